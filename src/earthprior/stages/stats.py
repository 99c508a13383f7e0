"""Stage `stats`: check every chip, measure the training chips, and write what the later stages depend on.

Neither torch nor mlflow is imported: this stage runs on data machines, and reruns whenever data/ changes.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from earthprior.chips.catalog import USAGES
from earthprior.chips.problem_log import ProblemLog
from earthprior.chips.read import ChipSpec, read_chip
from earthprior.chips.statistics import BandStatistics, merged
from earthprior.chips.survey import Survey, survey
from earthprior.chips.verdict import conclude, reading_progress, tell
from earthprior.files import sweep, write_atomic, write_json
from earthprior.identity import data_version
from earthprior.params import Params

RESULTS = Path("results/stats")
HISTOGRAM_BINS = 128
SAMPLES = 8


def run(params: Params, root: Path) -> None:
    """Write results/stats/{stats.json, bad_chips.csv, histograms.csv, samples.png}.

    bad_chips.csv is written in any case; the others only when no error remains.

    Args:
        params: The whole of params.yaml; only section `data` and `operation.readers` are read.
        root: The project's root.

    Raises:
        DataError: With every error of the catalog and the chips.
    """
    folder = root / RESULTS
    readers = params.operation.readers
    sweep(folder)
    with ProblemLog(folder / "bad_chips.csv") as log:
        found = survey(params.data, root, readers, log, reading_progress("stats", readers, log))
        skipped = conclude(params.data, found, log)
    tell(found, log, str(RESULTS / "bad_chips.csv"))
    write_json(folder / "stats.json", _content(params, root, found, skipped, log))
    write_atomic(folder / "histograms.csv", _histograms(params.data.bands, found.bands))
    _write_samples(folder / "samples.png", found, skipped, ChipSpec.from_params(params.data))
    warnings = log.tally.warnings
    said = f"{warnings:,} warnings in results/stats/bad_chips.csv" if warnings else "nothing to complain of"
    print(f"stats: {found.rows.total():,} chips read, {len(skipped):,} skipped; {said}", file=sys.stderr)


def _content(params: Params, root: Path, found: Survey, skipped: list[int], log: ProblemLog) -> dict[str, Any]:
    """stats.json: no times and no paths of this machine, for it enters every run's fingerprint."""
    md5, files = data_version(root) if params.data.dir == "data" else (None, None)
    return {
        "format": 2,
        "data": {
            "md5": md5,
            "nfiles": files,
            "catalog_sha256": found.catalog_sha256,
            "chips_sha256": found.chips_sha256,
        },
        "bands": list(params.data.bands),
        "dtype": found.dtype,
        "chip_size": params.data.chip_size,
        "chips": {**{usage: found.chips[usage] for usage in USAGES}, "skipped_lines": skipped},
        "per_band": {name: band.to_json() for name, band in zip(params.data.bands, found.bands, strict=True)},
        "all_bands": merged(found.bands).to_json(),
        "valid_fraction": found.valid_fraction_sum / found.chips["train"],
        "crs": dict(sorted(found.crs.items())),
        "sizes": dict(sorted(found.sizes.items())),
        "dtypes": {found.dtype: found.chips.total()},
        "overlapping_pairs": found.overlapping_pairs,
        "problems": {"errors": log.tally.errors, "warnings": log.tally.warnings},
    }


def _histograms(names: Sequence[str], bands: Sequence[BandStatistics]) -> str:
    """The bands' densities as a long table for `dvc plots`."""
    table = [
        (name, f"{value:.6g}", f"{density:.6g}")
        for name, band in zip(names, bands, strict=True)
        for value, density in band.histogram(HISTOGRAM_BINS)
    ]
    return _csv(("band", "value", "density"), table)


def _csv(header: Sequence[str], table: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(table)
    return text.getvalue()


def _write_samples(path: Path, found: Survey, skipped: Sequence[int], spec: ChipSpec) -> None:
    """Some training chips, spread over the catalog."""
    from earthprior.figures import chips_figure, save_png

    count, left_out = found.chips["train"], set(skipped)
    picks = set(np.linspace(0, count - 1, min(SAMPLES, count)).round().astype(int).tolist())
    train = (row for row in found.catalog.chips() if row.usage == "train" and row.line not in left_out)
    rows = [row for place, row in enumerate(train) if place in picks]
    chips = [read_chip(found.catalog.dir, row, spec) for row in rows]
    titles = [Path(row.images[0]).stem for row in rows]
    figure = chips_figure([pixels for pixels, _ in chips], [valid for _, valid in chips], spec.bands, titles)
    save_png(figure, path)
