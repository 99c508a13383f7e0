"""What the probes and the pictures of features say on the report's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from earthprior import figures
from earthprior.evaluation.gallery import Gallery
from earthprior.evaluation.probing import REPRESENTATIONS, Probing
from earthprior.evaluation.serving import Serving
from earthprior.figures.probes import capitalized
from earthprior.probe import ProbeResult
from earthprior.report import SCORE_NAMES, Number, Picture, Section, Table, count, number
from earthprior.scoring import Score

PROBES = {
    "linear": "linear probe",
    "mlp": "small MLP",
    "logistic": "logistic regression",
    "ridge": "ridge regression",
    "knn": "10 nearest neighbours",
}
"""What probes are called."""

NETWORKS = {"network": "trained", "untrained": "untrained"}

_SERVING = "On validation chips: each block on its own, and all of a side together; framed the one that serves."

INTERVALS = "Intervals: 95 %, from 1,000 resamples of the judged chips."


def probe_figures(probing: Probing, gallery: Gallery, bands: Sequence[str]) -> dict[str, Figure | None]:
    """By name; None for what there is no data for."""
    maps, rows = gallery.maps, gallery.neighbours
    return {
        "serving": _serving_figure(probing),
        "probes": _scores_figure(probing.pixels),
        "image_probes": _scores_figure(probing.images),
        "feature_maps": figures.feature_maps_figure(maps, bands, NETWORKS) if maps else None,
        "neighbours": figures.neighbours_figure(rows, bands, gallery.note) if rows else None,
    }


def sections(probing: Probing, usage: str, paths: Mapping[str, Path]) -> list[Section]:
    """The probes, and the features in pictures."""
    found = [_serving_section(probing, usage, paths), _pixels_section(probing, usage, paths)]
    if probing.images.scores or "image_label_column)" not in (probing.images.reason or ""):
        found.append(_images_section(probing, usage, paths))
    return [*found, *_pictures_section(probing, paths)]


def headline(probing: Probing) -> list[Number]:
    """The first probe's first score, beside the best of what needs no training."""
    for result in (probing.pixels, probing.images):
        for probe, scores in result.scores.items():
            kind = next(iter(scores["network"]))
            others = ", ".join(
                f"{name} {number(scores[name][kind].value, '.3f')}"
                for name in scores
                if name not in ("network", "pixels")
            )
            title = f"{capitalized(PROBES[probe])}, {SCORE_NAMES[kind]}"
            return [Number(title, number(scores["network"][kind].value, ".3f"), others)]
    return []


def _serving_section(probing: Probing, usage: str, paths: Mapping[str, Path]) -> Section:
    serving = probing.serving
    title = "Where features are taken"
    if not probing.tried:
        text = f"No labels choose, so features are taken at {serving.words}, as {serving.chosen_by} says."
        return Section(title, [text])
    text = (
        f"Features serve best at {serving.words}: of all levels of a side, the best noise level and side by "
        f"{serving.chosen_by}. Single levels (0 is the finest, and each next one halves the resolution) show where it "
        "comes from. serving.json keeps the choice beside the weights."
    )
    if usage == "validate":
        text += (
            " The same split judges below, so the network's scores there are a little too good; test rows would not be."
        )
    picture = Picture(
        paths["serving"],
        "serving",
        _SERVING,
    )
    return Section(title, [text], [picture])


def _pixels_section(probing: Probing, usage: str, paths: Mapping[str, Path]) -> Section:
    """What the probes of label rasters say, or why there are none."""
    result, facts = probing.pixels, probing.pixels.facts
    title = "Are the features worth anything? Probes of pixels"
    if not result.scores:
        return Section(title, [f"No probe: {result.reason}. Its metrics are absent.{_gaps(facts)}"])
    text = (
        f"The same small classifiers on standardized values of single pixels, fitted on {facts['fit_pixels']:,} pixels "
        f"of {count(facts['fit_chips'], 'training chip')} and judged on {facts['judged_pixels']:,} pixels of "
        f"{count(facts['judged_chips'], f'{usage} chip')} ({facts['classes']} classes). The network is frozen."
        f"{_gaps(facts)}"
    )
    if "positive_share" in facts:
        text += f" Guessing scores an average precision of {facts['positive_share']:.3f}, the share of positive pixels."
    notes = [text, f"{verdict(result)} {INTERVALS}", *_unconverged(result)]
    return Section(title, notes, _pictures(paths, "probes"), _tables(result))


