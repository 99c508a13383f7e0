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
from tqdm import tqdm

from earthprior.chips.catalog import USAGES, Catalog, ChipRow, scan_catalog
from earthprior.chips.problems import SHOWN, Problem, data_error
from earthprior.chips.read import ChipSpec, read_chip
from earthprior.chips.statistics import BandStatistics, merged
from earthprior.chips.survey import Survey, census, crs_name, digest_of, survey
from earthprior.files import sha256_file, sweep, write_atomic, write_json
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
    catalog, problems = scan_catalog(params.data, root)
    spec = ChipSpec.from_params(params.data)

    def progress(chips: Iterable[Any]) -> Iterable[Any]:
        return tqdm(chips, "stats", len(catalog.rows), unit=" chips", file=sys.stderr, disable=None, mininterval=0.5)

    found = survey(catalog, spec, params.operation.readers, progress)
    problems += found.problems
    skipped, problems = _skip(params, catalog, problems)
    problems += _training_possible(params, catalog, found)
    sweep(root / RESULTS)
    _write_problems(root / RESULTS / "bad_chips.csv", problems)
    _report(catalog, problems)
    folder = root / RESULTS
    rows = catalog.without(skipped)
    write_json(folder / "stats.json", _content(params, root, rows, found, skipped, problems))
    write_atomic(folder / "histograms.csv", _histograms(params.data.bands, found.bands))
    _write_samples(folder / "samples.png", rows, spec)
    said = f"{len(problems)} warnings in results/stats/bad_chips.csv" if problems else "nothing to complain of"
    print(f"stats: {len(catalog.rows):,} chips read, {len(skipped):,} skipped; {said}", file=sys.stderr)


def _skip(params: Params, catalog: Catalog, problems: Sequence[Problem]) -> tuple[list[int], list[Problem]]:
    """With `on_bad_chip: skip`, turn errors of single chips into warnings, up to the share that params allow.

    Returns:
        The skipped lines, and the problems that are left.
    """
    bad = sorted({problem.line for problem in problems if problem.skippable})
    if params.data.on_bad_chip == "error" or not bad:
        return [], list(problems)
    share = len(bad) / len(catalog.rows)
    if share > params.data.max_bad_fraction:
        what = (
            f"{len(bad)} of {len(catalog.rows)} chips cannot be used ({share:.1%}), more than data.max_bad_fraction "
            f"({params.data.max_bad_fraction:.1%}) lets skip"
        )
        return [], [*problems, Problem("error", catalog.path.name, 0, what, "Mend the chips below, or raise it")]
    kept = [
        Problem("warning", problem.file, problem.line, f"skipped: {problem.what}", problem.fix)
        if problem.skippable
        else problem
        for problem in problems
    ]
    return bad, kept


def _training_possible(params: Params, catalog: Catalog, found: Survey) -> list[Problem]:
    """What makes training impossible though every chip is sound."""
    name = catalog.path.name
    left = {usage: sum(finding.row.usage == usage for finding in found.findings) for usage in USAGES}
    problems = [
        Problem("error", name, 0, f"no {usage} chip can be used", "Mend the chips below")
        for usage in ("train", "validate")
        if catalog.split(usage) and not left[usage]
    ]
    if not left["train"]:
        return problems
    for usage in ("train", "validate"):
        fractions = [finding.valid_fraction for finding in found.findings if finding.row.usage == usage]
        if fractions and not any(fractions):
            problems.append(Problem("error", name, 0, f"no {usage} chip has a valid pixel", "Check data.nodata"))
    return problems


def _report(catalog: Catalog, problems: Sequence[Problem]) -> None:
    """Show the warnings, and raise if there are errors.

    Raises:
        DataError: With the errors.
    """
    where = f"all are in {RESULTS / 'bad_chips.csv'}"
    warnings = [problem for problem in problems if problem.severity == "warning"]
    errors = [problem for problem in problems if problem.severity == "error"]
    if warnings:
        print(f"{len(warnings)} warning{'s' * (len(warnings) > 1)} ({where}):", file=sys.stderr)
        for problem in warnings[:SHOWN]:
            print(f"  {problem}", file=sys.stderr)
        if len(warnings) > SHOWN:
            print(f"  ... and {len(warnings) - SHOWN} more", file=sys.stderr)
    if errors:
        missing = sum(problem.what == "not found" for problem in errors)
        hint = ""
        if missing == len(catalog.rows) and missing:
            hint = (
                " Not one chip was found: is the data there (dvc pull), and are the paths relative to "
                f"{catalog.dir.name}/?"
            )
        raise data_error(f"{len(errors)} error{'s' * (len(errors) > 1)} in the data ({where}).{hint}", errors)


def _content(
    params: Params, root: Path, catalog: Catalog, found: Survey, skipped: list[int], problems: Sequence[Problem]
) -> dict[str, Any]:
    """stats.json: no times and no paths of this machine, for it enters every run's fingerprint."""
    md5, files = data_version(root) if params.data.dir == "data" else (None, None)
    train = [finding for finding in found.findings if finding.row.usage == "train"]
    return {
        "format": 2,
        "data": {
            "md5": md5,
            "nfiles": files,
            "catalog_sha256": sha256_file(catalog.path),
            "chips_sha256": digest_of(found.findings),
        },
        "bands": list(params.data.bands),
        "dtype": found.findings[0].dtype,
        "chip_size": params.data.chip_size,
        "chips": {**{usage: len(catalog.split(usage)) for usage in USAGES}, "skipped_lines": skipped},
        "per_band": {name: band.to_json() for name, band in zip(params.data.bands, found.bands, strict=True)},
        "all_bands": merged(found.bands).to_json(),
        "valid_fraction": sum(finding.valid_fraction for finding in train) / len(train),
        "crs": census(crs_name(finding.crs) for finding in found.findings),
        "sizes": census("{} x {}".format(*finding.size) for finding in found.findings),
        "dtypes": census(finding.dtype for finding in found.findings),
        "overlapping_pairs": found.overlapping_pairs,
        "problems": {
            "errors": sum(problem.severity == "error" for problem in problems),
            "warnings": sum(problem.severity == "warning" for problem in problems),
        },
    }


def _write_problems(path: Path, problems: Sequence[Problem]) -> None:
    table = [(p.severity, p.file, p.line or "", p.what, p.fix) for p in sorted(problems, key=lambda p: p.severity)]
    write_atomic(path, _csv(("severity", "file", "line", "what", "fix"), table))


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


def _write_samples(path: Path, catalog: Catalog, spec: ChipSpec) -> None:
    """Some training chips, spread over the catalog."""
    from earthprior.figures import chips_figure, save_png

    train = catalog.split("train")
    picks = sorted(set(np.linspace(0, len(train) - 1, min(SAMPLES, len(train))).round().astype(int).tolist()))
    rows: list[ChipRow] = [train[pick] for pick in picks]
    chips = [read_chip(catalog.dir, row, spec) for row in rows]
    titles = [Path(row.images[0]).stem for row in rows]
    figure = chips_figure([pixels for pixels, _ in chips], [valid for _, valid in chips], spec.bands, titles)
    save_png(figure, path)
