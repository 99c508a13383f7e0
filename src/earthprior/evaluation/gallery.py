"""Features in pictures, for which no labels are needed: maps in false colours, and the nearest neighbours of chips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from earthprior.chips.batch import Batch
from earthprior.chips.catalog import ChipRow
from earthprior.chips.geotiff import Header, chip_header
from earthprior.chips.normalize import denormalize
from earthprior.chips.selection import spread
from earthprior.evaluation.labelled import Material
from earthprior.evaluation.serving import Serving
from earthprior.figures import FeatureMap, Shown
from earthprior.figures.style import file_title
from earthprior.representations import FrozenFeatures, PooledFeatures
from earthprior.tasks.diffusion import DiffusionTask

Array: TypeAlias = NDArray[Any]

CROPS_AT_ONCE = 16
MAPPED, MAP_PX, FITTED = 5, 128, 8000
"""Chips that are mapped, the largest width of a map, and pixels that colours are made from, at most."""

MAP_VALUES = 32_000_000
"""Numbers in memory: wide networks have coarser maps (128 MB as float32)."""

EMBEDDED = {"train": 192, "validate": 64}
"""Chips that neighbours are looked for among."""

CHIP_CROPS, ASKED, NEAREST = 4, 5, 5
SAME_GROUND = 0.001
"""Share of a chip's side that it must share with another one to show the same place: less is a rounded coordinate."""


@dataclass(frozen=True)
class Gallery:
    """What the pictures show.

    Args:
        maps: Chips with their maps by network.
        neighbours: Per asked chip a row: the chip, and its nearest ones.
        note: What is to be known of the neighbours.
    """

    maps: Sequence[FeatureMap]
    neighbours: Sequence[Sequence[Shown]]
    note: str


def gallery(material: Material, tasks: Mapping[str, DiffusionTask], serving: Serving) -> Gallery:
    """Maps and neighbours of validation chips.

    Args:
        material: What chips are read with.
        tasks: Networks by name, in evaluation mode, on the device; neighbours are those of "network".
        serving: Where features are taken.
    """
    rows, note = _neighbours(material, tasks["network"], serving)
    return Gallery(_maps(material, tasks, serving), rows, note)


def _maps(material: Material, tasks: Mapping[str, DiffusionTask], serving: Serving) -> list[FeatureMap]:
    rows = spread(material.selection.validate, MAPPED)
    chips = [(row, batch[index : index + 1]) for batch, read in material.read(rows) for index, row in enumerate(read)]
    colours = {name: _coloured(material, task, serving, chips) for name, task in tasks.items()}
    return [
        FeatureMap(row.images[0], *_physical(batch), {name: maps[place] for name, maps in colours.items()})
        for place, (row, batch) in enumerate(chips)
    ]


