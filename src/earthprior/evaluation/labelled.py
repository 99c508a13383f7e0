"""The labelled chips of a catalog: which ones, and their label rasters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from earthprior.chips.batch import Batch
from earthprior.chips.catalog import ChipRow
from earthprior.chips.content import is_tiff
from earthprior.chips.normalize import Normalizer
from earthprior.chips.problems import ChipError
from earthprior.chips.read import ChipSpec, chip_header, read_label
from earthprior.chips.selection import Selection, chip_key, read_in_order
from earthprior.params import Params
from earthprior.probe import Labels, choose_classes
from earthprior.randomness import seed_of

CHIPS_AT_ONCE = 4


@dataclass(frozen=True)
class Material:
    """What every part of an evaluation reads chips with.

    Args:
        params: The whole of params.yaml.
        selection: The run's chips.
        normalizer: Of the run.
        device: Where features are computed.
    """

    params: Params
    selection: Selection
    normalizer: Normalizer
    device: torch.device

    def read(self, rows: Sequence[ChipRow]) -> Iterator[tuple[Batch, list[ChipRow]]]:
        """Whole chips, normalized, a few at a time."""
        folder = self.selection.folder
        yield from read_in_order(self.params, folder, list(rows), self.normalizer, self.device, CHIPS_AT_ONCE)


@dataclass(frozen=True)
class Labelled:
    """Chips of one split with their label rasters (H, W), both in the same order; `empty` is how many have none."""

    rows: list[ChipRow]
    labels: list[Labels]
    empty: int

    def batches(self, material: Material) -> Iterator[tuple[Batch, list[str], list[Labels]]]:
        """The chips, what addresses their draws, and their labels."""
        labels = {row.line: label for row, label in zip(self.rows, self.labels, strict=True)}
        for batch, rows in material.read(self.rows):
            yield batch, [chip_key(row) for row in rows], [labels[row.line] for row in rows]


@dataclass(frozen=True)
class LabelledSplits:
    """What a probe needs: chips to fit on, to choose features by, and to judge on, and the label values that count."""

    fit: Labelled
    choose: Labelled
    judged: Labelled
    classes: list[int]


def read_labelled(material: Material, judged: Sequence[ChipRow], limit: int) -> LabelledSplits | str:
    """The labelled chips by `evaluate.label_column`, or why there are none.

    Args:
        material: What chips are read with.
        judged: The rows that are judged.
        limit: How many chips a split has at most.
    """
    selection, column = material.selection, material.params.evaluate.label_column
    cells = [row.values.get(column) for row in [*selection.train, *judged]]
    if all(cell is None for cell in cells):
        return f"the catalog has no column {column!r} (evaluate.label_column)"
    filled = [cell for cell in cells if cell]
    if not filled:
        return f"every cell of the catalog's column {column!r} is empty"
    if not any(is_tiff(cell) for cell in filled):
        return (
            f"column {column!r} holds values such as {filled[0][:40]!r}, not paths of label rasters (.tif); labels of "
            "whole images belong into evaluate.image_label_column"
        )
    try:
        fit, other = (_labelled(material, rows, limit) for rows in (selection.train, judged))
        same = {row.line for row in judged} == {row.line for row in selection.validate}
        choose = other if same else _labelled(material, selection.validate, limit)
        classes, reason = choose_classes(fit.labels, _declared_nodata(selection, fit.rows, column))
    except ChipError as error:
        # One bad label must not cost the evaluation of a training that took days.
        return f"a label raster cannot be used: {error}"
    return f"{reason} (column {column!r})" if reason else LabelledSplits(fit, choose, other, classes)


def _labelled(material: Material, rows: Sequence[ChipRow], limit: int) -> Labelled:
    """Up to `limit` chips with a label, in an order that depends on the chips' paths alone."""
    params, folder = material.params, material.selection.folder
    column = params.evaluate.label_column
    with_cell = [row for row in rows if row.values[column]]
    chosen = sorted(with_cell, key=lambda row: seed_of("probe chips", chip_key(row)))[:limit]
    spec = ChipSpec.from_params(params.data)
    found = [(row, read_label(folder, row, column, spec)) for row in chosen]
    pairs = [(row, label) for row, label in found if label is not None]
    return Labelled([row for row, _ in pairs], [label for _, label in pairs], len(rows) - len(with_cell))


def _declared_nodata(selection: Selection, rows: Sequence[ChipRow], column: str) -> float | None:
    """What the first label file declares as nodata; the files of one column are made alike."""
    for row in rows[:1]:
        name = row.values[column]
        return chip_header(selection.folder, name, row.line)[0].nodata[0]
    return None
