from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from earthprior import build
from earthprior.chips.batch import Batch
from earthprior.diffusion.gain import RHOS, Denoiser, linear_denoiser
from earthprior.diffusion.linear import LinearDenoiser
from earthprior.errors import DivergedError
from earthprior.params import Params
from earthprior.tasks.diffusion import DiffusionTask
from earthprior.training.validate import Validation
from support import gaussian_chips, make_batch, some_mixing, toy_linear

CHIPS = gaussian_chips(8, some_mixing(4), 16, 16, mean=0.1, seed=7)


class Zero(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :4])


class Batches:
    """The chips in batches of a size, counting how often they were read."""

    def __init__(self, size: int = 8) -> None:
        self.size, self.reads = size, 0

    def __call__(self) -> Iterator[tuple[Batch, list[str]]]:
        self.reads += 1
        for first in range(0, len(CHIPS), self.size):
            chips = CHIPS[first : first + self.size]
            yield make_batch(chips), [f"chip_{first + index}.tif" for index in range(len(chips))]


@pytest.fixture(scope="module")
def filter_16() -> LinearDenoiser:
    return toy_linear()


@pytest.fixture
def task(make_params: Callable[..., Params], filter_16: LinearDenoiser) -> DiffusionTask:
    overrides = {"unet_film.attention": False, "unet_film.time_embedding_dim": 16}
    return build.task(make_params(overrides), filter_16)


def started(task: DiffusionTask) -> DiffusionTask:
    """With a network that does something: all of its parameters at random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return task.eval()


def test_judging_twice_gives_the_same(task: DiffusionTask) -> None:
    started(task)
    validation = Validation(Batches(), ["a", "b", "c", "d"])
    torch.manual_seed(1)
    first = validation.judge(task)
    torch.manual_seed(2)
    again = Validation(Batches(), ["a", "b", "c", "d"]).judge(task)
    assert first == validation.judge(task) == again
    assert set(first) == {"loss", "gain_db/mean", *(f"gain_db/rho_{rho:g}" for rho in RHOS)}
    assert first["gain_db/mean"] != 0


def test_no_gradient_and_no_weight_is_touched(task: DiffusionTask) -> None:
    started(task)
    before = {name: value.clone() for name, value in task.network.state_dict().items()}
    Validation(Batches(), ["a", "b", "c", "d"]).judge(task)
    assert all(parameter.grad is None for parameter in task.network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in task.network.state_dict().items())


def test_a_network_of_zeros_over_the_wiener_skip_is_the_linear_filter(task: DiffusionTask) -> None:
    task.network = Zero()
    judged = Validation(Batches(), ["a", "b", "c", "d"]).judge(task)
    assert {value for name, value in judged.items() if name.startswith("gain_db/")} == {0.0}


@pytest.mark.parametrize("share", [0.5, 1.0, 4.0])
def test_the_gain_is_the_ratio_of_squared_errors_in_decibels(
    task: DiffusionTask, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = linear_denoiser(task.linear, task.schedule)

    def with_that_share(batch: Batch) -> Denoiser:
        return lambda xt, t: batch.x0 + math.sqrt(share) * (reference(xt, t) - batch.x0)

    monkeypatch.setattr(task, "denoiser", with_that_share)
    judged = Validation(Batches(), ["a", "b", "c", "d"]).judge(task)
    gains = [value for name, value in judged.items() if name.startswith("gain_db/")]
    assert gains == pytest.approx([-10 * math.log10(share)] * (len(RHOS) + 1), abs=1e-3)


def test_batches_of_another_size_give_the_same_gain(task: DiffusionTask) -> None:
    started(task)
    whole = Validation(Batches(8), ["a", "b", "c", "d"]).judge(task)
    parts = Validation(Batches(3), ["a", "b", "c", "d"]).judge(task)
    for name in whole:
        if name != "loss":
            assert parts[name] == pytest.approx(whole[name], abs=1e-3)


def test_the_linear_filter_is_measured_once(task: DiffusionTask) -> None:
    batches = Batches()
    validation = Validation(batches, ["a", "b", "c", "d"])
    validation.judge(task)
    first = batches.reads
    validation.judge(task)
    assert batches.reads - first == first - 1


def test_a_network_that_answers_nan_has_diverged(task: DiffusionTask) -> None:
    with torch.no_grad():
        for parameter in task.network.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(DivergedError, match="chip_0"):
        Validation(Batches(), ["a", "b", "c", "d"]).judge(task)