def _coloured(
    material: Material, task: DiffusionTask, serving: Serving, chips: Sequence[tuple[ChipRow, Batch]]
) -> list[Array]:
    """Per chip (h, w, 3) in [0, 1]: three principal components that all chips share."""
    represent = FrozenFeatures(serving.features(task), material.params.data.train_px, CROPS_AT_ONCE)
    every = task.widths
    most = MAP_VALUES // (len(chips) * sum(every[level] for level in serving.levels))
    values, valids, shapes = [], [], []
    for _, batch in chips:
        size = batch.x0.shape[-2:]
        step = _step(size, most)
        rows, columns = (torch.arange(step // 2, length, step) for length in size)
        values.append(represent(batch, [torch.cartesian_prod(rows, columns)])[0].numpy())
        valids.append(batch.valid[0, 0].cpu()[rows][:, columns].flatten().numpy())
        shapes.append((len(rows), len(columns), 3))
    known = np.concatenate([part[valid] for part, valid in zip(values, valids, strict=True)])
    if not len(known):
        return [np.ones(shape) for shape in shapes]
    components = Components.of(known[:: -(-len(known) // FITTED)])
    return [components.colours(part).reshape(shape) for part, shape in zip(values, shapes, strict=True)]


def _step(size: Sequence[int], most: int) -> int:
    """Every so many pixels of a chip, so that a map is at most MAP_PX wide and has at most so many pixels."""
    step = -(-max(size) // MAP_PX)
    while step < max(size) and -(-size[0] // step) * -(-size[1] // step) > most:
        step += 1
    return step


@dataclass(frozen=True)
class Components:
    """The three main components of standardized features, and the range of each that is shown.

    Args:
        mean: (D,).
        scale: (D,).
        axes: (D, 3); of each the largest weight is positive, so that colours do not flip from run to run.
        low: (3,), shown as black.
        high: (3,), shown as full colour.
    """

    mean: Array
    scale: Array
    axes: Array
    low: Array
    high: Array

    @classmethod
    def of(cls, values: Array) -> Components:
        """Of features (N, D)."""
        values = values.astype(np.float64)
        mean, scale = values.mean(0), values.std(0)
        scale = np.where(scale > 1e-12, scale, 1.0)
        standard = (values - mean) / scale
        _, vectors = np.linalg.eigh(standard.T @ standard)
        axes = vectors[:, ::-1][:, :3]
        axes = axes * np.where(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])] < 0, -1, 1)
        axes = np.pad(axes, ((0, 0), (0, 3 - axes.shape[1])))
        low, high = np.percentile(standard @ axes, [2, 98], axis=0)
        return cls(mean, scale, axes, low, np.where(high > low, high, low + 1))

    def colours(self, values: Array) -> Array:
        """(N, 3) in [0, 1] of features (N, D)."""
        found: Array = ((values - self.mean) / self.scale @ self.axes - self.low) / (self.high - self.low)
        return found.clip(0, 1)


def _neighbours(material: Material, task: DiffusionTask, serving: Serving) -> tuple[list[list[Shown]], str]:
    """Rows of chips, and what is to be known of them."""
    selection = material.selection
    asked = spread(selection.validate, ASKED)
    pool = spread(selection.train, EMBEDDED["train"]) + spread(selection.validate, EMBEDDED["validate"])
    lines = {row.line for row in pool}
    pool += [row for row in asked if row.line not in lines]
    represent = PooledFeatures(serving.features(task), material.params.data.train_px, CROPS_AT_ONCE, CHIP_CROPS)
    features = np.concatenate([represent(batch).numpy() for batch, _ in material.read(pool)])
    headers = [chip_header(selection.folder, row.images[0], row.line)[0] for row in pool]
    alike = similarity(features)
    found, first = [], 0
    for row in asked:
        own = next(place for place, other in enumerate(pool) if other.line == row.line)
        near = [int(place) for place in np.argsort(-alike[own], kind="stable") if place != own]
        same = [overlap(headers[own], headers[place]) for place in near]
        first += bool(same and same[0])
        elsewhere = [place for place, here in zip(near, same, strict=True) if not here]
        here = [place for place, shared in zip(near, same, strict=True) if shared]
        taken = (elsewhere + here)[:NEAREST]
        marks = dict.fromkeys(here, ", same place")
        found.append(
            [(row, "asked")] + [(pool[place], f"{alike[own, place]:.2f}{marks.get(place, '')}") for place in taken]
        )
    note = f"Framed: a validation chip. Beside it the {NEAREST} nearest of {len(pool)} training and validation chips"
    note += ", with the cosine of their pooled, standardized features."
    if any(header.bounds is None for header in headers):
        note += " Where chips lie is not known, so a neighbour may show the same place."
    elif first:
        note += f" Chips of the same place are left out while there are others; of {first} of {len(asked)} asked chips "
        note += "one would be the nearest."
    return _read(material, found), note


def similarity(features: Array) -> Array:
    """Cosine (N, N) of features (N, D), standardized over the N."""
    wide = features.astype(np.float64)
    scale = wide.std(0)
    standard = (wide - wide.mean(0)) / np.where(scale > 1e-12, scale, 1.0)
    unit = standard / np.linalg.norm(standard, axis=1, keepdims=True).clip(min=1e-12)
    found: Array = unit @ unit.T
    return found


def overlap(one: Header, other: Header) -> bool:
    """Whether two chips share ground; False where it is not known, or in different CRSs."""
    if one.bounds is None or other.bounds is None or one.crs != other.crs:
        return False
    reach = SAME_GROUND * min(abs(one.bounds[2] - one.bounds[0]), abs(one.bounds[3] - one.bounds[1]))
    across = min(one.bounds[2], other.bounds[2]) - max(one.bounds[0], other.bounds[0])
    along = min(one.bounds[3], other.bounds[3]) - max(one.bounds[1], other.bounds[1])
    return across > reach and along > reach


def _read(material: Material, rows: Sequence[Sequence[tuple[ChipRow, str]]]) -> list[list[Shown]]:
    """The chips themselves, each read once."""
    wanted = list({row.line: row for group in rows for row, _ in group}.values())
    pictures: dict[int, tuple[Array, Array]] = {}
    for batch, read in material.read(wanted):
        pictures |= {row.line: _physical(batch[index : index + 1]) for index, row in enumerate(read)}
    named = {row.line: file_title(row.images[0]) for group in rows for row, _ in group}
    return [
        [
            Shown(named[row.line] if place == 0 else f"{named[row.line]}  {mark}", *pictures[row.line])
            for place, (row, mark) in enumerate(group)
        ]
        for group in rows
    ]


def _physical(batch: Batch) -> tuple[Array, Array]:
    """The one chip of a batch (C, H, W) in physical values, and its mask (H, W)."""
    return denormalize(batch.x0, batch.affine)[0].cpu().numpy(), batch.valid[0, 0].cpu().numpy()
