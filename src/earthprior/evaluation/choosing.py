"""At which noise level, and from which side of the network, frozen features serve best: asked of validation chips.

For every candidate a quick linear probe is fitted on training chips and judged on validation chips, on fewer pixels
than the probes that are reported. The choice is kept beside the weights, for whoever takes the backbone away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from earthprior.chips.batch import Batch
from earthprior.chips.crops import grid_crops, grid_windows
from earthprior.evaluation.image_labels import Images, ImageSplits, answers
from earthprior.evaluation.labelled import Labelled, LabelledSplits, Material
from earthprior.evaluation.serving import Serving, candidates
from earthprior.probe import Labels, collect, judge, unprobeable
from earthprior.probe_models import IMAGE_PROBES, quick_linear
from earthprior.randomness import numpy_generator
from earthprior.representations import FrozenFeatures, PooledFeatures
from earthprior.scoring import image_scores
from earthprior.tasks.diffusion import DiffusionTask

CROPS_AT_ONCE = 16
CROPS, CROP_PIXELS = 96, 128
"""Of each split, and of each crop: of fewer pixels narrow blocks, which overfit less, would be favoured."""

CROP_VALUES = 32_000_000
"""Of each split in memory: large crops of many bands are fewer."""

CHIPS, CHIP_CROPS = 192, 4
"""Of each split, where whole images are labelled."""


def try_pixels(material: Material, task: DiffusionTask, splits: LabelledSplits) -> list[Serving]:
    """Every candidate with its average precision on pixels of validation chips; none where they tell nothing."""
    fit_crops, asked_crops = (_crops(material, chips) for chips in (splits.fit, splits.choose))
    tried: list[Serving] = []
    for block in candidates(material.params, task):
        whole = replace(block[-1], levels=tuple(range(len(task.widths))))
        represent = FrozenFeatures(whole.features(task), material.params.data.train_px, CROPS_AT_ONCE)
        fit, asked = (collect(crops, represent, splits.classes, CROP_PIXELS) for crops in (fit_crops, asked_crops))
        if unprobeable(fit.classes, asked.classes):
            return []
        for candidate in block:
            columns = _columns(candidate.levels, task.widths)
            part, other = (replace(pixels, values=pixels.values[:, columns]) for pixels in (fit, asked))
            scores, _ = judge(quick_linear, part, other, splits.classes)
            tried.append(replace(candidate, score=scores.values()["average_precision"]))
    return tried


def try_images(material: Material, task: DiffusionTask, splits: ImageSplits) -> list[Serving]:
    """Every candidate with its score on labelled validation chips: average precision, or R2."""
    probe = next(iter(IMAGE_PROBES[splits.kind].values()))
    headline = "r2" if splits.kind == "regression" else "average_precision"
    fit, asked = (Images(chips.rows[:CHIPS], chips.truths[:CHIPS], 0) for chips in (splits.fit, splits.choose))
    tried: list[Serving] = []
    if len(fit.rows) < 2 or len(asked.rows) < 2 or len(np.unique(fit.truths)) < 2:
        return []
    for block in candidates(material.params, task):
        whole = replace(block[-1], levels=tuple(range(len(task.widths))))
        px = material.params.data.train_px
        represent = PooledFeatures(whole.features(task), px, CROPS_AT_ONCE, CHIP_CROPS)
        values, others = (chips.represented(material, represent) for chips in (fit, asked))
        for candidate in block:
            columns = _columns(candidate.levels, [2 * width for width in task.widths])
            answer, _ = answers(probe, splits, fit.truths, values[:, columns], others[:, columns])
            score = image_scores(splits.kind, asked.truths, answer)[headline].value
            tried.append(replace(candidate, score=score))
    return tried


def _crops(material: Material, chips: Labelled) -> list[tuple[Batch, list[str], list[Labels]]]:
    """Crops of a split, evenly many of each chip, at places that its path chooses.

    Pixels at a crop's rim count as invalid: the network knows half of their surroundings only, and the probes that are
    reported read such pixels from another crop.
    """
    params = material.params
    px, bands = params.data.train_px, len(params.data.bands)
    most = max(1, min(CROPS, CROP_VALUES // (bands * px**2)))
    kept = Labelled(chips.rows[:most], chips.labels[:most], 0)
    per_chip = -(-most // max(1, len(kept.rows)))
    found = []
    for batch, keys, labels in kept.batches(material):
        windows = grid_windows(batch, px)
        crops, chosen, parts, names = grid_crops(batch, px), [], [], []
        for index, (key, label) in enumerate(zip(keys, labels, strict=True)):
            for place in sorted(numpy_generator("probe crops", key).permutation(len(windows))[:per_chip].tolist()):
                top, left = windows[place]
                chosen.append(index * len(windows) + place)
                parts.append(label[top : top + px, left : left + px])
                names.append(f"{key}#{place}")
        taken = crops[torch.tensor(chosen, device=crops.x0.device)]
        rim = px // 8
        inner = torch.zeros_like(taken.valid)
        inner[..., rim : px - rim, rim : px - rim] = True
        found.append((replace(taken, valid=taken.valid & inner), names, parts))
    return found


def _columns(levels: Sequence[int], widths: Sequence[int]) -> NDArray[np.int64]:
    """Where the levels' channels are among all levels'."""
    ends = np.cumsum(widths)
    return np.concatenate([np.arange(ends[level] - widths[level], ends[level]) for level in levels])
