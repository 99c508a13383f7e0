from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from earthprior.diffusion.gain import (
    RHOS,
    NoiseLevel,
    denoising_table,
    fixed_noise,
    gain_db,
    level_means,
    linear_denoiser,
    mean_denoiser,
    mse,
    noise_levels,
)
from earthprior.errors import DivergedError, ParamsError
from support import gaussian_chips, linear_schedule, make_batch, some_mixing, toy_linear

BANDS = ("red", "nir")
CHIPS = ["a.tif", "b.tif", "c.tif"]


@pytest.fixture(scope="module")
def linear():
    return toy_linear(bands=2)


def three_chips(valid=None):
    return make_batch(gaussian_chips(3, some_mixing(2), 16, 16, 0.1, seed=5), valid)


def table_of(denoisers, batches, levels=None, metrics=None):
    schedule = linear_schedule()
    makers = {name: (lambda batch, denoise=denoise: denoise) for name, denoise in denoisers.items()}
    levels = levels or noise_levels(schedule, 0.7)
    return denoising_table(makers, batches, schedule, levels, BANDS, metrics or {"mse": mse})


def test_the_linear_filter_against_itself_is_0_db_exactly(linear):
    denoise = linear_denoiser(linear, linear_schedule())
    table = table_of({"network": denoise, "linear": denoise}, [(three_chips(), CHIPS)])
    gains = gain_db(level_means(table, "mse"))
    assert list(gains) == [f"rho_{rho:g}" for rho in RHOS] + ["mean"]
    assert set(gains.values()) == {0.0}


def test_knowing_nothing_of_the_chip_is_below_the_filter_at_every_level(linear):
    schedule = linear_schedule()
    denoisers = {"network": mean_denoiser(linear), "linear": linear_denoiser(linear, schedule)}
    gains = gain_db(level_means(table_of(denoisers, [(three_chips(), CHIPS)]), "mse"))
    assert max(gains.values()) < 0
    assert gains["rho_0.05"] < gains["rho_0.5"] < gains["rho_5"]


def test_half_the_error_is_3_db_and_the_mean_is_over_decibels_not_errors():
    errors = pd.DataFrame({"network": [0.5, 4.0, 1e-6], "linear": [1.0, 1.0, 1e-3]}, index=[0.1, 0.5, 2.0])
    gains = gain_db(errors)
    assert gains["rho_0.1"] == pytest.approx(10 * math.log10(2))
    assert gains["rho_0.5"] == pytest.approx(-10 * math.log10(4))
    assert gains["rho_2"] == pytest.approx(30)
    assert gains["mean"] == pytest.approx((30 - 10 * math.log10(2)) / 3)


@pytest.mark.parametrize("std", [0.05, 0.3, 1.0])
def test_levels_are_the_nearest_timesteps(std):
    schedule = linear_schedule()
    ratios = schedule.sigma / (schedule.alpha * std)
    for level in noise_levels(schedule, std):
        assert float((ratios[level.t] / level.rho).log().abs()) == float((ratios / level.rho).log().abs().min())
        assert float(ratios[level.t]) == pytest.approx(level.rho, rel=0.1)


def test_levels_that_a_schedule_does_not_reach_are_absent():
    # At T = 1000 the judged ratios are all there; one that starts with much noise lacks the lowest.
    assert [level.rho for level in noise_levels(linear_schedule(), 1.0)] == list(RHOS)
    coarse = linear_schedule(first=0.02, last=0.03)
    assert coarse.sigma[0] / coarse.alpha[0] > 0.1
    assert [level.rho for level in noise_levels(coarse, 1.0)] == [0.2, 0.5, 1.0, 2.0, 5.0]
    assert noise_levels(coarse, 1.0, [0.1, 0.5]) == noise_levels(coarse, 1.0, [0.5])


def test_a_level_10_per_cent_off_is_in_and_one_further_off_is_out():
    schedule = linear_schedule()
    first = float(schedule.sigma[0] / schedule.alpha[0])
    assert noise_levels(schedule, 1.0, [first / 1.09, 1.0])[0] == NoiseLevel(first / 1.09, 0)
    assert [level.rho for level in noise_levels(schedule, 1.0, [first / 1.11, 1.0])] == [1.0]


def test_a_schedule_that_reaches_no_level_is_refused():
    with pytest.raises(ParamsError, match="noise-to-signal"):
        noise_levels(linear_schedule(2, first=1e-6, last=2e-6), 1.0)


def test_a_level_is_named_as_in_metrics():
    assert [NoiseLevel(rho, 0).name for rho in RHOS] == [
        "rho_0.05", "rho_0.1", "rho_0.2", "rho_0.5", "rho_1", "rho_2", "rho_5"
    ]  # fmt: skip