def _images_section(probing: Probing, usage: str, paths: Mapping[str, Path]) -> Section:
    """What the probes of whole images say, or why there are none."""
    result, facts = probing.images, probing.images.facts
    title = "Probes of whole images"
    if not result.scores:
        return Section(title, [f"No probe: {result.reason}. Its metrics are absent.{_gaps(facts)}"])
    what = "numbers" if facts["kind"] == "regression" else f"{facts['classes']} classes"
    text = (
        f"From means and standard deviations of each channel over the chip, standardized: {what}, fitted on "
        f"{count(facts['fit_chips'], 'training chip')} and judged on {count(facts['judged_chips'], f'{usage} chip')}."
        f"{_gaps(facts)}"
    )
    notes = [text, f"{verdict(result)} {INTERVALS}", *_unconverged(result)]
    return Section(title, notes, _pictures(paths, "image_probes"), _tables(result))


def _pictures_section(probing: Probing, paths: Mapping[str, Path]) -> list[Section]:
    captions = {
        "feature_maps": "What the trained and the untrained network tell apart.",
        "neighbours": "Chips that the trained network calls alike.",
    }
    pictures = [Picture(paths[name], name, text) for name, text in captions.items() if name in paths]
    text = f"Frozen features at {probing.serving.words}; no labels are used."
    return [Section("Features in pictures", [text], pictures)] if pictures else []


def verdict(result: ProbeResult) -> str:
    """Whether pretraining helped, in a sentence that the numbers force."""
    words = {
        "untrained": "the untrained network's",
        "context": "raw pixels with local context",
        "statistics": "the bands' statistics",
    }
    texts = []
    for probe, scores in result.scores.items():
        kind = next(iter(scores["network"]))
        ours = scores["network"][kind].value
        asked = [name for name in words if name in scores]
        better = [words[name] for name in asked if not ours > scores[name][kind].value]
        beaten = [words[name] for name in asked if ours > scores[name][kind].value]
        if not better:
            texts.append(f"{PROBES[probe]}: the trained network's features beat {_and(beaten)}.")
        else:
            texts.append(f"{PROBES[probe]}: the trained network's features do not beat {_and(better, 'or')}.")
    return " ".join(map(capitalized, texts))


def _and(names: Sequence[str], word: str = "and") -> str:
    return f" {word} ".join(names)


def _gaps(facts: Mapping[str, int]) -> str:
    skipped = facts.get("chips_without_label", 0)
    return f" {count(skipped, 'chip')} without a usable label were skipped." if skipped else ""


def _unconverged(result: ProbeResult) -> list[str]:
    if not result.unconverged:
        return []
    return [f"Stopped at the iteration limit, so a little low: {'; '.join(result.unconverged)}."]


def _tables(result: ProbeResult) -> list[Table]:
    tables = []
    for probe, scores in result.scores.items():
        kinds = list(next(iter(scores.values())))
        rows = [[REPRESENTATIONS[name], *(_cell(found[kind]) for kind in kinds)] for name, found in scores.items()]
        columns = ["representation", *(SCORE_NAMES[kind] for kind in kinds)]
        tables.append(Table(columns, rows, capitalized(PROBES[probe])))
    return tables


def _cell(score: Score) -> str:
    value = number(score.value, ".3f")
    return value if np.isnan(score.low) else f"{value} ({number(score.low, '.3f')} to {number(score.high, '.3f')})"


def _pictures(paths: Mapping[str, Path], name: str) -> list[Picture]:
    return [Picture(paths[name], name)] if name in paths else []


def _serving_figure(probing: Probing) -> Figure | None:
    if not probing.tried:
        return None
    blocks = list(dict.fromkeys(one.block for one in probing.tried))
    rhos = list(dict.fromkeys(one.rho for one in probing.tried))
    scores = np.full((len(blocks), len(rhos)), np.nan)

    def place(one: Serving) -> tuple[int, int]:
        return blocks.index(one.block), rhos.index(one.rho)

    for one in probing.tried:
        scores[place(one)] = np.nan if one.score is None else one.score
    regression = probing.images.facts.get("kind") == "regression" and not probing.pixels.scores
    return figures.serving_figure(
        scores, blocks, rhos, place(probing.serving), "R2" if regression else "average precision"
    )


def _scores_figure(result: ProbeResult) -> Figure | None:
    if not result.scores:
        return None
    first = next(iter(result.scores.values()))
    kind = next(iter(first["network"]))
    shown = {
        PROBES[probe]: {name: (one[kind].value, one[kind].low, one[kind].high) for name, one in scores.items()}
        for probe, scores in result.scores.items()
    }
    chance = result.facts.get("positive_share") if kind == "average_precision" else None
    return figures.scores_figure(shown, REPRESENTATIONS, SCORE_NAMES[kind], chance)
