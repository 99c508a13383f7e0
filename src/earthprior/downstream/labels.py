"""What a catalog's label column says of its chips: a map of classes, one class, or one number for each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from earthprior.chips.batch import UNLABELLED
from earthprior.chips.catalog import ChipRow
from earthprior.chips.content import is_tiff
from earthprior.chips.problems import chip_error
from earthprior.chips.read import ChipSpec, chip_header, read_label
from earthprior.downstream.budget import strata_by_class, strata_by_number, strata_by_pixels
from earthprior.errors import DataError
from earthprior.params import DownstreamParams
from earthprior.params.plain import shown
from earthprior.probe import MAX_CLASSES, choose_classes

Class: TypeAlias = int | str


@dataclass(frozen=True)
class Labels:
    """How a catalog's cells become targets.

    Attributes:
        task: segmentation, classification or regression.
        column: Of the catalog.
        classes: Raster values or cells, in the order of their numbers 0 .. K - 1; none for numbers.
        folder: What the catalog's paths are relative to.
        spec: What label rasters must fit.
    """

    task: str
    column: str
    classes: tuple[Class, ...]
    folder: Path
    spec: ChipSpec

    def read(self, row: ChipRow) -> NDArray[Any]:
        """A chip's target.

        Returns:
            Class numbers (H, W) int16, UNLABELLED where there is none; its class () int64, UNLABELLED for one that no
            train chip has; or its number () float32.

        Raises:
            ChipError: The label raster is missing, damaged, or does not fit the chip.
            DataError: The cell holds no number.
        """
        if self.task == "regression":
            return np.asarray(_number(row, self.column), np.float32)
        if self.task == "classification":
            cell = _class(row.values[self.column])
            return np.asarray(self.classes.index(cell) if cell in self.classes else UNLABELLED, np.int64)
        raster = read_label(self.folder, row, self.column, self.spec)
        if raster is None:
            raise chip_error(row.images[0], row.line, f"column {self.column!r} is empty", "Leave the chip out")
        return self.numbered(raster)

    def numbered(self, raster: NDArray[Any]) -> NDArray[np.int16]:
        """Class numbers (H, W) of a label raster (H, W)."""
        values = np.asarray(self.classes, np.float64)
        place = np.searchsorted(values, raster).clip(0, len(values) - 1)
        return np.where(values[place] == raster, place, UNLABELLED).astype(np.int16)


def find(params: DownstreamParams, folder: Path, train: Sequence[ChipRow]) -> tuple[Labels, list[ChipRow], list[Any]]:
    """The labels of a catalog, from all of its train chips.

    Args:
        params: Of the finetuning.
        folder: What the catalog's paths are relative to.
        train: Its train rows.

    Returns:
        The labels; the rows that have one; and of each the kind of chip it is, for `budget.choose`.

    Raises:
        DataError: There is no such column, or it holds something else than the task needs.
    """
    column = params.label_column
    rows = labelled(train, column)
    _check_cells(params, train, rows)
    spec = ChipSpec.from_params(params.data)
    if params.task == "segmentation":
        return _of_rasters(params, folder, rows, spec)
    if params.task == "regression":
        numbers = [_number(row, column) for row in rows]
        return Labels(params.task, column, (), folder, spec), rows, strata_by_number(numbers)
    cells = [_class(row.values[column]) for row in rows]
    classes = tuple(sorted(set(cells), key=lambda cell: (isinstance(cell, str), cell)))
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise DataError(
            f"column {column!r} has {len(classes)} different labels on train chips, such as "
            f"{shown(list(classes[:3]))}; a classification takes 2 to {MAX_CLASSES}. For numbers, set task: regression"
        )
    return Labels(params.task, column, classes, folder, spec), rows, strata_by_class(cells)


def judgeable(labels: Labels, rows: Sequence[ChipRow]) -> list[ChipRow]:
    """The rows that have a label which the train chips have, too: another class would be learned from nothing."""
    found = labelled(rows, labels.column)
    if labels.task != "classification":
        return found
    return [row for row in found if _class(row.values[labels.column]) in labels.classes]


def labelled(rows: Sequence[ChipRow], column: str) -> list[ChipRow]:
    """The rows whose cell is not empty."""
    return [row for row in rows if row.values.get(column)]


def _of_rasters(
    params: DownstreamParams, folder: Path, rows: list[ChipRow], spec: ChipSpec
) -> tuple[Labels, list[ChipRow], list[Any]]:
    column, counts = params.label_column, []
    ignored = {params.ignore_value}
    for row in rows:
        raster = read_label(folder, row, column, spec)
        assert raster is not None
        values, pixels = np.unique(raster[np.isfinite(raster)], return_counts=True)
        counts.append({float(v): int(n) for v, n in zip(values, pixels, strict=True) if float(v) not in ignored})
    nodata = chip_header(folder, rows[0].values[column], rows[0].line)[0].nodata[0]
    # One raster per value set: all that is asked is which values there are.
    kinds = [np.asarray(list(found), np.float64) for found in counts]
    classes, reason = choose_classes(kinds, nodata)
    if reason:
        raise DataError(f"column {column!r} cannot be learned: {reason}. Set label_column, task or ignore_value")
    table = np.asarray([[found.get(float(value), 0) for value in classes] for found in counts], np.float64)
    return Labels(params.task, column, tuple(classes), folder, spec), rows, strata_by_pixels(table)


def _check_cells(params: DownstreamParams, train: Sequence[ChipRow], rows: Sequence[ChipRow]) -> None:
    """Refuse a column that is not there, is empty, or is of another task."""
    column = params.label_column
    if train and column not in train[0].values:
        raise DataError(
            f"{params.data.catalog} has no column {column!r} (label_column in downstream/params.yaml); found "
            f"{shown(list(train[0].values))}"
        )
    if not rows:
        raise DataError(f"{params.data.catalog}: column {column!r} (label_column) is empty for all train chips")
    kinds = Counter(is_tiff(row.values[column]) for row in rows)
    wanted = params.task == "segmentation"
    if kinds[not wanted]:
        row = next(row for row in rows if is_tiff(row.values[column]) != wanted)
        needs = "paths of label rasters (.tif)" if wanted else "classes or numbers, not paths of rasters"
        other = "classification or regression" if wanted else "segmentation"
        raise DataError(
            f"{params.data.catalog} line {row.line}: column {column!r} holds {row.values[column][:60]!r}; task "
            f"{params.task} needs {needs}. Set task: {other}, or another label_column"
        )


def _class(cell: str) -> Class:
    """Whole numbers as numbers, so that they sort as such."""
    text = cell.strip()
    return int(text) if text.lstrip("-").isascii() and text.lstrip("-").isdigit() and len(text) < 16 else text


def _number(row: ChipRow, column: str) -> float:
    try:
        value = float(row.values[column])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"catalog line {row.line}: column {column!r} holds {row.values[column][:60]!r}, which is no finite number. "
            "Leave the cell empty where there is no label; or set task: classification"
        )
    return value


def facts(labels: Labels, rows: Sequence[ChipRow]) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """What training is balanced and scaled by: labelled pixels or chips per class (K,); mean and deviation of numbers.

    Args:
        labels: Of the catalog.
        rows: The chips that are trained on.
    """
    if labels.task == "regression":
        numbers = np.asarray([labels.read(row) for row in rows], np.float64)
        deviation = float(numbers.std())
        return np.zeros(0), (float(numbers.mean()), deviation if deviation > 0 else 1.0)
    counts = np.zeros(len(labels.classes))
    for row in rows:
        target = labels.read(row)
        known = target[target != UNLABELLED]
        counts += np.bincount(known.ravel(), minlength=len(labels.classes))
    return counts, (0.0, 1.0)


def balanced(counts: NDArray[np.float64]) -> list[float]:
    """Weights of the classes that make each count as much as any other, their mean over labels 1; 0 of absent ones."""
    present = counts > 0
    weights = np.where(present, counts.sum() / (present.sum() * np.where(present, counts, 1)), 0.0)
    return [float(weight) for weight in weights]
