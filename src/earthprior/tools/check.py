"""Tool `check`: read every chip of a catalog once and tell all that is wrong, without making statistics or results."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from earthprior.chips.problem_log import ProblemLog
from earthprior.chips.problems import Problem
from earthprior.chips.survey import survey
from earthprior.chips.verdict import conclude, counted, reading_progress, tell, time_told
from earthprior.errors import DataError
from earthprior.params import Params

OUT = Path("work/check/bad_chips.csv")


def run(
    params: Params,
    root: Path,
    folder: Path | None = None,
    catalog: str | None = None,
    out: Path | None = None,
    readers: int | None = None,
) -> None:
    """Check the chips as the stage `stats` does, and what only later stages would find.

    Args:
        params: The whole of params.yaml.
        root: The project's root.
        folder: The data folder; by default data.dir.
        catalog: The CSV file in it; by default data.catalog.
        out: Where all problems are listed; by default work/check/bad_chips.csv.
        readers: Threads; by default as many as operation.readers and as there are cores.

    Raises:
        DataError: With every error of the catalog and the chips, or FOLDER is none.
        KeyboardInterrupt: Stopped; what was found so far is in a file.
    """
    if folder and not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Name the folder that holds the catalog and its chips")
    changes = {"dir": folder and str(folder.absolute()), "catalog": catalog}
    data = params.data.model_copy(update={key: value for key, value in changes.items() if value})
    readers = readers or max(params.operation.readers, os.cpu_count() or 1)
    path = root / OUT if out is None else out
    began = time.monotonic()
    with ProblemLog(path) as log:
        progress = reading_progress("check", readers, log)
        try:
            found = survey(data, root, readers, log, progress, params.evaluate.label_column, statistics=False)
        except KeyboardInterrupt:
            so_far = f"{counted(log.tally.errors, 'error')} and {counted(log.tally.warnings, 'warning')}"
            where = f" are in {_shown(log.partial_path, root)}" if log.tally.errors + log.tally.warnings else ""
            print(f"check: {so_far} found so far{where}", file=sys.stderr)
            raise
        fault = params.epoch_fault(found.chips["train"]) if found.chips["train"] else None
        if fault:
            log.add(Problem("error", "params.yaml", 0, fault, "See data.crops_per_chip, too"))
        skipped = conclude(data, found, log)
    tell(found, log, _shown(path, root))
    left_out = f", {len(skipped):,} to be skipped" if skipped else ""
    warnings = log.tally.warnings
    said = f"no error, {counted(warnings, 'warning')}" if warnings else "nothing to complain of"
    taken = time_told(time.monotonic() - began)
    print(f"check: {counted(found.rows.total(), 'chip')} read in {taken}{left_out}; {said}", file=sys.stderr)


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path)
