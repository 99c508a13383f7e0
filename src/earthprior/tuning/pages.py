"""A study as files for people: report.html, its pictures, and trials.csv."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import optuna
from matplotlib.figure import Figure

from earthprior.figures.study import curves_figure, history_figure, importances_figure, pareto_figure
from earthprior.figures.study_space import MOST_SIDE_BY_SIDE, parallel_figure, slices_figure
from earthprior.figures.style import save_png
from earthprior.figures.trials import unit_apart
from earthprior.files import write_atomic, write_csv
from earthprior.params import TuneParams
from earthprior.report import Number, Report, count, render
from earthprior.tracking_store import redacted
from earthprior.training.progress import duration
from earthprior.tuning import sections
from earthprior.tuning.findings import Findings, seconds_of
from earthprior.tuning.tables import trials_table, value_text


def write(
    study: optuna.Study,
    folder: Path,
    name: str,
    commands: Mapping[int, str] | None = None,
    storage: str = "",
    tune: TuneParams | None = None,
) -> Path:
    """Write report.html, figures/*.png and trials.csv; pictures of an earlier call that no longer hold are removed.

    Args:
        study: Its objectives are maximized.
        folder: Where; made if it is not there.
        name: The study's, for the eye.
        commands: By trial number, the line that repeats the trial; shown for the best trials.
        storage: Where the study is kept; user, password and tokens in it are not shown.
        tune: The section it was made with, for its sampler and pruner.

    Returns:
        The path of report.html.
    """
    found = Findings.of(study)
    pictures = _draw(found, folder / "figures")
    for stale in set((folder / "figures").glob("*.png")) - set(pictures.values()):
        stale.unlink(missing_ok=True)
    write_csv(folder / "trials.csv", trials_table(found))
    sought = " and ".join(unit_apart(metric)[0] for metric in found.metrics)
    report = Report(
        title=f"Study {name}",
        subtitle=f"Searched for the greatest {sought}: {count(len(found.trials), 'trial')} over "
        f"{count(len(found.dials), 'parameter')} of params.yaml.",
        verdict=sections.verdict(found),
        below=sections.below(found),
        numbers=_numbers(found),
        sections=[
            *sections.best(found, commands or {}),
            *sections.course(found, pictures),
            *sections.mattered(found, pictures),
            *sections.trials(found),
        ],
        identity=_identity(found, storage, tune),
        identity_title="How the study was made",
    )
    write_atomic(folder / "report.html", render(report))
    return folder / "report.html"


def _draw(found: Findings, folder: Path) -> dict[str, Path]:
    """Draw every figure that there is something for; paths by name."""
    trials, metrics, dials = found.trials, found.metrics, found.dials
    valued = any(trial.reached() is not None for trial in trials)
    figures: dict[str, Figure] = {}
    if valued:
        figures["history"] = history_figure(trials, metrics)
    if len(metrics) > 1 and found.best:
        figures["front"] = pareto_figure(trials, metrics, [trial.number for trial in found.best])
    if any(trial.curve for trial in trials):
        figures["curves"] = curves_figure(trials, metrics[0], found.best[0].number if found.best else None)
    if found.shares:
        figures["importances"] = importances_figure(found.shares)
    if valued and dials:
        for place, metric in enumerate(metrics):
            figures[f"slices_{place + 1}"] = slices_figure(trials, dials, metric, place)
    if len(found.finished) > 1 and dials:
        figures["parallel"] = parallel_figure(trials, dials[:MOST_SIDE_BY_SIDE], metrics)
    paths = {name: folder / f"{name}.png" for name in figures}
    for name, path in paths.items():
        save_png(figures[name], path)
    return paths


def _numbers(found: Findings) -> list[Number]:
    """The headline numbers."""
    numbers = []
    for place, metric in enumerate(found.metrics if found.best else ()):
        top = max(found.best, key=lambda trial: trial.values[place])
        numbers.append(Number(f"Best {metric}", value_text(top.values[place], metric), f"trial {top.number}"))
    numbers.append(Number("Finished trials", f"{len(found.finished)}", sections.counted(found, but="finished")))
    seconds = sorted(value for raw in found.frozen if (value := seconds_of(raw)) is not None)
    if seconds:
        note = f"over all trials; the median one {duration(seconds[len(seconds) // 2])}"
        numbers.append(Number("Computed", duration(sum(seconds)), note))
    return numbers


def _identity(found: Findings, storage: str, tune: TuneParams | None) -> list[tuple[str, str]]:
    """How the study was made, as (name, value)."""
    started = [raw.datetime_start for raw in found.frozen if raw.datetime_start]
    ended = [raw.datetime_complete for raw in found.frozen if raw.datetime_complete]
    repeated = sum("same_as" in raw.user_attrs for raw in found.frozen)
    rows = [
        ("Storage", redacted(storage)),
        ("Objective, maximized", "; ".join(found.metrics)),
        ("Trials", sections.counted(found) + (f"; {repeated} repeat another one's settings" if repeated else "")),
        ("First start, last end", f"{min(started):%Y-%m-%d %H:%M}, {max(ended):%Y-%m-%d %H:%M}" if ended else ""),
        ("Optuna", optuna.__version__),
    ]
    if tune is not None:
        pruned = {"none": "none", "median": f"median, after {count(tune.pruning_warmup_epochs, 'epoch')}"}
        rows[2:2] = [
            ("Sampler", f"{tune.sampler}, seed {tune.sampler_seed}, {tune.startup_trials} at random first"),
            ("Pruner", pruned.get(tune.pruner, tune.pruner)),
        ]
    return [(name, value) for name, value in rows if value]
