"""Files that are complete or absent: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

UNFINISHED: set[Path] = set()
"""The temporary files that this process is writing."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on success it is synced and takes `path`'s place, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".tmp{path.suffix}", dir=path.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    os.close(descriptor)
    temporary = Path(name)
    UNFINISHED.add(temporary)
    try:
        yield temporary
        # mkstemp makes files private; results are meant to be shared like any other file.
        temporary.chmod(0o644)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # A write says that the disk is full, and not of what.
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        UNFINISHED.discard(temporary)
    _sync_folder(path.parent)


def remove_unfinished() -> None:
    """Remove the temporary files that are being written: for a process that ends without unwinding."""
    for temporary in list(UNFINISHED):
        with suppress(OSError):
            temporary.unlink()


def sweep(folder: Path) -> list[Path]:
    """Remove the temporary files that killed processes left in a folder, and name them; for who alone writes there."""
    stumps = list(folder.glob(".*.tmp*"))
    for stump in stumps:
        stump.unlink(missing_ok=True)
    return stumps


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to `path`, never leaving a partial file under that name."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def move_into(folder: Path, results: Path, names: Iterable[str]) -> None:
    """Move what was built aside to where it belongs, in place of what was there: files and folders.

    Args:
        folder: Where it was built; nothing else is left in it afterwards.
        results: Where it belongs; made when missing.
        names: Of all that was built.
    """
    results.mkdir(parents=True, exist_ok=True)
    for name in names:
        target = results / name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(folder / name, target)
    folder.rmdir()


def write_json(path: Path, content: Any) -> None:
    """Write JSON with sorted keys, so that equal content gives equal bytes.

    Raises:
        ValueError: A number is NaN or infinite, which JSON cannot hold.
    """
    write_atomic(path, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds something else, or is nested without end.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested without end") from None


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV without its index."""
    write_atomic(path, table.to_csv(index=False))


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: the folder's own entry must reach the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
