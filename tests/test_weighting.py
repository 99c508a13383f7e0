from __future__ import annotations

import pytest
import torch

from earthprior.diffusion.objective import OBJECTIVES
from earthprior.diffusion.schedule import NoiseSchedule, with_zero_terminal_snr
from earthprior.diffusion.weighting import SNR_WEIGHTINGS, timestep_weights
from support import linear_schedule

GAMMA = 5.0


def weights_of(weighting, objective, schedule=None, gamma=GAMMA):
    return timestep_weights(weighting, gamma, OBJECTIVES[objective], schedule or linear_schedule()).double()


def snr_of(schedule):
    return schedule.log_snr.double().exp()


def test_min_snr_as_another_implementation_has_it():
    """Which says min(snr, 5) / 5 for x0, with betas from 1e-4 to 0.02."""
    weights = weights_of("min_snr", "x0", linear_schedule(first=1e-4))[[100, 250, 500]] / GAMMA
    torch.testing.assert_close(weights, torch.tensor([1, 0.217906, 0.016872]).double(), rtol=0, atol=1e-6)


def test_min_snr_as_published_for_each_objective():
    snr = snr_of(linear_schedule())
    cut = snr.clamp(max=GAMMA)
    torch.testing.assert_close(weights_of("min_snr", "x0"), cut, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights_of("min_snr", "eps"), cut / snr, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights_of("min_snr", "v"), cut / (snr + 1), rtol=1e-5, atol=0)


def test_soft_min_snr_as_published():
    schedule = linear_schedule()
    # The paper's sigma, of xt = x0 + sigma eps.
    sigma = (schedule.sigma / schedule.alpha).double()
    torch.testing.assert_close(weights_of("soft_min_snr", "x0"), 1 / (sigma**2 + 1 / GAMMA), rtol=1e-5, atol=0)


def test_soft_min_snr_is_below_min_snr_and_near_it_away_from_gamma():
    soft, hard = weights_of("soft_min_snr", "x0"), weights_of("min_snr", "x0")
    assert bool((soft <= hard).all())
    assert float((soft / hard).min()) == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close((soft / hard)[[0, 999]], torch.ones(2).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("weighting", SNR_WEIGHTINGS)
def test_the_same_error_costs_the_same_in_every_objective(weighting):
    """A squared error of x0, translated into each objective's, is weighed back to the same."""
    schedule = linear_schedule()
    alpha, sigma = schedule.alpha.double(), schedule.sigma.double()
    costs = [weights_of(weighting, name) * o.x0_gain(alpha, sigma) ** 2 for name, o in OBJECTIVES.items()]
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(costs[0], costs[2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighting", SNR_WEIGHTINGS)
def test_gamma_acts_and_infinite_gamma_weighs_by_the_snr(weighting):
    assert not torch.equal(weights_of(weighting, "x0"), weights_of(weighting, "x0", gamma=1.0))
    torch.testing.assert_close(weights_of(weighting, "eps", gamma=1e30), torch.ones(1000).double())


@pytest.mark.parametrize("weighting", ["uniform", "linear"])
def test_others_weigh_nothing_afterwards(weighting):
    assert torch.equal(weights_of(weighting, "v"), torch.ones(1000).double())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("weighting", SNR_WEIGHTINGS)
def test_pure_noise_has_a_finite_weight(weighting, objective):
    betas = with_zero_terminal_snr(torch.linspace(1e-6, 0.02, 100, dtype=torch.float64))
    weights = weights_of(weighting, objective, NoiseSchedule(betas, zero_terminal_snr=True))
    assert weights.isfinite().all()
    assert float(weights[-1]) == (1.0 if objective == "eps" else 0.0)
