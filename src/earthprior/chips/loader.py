"""Raw batches of chips, read by threads into a ring of reused buffers while the device works.

Chips cross to the device in their files' dtype: uint16 is half of float32. Threads of this process cost less than
DataLoader workers (no transport between processes), and a fault in one is the chip's own error, at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from earthprior.chips.catalog import ChipRow
from earthprior.chips.problems import ChipError, chip_error
from earthprior.chips.read import ChipSpec, read_chip
from earthprior.chips.readers import Readers, alone

TORCH_DTYPES = {
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "int16": torch.int16,
    "float32": torch.float32,
    # No accelerator gains from the other 29 bits of mantissa.
    "float64": torch.float32,
}

Extra: TypeAlias = Callable[[ChipRow], NDArray[Any]]
"""What else is read of a chip, as its label: of all chips one shape and one dtype."""


@dataclass(frozen=True)
class RawBatch:
    """Chips as they are in their files.

    The tensors are views of a reused buffer: they stay as they are until the next batch is asked for.

    Attributes:
        pixels: (B, C, H, W) in the files' dtype (float64 as float32), physical units, 0 where invalid.
        valid: (B, H, W) bool, true where there is data.
        rows: The catalog rows, in the batch's order.
        extra: What else was asked for, by name, each with B entries; no views of the buffer.
    """

    pixels: Tensor
    valid: Tensor
    rows: list[ChipRow]
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


_Extras: TypeAlias = dict[str, NDArray[Any]]


class _Buffer:
    """Memory for one batch, grown when a batch is larger than any before it."""

    def __init__(self, chip_shape: tuple[int, int, int], dtype: torch.dtype, pin: bool) -> None:
        self._chip_shape, self._dtype, self._pin = chip_shape, dtype, pin
        self.reserve(0)

    def reserve(self, chips: int) -> None:
        """Make room for that many chips; what was there is lost."""
        self.pixels = torch.empty((chips, *self._chip_shape), dtype=self._dtype, pin_memory=self._pin and chips > 0)
        self.valid = torch.empty((chips, *self._chip_shape[1:]), dtype=torch.bool, pin_memory=self._pin and chips > 0)
        self.pixel_array: NDArray[Any] = self.pixels.numpy()
        self.valid_array: NDArray[np.bool_] = self.valid.numpy()


def load_batches(
    folder: Path,
    rows: Sequence[ChipRow],
    order: Iterable[Sequence[int]],
    spec: ChipSpec,
    readers: int = 4,
    ahead: int = 2,
    pin: bool = False,
    extra: Mapping[str, Extra] | None = None,
) -> Generator[RawBatch]:
    """Read chips in the order asked for.

    What comes out does not depend on `readers` or `ahead`. Closing the generator (also by leaving the loop that holds
    the only reference to it) stops the threads.

    Args:
        folder: The data folder.
        rows: The chips that `order` indexes.
        order: One sequence of row indices per batch; taken from lazily, `ahead` batches before they are asked for.
        spec: What every chip must be.
        readers: Threads.
        ahead: Batches read in advance.
        pin: Page-locked buffers, which CUDA copies from asynchronously.
        extra: What else is read of each chip, by name, by the same threads.

    Raises:
        ChipError: A chip cannot be read, or its dtype is not that of the first chip; it names file and catalog line.
        StorageError: A read hangs.
    """
    batches = iter(order)
    first = next(batches, None)
    if first is None:
        return
    # Beforehand: the dtype is needed.
    with _sound_before():
        sample, _ = alone(rows[first[0]].images[0], read_chip, folder, rows[first[0]], spec)
    free = deque(_Buffer(sample.shape, TORCH_DTYPES[sample.dtype.name], pin) for _ in range(ahead + 1))
    pending: deque[tuple[_Buffer, list[ChipRow], list[Future[_Extras]]]] = deque()
    more = extra or {}
    with Readers(readers) as pool:
        upcoming: Sequence[int] | None = first
        while True:
            while free and upcoming is not None:
                chips = [rows[index] for index in upcoming]
                pending.append((free[0], chips, _begin(pool, free.popleft(), folder, chips, spec, sample.dtype, more)))
                upcoming = next(batches, None)
            if not pending:
                return
            buffer, chips, futures = pending.popleft()
            with _sound_before():
                found = [pool.result(future) for future in futures]
            stacked = {name: torch.from_numpy(np.stack([each[name] for each in found])) for name in more}
            yield RawBatch(buffer.pixels[: len(chips)], buffer.valid[: len(chips)], chips, stacked)
            free.append(buffer)


@contextmanager
def _sound_before() -> Iterator[None]:
    """Says of a chip that fails that it has not always done so: the stage stats has read them all."""
    try:
        yield
    except ChipError as error:
        fix = (
            "It was sound when results/stats/ was made: restore the file (git checkout data.dvc && dvc pull data), and "
            "the same command continues; or train without it, which is another run: data.on_bad_chip: skip, then "
            "dvc repro"
        )
        raise ChipError(replace(error.problem, fix=fix)) from error


def _begin(
    pool: Readers,
    buffer: _Buffer,
    folder: Path,
    chips: Sequence[ChipRow],
    spec: ChipSpec,
    dtype: np.dtype[Any],
    extra: Mapping[str, Extra],
) -> list[Future[_Extras]]:
    """Let the threads fill a buffer, and bring what else is read."""
    if len(chips) > len(buffer.pixels):
        buffer.reserve(len(chips))

    def fill(slot: int) -> _Extras:
        row = chips[slot]
        # Read into fresh memory and copied: a chip of another dtype must not be converted in silence.
        pixels, valid = read_chip(folder, row, spec)
        if pixels.dtype != dtype:
            what = f"has dtype {pixels.dtype}, the chips before it {dtype}"
            raise chip_error(row.images[0], row.line, what, "Bring all chips to one dtype")
        buffer.pixel_array[slot] = pixels
        buffer.valid_array[slot] = valid
        return {name: read(row) for name, read in extra.items()}

    return [pool.submit(row.images[0], fill, slot) for slot, row in enumerate(chips)]
