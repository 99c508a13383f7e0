"""Chips read whole, whatever their sizes, and handed on some at a time; what cannot be read is told and left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from earthprior.chips.geotiff import LARGEST_CHIP_PX
from earthprior.chips.problems import ChipError, chip_error
from earthprior.chips.readers import alone, ordered_map
from earthprior.chips.scene import open_scene
from earthprior.prediction.inputs import Image


@dataclass(frozen=True)
class WholeChips:
    """Chips of one size and dtype.

    Attributes:
        images: The chips (B,).
        pixels: (B, C, H, W), physical values.
        valid: (B, H, W) bool.
    """

    images: list[Image]
    pixels: Tensor
    valid: Tensor


@dataclass(frozen=True)
class _Chip:
    image: Image
    pixels: NDArray[Any]
    valid: NDArray[np.bool_]
    note: str | None


def whole_chips(
    images: Iterable[Image],
    bands: Sequence[str],
    nodata: Sequence[float] | None,
    at_once: int,
    readers: int,
    failed: Callable[[Image, ChipError], None],
    noted: Callable[[str], None],
) -> Iterator[WholeChips]:
    """All chips in order, neighbours of one size and dtype together.

    Args:
        images: Taken from lazily.
        bands: As the model has them.
        nodata: Values that mark missing data, or None for the files' own.
        at_once: Chips in a batch, at most.
        readers: Threads.
        failed: Told of each chip that cannot be read.
        noted: Told how bands were chosen, where a person should know.
    """
    waiting: list[_Chip] = []
    read = partial(_read, bands=bands, nodata=nodata)
    for found in ordered_map(read, images, lambda image: image.files[0], readers):
        if isinstance(found, tuple):
            failed(*found)
            continue
        if found.note:
            noted(found.note)
        if waiting and (len(waiting) == at_once or not _alike(waiting[0], found)):
            yield _joined(waiting)
            waiting = []
        waiting.append(found)
    if waiting:
        yield _joined(waiting)


def warm_up(image: Image, bands: Sequence[str]) -> None:
    """The first use of GDAL's drivers in a process, which threads must not race for."""
    alone(image.files[0], _read, image, bands, None)


def _read(image: Image, bands: Sequence[str], nodata: Sequence[float] | None) -> _Chip | tuple[Image, ChipError]:
    try:
        with open_scene(image.folder, image.files, nodata, image.line) as scene:
            note = scene.choose(bands)
            height, width = scene.grid.height, scene.grid.width
            if max(height, width) > LARGEST_CHIP_PX:
                what = f"is a scene of {width:,} x {height:,} px, and one value is asked for each image"
                raise chip_error(image.files[0], image.line, what, "Cut it into chips first")
            return _Chip(image, *scene.read(0, 0, height, width), note)
    except ChipError as error:
        return image, error


def _alike(one: _Chip, other: _Chip) -> bool:
    return one.pixels.shape == other.pixels.shape and one.pixels.dtype == other.pixels.dtype


def _joined(chips: Sequence[_Chip]) -> WholeChips:
    pixels = torch.from_numpy(np.stack([chip.pixels for chip in chips]))
    return WholeChips([chip.image for chip in chips], pixels, torch.from_numpy(np.stack([c.valid for c in chips])))
