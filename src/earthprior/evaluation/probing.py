"""The probe on the labelled chips of a catalog: which chips, their labels, and the four representations compared."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from earthprior import build
from earthprior.chips.batch import Batch
from earthprior.chips.catalog import ChipRow
from earthprior.chips.normalize import Affine, Normalizer
from earthprior.chips.problems import ChipError
from earthprior.chips.read import ChipSpec, chip_header, read_label
from earthprior.chips.selection import Selection, chip_key, read_in_order
from earthprior.params import Params
from earthprior.probe import Labels, ProbeResult, choose_classes, collect, judge
from earthprior.randomness import seed_of
from earthprior.representations import FrozenFeatures, Representation, raw_context, raw_pixels
from earthprior.tasks.diffusion import DiffusionTask

MAX_PIXELS = 100_000
"""Per split: more would sharpen no difference that matters, and the fit is in memory."""

MAX_VALUES = 48_000_000
"""Per split and representation: wide networks get fewer pixels (200 MB as float32)."""

CHIPS_AT_ONCE, CROPS_AT_ONCE = 4, 16

REPRESENTATIONS = {
    "network": "frozen features of the trained network",
    "untrained": "the same network, untrained",
    "context": "pixels with local means and deviations (5, 11, 21 px)",
    "pixels": "pixels alone",
}
"""What the probe compares, in the report's order."""


@dataclass(frozen=True)
class _Labelled:
    """Chips of one split with their labels, both in the same order."""

    rows: list[ChipRow]
    labels: list[Labels]
    empty: int


def probe(
    params: Params,
    task: DiffusionTask,
    selection: Selection,
    judged: Sequence[ChipRow],
    normalizer: Normalizer,
    device: torch.device,
    names: Collection[str] = tuple(REPRESENTATIONS),
) -> ProbeResult:
    """Compare the representations on `evaluate.label_column`, or say why not.

    Args:
        params: The whole of params.yaml.
        task: The trained task, in evaluation mode, on the device.
        selection: The run's chips; the probe is fitted on the training ones.
        judged: The rows that are judged on.
        normalizer: Of the run.
        device: Where features are computed.
        names: Of the representations to compare; "network" among them.
    """
    column = params.evaluate.label_column
    cells = [row.values.get(column) for row in [*selection.train, *judged]]
    if all(cell is None for cell in cells):
        return ProbeResult(reason=f"the catalog has no column {column!r} (evaluate.label_column)")
    filled = [cell for cell in cells if cell]
    if not filled:
        return ProbeResult(reason=f"every cell of the catalog's column {column!r} is empty")
    if not any(cell.lower().endswith((".tif", ".tiff")) for cell in filled):
        return ProbeResult(
            reason=f"column {column!r} holds values such as {filled[0][:40]!r}, not paths of label rasters (.tif), and "
            "labels of whole images are not probed"
        )
    limit = _chip_limit(params, task, device)
    try:
        fit, other = (_labelled(params, selection, rows, limit) for rows in (selection.train, judged))
    except ChipError as error:
        # One bad label must not cost the evaluation of a training that took days.
        return ProbeResult(reason=f"a label raster cannot be used: {error}")
    classes, reason = choose_classes(fit.labels, _declared_nodata(selection, fit.rows, column))
    if reason:
        return ProbeResult(reason=f"{reason} (column {column!r})")
    representations = {name: found for name, found in _representations(params, task, device).items() if name in names}

    def pixels(chips: _Labelled) -> Any:
        batches = _batches(params, selection, chips, normalizer, device)
        return collect(batches, representations, classes, params.evaluate.probe_pixels)

    return judge(pixels(fit), pixels(other), {"chips_without_label": fit.empty + other.empty})


def _representations(params: Params, task: DiffusionTask, device: torch.device) -> dict[str, Representation]:
    """By the names of REPRESENTATIONS; the untrained network is the trained one's start, so only training differs."""
    untrained = build.task(params, task.linear).to(device).eval()

    def frozen(source: DiffusionTask) -> Representation:
        def features(batch: Batch) -> list[torch.Tensor]:
            return source.features(batch, params.evaluate.probe_rho)

        return FrozenFeatures(features, params.data.train_px, CROPS_AT_ONCE)

    found: dict[str, Representation] = {
        "network": frozen(task),
        "untrained": frozen(untrained),
        "context": raw_context,
        "pixels": raw_pixels,
    }
    return {name: found[name] for name in REPRESENTATIONS}


@torch.no_grad()
def _chip_limit(params: Params, task: DiffusionTask, device: torch.device) -> int:
    """How many chips a split may have, by the width of the network's features, which one blank crop tells."""
    size, bands = params.data.train_px, len(params.data.bands)
    blank = torch.zeros(1, bands, size, size, device=device)
    affine = Affine(torch.zeros(1, bands, 1, 1, device=device), torch.ones(1, bands, 1, 1, device=device))
    pyramid = task.features(Batch(blank, blank[:, :1] == 0, affine), params.evaluate.probe_rho)
    width = sum(level.shape[1] for level in pyramid)
    return max(1, min(MAX_PIXELS, MAX_VALUES // width) // params.evaluate.probe_pixels)


def _labelled(params: Params, selection: Selection, rows: Sequence[ChipRow], limit: int) -> _Labelled:
    """Up to `limit` chips with a label, in an order that depends on the chips' paths alone."""
    column = params.evaluate.label_column
    with_cell = [row for row in rows if row.values[column]]
    chosen = sorted(with_cell, key=lambda row: seed_of("probe chips", chip_key(row)))[:limit]
    spec = ChipSpec.from_params(params.data)
    found = [(row, read_label(selection.folder, row, column, spec)) for row in chosen]
    pairs = [(row, label) for row, label in found if label is not None]
    return _Labelled([row for row, _ in pairs], [label for _, label in pairs], len(rows) - len(with_cell))


def _declared_nodata(selection: Selection, rows: Sequence[ChipRow], column: str) -> float | None:
    """What the first label file declares as nodata; the files of one column are made alike."""
    for row in rows[:1]:
        name = row.values[column]
        return chip_header(selection.folder, name, row.line)[0].nodata[0]
    return None


def _batches(
    params: Params, selection: Selection, chips: _Labelled, normalizer: Normalizer, device: torch.device
) -> Iterator[tuple[Batch, list[str], list[Labels]]]:
    labels = {row.line: label for row, label in zip(chips.rows, chips.labels, strict=True)}
    for batch, rows in read_in_order(params, selection.folder, chips.rows, normalizer, device, CHIPS_AT_ONCE):
        yield batch, [chip_key(row) for row in rows], [labels[row.line] for row in rows]
