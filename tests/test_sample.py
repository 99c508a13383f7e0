from __future__ import annotations

import math

import pytest
import torch

from earthprior import build
from earthprior.diffusion.sample import SAMPLERS, sample
from earthprior.diffusion.schedule import NOISE_SCHEDULES, NoiseSchedule, with_zero_terminal_snr
from support import linear_schedule


def oracle(schedule, std, mean=0.0):
    """The best denoiser of independent Gaussian pixels."""

    def denoise(xt, t):
        alpha, sigma = schedule.at("alpha", t), schedule.at("sigma", t)
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (xt - alpha * mean)

    return denoise


def drawn_std(sampler, steps, std):
    schedule = linear_schedule()
    return float(sample(oracle(schedule, std), (4, 1, 64, 64), schedule, sampler, steps, seed=0).std())


def closed_form_std(sampler, steps, std):
    """What DDIM and ancestral sampling leave of Gaussian data, by their published update, step by step."""
    alpha_bar = linear_schedule().alpha_bar.double().tolist()
    timesteps = [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
    variance = 1.0
    for t, later in zip(timesteps, [*timesteps[1:], None], strict=True):
        now = alpha_bar[t]
        before = 1.0 if later is None else alpha_bar[later]
        x0_of_xt = math.sqrt(now) * std**2 / (now * std**2 + 1 - now)
        if sampler == "ddim":
            eps_of_xt = (1 - math.sqrt(now) * x0_of_xt) / math.sqrt(1 - now)
            variance *= (math.sqrt(before) * x0_of_xt + math.sqrt(1 - before) * eps_of_xt) ** 2
        else:
            beta = 1 - now / before
            of_x0, of_xt = math.sqrt(before) * beta / (1 - now), math.sqrt(1 - beta) * (1 - before) / (1 - now)
            noise = beta * (1 - before) / (1 - now) if before < 1 else 0.0
            variance = variance * (of_x0 * x0_of_xt + of_xt) ** 2 + noise
    return math.sqrt(variance)


@pytest.mark.parametrize(("std", "expected"), [(0.2, 0.205), (0.05, 0.051)])
def test_dpm_solver_needs_20_steps(std, expected):
    assert drawn_std("dpm_solver", 20, std) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("std", "expected"), [(0.2, 0.176), (0.05, 0.030)])
def test_ddim_of_50_steps_as_measured(std, expected):
    assert drawn_std("ddim", 50, std) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("std", [0.2, 0.05, 1.0])
@pytest.mark.parametrize("steps", [20, 50, 130])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samplers_leave_what_their_equations_leave(sampler, steps, std):
    assert drawn_std(sampler, steps, std) == pytest.approx(closed_form_std(sampler, steps, std), rel=0.025)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_more_steps_come_nearer_to_the_data(sampler):
    few, many = (abs(math.log(drawn_std(sampler, steps, 0.2) / 0.2)) for steps in (10, 100))
    assert many < few
    assert many < 0.15


@pytest.mark.parametrize("timesteps", [100, 1000])
@pytest.mark.parametrize("name", NOISE_SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_walks_every_schedule(sampler, name, timesteps, make_params):
    # Unscaled, 100 betas do not reach noise, and nothing can start from there.
    changes = {"noise_schedule": name, "timesteps": timesteps, "scale_betas": True}
    schedule = build.schedule(make_params({f"diffusion.{key}": value for key, value in changes.items()}))
    chips = sample(oracle(schedule, 0.2), (4, 1, 32, 32), schedule, sampler, 30, seed=0)
    assert chips.isfinite().all()
    assert float(chips.std()) == pytest.approx(0.2, rel=0.3)


@pytest.mark.parametrize("steps", [334, 600])
def test_ddim_needs_no_divisor_of_t(steps):
    assert drawn_std("ddim", steps, 0.2) == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_chips_far_outside_of_minus_1_to_1_are_not_clipped(sampler):
    schedule = linear_schedule()
    chips = sample(oracle(schedule, 0.5, mean=7.0), (2, 3, 16, 16), schedule, sampler, 25, seed=0)
    assert chips.shape == (2, 3, 16, 16)
    assert chips.dtype == torch.float32
    assert float(chips.mean()) == pytest.approx(7.0, abs=0.1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_draws_the_same_chips_and_more_chips_change_none(sampler):
    schedule = linear_schedule()

    def draw(count, seed):
        torch.manual_seed(count)
        return sample(oracle(schedule, 0.5), (count, 2, 8, 8), schedule, sampler, 12, seed)

    three = draw(3, seed=1)
    assert torch.equal(three, draw(3, seed=1))
    torch.testing.assert_close(draw(5, seed=1)[:3], three)
    assert not torch.allclose(three, draw(3, seed=2))
    assert not torch.allclose(three[0], three[1])


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_network_is_asked_once_per_step_from_much_to_little_noise(sampler, steps):
    schedule, asked = linear_schedule(), []

    def denoise(xt, t):
        assert not torch.is_grad_enabled()
        assert t.shape == (2,)
        assert t.dtype == torch.int64
        asked.append(int(t[0]))
        return oracle(schedule, 0.5)(xt, t)

    chips = sample(denoise, (2, 1, 4, 4), schedule, sampler, steps, seed=0)
    assert len(asked) == steps
    assert asked[0] == 999
    assert asked == sorted(asked, reverse=True)
    assert min(asked) >= 0
    assert chips.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_network_that_knows_the_chip_draws_it(sampler):
    schedule = linear_schedule()
    chip = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    chips = sample(lambda xt, t: chip.expand_as(xt), (2, 3, 8, 8), schedule, sampler, 10, seed=0)
    torch.testing.assert_close(chips, chip.expand_as(chips), rtol=0, atol=2e-3)


def test_progress_sees_every_step():
    seen = []

    def watch(timesteps):
        for t in timesteps:
            seen.append(int(t))
            yield t

    schedule = linear_schedule()
    sample(oracle(schedule, 1.0), (1, 1, 4, 4), schedule, "ddim", 5, seed=0, progress=watch)
    assert len(seen) == 5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_estimates_are_cut_at_the_bounds(sampler):
    schedule, bounds = linear_schedule(), (0.0, 1.0)

    def draw(denoise, bounds):
        return sample(denoise, (2, 1, 8, 8), schedule, sampler, 10, seed=0, bounds=bounds)

    assert float(draw(lambda xt, t: torch.full_like(xt, 7.0), bounds).max()) == pytest.approx(1, abs=2e-3)
    assert float(draw(lambda xt, t: torch.full_like(xt, -7.0), bounds).min()) == pytest.approx(0, abs=2e-3)
    wide = oracle(schedule, 1.0, mean=0.5)
    chips, free = draw(wide, bounds), draw(wide, None)
    assert float(free.max()) > 1.5
    assert -0.01 < float(chips.min()) < float(chips.max()) < 1.01
    assert torch.equal(draw(wide, (-1e9, 1e9)), free)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_sampling_can_start_from_pure_noise(sampler, steps):
    betas = with_zero_terminal_snr(linear_schedule().betas.double())
    schedule, asked = NoiseSchedule(betas, zero_terminal_snr=True), []

    def denoise(xt, t):
        asked.append(int(t[0]))
        return oracle(schedule, 0.2, mean=3.0)(xt, t)

    chips = sample(denoise, (4, 1, 32, 32), schedule, sampler, steps, seed=0)
    assert asked[0] == 999
    assert chips.isfinite().all()
    assert float(chips.mean()) == pytest.approx(3, abs=0.1)
    if steps == 50:
        assert float(chips.std()) == pytest.approx(0.2, rel=0.3)
