"""Labels of whole images in a column of the catalog: classes, or numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from earthprior.chips.catalog import ChipRow
from earthprior.chips.content import is_tiff
from earthprior.chips.selection import chip_key
from earthprior.evaluation.labelled import Material
from earthprior.probe import MAX_CLASSES
from earthprior.probe_models import Probe
from earthprior.randomness import seed_of
from earthprior.representations import ChipRepresentation

Array: TypeAlias = NDArray[Any]

MAX_NUMBERED_CLASSES = 20
"""Whole numbers of more different values than this are measured, not numbers of classes."""

MAX_CHIPS = 512
"""Per split: their features are in memory, and computed."""


@dataclass(frozen=True)
class Images:
    """Chips of one split, with their truths (N,): places of the classes, or numbers; `left_out` have none of use."""

    rows: list[ChipRow]
    truths: Array
    left_out: int

    def represented(self, material: Material, represent: ChipRepresentation) -> Array:
        """A representation of the chips, (N, D) float32."""
        found = [represent(batch).numpy() for batch, _ in material.read(self.rows)]
        return np.concatenate(found) if found else np.zeros((0, 0), np.float32)


@dataclass(frozen=True)
class ImageSplits:
    """What a probe needs.

    Args:
        kind: classification, or regression.
        classes: The cells' texts, sorted; empty for numbers.
        fit: Training chips.
        choose: Validation chips, which features are chosen by.
        judged: The judged chips.
    """

    kind: str
    classes: list[str]
    fit: Images
    choose: Images
    judged: Images


def read_images(material: Material, judged: Sequence[ChipRow]) -> ImageSplits | str:
    """The chips by `evaluate.image_label_column`, or why there are none.

    Numbers of which one has a fraction, or that have more than 20 different values, are numbers (regression);
    everything else is the name of a class.
    """
    selection, column = material.selection, material.params.evaluate.image_label_column
    if column is None:
        return "no column holds labels of whole images (evaluate.image_label_column)"
    splits = (selection.train, selection.validate, judged)
    if all(column not in row.values for rows in splits for row in rows[:1]):
        return f"the catalog has no column {column!r} (evaluate.image_label_column)"
    cells = [row.values[column].strip() for rows in splits for row in rows]
    filled = [cell for cell in cells if cell]
    if not filled:
        return f"every cell of the catalog's column {column!r} is empty"
    if any(is_tiff(cell) for cell in filled):
        return f"column {column!r} holds paths of label rasters, which belong into evaluate.label_column"
    numbers = [_number(cell) for cell in filled]
    if all(math.isfinite(number) for number in numbers) and (
        len(set(numbers)) > MAX_NUMBERED_CLASSES or any(number != round(number) for number in numbers)
    ):
        return ImageSplits("regression", [], *(_images(rows, column, None) for rows in splits))
    classes = sorted({cell for row in selection.train if (cell := row.values[column].strip())})
    if not 2 <= len(classes) <= MAX_CLASSES:
        return (
            f"column {column!r} has {len(classes)} classes in the training chips, and a probe needs 2 to {MAX_CLASSES}"
        )
    if not any(row.values[column].strip() in classes for row in judged):
        return f"no judged chip has a class of column {column!r} that a training chip has, too"
    return ImageSplits("classification", classes, *(_images(rows, column, classes) for rows in splits))


def answers(probe: Probe, splits: ImageSplits, truths: Array, values: Array, asked: Array) -> tuple[Array, bool]:
    """What a probe says of the asked chips.

    Args:
        probe: One of `IMAGE_PROBES[splits.kind]`.
        splits: Whose labels.
        truths: (N,), of the chips that it is fitted on.
        values: (N, D), these chips.
        asked: (M, D), others.

    Returns:
        Probabilities (M, K) of all classes, 0 for one that no fitted chip has, or numbers (M,); and whether the fit
        converged.
    """
    if splits.kind == "regression":
        return probe(values, truths, asked)
    known, places = np.unique(truths, return_inverse=True)
    found, converged = probe(values, places, asked)
    probabilities = np.zeros((len(found), len(splits.classes)))
    probabilities[:, known] = found
    return probabilities, converged


def _images(rows: Sequence[ChipRow], column: str, classes: Sequence[str] | None) -> Images:
    """The chips whose cell is of use, an even choice by their paths where they are many."""
    usable = [row for row in rows if (cell := row.values[column].strip()) and (classes is None or cell in classes)]
    chosen = sorted(usable, key=lambda row: seed_of("probe images", chip_key(row)))[:MAX_CHIPS]
    cells = [row.values[column].strip() for row in chosen]
    truths = [_number(cell) if classes is None else classes.index(cell) for cell in cells]
    dtype = np.float64 if classes is None else np.int64
    return Images(chosen, np.asarray(truths, dtype), len(rows) - len(usable))


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan
