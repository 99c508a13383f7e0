"""`earthprior compare`: runs made before on one page, their params, numbers, curves, and the same chips denoised."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from earthprior import recorded
from earthprior.errors import EarthPriorError
from earthprior.evaluation import comparison, comparison_panels
from earthprior.evaluation.comparison import ABSENT, Compared
from earthprior.figures import RunCurves, comparison_figure, denoising_figure, save_png
from earthprior.figures.curves import RUN_STYLES
from earthprior.files import write_atomic
from earthprior.params import Params
from earthprior.params.editing import plain
from earthprior.recorded import RUN_ID
from earthprior.report import SCORE_NAMES, Number, Picture, Report, Section, Table, count, number, render, signed

LONGEST = 24
"""Of a run in the name of a page."""

MOST = len(RUN_STYLES)
HEAD_LENGTH = 24
LISTS = "`dvc exp list --all-commits` lists DVC experiments, `mlflow ui` the runs and their ids"


def run(params: Params, root: Path, asked: Sequence[str], chips: int, out: Path | None = None) -> None:
    """Write the page and say where it is.

    Args:
        params: The whole of params.yaml.
        root: The project's root.
        asked: Two to eight runs: MLflow run ids or names of DVC experiments.
        chips: How many validation chips to denoise.
        out: The page; None means work/compare/<run>-<run>.html.

    Raises:
        EarthPriorError: There are too few or too many runs, one is named twice, or one is not known.
    """
    _check(asked)
    torch.set_num_threads(params.threads)
    path = out or root / "work/compare" / f"{_page(asked)}.html"
    with tempfile.TemporaryDirectory(prefix="earthprior-compare-") as temporary:
        found = [recorded.find(root, name, Path(temporary) / str(place)) for place, name in enumerate(asked)]
        runs = comparison.beside(found, params)
        drawing = comparison_panels.draw(runs, params, root, chips)
        pictures = [Path(temporary) / f"chip_{place}.png" for place in range(len(drawing.panels))]
        for picture, panels in zip(pictures, drawing.panels, strict=True):
            save_png(denoising_figure(panels, params.data.bands), picture)
        sections = [
            _comparability(runs),
            _params_section(runs),
            _numbers_section(runs),
            _curves_section(runs, Path(temporary) / "curves.png"),
            _chips_section(runs, pictures, drawing.notes),
            _identity_section(runs),
        ]
        write_atomic(path, render(_report(runs, sections)))
    shown = path if out else path.relative_to(root)
    print(f"{len(runs)} runs beside each other: {shown} (open it in a browser)")


def _check(asked: Sequence[str]) -> None:
    if not 2 <= len(asked) <= MOST:
        raise EarthPriorError(f"compare takes 2 to {MOST} runs, and {len(asked)} are named; {LISTS}")
    twice = [name for place, name in enumerate(asked) if name in asked[:place]]
    if twice:
        raise EarthPriorError(f"run {twice[0]} is named twice, and would only equal itself; {LISTS}")


def _page(asked: Sequence[str]) -> str:
    """The page's name; where the runs' are cut, what was cut off tells one page from another."""
    slugs = [_slug(name) for name in asked]
    whole = all(len(name) <= LONGEST or RUN_ID.fullmatch(name) for name in asked)
    cut = [] if whole else [hashlib.sha256("\n".join(asked).encode()).hexdigest()[:6]]
    return "-".join([*slugs, *cut])


def _slug(asked: str) -> str:
    """Part of a file's name; of an MLflow id the beginning."""
    text = re.sub(r"[^\w.=]+", "-", asked).strip("-.") or "run"
    return text[:8] if RUN_ID.fullmatch(text) else text[:LONGEST]


def _report(runs: Sequence[Compared], sections: Sequence[Section]) -> Report:
    gains = {run.letter: gain for run in runs if (gain := _best_gain(run, runs)) is not None}
    trainings = {comparison.training_of(run) or run.letter: run.letter for run in reversed(runs)}
    # One training under several names is no rival of its own.
    ranked = {letter: gain for letter, gain in gains.items() if letter in trainings.values()}
    pair = len(runs) == 2
    return Report(
        title=f"EarthPrior: {' against '.join(run.run.title for run in runs) if pair else f'{len(runs)} runs'}",
        subtitle="; ".join(run.name for run in runs),
        verdict=_verdict(ranked, fair=not comparison.cautions(runs)),
        below=max(gains.values(), default=0.0) <= 0,
        numbers=[
            Number(run.name, f"{signed(gains[run.letter])} dB", f"validation gain, epoch {_best_epoch(run)}")
            for run in runs
            if run.letter in gains
        ],
        sections=sections,
    )


def _verdict(gains: Mapping[str, float], fair: bool) -> str:
    """Which run is best, and by how much, in a sentence; `fair` if their gains compare directly."""
    ranked = sorted(gains, key=lambda letter: -gains[letter])
    if not ranked:
        return "No validation gain was recorded of any of these runs."
    text = f"{ranked[0]} has the best validation gain, {signed(gains[ranked[0]])} dB over the linear filter"
    if len(ranked) == 1:
        return f"{text}; of no other training is it known."
    ahead = gains[ranked[0]] - gains[ranked[1]]
    # What rounds to nothing is nothing to claim.
    text += f", {ahead:.2f} dB ahead of {ranked[1]}." if ahead >= 0.005 else f", and {ranked[1]} equals it to 0.01 dB."
    if not fair:
        return f"{text} But see below what keeps them from comparing."
    return f"{text} One training each: repeats with other seeds tell how much of a difference is chance."


def _best_gain(run: Compared, runs: Sequence[Compared]) -> float | None:
    """At the run's best epoch, over the levels that all runs have."""
    gains = comparison.mean_gain(run, comparison.common_levels(runs))
    return None if gains is None or run.best is None else float(gains.iloc[run.best])


def _best_epoch(run: Compared) -> str:
    history = run.run.history
    if run.best is None or "epoch" not in history:
        return "-"
    return f"{history['epoch'].iloc[run.best]:.0f} of {len(history)}"


def _comparability(runs: Sequence[Compared]) -> Section:
    found = comparison.cautions(runs)
    same = "The runs share their chips, bands, normalization, crops and noise levels, so their gains compare directly."
    return Section("Do they compare?", [*comparison.same_trainings(runs), *(found or [same])])


def _params_section(runs: Sequence[Compared]) -> Section:
    differing = comparison.differing(runs)
    if not differing:
        return Section("Params that differ", ["None: every parameter that acted is the same in all runs."])
    rows = [[key, *("-" if value is ABSENT else plain(value) for value in values)] for key, values in differing.items()]
    text = "Of the parameters that acted; a dash stands where a key had no effect in that run, or was not there yet."
    return Section("Params that differ", [text], tables=[Table(["key", *_heads(runs)], rows)])


def _heads(runs: Sequence[Compared]) -> list[str]:
    """The runs as columns of a table; the page's beginning has their whole names."""
    return [run.name if len(run.name) <= HEAD_LENGTH else f"{run.name[: HEAD_LENGTH - 3]}..." for run in runs]


def _numbers_section(runs: Sequence[Compared]) -> Section:
    common = comparison.common_levels(runs)
    kind = next(
        (kind for kind in SCORE_NAMES if any(f"probe/linear/network/{kind}" in run.run.metrics for run in runs)), ""
    )

    def metric(key: str, pattern: str) -> list[str]:
        return [number(run.run.metrics.get(key), pattern) for run in runs]

    rows = [
        ["validation gain at the best epoch, dB", *(signed(_best_gain(run, runs)) for run in runs)],
        ["best epoch", *map(_best_epoch, runs)],
        ["optimizer steps", *(_last(run.run.history.get("step")) for run in runs)],
        ["chips seen", *(_last(run.chips_seen()) for run in runs)],
        ["evaluated gain, dB", *(signed(comparison.evaluated_gain(run, common)) for run in runs)],
        ["evaluated chips", *metric("judged_chips", ",.0f")],
        ["PSNR, dB", *metric("psnr/network", ".2f")],
        ["PSNR of the linear filter, dB", *metric("psnr/linear", ".2f")],
        ["SSIM", *metric("ssim/network", ".4f")],
        ["SSIM of the linear filter", *metric("ssim/linear", ".4f")],
    ]
    if kind:
        name = SCORE_NAMES[kind]
        rows += [
            [f"linear probe, {name}", *metric(f"probe/linear/network/{kind}", ".4f")],
            ["the same, untrained network", *metric(f"probe/linear/untrained/{kind}", ".4f")],
            ["the same, raw pixels with local context", *metric(f"probe/linear/context/{kind}", ".4f")],
        ]
    text = "A dash stands where a run has no such number; without an evaluation there is no PSNR, SSIM or probe."
    return Section("Numbers", [text], tables=[Table(["", *_heads(runs)], _known(rows))])


def _last(values: pd.Series | None) -> str:
    return "-" if values is None or values.empty else f"{values.iloc[-1]:,.0f}"


def _curves_section(runs: Sequence[Compared], path: Path) -> Section:
    without = [run.letter for run in runs if run.run.history.empty]
    notes = [f"No training history is kept of {', '.join(without)}."] if without else []
    if len(without) == len(runs):
        return Section("Curves", notes)
    save_png(comparison_figure([_curves(run, runs) for run in runs]), path)
    told = "Validation gain is that of the averaged weights on fixed chips and noise; a ring marks the kept epoch."
    return Section("Curves", notes, [Picture(path, "curves of all runs", told)])


def _curves(run: Compared, runs: Sequence[Compared]) -> RunCurves:
    history = run.run.history
    columns: Mapping[str, Any] = {
        "step": history.get("step"),
        "chips": run.chips_seen(),
        "gain": comparison.mean_gain(run, comparison.common_levels(runs)),
        "lr": history.get("lr"),
    }
    known = pd.DataFrame({name: column for name, column in columns.items() if column is not None})
    return RunCurves(run.name, known, run.best, run.levels)


def _chips_section(runs: Sequence[Compared], pictures: Sequence[Path], notes: Sequence[str]) -> Section:
    text = (
        "The same chips under the same noise, each run's estimate and below it what is wrong with it. The noisy chip "
        "and the linear filter's estimate are those of the first run shown; another run's schedule meets the noise "
        "level to the nearest timestep."
    )
    shown = [Picture(path, f"chip {place + 1}, denoised by each run") for place, path in enumerate(pictures)]
    title = f"{count(len(shown), 'validation chip')}, denoised" if shown else "Chips, denoised"
    return Section(title, [*([text] if shown else []), *notes], shown)


def _identity_section(runs: Sequence[Compared]) -> Section:
    rows = [
        ["DVC experiment", *(run.run.experiment or "-" for run in runs)],
        ["MLflow run", *(run.run.run_id or "-" for run in runs)],
        ["Git commit", *(run.run.commit or "-" for run in runs)],
        ["code digest", *(run.run.code or "-" for run in runs)],
        ["data md5 (data.dvc)", *(run.run.data_md5 or "-" for run in runs)],
    ]
    return Section("These runs", tables=[Table(["", *_heads(runs)], _known(rows))])


def _known(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Without the rows that are empty for every run."""
    return [row for row in rows if set(row[1:]) != {"-"}]
