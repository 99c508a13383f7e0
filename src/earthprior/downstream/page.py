"""What a finetuning found, and its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from earthprior import figures
from earthprior.downstream.finetuning import Done, Work
from earthprior.downstream.fitting import whole_chips
from earthprior.downstream.judging import HEADLINES, judge
from earthprior.report import Number, Picture, Report, Section, Table, count, number
from earthprior.scoring import Score, flat_scores
from earthprior.training.headline import Headline

NAMES = {
    "average_precision": "average precision", "iou": "IoU", "mean_iou": "mean IoU", "f1": "F1", "accuracy": "accuracy",
    "r2": "R2", "mae": "mean absolute error",
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What there is to tell.

    Attributes:
        work: What was finetuned.
        scores: Of the network that was kept, on the judged chips.
        history: One row an epoch.
        best_epoch: With the best headline on the validate chips.
    """

    work: Work
    scores: dict[str, Score]
    history: pd.DataFrame
    best_epoch: int

    @property
    def headline(self) -> Headline:
        """What the task is judged by."""
        return HEADLINES[self.work.setup.labels.task]

    def metrics(self) -> dict[str, float]:
        """The content of metrics.json: scores with the ends of their intervals, and what they are of."""
        return {
            **flat_scores(self.scores),
            "judged_chips": len(self.work.judged),
            "train_chips": len(self.work.train),
        }


def judged(work: Work, done: Done) -> Found:
    """Judge the network on whole chips of the test split, or of the validate split where there is no other."""
    scores = judge(done.model, whole_chips(work.setup, work.judged))
    return Found(work, scores, pd.DataFrame(done.outcome.history), done.outcome.best_epoch)


def told(found: Found) -> list[str]:
    """The result in a few lines for a terminal."""
    scores = ", ".join(f"{NAMES.get(name, name)} {spelled(score)}" for name, score in found.scores.items())
    return [f"{scores} (with 95 % intervals over {count(len(found.work.judged), f'{found.work.usage} chip')})"]


def spelled(score: Score) -> str:
    """A score with its interval."""
    ends = f" [{score.low:.3f}, {score.high:.3f}]" if score.low == score.low else ""
    return f"{number(score.value, '.3f')}{ends}"


def draw(found: Found, folder: Path) -> dict[str, Path]:
    """Draw all figures; their paths by name."""
    headline = found.headline
    title = f"{headline.noun[0].upper()}{headline.noun[1:]} on validate chips"
    path = folder / "history.png"
    figures.save_png(figures.history_figure(found.history, headline.name, title), path)
    return {"history": path}


def report(found: Found, pictures: dict[str, Path], identity: Sequence[tuple[str, str]]) -> Report:
    """The page."""
    work, params = found.work, found.work.setup.params
    labels = work.setup.labels
    first = found.scores.get(found.headline.name)
    chosen = " The same split chose the best epoch." if work.usage == "validate" and params.keep == "best" else ""
    blank = f" {count(work.unlabelled, 'chip')} without a label were left out." if work.unlabelled else ""
    return Report(
        title=f"EarthPrior: {params.task} of {params.label_column}, {_start(params)}",
        subtitle=f"Learned from {count(len(work.train), 'labelled chip')} (of {work.available:,}), judged on "
        f"{count(len(work.judged), f'{work.usage} chip')}; bands {', '.join(params.data.bands)}.{chosen}{blank}",
        verdict="" if first is None else f"{found.headline.noun[0].upper()}{found.headline.noun[1:]} {spelled(first)}.",
        numbers=[
            Number(NAMES.get(name, name), number(score.value, ".3f"), _interval(score))
            for name, score in found.scores.items()
        ],
        sections=[
            Section("What was learned", [_learned(found, labels.classes)], tables=[_table(found)]),
            Section(
                "Training",
                [f"{params.steps:,} steps; epoch {found.best_epoch} was the best on the validate chips."],
                [Picture(pictures["history"], "history", "Averaged weights on the validate chips, in crops.")],
            ),
        ],
        identity=identity,
    )


def _start(params: Any) -> str:
    return "from scratch" if params.start == "untrained" else "finetuned"


def _interval(score: Score) -> str:
    return f"95 % interval {score.low:.3f} to {score.high:.3f}" if score.low == score.low else "no interval"


def _learned(found: Found, classes: Sequence[Any]) -> str:
    params = found.work.setup.params
    trained = {
        "head": "the head alone, on frozen features",
        "last": f"the head and the last {params.last_levels} levels below it",
        "all": "all weights",
    }[params.train]
    start = "an untrained network" if params.start == "untrained" else f"the network of {params.pretrained}"
    kinds = f" Classes: {', '.join(map(str, classes))}." if classes else ""
    return (
        f"Beginning with {start}, {trained} were trained, with a {params.head} head on the features of the "
        f"{found.work.setup.params.side or 'serving side'}.{kinds} Intervals are of a bootstrap over chips."
    )


def _table(found: Found) -> Table:
    rows = [
        [NAMES.get(name, name), number(s.value, ".4f"), number(s.low, ".4f"), number(s.high, ".4f")]
        for name, s in found.scores.items()
    ]
    return Table(["score", "value", "low", "high"], rows, f"On whole {found.work.usage} chips")
