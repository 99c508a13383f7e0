"""The bytes of a chip's file: refused, and said what it is, before GDAL sees anything that is no TIFF."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from earthprior.chips.catalog import path_fault
from earthprior.chips.problems import ChipError, chip_error

NOT_FOUND = "not found"

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How TIFF and BigTIFF begin, in both byte orders."""

TIFF = (".tif", ".tiff")
"""How names of chips and label rasters end, in any case."""

_AGAIN = "Copy it again, or drop the row"
_CONVERT = "Convert it with gdal_translate, or drop the row"
_PULL = "Fetch the chips (dvc pull)"
# What is found under a chip's name instead of a TIFF: how it begins, what it is, and what to do.
_STRANGERS: tuple[tuple[str, str, str], ...] = (
    (r"version https://git-lfs", "is a Git LFS pointer, not the file itself", "Fetch the files: git lfs pull"),
    (r"(outs|md5|deps|wdir|desc):", "is a DVC pointer (.dvc), not the file itself", _PULL),
    (r"\s*<VRTDataset", "is a VRT, which only points to other files", _CONVERT),
    (r"\s*(<\?xml[^>]*>\s*)?<(GDAL_|WMS_|WMT_|Capabilities)", "is the description of a web service", _CONVERT),
    (r"\s*(<!doctype html|<html|<head|<body)", "is a web page, such as a download that failed leaves", _AGAIN),
    (r"\s*(<\?xml|<Error)", "is XML, such as a download that failed leaves", _AGAIN),
    (r"\s*[{\[]", "is JSON text", _AGAIN),
    (r"\x89PNG", "is a PNG", _CONVERT),
    (r"\xff\xd8\xff", "is a JPEG", _CONVERT),
    (r"GIF8", "is a GIF", _CONVERT),
    (r"RIFF....WEBP", "is a WebP", _CONVERT),
    (r"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "is a JPEG 2000", _CONVERT),
    (r"\x89HDF|CDF[\x01\x02\x05]", "is HDF5 or NetCDF", _CONVERT),
    (r"PK\x03\x04", "is a ZIP archive", "Unpack it, or drop the row"),
    (r"\x1f\x8b", "is compressed by gzip", "Unpack it, or drop the row"),
    (r"BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd", "is an archive", "Unpack it, or drop the row"),
    (r"\x93NUMPY", "is a NumPy array", _CONVERT),
    (r"\0{16}", "begins with zeros, as a copy that was cut off leaves", _AGAIN),
)

_LISTED = 20_000
"""Names of a folder that are looked through for one that differs in case only."""


def read_content(folder: Path, image: str, line: int, max_bytes: int, sha256: str = "") -> bytes:
    """The bytes of one file.

    Args:
        folder: The data folder.
        image: The file, relative to it.
        line: Its line in the catalog.
        max_bytes: What is larger is not read.
        sha256: What the bytes must hash to, in hex, or "" where that is not known.

    Raises:
        ChipError: The file is missing, no regular file, too large, empty, no TIFF, or not the one that was hashed.
    """
    path = _checked(folder, image, line)
    with _told(folder, image, line):
        size = path.stat().st_size
        if size > max_bytes:
            what = f"has {size / 2**20:,.0f} MiB, far more than a chip can need"
            raise chip_error(image, line, what, "Cut the scene into chips first", kind="is far too large")
        content = path.read_bytes()
    _check_begin(content, image, line)
    if sha256:
        _check_hash(content, image, line, sha256.lower())
    return content


def open_content(folder: Path, image: str, line: int) -> BinaryIO:
    """A file of any size, opened to be read in parts.

    Raises:
        ChipError: The file is missing, no regular file, empty, or no TIFF.
    """
    path = _checked(folder, image, line)
    with _told(folder, image, line):
        handle = path.open("rb")
    try:
        with _told(folder, image, line):
            _check_begin(handle.read(512), image, line)
            handle.seek(0)
    except BaseException:
        handle.close()
        raise
    return handle


def _checked(folder: Path, image: str, line: int) -> Path:
    """The path of what is a regular file."""
    fault = path_fault(image)
    if fault:
        raise chip_error(image[:100], line, f"the path {fault}", "Write paths relative to the data folder")
    path = folder / image
    with _told(folder, image, line):
        mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise chip_error(image, line, f"is {_node(mode)}, no regular file", "Point the row to a GeoTIFF")
    return path


def is_tiff(name: str) -> bool:
    """Whether a file's name, or a cell of a catalog, is that of a GeoTIFF."""
    return name.lower().endswith(TIFF)


@contextmanager
def _told(folder: Path, image: str, line: int) -> Iterator[None]:
    """What the file system says of a file, as the chip's own error."""
    try:
        yield
    except FileNotFoundError:
        raise _missing(folder, image, line) from None
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise chip_error(image, line, what, "Check the disk and the file's mode") from error


def _check_begin(content: bytes, image: str, line: int) -> None:
    """Whether a TIFF begins like this."""
    if not content:
        raise chip_error(image, line, "is empty (0 bytes)", _AGAIN)
    if not content.startswith(MAGIC):
        raise _stranger(content, image, line)


def _check_hash(content: bytes, image: str, line: int, expected: str) -> None:
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        what = f"is not the file that the catalog was written for: its SHA-256 is {actual}, the catalog says {expected}"
        fix = "Copy it again; if it was changed on purpose, write its hash anew (earthprior catalog DIR --force)"
        raise chip_error(image, line, what, fix, kind="the SHA-256 is not the catalog's")


def _stranger(content: bytes, image: str, line: int) -> ChipError:
    begin = content[:512].removeprefix(b"\xef\xbb\xbf").decode("latin-1")
    for pattern, what, fix in _STRANGERS:
        if re.match(pattern, begin, re.IGNORECASE | re.DOTALL):
            return chip_error(image, line, f"is not a GeoTIFF: it {what}", fix)
    if begin.isascii() and (begin.isprintable() or not re.search(r"[\x00-\x08\x0e-\x1f\x7f]", begin)):
        shown = " ".join(begin.split())[:40]
        kind = "is not a GeoTIFF: it is some text"
        return chip_error(image, line, f"is not a GeoTIFF: it is text that begins with {shown!r}", _AGAIN, kind=kind)
    # As ENVI and other raw formats are: pixels without a header.
    what = "is not a GeoTIFF: it begins with neither II nor MM (raw pixels, or another format?)"
    return chip_error(image, line, what, _CONVERT)


def under_dvc(folder: Path) -> bool:
    """Whether DVC tracks a data folder as a whole, and so can bring its files back."""
    return folder.with_name(f"{folder.name}.dvc").is_file()


def _missing(folder: Path, image: str, line: int) -> ChipError:
    path, name = folder / image, shlex.quote(folder.name)
    by_dvc = f" (git checkout {name}.dvc && dvc pull {name})" if under_dvc(folder) else ""
    restore = f"Restore the file{by_dvc}, or drop the row"
    if path.is_symlink():
        what = f"is a link to {path.readlink()}, which does not exist"
        return chip_error(image, line, what, restore, kind="is a link to what does not exist")
    near = _other_case(path)
    if near:
        return chip_error(
            image, line, f"{NOT_FOUND}, but {near} is there: the case differs", "Write the name as the file has it",
            kind="not found, but another case of the name is there",
        )  # fmt: skip
    return chip_error(image, line, NOT_FOUND, restore)


def _other_case(path: Path) -> str | None:
    return _names_by_lower_case(path.parent).get(path.name.lower())


@lru_cache(maxsize=8)
def _names_by_lower_case(folder: Path) -> dict[str, str]:
    """Names in a folder, if there are not too many; kept, for missing files come in hundreds."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in islice(entries, _LISTED + 1)]
    except OSError:
        return {}
    return {name.lower(): name for name in names} if len(names) <= _LISTED else {}


def _node(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "something else")
