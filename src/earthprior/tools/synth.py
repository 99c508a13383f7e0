"""`earthprior synth`: write a catalog of procedural chips with land-cover labels.

The folder can be used as `data/` as it stands:

    catalog.csv             image,label,usage,region,crs,x,y    (x, y: centre of the chip in metres of its crs)
    chips/synth_000000.tif  red, green, blue, nir; uint16 reflectance x 10,000; nodata 0 (in all bands at once)
    labels/synth_000000.tif 1 water, 2 cropland, 3 forest and trees, 4 built-up and roads, 5 grass and shrubs,
                            6 bare soil and sand, 7 cloud; 0 only where the chip has no data

Chips are made in parallel by processes that are spawned, never forked (GDAL and BLAS keep threads). A stopped run goes
on where it stopped when the same command is given again: every file is complete or absent, and the catalog comes last.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from earthprior.chips.landscapes.placement import PIXEL_M, place, region_size, usages
from earthprior.chips.landscapes.spectra import BANDS
from earthprior.chips.landscapes.synth import VERSION, synth_chip
from earthprior.chips.write import write_chip
from earthprior.errors import DataError, EarthPriorError, StorageError
from earthprior.files import read_json, write_csv, write_json

MARKER = ".synth.json"
CHUNK = 8
BYTES_PER_PIXEL = 4.2  # measured: 4 bands and label, compressed


def run(
    out: Path,
    n: int,
    seed: int,
    workers: int,
    validate_fraction: float = 0.2,
    size: int = 224,
    force: bool = False,
) -> None:
    """Write `n` chips, their labels and the catalog to `out`.

    The same arguments give the same files, whatever the number of workers; after an interruption they continue. Chip i
    depends on `seed`, i and `size` only.

    Args:
        out: Folder to fill; new, empty, or left by a stopped run with the same arguments.
        n: Number of chips, at least 2.
        seed: Seed of the set, at least 0.
        workers: Number of processes; 1 works in this one.
        validate_fraction: Share of chips for validation, in (0, 1); whole regions are taken, so it is met nearly.
        size: Side of the chips in px, at least 16.
        force: Replace an earlier set in `out`; other files there stay.

    Raises:
        DataError: An argument makes no sense, or `out` holds something else.
        StorageError: The disk is full or failing.
    """
    _check_arguments(out, n, seed, workers, validate_fraction, size)
    settings = {
        "version": VERSION, "n": n, "seed": seed, "validate_fraction": validate_fraction, "size": size,
    }  # fmt: skip
    try:
        _prepare(out, settings, force)
        missing = [i for i in range(n) if not all(path.exists() for path in _paths(out, i))]
        _check_space(out, len(missing), size)
        with tqdm(total=n, initial=n - len(missing), unit="chip", file=sys.stderr, disable=None) as bar:
            for count in _make(out, missing, seed, size, workers):
                bar.update(count)
        write_csv(out / "catalog.csv", _catalog(n, seed, validate_fraction, size))
        (out / MARKER).unlink()
    except BrokenProcessPool:
        raise EarthPriorError(
            f"a worker process died while writing to {out}, most likely for want of memory; "
            "the same command with fewer workers continues"
        ) from None
    except OSError as error:
        raise StorageError(f"cannot write the chips: {error}; mend this, and the same command continues") from error


def _check_arguments(out: Path, n: int, seed: int, workers: int, validate_fraction: float, size: int) -> None:
    problems = []
    if n < 2:
        problems.append(f"n is {n}, but a set needs at least 2 chips, one to train and one to validate")
    if seed < 0:
        problems.append(f"seed is {seed}; it must be 0 or more")
    if workers < 1:
        problems.append(f"workers is {workers}; it must be 1 or more")
    if not 0 < validate_fraction < 1:
        problems.append(f"validate_fraction is {validate_fraction}; it must lie between 0 and 1, such as 0.2")
    if size < 16:
        problems.append(f"size is {size} px; it must be 16 or more")
    if out.exists() and not out.is_dir():
        problems.append(f"{out} is a file; name a folder")
    if problems:
        raise DataError("synth: " + "; ".join(problems))
    place(seed, n - 1, size)  # raises if so many do not fit on the ground


def _prepare(out: Path, settings: dict[str, Any], force: bool) -> None:
    """Make `out` ours: empty, or left by a stopped run with the same settings."""
    marker = out / MARKER
    if force:
        _remove_set(out)
    elif marker.exists():
        try:
            begun = dict(read_json(marker))
        except (OSError, TypeError, ValueError):
            begun = {}  # cut short by whatever stopped the run; nothing of its settings is sure
        pairs = [(key, begun.get(key), value) for key, value in settings.items()]
        differing = [f"{key} {before} there, {now} now" for key, before, now in pairs if before != now]
        if differing:
            raise DataError(
                f"{out} holds an unfinished set with other settings ({'; '.join(differing)}); "
                "give the old settings to continue it, --force to replace it, or another folder"
            )
    elif out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty; name a new folder, or give --force to replace an earlier set there")
    write_json(marker, settings)
    for leftover in _ours(out, ".synth_*.tmp*"):  # of workers that were killed
        leftover.unlink()


def _remove_set(out: Path) -> None:
    (out / "catalog.csv").unlink(missing_ok=True)
    for path in _ours(out, "synth_*.tif"):
        path.unlink()


def _ours(out: Path, pattern: str) -> list[Path]:
    return [path for folder in ("chips", "labels") for path in (out / folder).glob(pattern)]


def _paths(out: Path, index: int) -> tuple[Path, Path]:
    name = f"synth_{index:06d}.tif"
    return out / "chips" / name, out / "labels" / name


def _check_space(out: Path, chips: int, size: int) -> None:
    needed, free = int(chips * BYTES_PER_PIXEL * size**2), shutil.disk_usage(out).free
    if needed > free:
        raise StorageError(
            f"{out}: {chips:,} chips take about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; "
            "choose fewer chips or another disk"
        )


def _make(out: Path, indices: list[int], seed: int, size: int, workers: int) -> Iterator[int]:
    """Make the chips, yielding how many were finished each time."""
    chunks = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
    if workers == 1:
        for chunk in chunks:
            yield _make_chunk(out, chunk, seed, size)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, max(len(chunks), 1)), mp_context=context, initializer=_start_worker)
    try:
        for future in as_completed([pool.submit(_make_chunk, out, chunk, seed, size) for chunk in chunks]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent ends, however that happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _make_chunk(out: Path, indices: list[int], seed: int, size: int) -> int:
    # Writing waits for the disk (10 ms a file, to survive a power cut), so the next chips are made meanwhile.
    with ThreadPoolExecutor(2) as writers:
        writes = []
        for index in indices:
            image, label = _paths(out, index)
            pixels, classes, _ = synth_chip(seed, index, size)
            where = place(seed, index, size)
            corner = (where.left_m, where.top_m)
            ground = (where.crs, corner, PIXEL_M)
            writes.append(writers.submit(write_chip, label, classes[None], *ground, ("land cover",), 0))
            writes.append(writers.submit(write_chip, image, pixels, *ground, BANDS, 0))
        for write in writes:
            write.result()
    return len(indices)


def _catalog(n: int, seed: int, validate_fraction: float, size: int) -> pd.DataFrame:
    side = region_size(n, validate_fraction)
    rows = []
    for index, usage in enumerate(usages(seed, n, validate_fraction)):
        image, label = _paths(Path(), index)
        where = place(seed, index, size)
        x, y = where.centre_m(size)
        region = f"region_{index // side:05d}"
        rows.append((image.as_posix(), label.as_posix(), usage, region, where.crs, round(x, 2), round(y, 2)))
    return pd.DataFrame(rows, columns=["image", "label", "usage", "region", "crs", "x", "y"])
