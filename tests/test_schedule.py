from __future__ import annotations

import pytest
import torch

from earthprior.diffusion.schedule import NOISE_SCHEDULES, NoiseSchedule, q_sample
from earthprior.errors import ParamsError
from earthprior.params import DiffusionParams
from support import linear_schedule

JUDGED_AT = [0, 250, 500, 750, 999]


def diffusion_params(**changes):
    values = {
        "timesteps": 1000, "noise_schedule": "linear", "beta_start": 1e-6, "beta_end": 0.02, "precondition": "none",
        "weighting": "uniform", "timestep_sampling": "uniform",
    }  # fmt: skip
    return DiffusionParams(**{**values, **changes})


def make(name, **changes):
    return NoiseSchedule(NOISE_SCHEDULES[name](diffusion_params(**changes)))


@pytest.mark.parametrize(
    ("name", "first", "expected"),
    [
        ("linear", 1e-6, [0.999999, 0.532910966206, 0.0807576876894, 0.00345801048093, 4.24204987411e-05]),
        ("linear", 1e-4, [0.9999, 0.5214230306, 0.07779665837, 0.003300158362, 4.035829765e-05]),
        ("cosine", 1e-6, [0.9999587158, 0.8458879865, 0.4922851724, 0.1431786464, 2.428766907e-09]),
    ],
)
def test_alpha_bar_as_published(name, first, expected):
    table = make(name, beta_start=first).alpha_bar[JUDGED_AT].double()
    torch.testing.assert_close(table, torch.tensor(expected).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "timesteps", "first", "expected"),
    [
        ("linear", 100, 1e-6, 0.365379572),
        ("cosine", 100, 1e-6, 2.428572279e-07),
        ("cosine", 2000, 1e-6, 6.07192e-10),
    ],
)
def test_alpha_bar_at_the_end_of_other_lengths(name, timesteps, first, expected):
    last = float(make(name, timesteps=timesteps, beta_start=first).alpha_bar[-1])
    assert last == pytest.approx(expected, rel=1e-5)


def test_betas_of_the_tutorial():
    betas = linear_schedule().betas[[0, 500, 999]]
    torch.testing.assert_close(betas, torch.tensor([9.99999997e-07, 0.0100105088, 0.02]))


def test_the_cosine_schedule_reads_no_betas_and_clips_the_last_one():
    one, other = make("cosine"), make("cosine", beta_start=0.01, beta_end=0.5)
    assert torch.equal(one.betas, other.betas)
    assert float(one.betas.max()) == pytest.approx(0.999)


@pytest.mark.parametrize("timesteps", [2, 10, 1000])
@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_the_signal_falls_and_the_tables_agree(name, timesteps):
    schedule = make(name, timesteps=timesteps)
    assert schedule.timesteps == timesteps
    assert bool((schedule.log_snr.diff() < 0).all())
    assert bool((schedule.alpha.diff() < 0).all())
    assert bool((schedule.sigma.diff() >= 0).all())
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(timesteps))
    torch.testing.assert_close(schedule.alpha**2, schedule.alpha_bar)
    expected = 2 * (schedule.alpha.double().log() - schedule.sigma.double().log())
    torch.testing.assert_close(schedule.log_snr.double(), expected, rtol=1e-5, atol=1e-5)
    for table in schedule.buffers():
        assert table.dtype == torch.float32
        assert table.isfinite().all()


@pytest.mark.parametrize("first", [1e-6, 1e-9, 1e-14])
def test_small_betas_are_not_lost_in_rounding(first):
    assert float(linear_schedule(first=first).sigma[0]) == pytest.approx(first**0.5, rel=1e-6)


@pytest.mark.parametrize("betas", [[0.0, 0.1], [0.1, 1.0], [-0.1, 0.1], [float("nan"), 0.1]])
def test_betas_outside_0_and_1_are_refused(betas):
    with pytest.raises(ValueError, match="betas must lie in"):
        NoiseSchedule(torch.tensor(betas))


@pytest.mark.parametrize("changes", [{"beta_start": 1e-31}, {"beta_end": 0.999}, {"timesteps": 30_000}])
def test_a_schedule_that_divides_by_zero_is_refused(changes):
    with pytest.raises(ParamsError, match="beta_start"):
        make("linear", **changes)


def test_tables_follow_the_parameters_not_the_checkpoint():
    assert linear_schedule().state_dict() == {}


def test_q_sample_of_the_tutorial():
    x0 = torch.tensor([0.0, 0.25, 0.5, 1.0]).view(1, 1, 1, 4).expand(4, -1, -1, -1)
    eps = torch.tensor([1.0, -1.0, 0.5, 0.0]).view(1, 1, 1, 4).expand(4, -1, -1, -1)
    expected = [
        [0.00100662, 0.24899326, 0.50050306, 0.99999952],
        [0.68343914, -0.50093728, 0.70672333, 0.73000747],
        [0.95877129, -0.88772655, 0.6214751, 0.28417897],
        [0.99997878, -0.9983505, 0.50324595, 0.0065131],
    ]
    xt = q_sample(x0, eps, torch.tensor([0, 250, 500, 999]), linear_schedule())
    # The tutorial computes 1 - alpha_bar in float32, which is off by 1.2 % at t = 0 (0.00100662 is truly 0.001).
    torch.testing.assert_close(xt[1:, 0, 0], torch.tensor(expected[1:]), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(xt[0, 0, 0], torch.tensor(expected[0]), rtol=0, atol=1e-5)


def test_at_shapes_one_entry_per_chip():
    schedule = linear_schedule()
    entries = schedule.at("sigma", torch.tensor([3, 999, 3]))
    assert entries.shape == (3, 1, 1, 1)
    assert entries.flatten().tolist() == [float(schedule.sigma[i]) for i in (3, 999, 3)]


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_nearest_is_what_a_search_through_all_finds(name):
    schedule = make(name, timesteps=200)
    wanted = torch.linspace(-30, 30, 1201)
    distances = (schedule.log_snr[None] - wanted[:, None]).abs()
    found = schedule.nearest(wanted)
    assert found.dtype == torch.int64
    torch.testing.assert_close(distances.gather(1, found[:, None])[:, 0], distances.amin(1), rtol=0, atol=0)


@pytest.mark.parametrize("timesteps", [2, 3, 1000])
def test_nearest_finds_every_timestep_itself_and_the_ends(timesteps):
    schedule = linear_schedule(timesteps)
    assert torch.equal(schedule.nearest(schedule.log_snr), torch.arange(timesteps))
    assert schedule.nearest(torch.tensor([1e4, -1e4])).tolist() == [0, timesteps - 1]
    assert schedule.nearest(schedule.log_snr[:1].double()).tolist() == [0]
