"""A bench as files for people: report.html and its picture."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from earthprior.bench.findings import Answer, Difference, Point, answers, differences, headline, points
from earthprior.bench.plan import METHODS, Fit, at_the_edge, budget_text
from earthprior.bench.table import Row
from earthprior.figures.labels import NAMES, labels_figure
from earthprior.figures.style import save_png
from earthprior.files import write_atomic
from earthprior.params.bench import BenchParams
from earthprior.report import SCORE_NAMES, Number, Picture, Report, Section, Table, count, render, signed
from earthprior.training.progress import duration


@dataclass(frozen=True)
class About:
    """What a bench was made with, for the page.

    Args:
        judged: The judged chips in words: "54 validate chips".
        available: Labelled chips that budgets are drawn from.
        holdout: Chips that dials are chosen on.
        metrics: The scores, the headline first.
        identity: What it is made of, as (name, value).
        command: The line that goes on with it.
    """

    judged: str
    available: int
    holdout: int
    metrics: Sequence[str]
    identity: Sequence[tuple[str, str]]
    command: str


def write(folder: Path, rows: Sequence[Row], fits: Collection[Fit], bench: BenchParams, about: About) -> Path:
    """Write report.html and figures/*.png from the rows that are there; the path of the page.

    Args:
        folder: Where; made if it is not there.
        rows: Of the table.
        fits: The plan.
        bench: The section of params.yaml.
        about: What else the page tells.
    """
    curves = {metric: points(rows, metric, fits) for metric in about.metrics}
    found = curves[about.metrics[0]]
    answer = headline(answers(found))
    pictures = []
    for metric in about.metrics[:2]:
        if curves[metric]:
            path = folder / f"figures/{metric}.png"
            marked = headline(answers(curves[metric]))
            save_png(labels_figure(curves[metric], SCORE_NAMES[metric], about.judged, marked), path)
            pictures.append(Picture(path, f"{SCORE_NAMES[metric]} over labelled chips, a line per method"))
    done = [row for row in rows if row.fit in fits]
    missing = len(set(fits)) - len(done)
    report = Report(
        title="How few labels are enough",
        subtitle=f"Judged on {about.judged}, which nothing was fitted or chosen on. {_state(missing, len(set(fits)))}",
        verdict=verdict(answer, about.metrics[0]),
        below=answer is not None and _worse(answer),
        numbers=_numbers(found, answer, done, about.metrics[0]),
        sections=[
            Section("The curves", [], pictures),
            Section("Beside each other", _notes(done), tables=_tables(curves, about.metrics)),
            _pairs(found, about.metrics[0]),
            _dials(found, bench, about),
        ],
        identity=about.identity,
        identity_title="This bench",
    )
    write_atomic(folder / "report.html", render(report))
    return folder / "report.html"


def verdict(answer: Answer | None, metric: str) -> str:
    """The answer in a sentence that the numbers force."""
    if answer is None:
        return ""
    point = answer.pretrained
    text = (
        f"With {count(point.labels, 'labelled chip')} the fine-tuned network has {_article(SCORE_NAMES[metric])} of "
        f"{point.mean:.3f}. "
    )
    if answer.needed is None:
        return text + f"From scratch, {answer.most:,} labelled chips, the most there are, do not reach that."
    if answer.at_least:
        return text + f"From scratch, {answer.needed:.0f} or fewer reach that, too: pretraining saves no labels here."
    times = answer.needed / point.labels
    if times <= 1:
        return text + f"From scratch about {answer.needed:.0f} reach that: pretraining saves no labels here."
    return text + f"From scratch it takes about {answer.needed:.0f} to reach that, {times:.1f} times as many."


def _worse(answer: Answer) -> bool:
    return answer.needed is not None and answer.needed <= answer.pretrained.labels


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiouAEI" else f"a {name}"


def _state(missing: int, wanted: int) -> str:
    return f"{missing} of {wanted} fits are still to be done." if missing else ""


def _numbers(found: Sequence[Point], answer: Answer | None, rows: Sequence[Row], metric: str) -> list[Number]:
    numbers = []
    if answer is not None:
        labels = answer.pretrained.labels
        for name in NAMES:
            for point in found:
                if point.method == name and point.labels == labels:
                    note = f"{SCORE_NAMES[metric]} with {labels} labels, {count(len(point.values), 'seed')}"
                    numbers.append(Number(NAMES[name], f"{point.mean:.3f}", note))
    busy = math.fsum(row.cpu_seconds for row in rows)
    return [*numbers, Number("Computed", duration(busy), f"of processor time, {count(len(rows), 'fit')} and judging")]


def _tables(curves: Mapping[str, Sequence[Point]], metrics: Sequence[str]) -> list[Table]:
    """One per score: methods down, labels across; mean over seeds, and their range."""
    tables = []
    for metric in metrics:
        found = curves[metric]
        labels = sorted({point.labels for point in found})
        rows = []
        for method in METHODS:
            cells = {point.labels: _cell(point) for point in found if point.method == method}
            if cells:
                rows.append([METHODS[method].title, *(cells.get(one, "-") for one in labels)])
        caption = f"{SCORE_NAMES[metric]}: mean over seeds, and the least and greatest"
        tables.append(Table(["method", *(count(one, "label") for one in labels)], rows, caption))
    return tables


def _cell(point: Point) -> str:
    least, greatest = min(point.values.values()), max(point.values.values())
    return f"{point.mean:.3f} ({least:.3f} to {greatest:.3f})" if len(point.values) > 1 else f"{point.mean:.3f}"


def _notes(rows: Sequence[Row]) -> list[str]:
    codes = {row.code for row in rows}
    if len(codes) < 2:
        return []
    return [f"These fits were made by {len(codes)} versions of the code (column code of bench.csv)."]


def _pairs(found: Sequence[Point], metric: str) -> Section:
    """Pretrained beside scratch, with the same labels and with the next budget's."""
    made = differences(found)
    rows = [[f"{one.few:,}", f"{one.more:,}", signed(one.mean, 3), _each(one)] for one in made]
    text = (
        "Fine-tuned less from scratch, seed by seed (a seed draws the same chips for both, and the smaller budget is "
        "part of the larger one). Above 0, pretraining is worth more than the further labels."
    )
    columns = ["labels, pretrained", "labels, scratch", f"{SCORE_NAMES[metric]}, difference", "each seed"]
    return Section("What pretraining is worth in labels", [text], tables=[Table(columns, rows)] if rows else [])


def _each(one: Difference) -> str:
    return ", ".join(signed(value, 3) for value in one.values)


def _dials(found: Sequence[Point], bench: BenchParams, about: About) -> Section:
    """What was tried, and what was chosen."""
    rows = []
    for point in found:
        dial = METHODS[point.method].dial
        edge = any(at_the_edge(bench, point.method, value) for value in point.dials)
        chosen = ", ".join(f"{value:g}" for value in point.dials)
        rows.append([METHODS[point.method].title, f"{point.labels:,}", f"{dial} {chosen}", "at the edge" * edge])
    tried = "with each budget's own labels" if bench.tuning_labels is None else f"with {bench.tuning_labels} labels"
    text = (
        f"Every method has one dial, turned by one procedure: each value is tried {tried}, in one draw, and judged on "
        f"{count(about.holdout, 'train chip')} that nothing else uses; the best serves all seeds. Learning rates: "
        f"{', '.join(f'{value:g}' for value in sorted(bench.lr))}; penalties (l2): "
        f"{', '.join(f'{value:g}' for value in sorted(bench.l2))}. At the edge, a better value may lie beyond."
    )
    table = Table(["method", "labels", "chosen", ""], rows)
    return Section("How it was tuned", [text], tables=[table], commands=[about.command])


def verdict_of(rows: Sequence[Row], fits: Collection[Fit], about: About) -> str:
    """`verdict` of the headline metric; empty where too little is done."""
    metric = about.metrics[0]
    return verdict(headline(answers(points(rows, metric, fits))), metric)


def metrics(rows: Sequence[Row], fits: Collection[Fit], about: About) -> Iterator[tuple[str, tuple[int, float]]]:
    """For MLflow: name, and labelled chips and mean over seeds; a curve for each method and score."""
    for metric in about.metrics:
        found = points(rows, metric, fits)
        for point in found:
            yield f"bench/{point.method}/{metric}", (point.labels, point.mean)
            yield f"bench/{point.method}/{metric}_at_{budget_text(point.budget)}", (0, point.mean)
        answer = headline(answers(found))
        if answer is not None and answer.needed is not None:
            yield f"bench/labels_needed_from_scratch/{metric}", (answer.pretrained.labels, answer.needed)
