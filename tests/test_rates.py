from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from earthprior.errors import ParamsError
from earthprior.params import Params
from earthprior.training.optim import OPTIMIZERS
from earthprior.training.rates import LR_SCHEDULES, LRSchedule

STEPS_PER_EPOCH, EPOCHS, WARMUP, LR, FLOOR = 5, 8, 2, 0.01, 0.001
TOTAL = STEPS_PER_EPOCH * EPOCHS
GAINS = (-3.0, -1.0, -1.5, -0.9, -1.2, -1.1, -1.0, -0.95)
"""Of the epochs; those without a better one before or at them: 3, 5, 6, 7, 8."""

MakeParams = Callable[..., Params]
Curve = Callable[[int, int], float]
"""The rate of a step of the run after a number of warm-up steps."""

DIALS: dict[str, Any] = {
    "lr": LR, "epochs": EPOCHS, "cosine.eta_min": FLOOR, "cosinewarm.eta_min": FLOOR, "cosinewarm.t_0": 2,
    "step.step_size": 3, "step.gamma": 0.4, "multistep.milestones": [1, 4, 7], "multistep.gamma": 0.3,
    "plateau.patience": 1, "plateau.factor": 0.2, "plateau.min_lr": 0.0005, "poly.min_lr": FLOOR, "poly.power": 2.0,
}  # fmt: skip


def half_cosine(done: float, low: float = FLOOR, high: float = LR) -> float:
    return low + (high - low) * (1 + math.cos(math.pi * done)) / 2


def restarts(step: int) -> float:
    """t_0 = 2 epochs, then 4, then 8."""
    length = 2 * STEPS_PER_EPOCH
    while step >= length:
        step, length = step - length, 2 * length
    return half_cosine(step / length)


def one_cycle(step: int) -> float:
    """Up from lr / 25 to lr at 30 % of the run, down to a ten-thousandth of the first rate at its last step."""
    top, last = 0.3 * TOTAL - 1, TOTAL - 1
    if step <= top:
        return half_cosine(1 - step / top, low=LR / 25)
    return half_cosine((step - top) / (last - top), low=LR / 25e4)


def falls(step: int, rise: int, epochs: list[int]) -> int:
    """How many of these epochs have passed, but not in warm-up."""
    return sum(rise < epoch * STEPS_PER_EPOCH <= step for epoch in epochs)


def plateaued(step: int, rise: int) -> float:
    """patience 1: the second epoch in a row without a better gain lowers the rate.

    Without warm-up these are 6 and 8; the first epoch after a warm-up of 2 sets the mark of -1.5, and the same follow.
    """
    return LR * 0.2 ** sum(epoch * STEPS_PER_EPOCH <= step for epoch in (6, 8))


CURVES: dict[str, Curve] = {
    "cosine": lambda step, rise: half_cosine((step - rise) / (TOTAL - rise)),
    "cosinewarm": lambda step, rise: restarts(step - rise),
    "step": lambda step, rise: LR * 0.4 ** falls(step, rise, [3, 6]),
    "multistep": lambda step, rise: LR * 0.3 ** falls(step, rise, [1, 4, 7]),
    "plateau": plateaued,
    "poly": lambda step, rise: FLOOR + (LR - FLOOR) * (1 - (step - rise) / (TOTAL - rise)) ** 2,
    "onecycle": lambda step, rise: one_cycle(step),
    "none": lambda step, rise: LR,
}


def begun(params: Params) -> tuple[torch.optim.Optimizer, LRSchedule]:
    optimizer = OPTIMIZERS[params.optimizer]([nn.Parameter(torch.ones(3))], params)
    return optimizer, LRSchedule(optimizer, params, STEPS_PER_EPOCH)


def walk(optimizer: torch.optim.Optimizer, schedule: LRSchedule, first: int = 0, last: int = TOTAL) -> list[float]:
    """The lr that each of the steps has, as the loop goes through them."""
    found = []
    for step in range(first, last):
        found.append(schedule.lr)
        optimizer.step()
        schedule.step()
        epoch, rest = divmod(step + 1, STEPS_PER_EPOCH)
        if rest == 0:
            schedule.end_epoch(epoch, GAINS[epoch - 1])
    return found


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_lr_follows_its_closed_form(make_params: MakeParams, name: str, warmup: int) -> None:
    found = walk(*begun(make_params({**DIALS, "lr_schedule": name, "warmup_epochs": warmup})))
    rise = 0 if name == "onecycle" else warmup * STEPS_PER_EPOCH
    expected = [LR * (step + 1) / (rise + 1) for step in range(rise)]
    expected += [CURVES[name](step, rise) for step in range(rise, TOTAL)]
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", sorted(set(LR_SCHEDULES) - {"onecycle"}))
def test_lr_has_no_dip_where_the_warm_up_ends(make_params: MakeParams, name: str) -> None:
    found = walk(*begun(make_params({**DIALS, "lr_schedule": name, "warmup_epochs": WARMUP})))
    rise = WARMUP * STEPS_PER_EPOCH
    assert found[0] > 0
    assert found[: rise + 1] == sorted(found[: rise + 1])
    assert found[rise] == pytest.approx(LR) == max(found)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("left_at", [1, 9, 10, 11, 30, TOTAL - 1])
