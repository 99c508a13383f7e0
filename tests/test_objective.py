from __future__ import annotations

import pytest
import torch

from earthprior.diffusion.objective import OBJECTIVES
from earthprior.diffusion.schedule import q_sample
from support import linear_schedule

TIMESTEPS = torch.tensor([0, 10, 250, 500, 999])


@pytest.fixture
def noisy():
    """x0, eps, xt, alpha, sigma at five timesteps, float64 so that only the algebra is tested."""
    schedule = linear_schedule().double()
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(5, 4, 3, 3, generator=generator).double()
    eps = torch.randn(5, 4, 3, 3, generator=generator).double()
    alpha = schedule.at("alpha", TIMESTEPS)
    # The float32 tables obey alpha^2 + sigma^2 = 1 to seven digits only.
    sigma = (1 - alpha**2).sqrt()
    return x0, eps, alpha * x0 + sigma * eps, alpha, sigma


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_target_leads_back_to_x0(name, noisy):
    x0, eps, xt, alpha, sigma = noisy
    objective = OBJECTIVES[name]
    torch.testing.assert_close(objective.x0_hat(objective.target(x0, eps, alpha, sigma), xt, alpha, sigma), x0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_prediction_of_the_true_x0_is_the_target(name, noisy):
    x0, eps, xt, alpha, sigma = noisy
    objective = OBJECTIVES[name]
    expected = objective.target(x0, eps, alpha, sigma)
    torch.testing.assert_close(objective.prediction(x0, xt, alpha, sigma), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_prediction_inverts_x0_hat_for_any_estimate(name, noisy):
    _, _, xt, alpha, sigma = noisy
    objective = OBJECTIVES[name]
    estimate = torch.randn(xt.shape, generator=torch.Generator().manual_seed(1)).double()
    said = objective.prediction(estimate, xt, alpha, sigma)
    torch.testing.assert_close(objective.x0_hat(said, xt, alpha, sigma), estimate)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_x0_gain_is_the_derivative_of_the_prediction(name, noisy):
    x0, _, xt, alpha, sigma = noisy
    objective = OBJECTIVES[name]
    x0_hat = x0.clone().requires_grad_()
    objective.prediction(x0_hat, xt, alpha, sigma).sum().backward()
    torch.testing.assert_close(x0_hat.grad.abs(), objective.x0_gain(alpha, sigma).expand_as(x0))


def test_x0_gain_squared_is_the_weight_known_from_the_literature(noisy):
    _, _, _, alpha, sigma = noisy
    snr = alpha**2 / sigma**2
    torch.testing.assert_close(OBJECTIVES["eps"].x0_gain(alpha, sigma) ** 2, snr)
    torch.testing.assert_close(OBJECTIVES["x0"].x0_gain(alpha, sigma) ** 2, torch.ones_like(snr))
    # Salimans & Ho 2022, Section 4: v weighs x0 by SNR + 1.
    torch.testing.assert_close(OBJECTIVES["v"].x0_gain(alpha, sigma) ** 2, snr + 1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_eps_rate_is_what_an_error_of_the_prediction_is_in_eps(name, noisy):
    _, _, _, alpha, sigma = noisy
    objective = OBJECTIVES[name]
    expected = OBJECTIVES["eps"].x0_gain(alpha, sigma) / objective.x0_gain(alpha, sigma)
    torch.testing.assert_close(objective.eps_rate(alpha, sigma), expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pure_noise_makes_no_nan(name):
    x0, eps = torch.full((1, 1, 2, 2), 0.3), torch.full((1, 1, 2, 2), -2.0)
    none, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    objective = OBJECTIVES[name]
    target = objective.target(x0, eps, none, one)
    torch.testing.assert_close(objective.prediction(x0, eps, none, one), target)
    assert objective.x0_gain(none, one).isfinite().all()
    assert objective.eps_rate(none, one).isfinite().all()
    if name != "eps":
        torch.testing.assert_close(objective.x0_hat(target, eps, none, one), x0)


def test_v_is_the_rotation_of_x0_and_eps(noisy):
    x0, eps, xt, alpha, sigma = noisy
    v = OBJECTIVES["v"].target(x0, eps, alpha, sigma)
    torch.testing.assert_close(alpha * xt - sigma * v, x0)
    torch.testing.assert_close(sigma * xt + alpha * v, eps)
    torch.testing.assert_close(xt**2 + v**2, x0**2 + eps**2)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_round_trip_in_float32_at_both_ends_of_the_schedule(name):
    schedule = linear_schedule()
    t = torch.tensor([0, 999])
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1, 8, 8, generator=generator), torch.randn(2, 1, 8, 8, generator=generator)
    alpha, sigma = schedule.at("alpha", t), schedule.at("sigma", t)
    xt = q_sample(x0, eps, t, schedule)
    said = OBJECTIVES[name].target(x0, eps, alpha, sigma)
    # At t = 999 alpha is 0.0065, so that eps tells x0 to five digits.
    torch.testing.assert_close(OBJECTIVES[name].x0_hat(said, xt, alpha, sigma), x0, rtol=0, atol=1e-4)
