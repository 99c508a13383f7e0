"""LR schedules: torch's own, chosen by name, after a linear warm-up.

A schedule begins, with lr, where warm-up ends; its lengths (t_max, t_0, max_decay_epochs) count from there. The falls
of step and multistep are at epochs of the run, as one reads them in a table; none happens during warm-up. onecycle
rises by itself and knows no other warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from torch.optim import Optimizer, lr_scheduler

from earthprior.errors import ParamsError
from earthprior.params import LearningParams, Params

LRScheduler = lr_scheduler.LRScheduler


class _Cosine(lr_scheduler.CosineAnnealingLR):
    """Half a cosine that stays at its end; torch's would rise again."""

    def get_lr(self) -> Any:
        if self.last_epoch > self.T_max:
            return [group["lr"] for group in self.optimizer.param_groups]
        return super().get_lr()


def cosine(optimizer: Optimizer, params: Params, steps_per_epoch: int) -> LRScheduler:
    """From lr to eta_min along half a cosine, over t_max epochs or all after warm-up."""
    epochs = params.cosine.t_max or params.epochs - params.warmup_epochs
    return _Cosine(optimizer, T_max=epochs * steps_per_epoch, eta_min=params.cosine.eta_min)


def cosinewarm(optimizer: Optimizer, params: Params, steps_per_epoch: int) -> LRScheduler:
    """Cosine with warm restarts, t_0 epochs to the first. Source: Loshchilov & Hutter 2017, arXiv:1608.03983."""
    section = params.cosinewarm
    return lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, T_0=section.t_0 * steps_per_epoch, T_mult=section.t_mult, eta_min=section.eta_min
    )


def step(optimizer: Optimizer, params: Params, steps_per_epoch: int) -> LRScheduler:
    """Times gamma after every step_size epochs of the run."""
    falls = range(params.step.step_size, params.epochs + 1, params.step.step_size)
    return _falling(optimizer, params, steps_per_epoch, falls, params.step.gamma)


def multistep(optimizer: Optimizer, params: Params, steps_per_epoch: int) -> LRScheduler:
    """Times gamma after each of the milestones, which are epochs of the run."""
    return _falling(optimizer, params, steps_per_epoch, params.multistep.milestones, params.multistep.gamma)


def _falling(
    optimizer: Optimizer, params: Params, steps_per_epoch: int, falls: Iterable[int], gamma: float
) -> LRScheduler:
    after = [(epoch - params.warmup_epochs) * steps_per_epoch for epoch in falls if epoch > params.warmup_epochs]
    return lr_scheduler.MultiStepLR(optimizer, milestones=after, gamma=gamma)


def poly(optimizer: Optimizer, params: Params, steps_per_epoch: int) -> LRScheduler:
    """min_lr + (lr - min_lr) (1 - done)^power, over max_decay_epochs or all epochs after warm-up; then min_lr.

    torch's PolynomialLR knows no min_lr. Source: Liu et al. 2015, arXiv:1506.04579, Section 3.1 (the schedule "poly").
    """
    section = params.poly
    steps = (section.max_decay_epochs or params.epochs - params.warmup_epochs) * steps_per_epoch
    floor = section.min_lr / params.lr
    return lr_scheduler.LambdaLR(optimizer, lambda n: floor + (1 - floor) * (1 - min(n / steps, 1.0)) ** section.power)


def onecycle(optimizer: Optimizer, params: Params, steps_per_epoch: int) -> LRScheduler:
    """Up to lr over pct_start of the run, then down. Source: Smith & Topin 2018, arXiv:1708.07120.

    Raises:
        ParamsError: The rise has no step to happen in.
    """
    section, steps = params.onecycle, params.epochs * steps_per_epoch
    if section.pct_start * steps <= 1:
        raise ParamsError(
            f"onecycle.pct_start {section.pct_start:g} leaves none of the run's {steps} steps to rise in; raise it, or "
            "train for more epochs"
        )
    return lr_scheduler.OneCycleLR(
        optimizer, max_lr=params.lr, total_steps=steps, pct_start=section.pct_start, cycle_momentum=False,
        div_factor=section.div_factor, final_div_factor=section.final_div_factor,
    )  # fmt: skip


def constant(optimizer: Optimizer, params: Params, steps_per_epoch: int) -> LRScheduler:
    """lr throughout; what `plateau` does to it follows the epochs, see `LRSchedule`."""
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)


LR_SCHEDULES: dict[str, Callable[[Optimizer, Params, int], LRScheduler]] = {
    "cosine": cosine,
    "cosinewarm": cosinewarm,
    "step": step,
    "multistep": multistep,
    "plateau": constant,
    "poly": poly,
    "onecycle": onecycle,
    "none": constant,
}


class LRSchedule:
    """The learning rate of an optimizer: linear warm-up, then the schedule that params choose.

    Args:
        optimizer: Made with lr.
        params: Of the training. What offers a schedule's word has its section, too.
        steps_per_epoch: Optimizer steps.
    """

    def __init__(self, optimizer: Optimizer, params: LearningParams, steps_per_epoch: int) -> None:
        self._optimizer = optimizer
        whole = cast(Params, params)
        self._warmup_epochs = 0 if params.lr_schedule == "onecycle" else params.warmup_epochs
        self._by_step = LR_SCHEDULES[params.lr_schedule](optimizer, whole, steps_per_epoch)
        if self._warmup_epochs:
            steps = self._warmup_epochs * steps_per_epoch
            # The first step already moves: it has lr / (steps + 1), not 0.
            warmup = lr_scheduler.LinearLR(optimizer, start_factor=1 / (steps + 1), total_iters=steps)
            self._by_step = lr_scheduler.SequentialLR(optimizer, [warmup, self._by_step], milestones=[steps])
        self._by_epoch = _plateau(optimizer, whole) if params.lr_schedule == "plateau" else None

    @property
    def lr(self) -> float:
        """The rate that the next step has; of a task's several groups of weights, the first one's."""
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """After each optimizer step."""
        self._by_step.step()

    def end_epoch(self, epoch: int, score: float) -> None:
        """After an epoch, counted from 1, was judged; plateau watches from the first one after warm-up on."""
        if self._by_epoch is not None and epoch > self._warmup_epochs:
            self._by_epoch.step(score)

    def state_dict(self) -> dict[str, Any]:
        """In plain types; the rate itself is in the optimizer's state."""
        return {"by_step": self._by_step.state_dict(), "by_epoch": self._by_epoch and self._by_epoch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._by_step.load_state_dict(state["by_step"])
        if self._by_epoch is not None:
            self._by_epoch.load_state_dict(state["by_epoch"])


def _plateau(optimizer: Optimizer, params: Params) -> lr_scheduler.ReduceLROnPlateau:
    """Times factor when the gain has not risen in more than `patience` epochs; never below min_lr."""
    section = params.plateau
    # A gain in dB may be negative, so better is better by a difference, not by a ratio.
    return lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=section.factor, patience=section.patience, min_lr=section.min_lr,
        threshold=0.0, threshold_mode="abs", eps=0.0,
    )  # fmt: skip
