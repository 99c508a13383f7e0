"""What something was made of, as one short text: where it is the same, it need not be made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def digest(facts: Mapping[str, Any]) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors and their names."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # As bytes, since NumPy has no bfloat16.
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class FilesDigest:
    """Of files, by their names, lengths and times: to read them all would take as long as to predict them."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, path: Path) -> None:
        """One more; what is wrong with it is told when it is opened."""
        try:
            status = path.stat()
            told = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            told = "is not there"
        self._hash.update(f"{path.name} {told}\n".encode(errors="surrogateescape"))

    def value(self) -> str:
        """Of all so far."""
        return self._hash.hexdigest()


def files_digest(paths: Iterable[Path]) -> str:
    """Of some files, see `FilesDigest`."""
    found = FilesDigest()
    for path in paths:
        found.add(path)
    return found.value()
