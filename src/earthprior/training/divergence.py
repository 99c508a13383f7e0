"""When a loss or a gradient is no finite number: who was in the batch, what came before, and what to change."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from earthprior import build
from earthprior.chips.catalog import ChipRow
from earthprior.errors import DivergedError
from earthprior.files import write_json
from earthprior.journal import spelled
from earthprior.params import LearningParams
from earthprior.tasks.task import Loss
from earthprior.training.checkpoint import CheckpointStore

RECORD = "diverged.json"
NORMS = 20
"""Gradient norms that are remembered."""
SHOWN_CHIPS, SHOWN_NORMS = 3, 5


class NonFinite(Exception):
    """A step's loss or gradient is no finite number; the optimizer has not moved.

    Args:
        total: The loss.
        norm: The gradient's norm, before clipping.
        loss: Of the whole batch.
    """

    def __init__(self, total: float, norm: float, loss: Loss) -> None:
        super().__init__(total, norm)
        self.total, self.norm, self.loss = total, norm, loss


@dataclass(frozen=True)
class Moment:
    """Where in the run it was.

    Attributes:
        step: Counted from 1.
        total_steps: Of the run.
        epoch: Counted from 1.
        lr: Of this step.
        norms: Gradient norms of the steps before, oldest first.
    """

    step: int
    total_steps: int
    epoch: int
    lr: float
    norms: Sequence[float]


def of_step(
    fault: NonFinite,
    moment: Moment,
    rows: Sequence[ChipRow],
    params: LearningParams,
    device: torch.device,
    store: CheckpointStore,
    writes: bool,
) -> DivergedError:
    """What to tell of a step that diverged; all of it is in RECORD in the run's folder.

    Args:
        fault: What was found.
        moment: When.
        rows: The whole batch's chips, in the order of the loss per chip.
        params: Of the run.
        device: Where it trains.
        store: Its checkpoints.
        writes: Whether this process writes the record.
    """
    chips = _chips(rows, fault.loss)
    if writes:
        content = {
            "step": moment.step, "epoch": moment.epoch, "lr": moment.lr, "loss": spelled(fault.total),
            "gradient_norm": spelled(fault.norm), "gradient_norms_before": [spelled(norm) for norm in moment.norms],
            "chips": [{**chip, "loss": spelled(chip["loss"])} for chip in chips], "last_checkpoint": store.newest(),
        }  # fmt: skip
        # The message says what matters, should the disk be full as well.
        with suppress(OSError):
            write_json(store.folder / RECORD, content)
    before = ", ".join(f"{norm:.3g}" for norm in moment.norms[-SHOWN_NORMS:]) or "none"
    worst = sorted(chips, key=lambda chip: -chip["loss"] if math.isfinite(chip["loss"]) else -math.inf)
    named = "; ".join(_words(chip) for chip in worst[:SHOWN_CHIPS])
    return DivergedError(
        f"training diverged at step {moment.step:,} of {moment.total_steps:,} (epoch {moment.epoch}): loss "
        f"{fault.total:g}, gradient norm {fault.norm:g} (before it: {before}), lr {moment.lr:g}. Worst of the "
        f"{len(chips)} chips: {named}. All of them: {os.path.relpath(store.folder / RECORD)}. "
        f"{what_now(params, device, store)}, or look at the first of these chips"
    )


def of_average(
    epoch: int,
    step: int,
    judged: Mapping[str, float],
    params: LearningParams,
    device: torch.device,
    store: CheckpointStore,
) -> DivergedError:
    """What to tell where the averaged weights' error on the validation chips is no finite number.

    Args:
        epoch: After which they were judged, counted from 1.
        step: After which.
        judged: What was found; empty in processes that do not judge.
        params: Of the run.
        device: Where it trains.
        store: Its checkpoints.
    """
    names = [name for name, value in judged.items() if not math.isfinite(value)]
    found = f" ({', '.join(names)})" if names else ""
    return DivergedError(
        f"training diverged: after epoch {epoch} (step {step:,}) the averaged weights' error on the validation chips "
        f"is no finite number{found}. {what_now(params, device, store)}"
    )


def what_now(params: LearningParams, device: torch.device, store: CheckpointStore) -> str:
    """What is kept, and which dials end it."""
    last = store.newest()
    kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    from_there = "continues from it" if last else "begins anew"
    clip = "set grad_clip (null now)" if params.grad_clip is None else f"lower grad_clip ({params.grad_clip:g} now)"
    dials = [f"lower lr ({params.lr:g} now)", clip]
    if build.autocast_dtype(params, device) is not None:
        dials.append(f"set precision: float32 ({params.precision} now)")
    return (
        f"Nothing of it was kept; {kept}. The same command {from_there} and diverges at the same step again, so change "
        f"a dial, which begins a new run: {', '.join(dials)}"
    )


def _chips(rows: Sequence[ChipRow], loss: Loss) -> list[dict[str, Any]]:
    timesteps: Iterable[int | None] = [None] * len(rows) if loss.t is None else [int(t) for t in loss.t.tolist()]
    return [
        {"file": row.images[0], "catalog_line": row.line, "timestep": t, "loss": float(value)}
        for row, t, value in zip(rows, timesteps, loss.per_chip.tolist(), strict=True)
    ]


def _words(chip: Mapping[str, Any]) -> str:
    when = "" if chip["timestep"] is None else f" at timestep {chip['timestep']}"
    return f"{chip['file']} (catalog line {chip['catalog_line']}){when}, loss {chip['loss']:.3g}"
