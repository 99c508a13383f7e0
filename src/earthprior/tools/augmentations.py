"""`earthprior augmentations`: a picture of what each augmentation does to training chips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from earthprior import build
from earthprior.chips.augment import augment
from earthprior.chips.batch import Batch
from earthprior.chips.normalize import denormalize
from earthprior.chips.selection import read_in_order, read_stats, select, spread
from earthprior.figures import Stretch, save_png
from earthprior.figures.augmentation import Column, augmentation_figure
from earthprior.params import AS_THEY_ARE, AugmentationParams, Params
from earthprior.randomness import torch_generator

OFF: dict[str, Any] = {**AS_THEY_ARE.model_dump(), "crop_strategy": "center"}
"""The section with which every chip stays as it is."""

TYPICAL: dict[str, Any] = {
    "flip": True,
    "rotation_degree": {"low": -15.0, "high": 15.0},
    "scale_factor": (0.75, 1.5),
    "crop_strategy": "random",
    "patch_shift_px": 8,
    "contrast_range": (0.9, 1.2),
    "br_range": (-0.02, 0.02),
    "bshift_gamma_range": (0.5, 2.0),
    "patch_gamma_range": (0.5, 2.0),
    "sigma_range": (0.03, 0.07),
}
"""What is shown of an augmentation that params.yaml has off."""

RADIOMETRIC = ("contrast_range", "br_range", "bshift_gamma_range", "patch_gamma_range", "sigma_range")


def run(params: Params, root: Path, chips: int, out: Path | None = None) -> None:
    """Draw the picture and say where it is.

    Args:
        params: The whole of params.yaml.
        root: The project's root, holding results/stats/stats.json.
        chips: How many training chips to show, evenly spread over the catalog.
        out: The PNG; None means work/augmentations.png.

    Raises:
        EarthPriorError: Statistics are missing, or the data changed since they were made.
    """
    stats, _ = read_stats(root)
    selection = select(params, root, stats)
    rows = spread(selection.train, chips)
    normalizer = build.normalizer(params, stats)
    ((batch, _),) = read_in_order(params, selection.folder, rows, normalizer, torch.device("cpu"), len(rows))
    whole = zip(denormalize(batch.x0, batch.affine).numpy(), batch.valid[:, 0].numpy(), strict=True)
    stretches = [Stretch.of([chip], [valid]) for chip, valid in whole]
    titles = [Path(row.images[0]).stem for row in rows]
    figure = augmentation_figure(columns(batch, params), titles, stretches, params.data.bands)
    path = out or root / "work/augmentations.png"
    save_png(figure, path)
    print(f"{len(rows)} training chips under each augmentation: {path if out else path.relative_to(root)}")


def columns(batch: Batch, params: Params) -> list[Column]:
    """The middle of the chips, each augmentation alone, and twice all that params.yaml has on.

    The draws are the same for every seed.
    """
    section = params.augmentation
    crop_px = params.data.crop_px

    def view(changes: dict[str, Any], *address: str) -> Batch:
        changed = AugmentationParams(**{**OFF, **changes})
        return augment(batch, changed, crop_px, torch_generator("augmentations", *address))

    middle = view({})
    shown = [_column("as it is", "the chip's middle", True, middle, None)]
    for key, typical in TYPICAL.items():
        value = getattr(section, key)
        active = value != OFF[key]
        detail = _text(key, value) if active else f"{_text(key, typical)}\noff in params"
        changed = view({key: value if active else typical}, key)
        shown.append(_column(key, detail, active, changed, middle if key in RADIOMETRIC else None))
    twice = [(draw, view(section.model_dump(), "all", draw)) for draw in ("first draw", "second draw")]
    return shown + [_column("all that are on", draw, True, views, None) for draw, views in twice]


def _column(title: str, detail: str, active: bool, views: Batch, plain: Batch | None) -> Column:
    """With `plain`, the pictures say how far they are from it, root mean square over valid pixels and bands."""
    notes = [""] * len(views)
    if plain is not None:
        count = (views.valid.sum((1, 2, 3)) * views.x0.shape[1]).clamp(min=1)
        squares = torch.where(views.valid, views.x0 - plain.x0, 0.0).square().sum((1, 2, 3))
        notes = [f"rms {rms:.2g}" for rms in (squares / count).sqrt().tolist()]
    physical = denormalize(views.x0, views.affine).numpy()
    return Column(title, detail, active, list(physical), list(views.valid[:, 0].numpy()), notes)


def _text(key: str, value: Any) -> str:
    """A setting as a reader would say it."""
    if isinstance(value, dict | tuple):
        numbers = value.values() if isinstance(value, dict) else value
        choice = key == "rotation_degree" and isinstance(value, tuple)
        return (", " if choice else " to ").join(f"{number:g}" for number in numbers)
    return "on" if value is True else str(value)