@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_a_restored_schedule_continues_exactly(
    make_params: MakeParams, name: str, left_at: int, tmp_path: Path
) -> None:
    params = make_params({**DIALS, "lr_schedule": name, "warmup_epochs": WARMUP})
    expected = walk(*begun(params))
    optimizer, schedule = begun(params)
    walk(optimizer, schedule, last=left_at)
    torch.save([optimizer.state_dict(), schedule.state_dict()], tmp_path / "state.pt")
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer, schedule = begun(params)
    optimizer.load_state_dict(kept[0])
    schedule.load_state_dict(kept[1])
    assert walk(optimizer, schedule, first=left_at) == expected[left_at:]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("cosine", "t_max", 3), ("cosine", "eta_min", 0.002), ("cosinewarm", "t_0", 3), ("cosinewarm", "t_mult", 1),
        ("cosinewarm", "eta_min", 0.002), ("step", "step_size", 4), ("step", "gamma", 0.5),
        ("multistep", "milestones", [4, 5]), ("multistep", "gamma", 0.5), ("plateau", "patience", 2),
        ("plateau", "factor", 0.5), ("plateau", "min_lr", 0.005), ("poly", "max_decay_epochs", 4),
        ("poly", "min_lr", 0.002), ("poly", "power", 1.0), ("onecycle", "pct_start", 0.4),
        ("onecycle", "div_factor", 5.0), ("onecycle", "final_div_factor", 5.0),
    ],
)  # fmt: skip
def test_every_dial_changes_the_rate(make_params: MakeParams, name: str, key: str, value: Any) -> None:
    dials = {**DIALS, "lr_schedule": name, "warmup_epochs": 1}
    assert walk(*begun(make_params(dials))) != walk(*begun(make_params({**dials, f"{name}.{key}": value})))


@pytest.mark.parametrize(
    ("name", "key", "halfway"),
    [("cosine", "t_max", (LR + FLOOR) / 2), ("poly", "max_decay_epochs", FLOOR + (LR - FLOOR) / 4)],
)
def test_a_shorter_fall_stays_at_its_end(make_params: MakeParams, name: str, key: str, halfway: float) -> None:
    """Two epochs, counted from the end of warm-up."""
    params = make_params({**DIALS, "lr_schedule": name, "warmup_epochs": WARMUP, f"{name}.{key}": 2})
    found = walk(*begun(params))
    assert found[3 * STEPS_PER_EPOCH] == pytest.approx(halfway)
    assert found[4 * STEPS_PER_EPOCH :] == pytest.approx([FLOOR] * 4 * STEPS_PER_EPOCH)


def test_plateau_ends_at_its_floor(make_params: MakeParams) -> None:
    params = make_params({**DIALS, "lr_schedule": "plateau", "plateau.patience": 0})
    assert walk(*begun(params))[-1] == 0.0005


def test_plateau_takes_any_rise_for_better_also_below_zero_db(make_params: MakeParams) -> None:
    _, schedule = begun(make_params({**DIALS, "lr_schedule": "plateau", "plateau.patience": 0}))
    for epoch, gain in enumerate((-5.0, -4.99999, -4.99998), 1):
        schedule.end_epoch(epoch, gain)
        assert schedule.lr == LR
    schedule.end_epoch(4, -4.99998)
    assert schedule.lr == pytest.approx(0.2 * LR)


def test_plateau_does_not_watch_during_warm_up(make_params: MakeParams) -> None:
    """The gain falls from the first epoch on; the mark is set by the third."""
    dials = {**DIALS, "lr_schedule": "plateau", "plateau.patience": 0, "plateau.min_lr": 0.0}
    dials["warmup_epochs"] = WARMUP
    _, schedule = begun(make_params(dials))
    before = schedule.lr
    for epoch, gain in enumerate((3.0, 2.0, 1.0), 1):
        schedule.end_epoch(epoch, gain)
        assert schedule.lr == before
    schedule.end_epoch(4, 0.0)
    assert schedule.lr == pytest.approx(0.2 * before)


def test_onecycle_needs_steps_to_rise_in(make_params: MakeParams) -> None:
    params = make_params({"lr_schedule": "onecycle", "onecycle.pct_start": 0.2})
    message = "onecycle.pct_start 0.2 leaves none of the run's 5 steps to rise in; raise it, or train for more epochs"
    with pytest.raises(ParamsError, match=re.escape(message)):
        begun(params)


@pytest.mark.parametrize("name", ["adabelief", "sam", "sgd"])
@pytest.mark.parametrize("schedule", ["onecycle", "plateau"])
def test_the_rate_reaches_any_optimizer(make_params: MakeParams, name: str, schedule: str) -> None:
    params = make_params({**DIALS, "optimizer": name, "lr_schedule": schedule})
    optimizer, rates = begun(params)
    walk(optimizer, rates)
    assert optimizer.param_groups[0]["lr"] == rates.lr != LR
