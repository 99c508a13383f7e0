from __future__ import annotations

import math

import pytest
import torch

from earthprior import build
from earthprior.diffusion.schedule import NOISE_SCHEDULES, NoiseSchedule, q_sample, shifted, with_zero_terminal_snr
from earthprior.errors import ParamsError
from earthprior.params import DiffusionParams
from support import linear_schedule

JUDGED_AT = [0, 250, 500, 750, 999]


def diffusion_params(**changes):
    values = {
        "timesteps": 1000, "noise_schedule": "linear", "beta_start": 1e-6, "beta_end": 0.02, "scale_betas": False,
        "shift_reference_px": None, "zero_terminal_snr": False, "precondition": "none", "weighting": "uniform",
        "min_snr_gamma": 5.0, "timestep_sampling": "uniform",
    }  # fmt: skip
    return DiffusionParams(**{**values, **changes})


def make(name, **changes):
    return NoiseSchedule(NOISE_SCHEDULES[name](diffusion_params(**changes)))


def betas_of(name, **changes):
    return NOISE_SCHEDULES[name](diffusion_params(**changes))


@pytest.mark.parametrize(
    ("name", "first", "expected", "precision"),
    [
        ("linear", 1e-6, [0.999999, 0.532910966206, 0.0807576876894, 0.00345801048093, 4.24204987411e-05], 1e-6),
        ("linear", 1e-4, [0.9999, 0.5214230306, 0.07779665837, 0.003300158362, 4.035829765e-05], 1e-6),
        ("cosine", 1e-6, [0.9999587158, 0.8458879865, 0.4922851724, 0.1431786464, 2.428766907e-09], 1e-6),
        # Published in float32.
        ("clipped_cosine", 1e-6, [0.999992609, 0.851608396, 0.497647405, 0.14506273, 0.00324007263], 1e-6),
        ("quadratic", 1e-4, [0.99989998, 0.82001013, 0.33127463, 0.03814965, 7.33412e-04], 5e-6),
        ("sigmoid", 1e-4, [0.99985081, 0.90279901, 0.29888758, 0.00562292, 3.96818e-05], 5e-6),
    ],
)
def test_alpha_bar_as_published(name, first, expected, precision):
    table = make(name, beta_start=first).alpha_bar[JUDGED_AT].double()
    torch.testing.assert_close(table, torch.tensor(expected).double(), rtol=precision, atol=1e-8 * (table[-1] > 1e-8))


@pytest.mark.parametrize(
    ("name", "timesteps", "first", "scaled", "expected"),
    [
        ("linear", 100, 1e-6, False, 0.365379572),
        ("clipped_cosine", 100, 1e-6, False, 0.195406318),
        ("linear", 100, 1e-4, True, 2.039008976e-05),
        ("linear", 2000, 1e-4, True, 4.175557e-05),
        ("cosine", 100, 1e-6, False, 2.428572279e-07),
        ("cosine", 2000, 1e-6, False, 6.07192e-10),
    ],
)
def test_alpha_bar_at_the_end_of_other_lengths(name, timesteps, first, scaled, expected):
    last = float(make(name, timesteps=timesteps, beta_start=first, scale_betas=scaled).alpha_bar[-1])
    assert last == pytest.approx(expected, rel=1e-5)


def test_betas_of_the_tutorials_cosine_are_clipped():
    betas = betas_of("clipped_cosine")
    # The tutorial takes differences in float32, which leaves three digits of the first.
    expected = torch.tensor([7.39097595e-06, 0.00314348936, 0.02]).double()
    torch.testing.assert_close(betas[[0, 500, 999]], expected, rtol=1e-3, atol=0)
    assert int((betas == 0.02).sum()) == 98
    assert int((betas < 0.02).sum()) == 902
    assert float(betas_of("clipped_cosine", beta_start=0.001).min()) == 0.001


@pytest.mark.parametrize("name", ["linear", "clipped_cosine", "quadratic", "sigmoid"])
def test_scaled_betas_leave_as_much_after_fewer_timesteps(name):
    whole, fewer = (make(name, timesteps=T, beta_start=1e-4, scale_betas=True) for T in (1000, 250))
    assert float(fewer.log_snr[-1]) == pytest.approx(float(whole.log_snr[-1]), abs=0.5)
    plain = make(name, timesteps=250, beta_start=1e-4)
    assert float(plain.log_snr[-1]) > float(whole.log_snr[-1]) + 2
    first, last = betas_of(name, timesteps=250, beta_start=1e-4, scale_betas=True)[[0, -1]].tolist()
    assert 4e-4 <= first < 9e-4
    assert 0.079 < last <= 0.08


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


@pytest.mark.parametrize("first", [1e-6, 1e-7])
def test_small_betas_are_not_lost_in_rounding(first):
    assert float(linear_schedule(first=first).sigma[0]) == pytest.approx(first**0.5, rel=1e-6)


