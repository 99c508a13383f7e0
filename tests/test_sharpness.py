from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from earthprior.training.sharpness import ascended


def a_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 1, 1)).double()


CHIPS = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def pass_over(network: nn.Module) -> Tensor:
    network.zero_grad()
    loss: Tensor = (network(CHIPS) - 1).square().mean()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(
    ("adaptive", "expected"),
    [
        # g = (3, -4): w + 0.5 g / 5
        (False, [2.0 + 0.3, -0.5 - 0.4]),
        # T = (2, 0.5): T g = (6, -2), T^2 g = (12, -1); w + 0.5 T^2 g / sqrt(40)
        (True, [2.0 + 6 / 40**0.5, -0.5 - 0.5 / 40**0.5]),
    ],
)
def test_the_weights_climb_as_published(adaptive: bool, expected: list[float]) -> None:
    module = nn.ParameterList([torch.tensor([value], dtype=torch.float64) for value in (2.0, -0.5)])
    for weight, slope in zip(module, (3.0, -4.0), strict=True):
        weight.grad = torch.tensor([slope], dtype=torch.float64)
    with ascended(module, rho=0.5, adaptive=adaptive):
        assert [weight.item() for weight in module] == pytest.approx(expected, rel=1e-12)
    assert [weight.item() for weight in module] == [2.0, -0.5]


@pytest.mark.parametrize("adaptive", [False, True])
def test_sharpness_grows_with_the_radius(adaptive: bool) -> None:
    network = a_network()
    losses = [pass_over(network)]
    for rho in (0.01, 0.1):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        pass_over(network)
        with ascended(network, rho, adaptive):
            losses.append(pass_over(network))
        for name, weight in network.named_parameters():
            assert torch.equal(weight, before[name]), "back to the bit"
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    "base",
    [lambda weights: torch.optim.AdamW(weights, lr=0.1), lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9)],
)
def test_five_steps_are_those_of_pytorch_optimizer(
    adaptive: bool, base: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> None:
    from pytorch_optimizer import SAM

    ours, theirs = a_network(), a_network()
    optimizer = base(list(ours.parameters()))
    sam = SAM(theirs.parameters(), lambda groups, **_: base(groups), rho=0.2, adaptive=adaptive)  # type: ignore[arg-type]
    for _ in range(5):
        pass_over(ours)
        with ascended(ours, 0.2, adaptive):
            pass_over(ours)
        optimizer.step()
        pass_over(theirs)
        sam.step(lambda: pass_over(theirs))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Theirs takes the norm in float32.
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


def test_batch_norm_moves_with_the_first_pass_alone() -> None:
    once, twice = a_network(), a_network()
    pass_over(once)
    pass_over(twice)
    with ascended(twice, 0.1, adaptive=False):
        # It normalizes by the batch all the same.
        shifted = copy.deepcopy(twice)
        shifted[1].track_running_stats = True
        assert torch.equal(twice(3 * CHIPS), shifted(3 * CHIPS))
    norm = twice[1]
    assert norm.track_running_stats
    assert int(norm.num_batches_tracked) == 1
    assert torch.equal(norm.running_mean, once[1].running_mean)
    assert torch.equal(norm.running_var, once[1].running_var)


def test_a_vanishing_gradient_leads_nowhere_and_a_missing_one_does_no_harm() -> None:
    network = nn.Linear(2, 2)
    network.weight.grad = torch.zeros(2, 2)
    before = network.weight.clone()
    with ascended(network, 0.1, adaptive=False):
        assert torch.equal(network.weight, before)


def test_an_error_inside_leaves_the_weights_where_they_were() -> None:
    network = a_network()
    pass_over(network)
    before = network[0].weight.clone()
    with pytest.raises(RuntimeError), ascended(network, 0.1, adaptive=False):
        raise RuntimeError
    assert torch.equal(network[0].weight, before)
    assert network[1].track_running_stats