def test_noise_depends_on_chip_and_level_alone():
    noise = fixed_noise("a.tif", 0.5, (2, 16, 16))
    assert torch.equal(noise, fixed_noise("a.tif", 0.5, torch.Size([2, 16, 16])))
    torch.manual_seed(99)
    assert torch.equal(noise, fixed_noise("a.tif", 0.5, (2, 16, 16)))
    assert torch.equal(fixed_noise("a.tif", 1, (2, 4, 4)), fixed_noise("a.tif", 1.0, (2, 4, 4)))
    assert not torch.equal(noise, fixed_noise("b.tif", 0.5, (2, 16, 16)))
    assert not torch.equal(noise, fixed_noise("a.tif", 0.2, (2, 16, 16)))
    many = fixed_noise("a.tif", 0.5, (4, 128, 128))
    assert abs(float(many.mean())) < 0.02
    assert float(many.std()) == pytest.approx(1, abs=0.02)


def test_neither_batch_size_nor_order_nor_other_denoisers_change_a_row(linear):
    batch, denoise = three_chips(), linear_denoiser(linear, linear_schedule())
    together = table_of({"linear": denoise}, [(batch, CHIPS)])
    alone = [(make_batch(batch.x0[i : i + 1]), CHIPS[i : i + 1]) for i in (2, 0, 1)]
    apart = table_of({"mean": mean_denoiser(linear), "linear": denoise}, alone)
    keys = ["chip", "rho", "denoiser"]
    apart = apart[apart["denoiser"] == "linear"].sort_values(keys, ignore_index=True)
    pd.testing.assert_frame_equal(together.sort_values(keys, ignore_index=True), apart, rtol=1e-4)


def test_the_table_has_a_row_per_chip_level_and_denoiser_and_a_column_per_metric_and_band(linear):
    levels = [NoiseLevel(0.5, 300), NoiseLevel(1.0, 500)]
    constant = {"mse": mse, "bias": lambda x0_hat, batch: (x0_hat - batch.x0).mean((2, 3))}
    denoisers = {"network": mean_denoiser(linear), "linear": linear_denoiser(linear, linear_schedule())}
    table = table_of(denoisers, [(three_chips(), CHIPS)], levels, constant)
    assert list(table.columns) == ["chip", "rho", "t", "denoiser", "mse/red", "mse/nir", "bias/red", "bias/nir"]
    assert len(table) == 3 * 2 * 2
    assert not table.duplicated(["chip", "rho", "denoiser"]).any()
    one = table[(table["chip"] == "b.tif") & (table["denoiser"] == "network") & (table["rho"] == 0.5)].iloc[0]
    assert one["t"] == 300
    x0 = three_chips().x0[1]
    assert one["mse/nir"] == pytest.approx(float(((linear.mean[0, 1] - x0[1]) ** 2).mean()), rel=1e-5)


def test_denoisers_are_asked_at_the_level_with_noise_of_that_level(linear):
    asked = []

    def spy(xt, t):
        asked.append((xt.std().item(), t))
        return xt

    table_of({"network": spy}, [(three_chips(), CHIPS)], [NoiseLevel(5.0, 900), NoiseLevel(0.05, 10)])
    assert [at.tolist() for _, at in asked] == [[900] * 3, [10] * 3]
    assert asked[0][1].dtype == torch.int64
    assert asked[0][0] == pytest.approx(1.0, abs=0.05)


def test_mse_is_over_valid_pixels_per_band_and_nan_where_there_are_none():
    valid = torch.ones(3, 1, 16, 16, dtype=torch.bool)
    valid[1, ..., :8] = False
    valid[2] = False
    batch = three_chips(valid)
    wrong = batch.x0 + torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    wrong = torch.where(valid, wrong, 1e6)
    torch.testing.assert_close(mse(wrong, batch)[:2], torch.tensor([[1.0, 4.0], [1.0, 4.0]]))
    assert mse(wrong, batch)[2].isnan().all()


def test_a_chip_without_valid_pixels_is_left_out_of_means(linear):
    valid = torch.ones(3, 1, 16, 16, dtype=torch.bool)
    valid[2] = False
    denoise = linear_denoiser(linear, linear_schedule())
    with_empty = level_means(table_of({"linear": denoise}, [(three_chips(valid), CHIPS)]), "mse")
    batch = three_chips()
    without = level_means(table_of({"linear": denoise}, [(make_batch(batch.x0[:2]), CHIPS[:2])]), "mse")
    pd.testing.assert_frame_equal(with_empty, without, rtol=1e-5)


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_a_network_that_answers_one_chip_with_nan_is_not_judged_on_the_others(linear, junk):
    def broken(xt, t):
        answer = linear.mean.expand_as(xt).clone()
        answer[1, 0, 3, 3] = junk
        return answer

    denoisers = {"linear": linear_denoiser(linear, linear_schedule()), "network": broken}
    with pytest.raises(DivergedError, match=r"network answers chip b\.tif at rho_0\.05"):
        table_of(denoisers, [(three_chips(), CHIPS)])


def test_means_weigh_chips_and_bands_equally():
    table = pd.DataFrame(
        {
            "chip": ["a", "b"], "rho": [0.5, 0.5], "t": [3, 3], "denoiser": ["network", "network"],
            "mse/red": [1.0, 3.0], "mse/nir": [2.0, 6.0], "ssim/red": [0.1, 0.1], "ssim/nir": [0.1, 0.1],
        }
    )  # fmt: skip
    assert level_means(table, "mse").loc[0.5, "network"] == 3.0
