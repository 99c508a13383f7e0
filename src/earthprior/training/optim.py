"""Optimizers, LR schedules and the running average of weights: torch's own, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

from earthprior.params import Params

LRScheduler = lr_scheduler.LRScheduler


def adamw(parameters: Iterable[nn.Parameter], params: Params) -> torch.optim.Optimizer:
    """AdamW. Source: Loshchilov & Hutter 2019, arXiv:1711.05101."""
    return torch.optim.AdamW(
        parameters,
        lr=params.lr,
        weight_decay=params.weight_decay,
        betas=params.adamw.betas,
        eps=params.adamw.eps,
        fused=True,
    )


def cosine(optimizer: torch.optim.Optimizer, params: Params, steps_per_epoch: int) -> LRScheduler:
    """From lr to eta_min along half a cosine over the epochs after warm-up."""
    steps = (params.epochs - params.warmup_epochs) * steps_per_epoch
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=params.cosine.eta_min)


def cosinewarm(optimizer: torch.optim.Optimizer, params: Params, steps_per_epoch: int) -> LRScheduler:
    """Cosine with warm restarts, t_0 epochs to the first. Source: Loshchilov & Hutter 2017, arXiv:1608.03983."""
    section = params.cosinewarm
    return lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, T_0=section.t_0 * steps_per_epoch, T_mult=section.t_mult, eta_min=section.eta_min
    )


def constant(optimizer: torch.optim.Optimizer, params: Params, steps_per_epoch: int) -> LRScheduler:
    """lr throughout."""
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], Params], torch.optim.Optimizer]] = {"adamw": adamw}
LR_SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, Params, int], LRScheduler]] = {
    "cosine": cosine,
    "cosinewarm": cosinewarm,
    "none": constant,
}


def lr_schedule(optimizer: torch.optim.Optimizer, params: Params, steps_per_epoch: int) -> LRScheduler:
    """The chosen LR schedule, stepped once per optimizer step; it begins when the linear warm-up has reached lr."""
    after = LR_SCHEDULES[params.lr_schedule](optimizer, params, steps_per_epoch)
    warmup_steps = params.warmup_epochs * steps_per_epoch
    if warmup_steps == 0:
        return after
    # The first step already moves: it has lr / (warmup_steps + 1), not 0.
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    return lr_scheduler.SequentialLR(optimizer, [warmup, after], milestones=[warmup_steps])


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a network's weights and buffers.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that short runs are not an average of their start.
    Buffers (batch norm statistics) are averaged too; counters are copied.
    """

    @torch.no_grad()
    def update(average: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor | int) -> None:
        if not average[0].is_floating_point():
            for mine, theirs in zip(average, current, strict=True):
                mine.copy_(theirs)
            return
        n = int(updates)
        torch._foreach_lerp_(list(average), list(current), 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(network, multi_avg_fn=update, use_buffers=True)
