"""The probes of an evaluation: features chosen on validation chips, then judged beside what needs no training.

Of label rasters single pixels are probed, of labels of whole images pooled features. One representation at a time is in
memory, and of a split at most MAX_VALUES numbers of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from earthprior import build
from earthprior.chips.catalog import ChipRow
from earthprior.evaluation import choosing, serving
from earthprior.evaluation.image_labels import ImageSplits, answers, read_images
from earthprior.evaluation.labelled import Labelled, LabelledSplits, Material, read_labelled
from earthprior.evaluation.serving import Serving
from earthprior.params import Params
from earthprior.probe import Pixels, ProbeResult, collect, judge, unprobeable
from earthprior.probe_models import IMAGE_PROBES, PIXEL_PROBES
from earthprior.representations import (
    ChipRepresentation,
    FrozenFeatures,
    PooledFeatures,
    Representation,
    image_statistics,
    raw_context,
    raw_pixels,
)
from earthprior.scoring import Score, image_scores
from earthprior.tasks.diffusion import DiffusionTask

MAX_PIXELS = 100_000
"""Per split: more would sharpen no difference that matters, and the fit is in memory."""

MAX_VALUES = 48_000_000
"""Per split: wide networks get fewer pixels (200 MB as float32)."""

CROPS_AT_ONCE, CHIP_CROPS = 16, 16

REPRESENTATIONS = {
    "network": "frozen features of the trained network",
    "untrained": "the same network, untrained",
    "context": "pixels with local means and deviations (5, 11, 21 px)",
    "pixels": "pixels alone",
    "statistics": "means, deviations and percentiles of the bands",
}
"""What the probes compare, in the report's order: the last one of whole images, the two before it of pixels."""


@dataclass(frozen=True)
class Probing:
    """What the probes of an evaluation found.

    Args:
        serving: Where features are taken.
        tried: The candidates with their scores on validation chips; empty where nothing could choose.
        pixels: Of label rasters.
        images: Of labels of whole images; its kind is among the facts.
    """

    serving: Serving
    tried: Sequence[Serving]
    pixels: ProbeResult
    images: ProbeResult

    @property
    def scores(self) -> dict[str, Mapping[str, Mapping[str, Score]]]:
        """By probe (those of images begin with image_), representation and name."""
        return {**self.pixels.scores, **{f"image_{name}": found for name, found in self.images.scores.items()}}


def untrained(params: Params, task: DiffusionTask) -> DiffusionTask:
    """The trained network's start, so that only the training differs."""
    return build.task(params, task.linear).to(task.linear.mean.device).eval()


def probe(material: Material, tasks: Mapping[str, DiffusionTask], judged: Sequence[ChipRow]) -> Probing:
    """Choose where features are taken, and compare the representations there.

    Args:
        material: What chips are read with; probes are fitted on the training chips.
        tasks: "network" and "untrained", in evaluation mode, on the device.
        judged: The rows that are judged.
    """
    params, task = material.params, tasks["network"]
    labelled = read_labelled(material, judged, _chip_limit(params, task))
    images = read_images(material, judged)
    tried: list[Serving] = []
    by = ""
    if isinstance(labelled, LabelledSplits):
        by = "a linear probe's average precision on pixels of validation chips"
        tried = choosing.try_pixels(material, task, labelled)
    if not tried and isinstance(images, ImageSplits):
        by = f"a {next(iter(IMAGE_PROBES[images.kind]))} probe of whole validation chips"
        tried = choosing.try_images(material, task, images)
    where = serving.chosen(tried, by) or serving.default(params, task)
    return Probing(
        where,
        tried,
        ProbeResult(reason=labelled) if isinstance(labelled, str) else _of_pixels(material, tasks, labelled, where),
        ProbeResult(reason=images) if isinstance(images, str) else _of_images(material, tasks, images, where),
    )


def linear_scores(material: Material, task: DiffusionTask, judged: Sequence[ChipRow]) -> dict[str, float] | str:
    """The linear probe on all levels of the decoder at `evaluate.probe_rho`, or why there is none.

    Where runs are compared, as in a search, nothing is chosen on the chips that judge.
    """
    labelled = read_labelled(material, judged, _chip_limit(material.params, task))
    if isinstance(labelled, str):
        return labelled
    where = serving.default(material.params, task)
    represent = FrozenFeatures(where.features(task), material.params.data.train_px, CROPS_AT_ONCE)
    fit, asked = (_pixels(material, chips, represent, labelled.classes) for chips in (labelled.fit, labelled.judged))
    if reason := unprobeable(fit.classes, asked.classes):
        return reason
    return judge(PIXEL_PROBES["linear"], fit, asked, labelled.classes)[0].values()


