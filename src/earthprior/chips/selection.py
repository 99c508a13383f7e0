"""Which chips a run uses, as the stats stage left them, and the fixed views of them that judging needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from earthprior import handover
from earthprior.chips.augment import augment
from earthprior.chips.batch import Batch, prepare
from earthprior.chips.catalog import USAGES, ChipRow, load_catalog
from earthprior.chips.crops import centre_crop, grid_crops
from earthprior.chips.loader import load_batches
from earthprior.chips.normalize import Affine, Normalizer
from earthprior.chips.read import ChipSpec
from earthprior.errors import DataError, EarthPriorError
from earthprior.files import sha256_file
from earthprior.params import AS_THEY_ARE, Params
from earthprior.randomness import numpy_generator, torch_generator

LINEAR_CROPS = 512
"""Crops that the linear denoiser is fitted on at least: on 256 it is 0.2 % off, on 64 already 2 %."""

JUDGED_CHIPS = 512
"""Chips that a validation or an evaluation looks at, at most, evenly spread over the split: their pixels tell a gain to
a hundredth of a dB, and more would cost more than the training."""

VALIDATION_CROPS = 64
"""Crops that each validation looks at, at least: on fewer the gain of an epoch is mostly chance."""

LINEAR_CHIPS = 2048
"""Chips that it is fitted on at most: more would cost reading and gain nothing."""


@dataclass(frozen=True)
class Selection:
    """The chips of a run.

    Attributes:
        folder: What the catalog's paths are relative to.
        train, validate, test: Rows per usage, without those that the stats stage skipped.
    """

    folder: Path
    train: list[ChipRow]
    validate: list[ChipRow]
    test: list[ChipRow]


def read_stats(root: Path) -> tuple[dict[str, Any], str]:
    """What the stats stage wrote, and its SHA-256.

    Raises:
        EarthPriorError: It has not run, or its file is damaged.
    """
    path = root / "results/stats/stats.json"
    if not path.is_file():
        raise EarthPriorError("results/stats/stats.json is missing; run: dvc repro stats")
    return handover.read_stats(path), sha256_file(path)


def select(params: Params, root: Path, stats: Mapping[str, Any]) -> Selection:
    """The chips that the statistics were made of.

    Raises:
        DataError: The catalog is malformed, or not the one that stats.json was made from.
    """
    catalog = load_catalog(params.data, root)
    kept = catalog.without(stats["chips"]["skipped_lines"])
    if sha256_file(catalog.path) != stats["data"]["catalog_sha256"]:
        counts = [
            f"{usage} {then:,} -> {now:,}"
            for usage in USAGES
            if (then := stats["chips"][usage]) != (now := len(kept.split(usage)))
        ]
        what = f"chips: {', '.join(counts)}" if counts else "as many chips per split as before"
        raise DataError(
            f"{catalog.path.name} changed since results/stats/stats.json was made ({what}); run: dvc repro stats"
        )
    return Selection(catalog.dir, kept.split("train"), kept.split("validate"), kept.split("test"))


def spread(rows: Sequence[ChipRow], count: int) -> list[ChipRow]:
    """At most `count` rows, evenly spread over the list, in its order."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [rows[place] for place in places]


def chip_key(row: ChipRow) -> str:
    """What addresses a chip's own random draws: its paths, which no other chip has."""
    return "|".join(row.images)


def read_in_order(
    params: Params, folder: Path, rows: list[ChipRow], normalizer: Normalizer, device: torch.device, batch_size: int
) -> Iterator[tuple[Batch, list[ChipRow]]]:
    """Whole chips, normalized, in the catalog's order."""
    order = [list(range(first, min(first + batch_size, len(rows)))) for first in range(0, len(rows), batch_size)]
    spec = ChipSpec.from_params(params.data)
    for raw in load_batches(folder, rows, order, spec, readers=params.operation.readers):
        yield prepare(raw, normalizer, device), list(raw.rows)


def middle_crops(
    params: Params, folder: Path, rows: Sequence[ChipRow], count: int, normalizer: Normalizer, device: torch.device
) -> tuple[Batch, list[str]]:
    """The middle crops of some of the chips, evenly spread over the list, as one batch, with the chips' keys."""
    chosen = spread(rows, count)
    crops = [
        centre_crop(batch, params.data.train_px)
        for batch, _ in read_in_order(params, folder, chosen, normalizer, device, params.val_batch_size)
    ]
    affine = Affine(*(torch.cat([getattr(crop.affine, name) for crop in crops]) for name in ("offset", "scale")))
    batch = Batch(torch.cat([crop.x0 for crop in crops]), torch.cat([crop.valid for crop in crops]), affine)
    return batch, [chip_key(row) for row in chosen]


def validation_batches(
    params: Params, selection: Selection, normalizer: Normalizer, device: torch.device
) -> Iterator[tuple[Batch, list[str]]]:
    """Crops of every validation chip, the same ones each time, with the keys that address their noise.

    One crop a chip, at a place that the chip's path chooses; more where the chips are few, VALIDATION_CROPS in all.
    """
    rows = spread(selection.validate, JUDGED_CHIPS)
    per_chip = -(-VALIDATION_CROPS // len(rows))
    size = max(1, params.val_batch_size // per_chip)
    for batch, read in read_in_order(params, selection.folder, rows, normalizer, device, size):
        yield some_crops(batch, read, params.data.train_px, per_chip)


def some_crops(batch: Batch, rows: Sequence[ChipRow], px: int, per_chip: int) -> tuple[Batch, list[str]]:
    """Crops of every chip at places that the chip's path chooses, with a key each; fewer where they cover the chip."""
    crops = grid_crops(batch, px)
    places = len(crops) // len(batch)
    keys = [f"{chip_key(row)}#{place}" for row in rows for place in range(places)]
    chosen = [
        index * places + int(place)
        for index, row in enumerate(rows)
        for place in sorted(numpy_generator("validation crops", chip_key(row)).permutation(places)[:per_chip])
    ]
    return crops[torch.tensor(chosen, device=batch.x0.device)], [keys[index] for index in chosen]


def grid_batches(
    params: Params, folder: Path, rows: list[ChipRow], normalizer: Normalizer, device: torch.device
) -> Iterator[tuple[Batch, list[str], list[ChipRow]]]:
    """All crops of each chip, a chip at a time, with a key per crop and the chip's row."""
    for batch, read in read_in_order(params, folder, rows, normalizer, device, 1):
        crops = grid_crops(batch, params.data.train_px)
        yield crops, [f"{chip_key(read[0])}#{index}" for index in range(len(crops))], read


def linear_crops(params: Params, selection: Selection, normalizer: Normalizer) -> tuple[Iterator[Batch], bool]:
    """Crops to fit the linear denoiser on, and whether their spectra should be averaged over flips and turns.

    The draw is the same for every seed, so that the baseline is, too.
    """
    count = len(selection.train)
    picked = numpy_generator("linear chips").permutation(count)[:LINEAR_CHIPS]
    rows = [selection.train[index] for index in picked]
    # A chip seen whole is the same at every visit.
    per_chip = 1 if params.data.train_px == params.data.read_px else -(-LINEAR_CROPS // len(rows))
    small = count < LINEAR_CROPS // 2

    def crops() -> Iterator[Batch]:
        device = torch.device("cpu")
        for batch, read in read_in_order(params, selection.folder, rows, normalizer, device, 16):
            for visit in range(per_chip):
                generator = torch_generator("linear crops", chip_key(read[0]), visit)
                yield augment(batch, AS_THEY_ARE, params.data.crop_px, generator)

    return crops(), small
