"""What a finetuning found, and its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from earthprior import figures
from earthprior.chips.batch import LABEL, prepare
from earthprior.chips.selection import spread
from earthprior.downstream.baseline import context_scores
from earthprior.downstream.finetuning import Done, Work
from earthprior.downstream.fitting import BackboneNormalizer, read, whole_chips
from earthprior.downstream.judging import HEADLINES, judge, map_of
from earthprior.downstream.saved import Finetuned
from earthprior.figures.maps import MapPanel, maps_figure
from earthprior.report import SCORE_NAMES, Number, Picture, Report, Section, Table, count, number
from earthprior.scoring import Score, flat_scores
from earthprior.training.headline import Headline

SHOWN_CHIPS = 6


@dataclass(frozen=True)
class Found:
    """What there is to tell.

    Attributes:
        work: What was finetuned.
        scores: Of the network that was kept, on the judged chips.
        history: One row an epoch.
        best_epoch: With the best headline on the validate chips.
        panels: Maps of some of the judged chips.
        baseline: Scores of raw pixels with local context, from the same labels, on the same chips; of maps only.
    """

    work: Work
    scores: dict[str, Score]
    history: pd.DataFrame
    best_epoch: int
    panels: Sequence[MapPanel] = ()
    baseline: Mapping[str, Score] = field(default_factory=dict)

    @property
    def headline(self) -> Headline:
        """What the task is judged by."""
        return HEADLINES[self.work.setup.labels.task]

    def metrics(self) -> dict[str, float]:
        """The content of metrics.json: scores with the ends of their intervals, and what they are of."""
        return {
            **flat_scores(self.scores),
            **{f"raw_context/{name}": value for name, value in flat_scores(dict(self.baseline)).items()},
            "judged_chips": len(self.work.judged),
            "train_chips": len(self.work.train),
        }


def judged(work: Work, done: Done) -> Found:
    """Judge the network on whole chips of the test split, or of the validate split where there is no other."""
    scores = judge(done.model, whole_chips(work.setup, work.judged))
    history, maps = pd.DataFrame(done.outcome.history), done.model.kind == "segmentation"
    baseline = context_scores(work.setup, work.train, work.judged) if maps else {}
    return Found(work, scores, history, done.outcome.best_epoch, _panels(work, done.model), baseline)


def told(found: Found) -> list[str]:
    """The result in a few lines for a terminal."""
    scores = ", ".join(f"{SCORE_NAMES[name]} {spelled(score)}" for name, score in found.scores.items())
    lines = [f"{scores} (with 95 % intervals over {count(len(found.work.judged), f'{found.work.usage} chip')})"]
    if (name := found.headline.name) in found.baseline:
        lines.append(f"raw pixels with local context: {SCORE_NAMES[name]} {spelled(found.baseline[name])}")
    return lines


def spelled(score: Score) -> str:
    """A score with its interval."""
    ends = f" [{score.low:.3f}, {score.high:.3f}]" if score.low == score.low else ""
    return f"{number(score.value, '.3f')}{ends}"


def draw(found: Found, folder: Path) -> dict[str, Path]:
    """Draw all figures; their paths by name."""
    paths = {"history": folder / "history.png"}
    headline = found.headline
    title = f"{headline.noun[0].upper()}{headline.noun[1:]} on validate chips"
    figures.save_png(figures.history_figure(found.history, headline.name, title), paths["history"])
    if found.panels:
        paths["maps"] = folder / "maps.png"
        setup = found.work.setup
        drawn = maps_figure(found.panels, setup.labels.classes, setup.params.data.bands)
        figures.save_png(drawn, paths["maps"])
    return paths


def _panels(work: Work, model: Finetuned) -> list[MapPanel]:
    """Some of the judged chips with labels and maps."""
    if model.kind != "segmentation":
        return []
    rows, normalizer = spread(work.judged, SHOWN_CHIPS), BackboneNormalizer(work.setup.backbone)
    panels = []
    for raw in read(work.setup, rows, [[place] for place in range(len(rows))]):
        batch = prepare(raw, normalizer, work.setup.device)
        found = map_of(model, batch.x0)[0].cpu().numpy()
        label, valid = raw.extra[LABEL][0].numpy(), raw.valid[0].numpy()
        # Copied: the loader fills its buffer anew.
        pixels = raw.pixels[0].numpy().copy()
        panels.append(MapPanel(Path(raw.rows[0].images[0]).stem, pixels, valid.copy(), label, found))
    return panels


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
        verdict="" if first is None else _verdict(found, first),
        below=_below(found),
        numbers=[
            Number(SCORE_NAMES[name], number(score.value, ".3f"), _interval(score))
            for name, score in found.scores.items()
        ],
        sections=[
            Section("What was learned", [_learned(found, labels.classes)], tables=[_table(found)]),
            *_maps(found, pictures),
            Section(
                "Training",
                [f"{params.steps:,} steps; epoch {found.best_epoch} was the best on the validate chips."],
                [Picture(pictures["history"], "history", "Averaged weights on the validate chips, in crops.")],
            ),
        ],
        identity=identity,
    )


def _below(found: Found) -> bool:
    """Whether labels alone, without a network, do better."""
    name = found.headline.name
    return name in found.baseline and found.scores[name].value < found.baseline[name].value


def _verdict(found: Found, first: Score) -> str:
    noun = found.headline.noun
    text = f"{noun[0].upper()}{noun[1:]} {spelled(first)}"
    if not found.baseline:
        return f"{text}."
    than = "less than" if _below(found) else "beside"
    other = spelled(found.baseline[found.headline.name])
    return (
        f"{text}, {than} {other} of a linear classifier on raw pixels and their local means and deviations, which "
        "learned from the same labels."
    )


def _maps(found: Found, pictures: dict[str, Path]) -> list[Section]:
    if "maps" not in pictures:
        return []
    text = (
        f"Some of the {found.work.usage} chips, evenly spread over the split. A map is blended from overlapping tiles "
        f"of {found.work.setup.params.data.train_px} px, as earthprior predict makes it."
    )
    return [Section("Maps", [text], [Picture(pictures["maps"], "maps beside labels and imagery")])]


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
        [SCORE_NAMES[name], spelled(score), *([spelled(found.baseline[name])] if found.baseline else [])]
        for name, score in found.scores.items()
    ]
    columns = ["score", "network", *(["raw pixels with local context"] if found.baseline else [])]
    return Table(columns, rows, f"On whole {found.work.usage} chips, with 95 % intervals")
