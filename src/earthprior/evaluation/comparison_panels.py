"""The same validation chips under the same noise, denoised by each of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from earthprior import build, handover
from earthprior.chips.batch import Batch, prepare
from earthprior.chips.loader import RawBatch, load_batches
from earthprior.chips.read import ChipSpec
from earthprior.chips.selection import chip_key, read_stats, select, spread
from earthprior.diffusion.gain import fixed_noise, noise_levels
from earthprior.errors import EarthPriorError
from earthprior.evaluation.comparison import Compared
from earthprior.evaluation.denoising import PANEL_RHOS, denoised, panel_title
from earthprior.figures import Panel
from earthprior.figures.imagery import Array
from earthprior.params import Params, parse

FILTER = "linear filter"
KEPT = ("network.safetensors", "linear.safetensors", "config.json", "stats.json")


@dataclass
class Drawing:
    """What can be drawn of several runs.

    Attributes:
        panels: Per chip, one for each noise level; empty where nothing can be drawn.
        notes: Which runs are left out and why, and what else to know, a sentence each.
    """

    panels: list[list[Panel]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Fitting:
    """A run that can see the workspace's chips, and the params that it was trained with."""

    run: Compared
    trained: Params

    @property
    def px(self) -> int:
        return self.trained.data.train_px


@dataclass(frozen=True)
class _Answers:
    """About one chip at one level: the noisy chip and the filter's estimate of the first run, all runs' by name."""

    noisy: Array
    linear: Array
    estimates: dict[str, Array] = field(default_factory=dict)


def draw(runs: Sequence[Compared], params: Params, root: Path, chips: int) -> Drawing:
    """Denoise some validation chips of the workspace by every run whose weights fit them.

    Args:
        runs: The runs.
        params: The workspace's params, which say what its chips are.
        root: The project's root, holding the data folder and results/stats/.
        chips: How many, evenly spread over the split.
    """
    drawing = Drawing()
    fitting = []
    for run in runs:
        found = _fitting(run, params)
        if isinstance(found, str):
            drawing.notes.append(f"{run.letter} is not shown: {found}")
        else:
            fitting.append(found)
    if not fitting:
        return drawing
    try:
        stats, _ = read_stats(root)
        selection = select(params, root, stats)
        rows = spread(selection.validate, chips)
        spec, order = ChipSpec.from_params(params.data), [range(len(rows))]
        (raw,) = load_batches(selection.folder, rows, order, spec, readers=params.operation.readers)
    except EarthPriorError as error:
        drawing.notes.append(f"No chips are shown, for the workspace's cannot be read: {_on_a_line(error)}")
        return drawing
    drawing.notes += _other_versions(fitting, stats["data"].get("md5"))
    drawing.panels = _panels(fitting, raw, params, drawing.notes)
    return drawing


def _fitting(run: Compared, params: Params) -> _Fitting | str:
    """The run, if its network can be asked about the workspace's chips; else why not."""
    data = params.data
    missing = [name for name in KEPT if not (run.run.folder / name).is_file()]
    if missing:
        return f"its {', '.join(missing)} {'are' if len(missing) > 1 else 'is'} not kept."
    try:
        trained = parse(handover.read_config(run.run.folder / "config.json")["params"], "config.json")
    except EarthPriorError as error:
        return f"this code cannot rebuild its network. {_on_a_line(error)}"
    for key in ("bands", "image_columns"):
        theirs, ours = getattr(trained.data, key), getattr(data, key)
        if theirs != ours:
            return f"its data.{key} are {', '.join(theirs)}; the workspace's are {', '.join(ours)}."
    if trained.data.train_px > data.read_px:
        return f"it sees {trained.data.train_px} px, and the workspace's chips have {data.read_px} px."
    return _Fitting(run, trained)


def _other_versions(fitting: Sequence[_Fitting], md5: str | None) -> list[str]:
    others = [found.run.letter for found in fitting if md5 and found.run.run.data_md5 not in (None, md5)]
    told = "Trained on another version of the data than the one shown here, and perhaps on these very chips: "
    return [f"{told}{', '.join(others)}."] if others else []


def _panels(fitting: Sequence[_Fitting], raw: RawBatch, params: Params, notes: list[str]) -> list[list[Panel]]:
    """Per chip its panels, of the part of the chip that all runs see."""
    read, largest, smallest = params.data.read_px, max(f.px for f in fitting), min(f.px for f in fitting)
    if largest > smallest:
        told = ", ".join(f"{found.run.letter} {found.px} px" for found in fitting)
        notes.append(f"Shown are the middle {smallest} px of what each run sees ({told}).")
    answers: dict[tuple[int, float], _Answers] = {}
    names = []
    for found in fitting:
        try:
            _ask(found, raw, largest, smallest, build.device(params), answers)
        except EarthPriorError as error:
            notes.append(f"{found.run.letter} is not shown: {_on_a_line(error)}")
        else:
            names.append(found.run.name)
    shown = _window(read, largest, smallest)
    panels: dict[int, list[Panel]] = {}
    for (chip, rho), answer in sorted(answers.items(), key=lambda item: item[0]):
        title = panel_title(rho, chip_key(raw.rows[chip]))
        clean, valid = raw.pixels[chip].float()[shown].numpy(), raw.valid[chip][shown].numpy()
        estimates = {FILTER: answer.linear, **{name: answer.estimates.get(name) for name in names}}
        panels.setdefault(chip, []).append(Panel(title, clean, answer.noisy, estimates, valid))
    return list(panels.values())


@torch.no_grad()
def _ask(
    found: _Fitting,
    raw: RawBatch,
    largest: int,
    smallest: int,
    device: torch.device,
    answers: dict[tuple[int, float], _Answers],
) -> None:
    """Add one run's estimates by (chip, level); the first run at a level gives the noisy chip and the filter's, too.

    Raises:
        EarthPriorError: The run's network or normalization cannot be rebuilt, or no level is reached.
    """
    folder, px = found.run.run.folder, found.px
    task, trained = build.pretrained_task(folder)
    task = task.to(device).eval()
    whole = prepare(raw, build.normalizer(trained, handover.read_stats(folder / "stats.json")), device)
    seen = _window(whole.x0.shape[-1], largest, px)
    batch = Batch(whole.x0[seen].contiguous(), whole.valid[seen].contiguous(), whole.affine)
    levels = [level for level in noise_levels(task.schedule, float(task.linear.std)) if level.rho in PANEL_RHOS]
    first = (largest - smallest) // 2 - (largest - px) // 2
    shown = (..., slice(first, first + smallest), slice(first, first + smallest))
    for chip, row in enumerate(raw.rows):
        for level in levels:
            eps = fixed_noise(chip_key(row), level.rho, (batch.x0.shape[1], largest, largest))
            images = denoised(task, batch[chip : chip + 1], level, eps[_window(largest, largest, px)])
            noisy, linear, network = (image[shown] for image in images)
            answers.setdefault((chip, level.rho), _Answers(noisy, linear)).estimates[found.run.name] = network


def _window(size: int, outer: int, inner: int) -> tuple[Any, slice, slice]:
    """The middle `inner` px of the middle `outer` px of the last two axes, both `size` px wide.

    Middles of middles, for where odd and even widths meet the middle of the whole is not the middle of a part.
    """
    first = (size - outer) // 2 + (outer - inner) // 2
    part = slice(first, first + inner)
    return ..., part, part


def _on_a_line(error: EarthPriorError) -> str:
    return " ".join(str(error).split())
