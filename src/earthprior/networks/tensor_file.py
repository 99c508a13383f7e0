"""Weights that somebody else saved, as .safetensors or by torch.save: read as plain tensors, never running code."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

CONTAINERS = ("state_dict", "model_state_dict", "model", "network", "net")
"""Under which keys training scripts put the weights beside other things."""


class TensorFileError(Exception):
    """Why a file gives no weights: what follows its name in a message."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a state_dict by name, dense and on the CPU, each of floating point or a count of batches.

    Args:
        path: A .safetensors file; any other one is taken for torch.save's, old or new.

    Raises:
        OSError: The file cannot be opened.
        TensorFileError: It is damaged, or holds something else.
    """
    content = _content(path)
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = [content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping) or not content:
        raise TensorFileError("is no state_dict: it holds no tensors by name")
    for name, tensor in content.items():
        if fault := _fault(str(name), tensor):
            raise TensorFileError(f"is no state_dict: the entry {name} {fault}")
    return {str(name): tensor.detach() for name, tensor in content.items()}


def mismatches(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Why tensors do not fill a network, a phrase per name; none where they do.

    Args:
        wanted: The network's own, by name.
        found: Those to be put into it.
    """
    faults = [f"missing: {name} {tuple(wanted[name].shape)}" for name in wanted if name not in found]
    faults += [f"unexpected: {name} {tuple(found[name].shape)}" for name in found if name not in wanted]
    return faults + [
        f"{name}: {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]


def listed(faults: Sequence[str], shown: int = 5) -> str:
    """The first of them on one line, and how many more there are."""
    more = f"; and {len(faults) - shown} more" if len(faults) > shown else ""
    return "; ".join(faults[:shown]) + more


def _content(path: Path) -> Any:
    # A file that cannot be opened is none that is damaged.
    with path.open("rb") as handle:
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            # torch.save compresses nothing: what is compressed may be a thousand times as large as it looks.
            if zipfile.is_zipfile(handle) and any(entry.compress_type for entry in zipfile.ZipFile(handle).infolist()):
                raise TensorFileError("is compressed, which torch.save never does")
            handle.seek(0)
            # Only with weights_only does reading not mean running what the file says.
            return torch.load(handle, map_location="cpu", weights_only=True)
        except TensorFileError:
            raise
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            # Not torch's own words: they advise to load it all the same.
            what = f"names {named[1]}" if named else "is damaged, or holds something else than tensors"
            raise TensorFileError(f"{what}, and was not loaded, because that could run code from the file") from None
        except Exception:  # noqa: BLE001 - a damaged file makes torch raise whatever it likes
            raise TensorFileError("is damaged, or holds something else than tensors") from None


def _fault(name: str, tensor: Any) -> str | None:
    if not isinstance(tensor, Tensor):
        return "is no tensor"
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type != "cpu":
        return "is no plain tensor but a sparse, quantized or nested one, or one without its values"
    counts = name.endswith("num_batches_tracked") and not tensor.is_complex() and tensor.dtype != torch.bool
    if not tensor.is_floating_point() and not counts:
        return f"holds {str(tensor.dtype).removeprefix('torch.')} values, not floating point"
    return None if tensor.numel() else "has no values"
