"""A step's batch is worked through in shares: one after another in a process, side by side in several processes.

Shares are numbered through all processes, and what is random about one follows from its number. So two processes, or
one that accumulates two parts, see the same noise on the same chips and sum up the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from earthprior import build
from earthprior.chips.augment import augment
from earthprior.chips.batch import Batch, prepare
from earthprior.chips.catalog import ChipRow
from earthprior.chips.loader import RawBatch
from earthprior.chips.normalize import Normalizing
from earthprior.params import LearningParams
from earthprior.randomness import seed_of, torch_generator
from earthprior.tasks.task import Loss, Task
from earthprior.training.distributed import OtherEndsError, World, adding_up

UNREAD = -1


@dataclass(frozen=True)
class Share:
    """Some of a step's chips, with all that is random about them.

    Attributes:
        batch: Augmented chips on the device.
        rows: The chips' catalog rows.
        generator: As augmentation left it; the loss draws from copies, so that a second pass draws the same.
        dropout_seed: Of the global generators, which dropout draws from.
    """

    batch: Batch
    rows: Sequence[ChipRow]
    generator: torch.Generator
    dropout_seed: int


def make_share(
    raw: RawBatch, number: int, step: int, params: LearningParams, normalizer: Normalizing, device: torch.device
) -> Share:
    """Share `number` of the batch of `step`, from the chips as they were read."""
    address = (params.seed, "step", step, number)
    generator = torch_generator(*address, device=device)
    batch = augment(prepare(raw, normalizer, device), params.augmentation, params.data.crop_px, generator)
    return Share(batch, raw.rows, generator, seed_of(*address, "dropout"))


def share_weights(shares: Sequence[Share], world: World) -> Tensor:
    """What to multiply each share's mean with (N,), so that the processes' mean of sums is the whole batch's mean.

    A share's loss is the mean over its chips with pixels that count, and not all have the same number of these.

    Raises:
        OtherEndsError: Another process has none, see `tell_unread`.
    """
    counted = torch.stack([share.batch.counted().sum() for share in shares])
    together = world.gather(counted)
    if world.size > 1 and bool((together == UNREAD).any()):
        raise OtherEndsError
    return counted * world.size / together.sum().clamp(min=1)


def tell_unread(shares: int, world: World, device: torch.device) -> None:
    """Tell the processes that wait for the weights of this one's shares that it could not read their chips."""
    world.gather(torch.full((shares,), UNREAD, device=device))


def backward(task: Task, shares: Sequence[Share], weights: Tensor, params: LearningParams) -> list[Loss]:
    """Put the gradient of the whole batch's mean loss into the network's weights; each share's loss, detached."""
    task.network.zero_grad(set_to_none=True)
    losses = []
    for index, (share, weight) in enumerate(zip(shares, weights, strict=True)):
        torch.manual_seed(share.dropout_seed)
        with nullcontext() if index == len(shares) - 1 else adding_up(task.network):
            with autocast(params, weights.device):
                loss = task.loss(share.batch, share.generator.clone_state())
            (loss.total * weight).backward()
        losses.append(Loss(loss.total.detach(), loss.per_chip, loss.t, loss.terms))
    return losses


def joined(losses: Sequence[Loss], weights: Tensor, world: World) -> Loss:
    """The whole batch's loss from this process's shares, the same in all processes: chips in the shares' order."""

    def mean(values: list[Tensor]) -> Tensor:
        return world.gather(torch.stack(values) * weights).sum() / world.size

    t = [loss.t for loss in losses if loss.t is not None]
    return Loss(
        total=mean([loss.total for loss in losses]),
        per_chip=world.gather(torch.cat([loss.per_chip for loss in losses])),
        t=world.gather(torch.cat(t)) if t else None,
        terms={name: mean([loss.terms[name] for loss in losses]) for name in losses[0].terms},
    )


def autocast(params: LearningParams, device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision as params ask."""
    dtype = build.autocast_dtype(params, device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
