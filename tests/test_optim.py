from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from earthprior.params import Params
from earthprior.training.optim import OPTIMIZERS, averaged

MakeParams = Callable[..., Params]

OWN: dict[str, dict[str, Any]] = {
    "adam": {"betas": (0.81, 0.97), "eps": 1e-3},
    "adamw": {"betas": (0.81, 0.97), "eps": 1e-3},
    "sgd": {"momentum": 0.6, "nesterov": True},
    "rmsprop": {"alpha": 0.8, "eps": 1e-3, "momentum": 0.4},
    "adagrad": {"lr_decay": 0.1, "eps": 1e-3},
    "adadelta": {"rho": 0.7, "eps": 1e-3},
    "nadam": {"betas": (0.81, 0.97), "eps": 1e-3, "momentum_decay": 0.02},
    "adamax": {"betas": (0.81, 0.97), "eps": 1e-3},
    "radam": {"betas": (0.81, 0.97), "eps": 1e-3},
    "adabelief": {"betas": (0.81, 0.97), "eps": 1e-3},
}
"""Another value than params.yaml's for every key of an optimizer's section."""


def weights_after(params: Params, steps: int = 7) -> list[float]:
    """What an optimizer makes of two weights and a fixed row of gradients."""
    weight = nn.Parameter(torch.tensor([2.0, -4.0], dtype=torch.float64))
    optimizer = OPTIMIZERS[params.optimizer]([weight], params)
    for gradient in torch.randn(steps, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.tolist()


def test_every_optimizer_is_here() -> None:
    assert set(OPTIMIZERS) == {*OWN, "sam"}


@pytest.mark.parametrize("name", OWN)
def test_an_optimizer_gets_its_dials(make_params: MakeParams, name: str) -> None:
    dials = {"lr": 0.0123, "weight_decay": 0.045}
    params = make_params({"optimizer": name, **dials, **{f"{name}.{key}": value for key, value in OWN[name].items()}})
    assert set(OWN[name]) == set(type(getattr(params, name)).model_fields)
    optimizer = OPTIMIZERS[name]([nn.Parameter(torch.ones(3))], params)
    for found in (optimizer.defaults, *optimizer.param_groups):
        assert {key: found[key] for key in {**dials, **OWN[name]}} == {**dials, **OWN[name]}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [(name, f"{name}.{key}", value) for name, own in OWN.items() for key, value in own.items()]
    + [(name, key, 0.2) for name in OWN for key in ("lr", "weight_decay")],
)
def test_every_dial_changes_the_weights(make_params: MakeParams, name: str, key: str, value: Any) -> None:
    assert weights_after(make_params({"optimizer": name, key: value})) != weights_after(
        make_params({"optimizer": name})
    )


@pytest.mark.parametrize("name", OWN)
def test_sam_has_its_base_with_that_ones_dials(make_params: MakeParams, name: str) -> None:
    own = {f"{name}.{key}": value for key, value in OWN[name].items()}
    params = make_params({"optimizer": "sam", "sam.base_optimizer": name, **own})
    alone = make_params({"optimizer": name, **own})
    weight = [nn.Parameter(torch.ones(3))]
    assert type(OPTIMIZERS["sam"](weight, params)) is type(OPTIMIZERS[name](weight, alone))
    assert weights_after(params) == weights_after(alone)


def test_adamw_takes_the_published_step(make_params: MakeParams) -> None:
    """The first step of AdamW: theta (1 - lr wd) - lr g / (|g| + eps)."""
    params = make_params({"lr": 0.1, "weight_decay": 0.5, "adamw.eps": 0.25})
    weight = nn.Parameter(torch.tensor([2.0, -4.0], dtype=torch.float64))
    weight.grad = torch.tensor([0.5, -3.0], dtype=torch.float64)
    OPTIMIZERS["adamw"]([weight], params).step()
    expected = [2.0 * 0.95 - 0.1 * 0.5 / 0.75, -4.0 * 0.95 + 0.1 * 3.0 / 3.25]
    assert weight.tolist() == pytest.approx(expected, rel=1e-6)


def adabelief(
    theta: float, gradients: list[float], lr: float, wd: float, betas: tuple[float, float], eps: float
) -> float:
    """Zhuang et al. 2020, Algorithm 2, with decoupled weight decay."""
    m = s = 0.0
    for n, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        s = betas[1] * s + (1 - betas[1]) * (g - m) ** 2 + eps
        theta -= lr * wd * theta
        theta -= lr * m / (1 - betas[0] ** n) / (math.sqrt(s / (1 - betas[1] ** n)) + eps)
    return theta


def rmsprop(theta: float, gradients: list[float], lr: float, alpha: float, eps: float, momentum: float) -> float:
    """Tieleman & Hinton 2012, with momentum as Graves 2013 has it."""
    square = push = 0.0
    for g in gradients:
        square = alpha * square + (1 - alpha) * g * g
        push = momentum * push + g / (math.sqrt(square) + eps)
        theta -= lr * push
    return theta


def radam(theta: float, gradients: list[float], lr: float, betas: tuple[float, float], eps: float) -> float:
    """Liu et al. 2020, Algorithm 2."""
    m = v = 0.0
    longest = 2 / (1 - betas[1]) - 1
    for n, g in enumerate(gradients, 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        length = longest - 2 * n * betas[1] ** n / (1 - betas[1] ** n)
        step = m / (1 - betas[0] ** n)
        if length > 5:
            r = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            step *= math.sqrt(r) * math.sqrt(1 - betas[1] ** n) / (math.sqrt(v) + eps)
        theta -= lr * step
    return theta


@pytest.mark.parametrize(
    ("reference", "dials"),
    [
        (adabelief, {"lr": 0.1, "wd": 0.3, "betas": (0.8, 0.9), "eps": 1e-3}),
        (rmsprop, {"lr": 0.1, "alpha": 0.8, "eps": 0.1, "momentum": 0.5}),
        (radam, {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-4}),
    ],
)
def test_an_optimizer_follows_its_paper(make_params: MakeParams, reference: Any, dials: dict[str, Any]) -> None:
    name = reference.__name__
    own = {f"{name}.{key}": value for key, value in dials.items() if key not in ("lr", "wd")}
    params = make_params({"optimizer": name, "lr": dials["lr"], "weight_decay": dials.get("wd", 0.0), **own})
    rows = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [reference(theta, rows[:, i].tolist(), **dials) for i, theta in enumerate((2.0, -4.0))]
    assert weights_after(params, steps=12) == pytest.approx(expected, rel=1e-9)


def test_adabelief_needs_no_torchvision(make_params: MakeParams, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "pytorch_optimizer"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    weights_after(make_params({"optimizer": "adabelief"}))


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