def _chip_limit(params: Params, task: DiffusionTask) -> int:
    """How many chips a split may have, by the width of the network's features."""
    return max(1, min(MAX_PIXELS, MAX_VALUES // sum(task.widths)) // params.evaluate.probe_pixels)


def _pixels(material: Material, chips: Labelled, represent: Representation, classes: Sequence[int]) -> Pixels:
    return collect(chips.batches(material), represent, classes, material.params.evaluate.probe_pixels)


def _of_pixels(
    material: Material, tasks: Mapping[str, DiffusionTask], splits: LabelledSplits, where: Serving
) -> ProbeResult:
    """Every probe on every representation of single pixels."""
    px = material.params.data.train_px
    representations: dict[str, Representation] = {
        name: FrozenFeatures(where.features(task), px, CROPS_AT_ONCE) for name, task in tasks.items()
    }
    representations |= {"context": raw_context, "pixels": raw_pixels}
    facts: dict[str, Any] = {"chips_without_label": splits.fit.empty + splits.judged.empty}
    scores: dict[str, dict[str, dict[str, Score]]] = {name: {} for name in PIXEL_PROBES}
    unconverged = []
    for name, represent in representations.items():
        fit = _pixels(material, splits.fit, represent, splits.classes)
        judged = _pixels(material, splits.judged, represent, splits.classes)
        facts |= _facts(fit, judged)
        if reason := unprobeable(fit.classes, judged.classes):
            return ProbeResult(reason=reason, facts=facts)
        for kind, probe_of in PIXEL_PROBES.items():
            found, converged = judge(probe_of, fit, judged, splits.classes)
            scores[kind][name] = found.scores()
            unconverged += [] if converged else [f"{kind}, {REPRESENTATIONS[name]}"]
    return ProbeResult(None, scores, facts, tuple(unconverged))


def _facts(fit: Pixels, judged: Pixels) -> dict[str, Any]:
    known = np.unique(fit.classes)
    share = {"positive_share": float(np.mean(judged.classes == known[1]))} if len(known) == 2 else {}
    return {
        "classes": len(known),
        "fit_chips": len(fit.counts),
        "fit_pixels": len(fit.classes),
        "judged_chips": len(judged.counts),
        "judged_pixels": len(judged.classes),
        **share,
    }


def _of_images(
    material: Material, tasks: Mapping[str, DiffusionTask], splits: ImageSplits, where: Serving
) -> ProbeResult:
    """Every probe on every representation of whole images."""
    px = material.params.data.train_px
    representations: dict[str, ChipRepresentation] = {
        name: PooledFeatures(where.features(task), px, CROPS_AT_ONCE, CHIP_CROPS) for name, task in tasks.items()
    }
    representations["statistics"] = image_statistics
    fit, judged = splits.fit, splits.judged
    facts: dict[str, Any] = {
        "kind": splits.kind,
        "classes": len(splits.classes),
        "fit_chips": len(fit.rows),
        "judged_chips": len(judged.rows),
        "chips_without_label": fit.left_out + judged.left_out,
    }
    if len(np.unique(fit.truths)) < 2 or not len(judged.rows):
        return ProbeResult(reason="the training chips' labels do not differ, or no judged chip has one", facts=facts)
    scores: dict[str, dict[str, dict[str, Score]]] = {name: {} for name in IMAGE_PROBES[splits.kind]}
    unconverged = []
    for name, represent in representations.items():
        values, asked = (chips.represented(material, represent) for chips in (fit, judged))
        for kind, probe_of in IMAGE_PROBES[splits.kind].items():
            answer, converged = answers(probe_of, splits, fit.truths, values, asked)
            scores[kind][name] = image_scores(splits.kind, judged.truths, answer)
            unconverged += [] if converged else [f"{kind}, {REPRESENTATIONS[name]}"]
    return ProbeResult(None, scores, facts, tuple(unconverged))
