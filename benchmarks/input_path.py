"""How many chips per second does the input path deliver, and how many would the plain way?

    PYTHONPATH=src python benchmarks/input_path.py [--data DIR] [--chips 320] [--batch 40] [--rounds 3]

Without --data, synthetic chips (4 bands, 224 px, uint16) are written to a temporary folder; a data folder of one's own
needs a catalog.csv with a column `image` and chips of one size. All ways read the same files in the same shuffled order
from a warm page cache, taking turns; medians over the rounds. "cpu-ms" is processor time per chip, children included,
which neighbours on the machine disturb least. Every way ends with a float32 tensor normalized per chip, but the one
marked raw, which is what a GPU is sent: it normalizes there.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from earthprior.chips.batch import prepare
from earthprior.chips.catalog import ChipRow
from earthprior.chips.loader import load_batches
from earthprior.chips.normalize import Normalizer
from earthprior.chips.read import ChipSpec
from earthprior.params import NormalizationParams
from earthprior.tools import synth


class PlainDataset(Dataset[Tensor]):
    """A chip as one would first write it: open, read, normalize in float64."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with rasterio.open(self.paths[index]) as source:
            pixels = source.read().astype(np.float64)
        return torch.from_numpy(normalized(pixels).astype(np.float32))


def normalized(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Min-max over the chip."""
    return (pixels - pixels.min()) / max(pixels.max() - pixels.min(), 1e-9)


def main() -> None:
    """Measure and print."""
    options = arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary) / "chips"
        if options.data is None:
            synth.run(folder, options.chips, seed=0, workers=2)
        rows = chips_of(folder, options.chips)
        ways = all_ways(folder, rows, options.batch)
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for number in range(options.rounds + 1):
            for name, way in ways.items():
                measured = measure(way(), len(rows))
                # The first round fills the page cache.
                if number:
                    results[name].append(measured)
    report(results, len(rows), options.rounds)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Chips per second of the input path.")
    parser.add_argument("--data", type=Path, help="folder with catalog.csv and chips")
    parser.add_argument("--chips", type=int, default=320)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def chips_of(folder: Path, count: int) -> list[ChipRow]:
    """The first chips of a catalog, in a fixed shuffled order."""
    with (folder / "catalog.csv").open(newline="") as handle:
        images = [row["image"] for row in csv.DictReader(handle)][:count]
    order = np.random.default_rng(0).permutation(len(images))
    return [ChipRow(int(index) + 2, "train", (images[index],), {}) for index in order]


def all_ways(folder: Path, rows: list[ChipRow], batch: int) -> dict[str, Callable[[], Iterable[Any]]]:
    """The contestants: each call gives an iterable of batches."""
    paths = [folder / row.images[0] for row in rows]
    with rasterio.open(paths[0]) as source:
        spec = ChipSpec(tuple(f"b{number}" for number in range(source.count)), source.width, 0, None)
    order = [range(start, min(start + batch, len(rows))) for start in range(0, len(rows), batch)]
    params = NormalizationParams(
        apply_normalization=True, normal_strategy="min_max", stat_procedure="lab", clip_percent=0.0, clip_val=None
    )
    normalizer = Normalizer(params, {"bands": [], "per_band": {}, "all_bands": {}})
    device = torch.device("cpu")

    def ours(readers: int) -> Iterable[Any]:
        return load_batches(folder, rows, order, spec, readers=readers)

    def ours_normalized(readers: int) -> Iterator[Any]:
        for raw in ours(readers):
            yield prepare(raw, normalizer, device).x0

    plain = PlainDataset(paths)
    return {
        "plain, one thread": lambda: (torch.stack([plain[index] for index in indices]) for indices in order),
        "plain, DataLoader, 2 workers": lambda: DataLoader(plain, batch, num_workers=2),
        "ours, 1 reader": lambda: ours_normalized(1),
        "ours, 2 readers": lambda: ours_normalized(2),
        "ours, 4 readers": lambda: ours_normalized(4),
        "ours, 1 reader, raw": lambda: ours(1),
        "ours, 2 readers, raw": lambda: ours(2),
        "ours, 4 readers, raw": lambda: ours(4),
    }


def measure(batches: Iterable[Any], chips: int) -> tuple[float, float]:
    """(chips/s, cpu-ms per chip) of one pass."""
    before, start = os.times(), time.perf_counter()
    for _ in batches:
        pass
    wall, after = time.perf_counter() - start, os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    return chips / wall, 1000 * cpu / chips


def report(results: dict[str, list[tuple[float, float]]], chips: int, rounds: int) -> None:
    """A table of medians, and the ratio to the first way."""
    print(f"{chips} chips, {rounds} rounds, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'way':32}{'chips/s':>9}{'ratio':>7}{'cpu-ms':>8}{'ratio':>7}")
    medians = {
        name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in results.items()
    }
    first = next(iter(medians.values()))
    for name, (speed, cpu) in medians.items():
        print(f"{name:32}{speed:9.0f}{speed / first[0]:7.2f}{cpu:8.2f}{first[1] / cpu:7.2f}")


if __name__ == "__main__":
    main()