@pytest.mark.parametrize(
    "betas", [[0.0, 0.1], [0.1, 1.0], [-0.1, 0.1], [float("nan"), 0.1], [0.1, 1 - 1e-12], [1e-8, 0.1]]
)
def test_betas_outside_0_and_1_are_refused(betas):
    with pytest.raises(ParamsError, match=r"betas span .* must lie in \(0, 1\)"):
        NoiseSchedule(torch.tensor(betas).double())


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
@pytest.mark.parametrize(("reference", "width"), [(64, 256), (256, 64), (32, 33)])
def test_a_shift_moves_the_log_snr_by_the_same_everywhere(name, reference, width):
    betas = betas_of(name)
    before, after = NoiseSchedule(betas), NoiseSchedule(shifted(betas, reference, width))
    moved = after.log_snr.double() - before.log_snr.double()
    expected = 2 * torch.log(torch.tensor(reference / width)).double().expand_as(moved)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)
    if reference < width:
        assert bool((after.sigma > before.sigma)[:500].all()), "wider chips take more noise"


def test_a_shift_to_the_same_width_changes_nothing():
    betas = betas_of("linear", beta_start=1e-9)
    torch.testing.assert_close(shifted(betas, 64, 64), betas, rtol=1e-9, atol=0)


@pytest.mark.parametrize("timesteps", [2, 3, 1000])
@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_zero_terminal_snr_scales_alpha_as_published(name, timesteps):
    betas = betas_of(name, timesteps=timesteps)
    schedule = NoiseSchedule(with_zero_terminal_snr(betas), zero_terminal_snr=True)
    alpha = (1 - betas).cumprod(0).sqrt()
    expected = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    torch.testing.assert_close(schedule.alpha.double(), expected, rtol=1e-5, atol=1e-7)
    assert (float(schedule.betas[-1]), float(schedule.alpha[-1]), float(schedule.sigma[-1])) == (1, 0, 1)
    assert float(schedule.betas[0]) == pytest.approx(float(betas[0]))
    assert float(schedule.log_snr[-1]) == float("-inf")
    assert bool((schedule.log_snr.diff() < 0).all())
    assert all(table.isfinite().all() for name, table in schedule.named_buffers() if name != "log_snr")


def test_zero_terminal_snr_of_a_known_schedule():
    """Computed by the algorithm's published code in float64 (linear 1e-4 to 0.02, T = 1000)."""
    betas = with_zero_terminal_snr(betas_of("linear", beta_start=1e-4))
    alpha = (1 - betas_of("linear", beta_start=1e-4)).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    ratios = torch.cat([alpha[:1], alpha[1:] / alpha[:-1]]) ** 2
    torch.testing.assert_close(betas, 1 - ratios, rtol=1e-9, atol=1e-12)


def test_zero_terminal_snr_keeps_small_betas():
    betas = with_zero_terminal_snr(betas_of("linear", beta_start=1e-14, beta_end=1e-13, timesteps=10))
    # Ten betas that sum to 5.5e-13: the alphas fall from nearly 1 to 0 in the same proportions, last one apart.
    assert float(betas[0]) == pytest.approx(1e-14, rel=1e-9)
    assert float(betas[1]) == pytest.approx(2 * 2 / 54, rel=0.05)


def test_nearest_is_defined_where_the_last_timestep_is_pure_noise():
    schedule = NoiseSchedule(with_zero_terminal_snr(betas_of("linear", timesteps=50)), zero_terminal_snr=True)
    assert torch.equal(schedule.nearest(schedule.log_snr), torch.arange(50))
    assert schedule.nearest(torch.tensor([1e4, -1e4, float("-inf")])).tolist() == [0, 48, 49]


def test_a_run_shifts_first_and_then_ends_in_noise(make_params):
    asked = {"diffusion.shift_reference_px": 8, "diffusion.zero_terminal_snr": True, "evaluate.sampler": "ddim"}
    params = make_params({**asked, "data.crop_px": 16})
    plain = betas_of("linear")
    expected = with_zero_terminal_snr(shifted(plain, 8, 16))
    schedule = build.schedule(params)
    assert torch.equal(schedule.betas, expected.float())
    assert schedule.zero_terminal_snr
    wider = build.schedule(make_params({**asked, "data.crop_px": 32}))
    assert float(wider.log_snr[100]) == pytest.approx(float(schedule.log_snr[100]) - 2 * math.log(2), abs=0.01)


def test_a_shift_beyond_all_measure_is_refused(make_params):
    params = make_params({"diffusion.shift_reference_px": 10**7})
    with pytest.raises(ParamsError, match="shift_reference_px"):
        build.schedule(params)
    assert build.schedule(make_params({"diffusion.shift_reference_px": 1})).log_snr.isfinite().all()


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
