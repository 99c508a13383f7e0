from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from earthprior.params import Params
from earthprior.training.optim import LR_SCHEDULES, OPTIMIZERS, averaged, lr_schedule

STEPS_PER_EPOCH, EPOCHS, WARMUP, LR, ETA_MIN = 5, 8, 2, 0.01, 0.001
TOTAL, RISE = STEPS_PER_EPOCH * EPOCHS, STEPS_PER_EPOCH * WARMUP

MakeParams = Callable[..., Params]


def half_cosine(done: float) -> float:
    return ETA_MIN + (LR - ETA_MIN) * (1 + math.cos(math.pi * done)) / 2


def restarts(step: int) -> float:
    """t_0 = 2 epochs, then 4, then 8."""
    length = 2 * STEPS_PER_EPOCH
    while step >= length:
        step, length = step - length, 2 * length
    return half_cosine(step / length)


CLOSED_FORMS: dict[str, Callable[[int, int], float]] = {
    "cosine": lambda step, steps: half_cosine(step / steps),
    "cosinewarm": lambda step, steps: restarts(step),
    "none": lambda step, steps: LR,
}


def schedule_params(make_params: MakeParams, name: str, warmup: int) -> Params:
    return make_params(
        {
            "lr": LR, "lr_schedule": name, "epochs": EPOCHS, "warmup_epochs": warmup, "cosine.eta_min": ETA_MIN,
            "cosinewarm.eta_min": ETA_MIN, "cosinewarm.t_0": 2, "cosinewarm.t_mult": 2,
        }
    )  # fmt: skip


def begun(params: Params) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = OPTIMIZERS[params.optimizer]([nn.Parameter(torch.ones(3))], params)
    return optimizer, lr_schedule(optimizer, params, STEPS_PER_EPOCH)


def walk(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[float]:
    """The lr that each of the next steps has."""
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("name", sorted(LR_SCHEDULES))
def test_lr_follows_its_closed_form(make_params: MakeParams, name: str, warmup: int) -> None:
    found = walk(*begun(schedule_params(make_params, name, warmup)), TOTAL)
    rise = warmup * STEPS_PER_EPOCH
    expected = [LR * (step + 1) / (rise + 1) for step in range(rise)]
    expected += [CLOSED_FORMS[name](step, TOTAL - rise) for step in range(TOTAL - rise)]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", sorted(LR_SCHEDULES))
def test_lr_has_no_dip_where_the_warm_up_ends(make_params: MakeParams, name: str) -> None:
    found = walk(*begun(schedule_params(make_params, name, WARMUP)), TOTAL)
    assert found[0] > 0
    assert found[: RISE + 1] == sorted(found[: RISE + 1])
    assert found[RISE] == pytest.approx(LR) == max(found)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("left_at", [1, RISE - 1, RISE, RISE + 1, TOTAL - 1])
@pytest.mark.parametrize("name", sorted(LR_SCHEDULES))
def test_a_restored_schedule_continues_exactly(make_params: MakeParams, name: str, left_at: int) -> None:
    params = schedule_params(make_params, name, WARMUP)
    expected = walk(*begun(params), TOTAL)
    optimizer, schedule = begun(params)
    walk(optimizer, schedule, left_at)
    kept = optimizer.state_dict(), schedule.state_dict()
    optimizer, schedule = begun(params)
    optimizer.load_state_dict(kept[0])
    schedule.load_state_dict(kept[1])
    assert walk(optimizer, schedule, TOTAL - left_at) == expected[left_at:]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_optimizer_gets_its_dials(make_params: MakeParams, name: str) -> None:
    dials = {"lr": 0.0123, "weight_decay": 0.045}
    own = {"betas": (0.81, 0.97), "eps": 1e-5}
    params = make_params({"optimizer": name, **dials, **{f"{name}.{key}": value for key, value in own.items()}})
    (group,) = OPTIMIZERS[name]([nn.Parameter(torch.ones(3))], params).param_groups
    assert {key: group[key] for key in {**dials, **own}} == {**dials, **own}


def test_adamw_takes_the_published_step(make_params: MakeParams) -> None:
    """The first step of AdamW: theta (1 - lr wd) - lr g / (|g| + eps)."""
    params = make_params({"lr": 0.1, "weight_decay": 0.5, "adamw.eps": 0.25})
    weight = nn.Parameter(torch.tensor([2.0, -4.0], dtype=torch.float64))
    weight.grad = torch.tensor([0.5, -3.0], dtype=torch.float64)
    OPTIMIZERS["adamw"]([weight], params).step()
    expected = [2.0 * 0.95 - 0.1 * 0.5 / 0.75, -4.0 * 0.95 + 0.1 * 3.0 / 3.25]
    assert weight.tolist() == pytest.approx(expected, rel=1e-6)


class Counting(nn.Module):
    """One weight, one floating buffer, one integer counter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.register_buffer("statistic", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))

    def set(self, value: float, count: int) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
        self.statistic.fill_(10 * value)
        self.count.fill_(count)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_average_follows_its_closed_form(decay: float) -> None:
    network = Counting()
    average = averaged(network, decay)
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    expected = 0.0
    for n, value in enumerate(values):
        network.set(value, 7 * n)
        average.update_parameters(network)
        # The first update takes the weights as they are; update n keeps min(decay, (1 + n) / (10 + n)).
        keep = min(decay, (1 + n) / (10 + n)) if n else 0.0
        expected = keep * expected + (1 - keep) * value
        assert average.module.weight.tolist() == pytest.approx([expected] * 2, rel=1e-12)
        assert average.module.statistic.tolist() == pytest.approx([10 * expected] * 2, rel=1e-12)
        assert int(average.module.count) == 7 * n
    assert network.weight.tolist() == [values[-1]] * 2, "the network itself must not be touched"


def test_batch_norm_is_averaged_too() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    average = averaged(network, 0.9)
    running = network[1].running_mean
    seen = []
    for step in range(3):
        network(torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(step)))
        average.update_parameters(network)
        seen.append(running.clone())
    first = seen[0]
    second = torch.lerp(first, seen[1], 1 - 2 / 11)
    torch.testing.assert_close(average.module[1].running_mean, torch.lerp(second, seen[2], 1 - 3 / 12))
    assert int(average.module[1].num_batches_tracked) == 3


def test_a_restored_average_continues_exactly() -> None:
    networks = [Counting(), Counting()]
    averages = [averaged(network, 0.9) for network in networks]
    for step in range(6):
        if step == 3:
            averages[1] = averaged(networks[1], 0.9)
            averages[1].load_state_dict(averages[0].state_dict())
        for network, average in zip(networks, averages, strict=True):
            network.set(step**0.5, step)
            average.update_parameters(network)
    assert torch.equal(averages[0].module.weight, averages[1].module.weight)
