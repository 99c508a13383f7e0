from __future__ import annotations

import pytest
import torch

from earthprior.losses import LOSSES, mean_over_valid

EVERYWHERE = torch.ones(2, 1, 16, 16, dtype=torch.bool)


def _mean(name, error):
    return float(mean_over_valid(LOSSES[name](error), EVERYWHERE).mean())


@pytest.mark.parametrize(("name", "expected"), [("mse", 1.9366022), ("l1", 1.1077695)])
def test_values_of_the_tutorial(name, expected):
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(2, 4, 16, 16, generator=generator)
    target = torch.randn(2, 4, 16, 16, generator=generator)
    assert _mean(name, prediction - target) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("name", "expected"), [("mse", 0.03331706), ("l1", 0.16658522)])
def test_values_of_the_tutorial_without_random_numbers(name, expected):
    a = torch.linspace(0, 1, 2048).view(2, 4, 16, 16)
    assert _mean(name, a - a**2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_no_error_is_the_least_loss_and_has_a_finite_gradient(name):
    error = torch.zeros(2, 4, 16, 16, requires_grad=True)
    loss = mean_over_valid(LOSSES[name](error), EVERYWHERE).mean()
    loss.backward()
    assert loss.item() == pytest.approx(0.001 if name == "charbonnier" else 0.0)
    assert torch.equal(error.grad, torch.zeros_like(error))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_even_and_grow_with_the_error(name):
    errors = torch.linspace(0, 3, 50)
    values = LOSSES[name](errors)
    assert bool((values.diff() > 0).all())
    assert torch.equal(values, LOSSES[name](-errors))


def test_charbonnier_is_l1_far_from_zero():
    error = torch.tensor([1.0, -20.0])
    assert torch.allclose(LOSSES["charbonnier"](error), LOSSES["l1"](error), atol=1e-6)


def test_the_mean_is_over_valid_pixels_of_each_chip():
    values = torch.arange(2 * 2 * 2 * 2, dtype=torch.float32).view(2, 2, 2, 2)
    valid = torch.tensor([[True, False, False, True], [False, True, False, False]]).view(2, 1, 2, 2)
    # Chip 0: 0, 3 of band 0 and 4, 7 of band 1; chip 1: 9 and 13.
    assert mean_over_valid(values, valid).tolist() == [3.5, 11.0]


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_what_lies_under_nodata_reaches_neither_mean_nor_gradient(junk):
    values = torch.ones(1, 3, 4, 4)
    valid = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    valid[..., 0, :] = False
    values[..., 0, :] = junk
    values.requires_grad_()
    mean = mean_over_valid(values, valid)
    mean.sum().backward()
    assert mean.tolist() == [1.0]
    assert values.grad[..., 0, :].abs().sum() == 0
    assert values.grad.sum() == pytest.approx(1.0)


def test_a_chip_without_valid_pixels_is_zero_not_nan():
    assert mean_over_valid(torch.ones(1, 2, 3, 3), torch.zeros(1, 1, 3, 3, dtype=torch.bool)).tolist() == [0.0]
