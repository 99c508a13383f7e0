from __future__ import annotations

import pytest
import torch

from earthprior.diffusion.linear import SIZES_KEPT, LinearDenoiser, fit
from earthprior.diffusion.schedule import q_sample
from earthprior.errors import DataError
from support import gaussian_chips, linear_schedule, make_batch, radial_power, some_mixing, toy_linear

TIMESTEPS = (0, 50, 200, 500, 999)


def noise_like(x0):
    # Not the seed that chips are made of, or the noise would know them.
    return torch.randn(x0.shape, generator=torch.Generator().manual_seed(4321))


def measured_mse(linear, x0, schedule, t):
    eps = noise_like(x0)
    at = torch.full((len(x0),), t)
    x0_hat = linear.denoise(q_sample(x0, eps, at, schedule), schedule.at("alpha", at), schedule.at("sigma", at))
    return float(((x0_hat - x0) ** 2).mean())


def true_filter(mixing, height, width, mean):
    """The Wiener filter of `gaussian_chips`, from its construction instead of from chips."""
    power = radial_power(height, width)[..., None, None] * (mixing @ mixing.T)
    values, vectors = torch.linalg.eigh(power.double())
    means = torch.full((len(mixing),), mean)
    return LinearDenoiser(means, torch.tensor(1.0), values, vectors, width)


def test_the_fit_finds_the_true_wiener_filter():
    mixing, schedule = some_mixing(3), linear_schedule()
    linear = fit([make_batch(gaussian_chips(3000, mixing, 12, 12, 0.7))], average_d4=True)
    truth = true_filter(mixing, 12, 12, 0.7)
    xt = gaussian_chips(64, mixing, 12, 12, 0.7, seed=9)
    xt = xt + torch.randn(xt.shape, generator=torch.Generator().manual_seed(3))
    for t in TIMESTEPS:
        alpha, sigma = schedule.at("alpha", torch.tensor([t])), schedule.at("sigma", torch.tensor([t]))
        expected, found = truth.denoise(xt, alpha, sigma), linear.denoise(xt, alpha, sigma)
        assert float(((found - expected) ** 2).mean()) < 1e-3 * float(xt.var())
    error = linear.expected_mse(schedule) / truth.expected_mse(schedule)
    assert float((error - 1).abs().max()) < 0.05


@pytest.mark.parametrize("t", TIMESTEPS)
def test_the_expected_error_is_the_one_measured_on_new_chips(t):
    mixing, schedule = some_mixing(4), linear_schedule()
    linear = fit([make_batch(gaussian_chips(2000, mixing, 10, 10, 0.3))], average_d4=True)
    new = gaussian_chips(500, mixing, 10, 10, 0.3, seed=77)
    assert measured_mse(linear, new, schedule, t) == pytest.approx(float(linear.expected_mse(schedule)[t]), rel=0.04)


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (9, 9), (6, 9), (7, 10)])
def test_the_expected_error_is_exact_on_the_chips_it_was_fitted_on(bands, size):
    """Error of a linear map W: mean |(alpha W - 1)(x0 - mean)|^2 + sigma^2 |W|^2, |W|^2 from its impulse responses.

    The first term depends on the chips' spectra alone, so no sampling error is left; any chips do, Gaussian or not.
    """
    generator = torch.Generator().manual_seed(bands)
    x0 = torch.rand(40, bands, *size, generator=generator) ** 3
    x0 = x0 + x0.roll(1, -1) + x0.roll(1, -2) + x0.mean(1, keepdim=True)
    linear = fit([make_batch(x0)], average_d4=False)
    schedule = linear_schedule()
    pixels = bands * size[0] * size[1]
    for t in (0, 200, 600):
        alpha, sigma = schedule.at("alpha", torch.tensor([t])), schedule.at("sigma", torch.tensor([t]))
        bias = linear.denoise(alpha * x0, alpha, sigma) - x0
        zero = linear.denoise(alpha * linear.mean.expand(1, bands, *size), alpha, sigma)
        impulses = torch.eye(pixels).view(pixels, bands, *size) + alpha * linear.mean
        response = linear.denoise(impulses, alpha, sigma) - zero
        expected = float((bias**2).mean() + sigma**2 * (response**2).sum() / pixels)
        assert float(linear.expected_mse(schedule)[t]) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("t", TIMESTEPS)
def test_no_scaled_identity_and_no_noisier_or_weaker_filter_does_better(t):
    mixing, schedule = some_mixing(3), linear_schedule()
    x0 = gaussian_chips(400, mixing, 12, 12, 0.5)
    linear = fit([make_batch(x0)], average_d4=False)
    error = measured_mse(linear, x0, schedule, t)
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    centred = x0 - linear.mean
    noisy = alpha * centred + sigma * noise_like(x0)
    scale = (noisy * centred).sum() / (noisy**2).sum()
    # At both ends of the schedule there is nothing to choose, hence the slack of sampling.
    slack = 1.001 if t in (0, 999) else 1.0
    assert error < slack * float(((scale * noisy - centred) ** 2).mean())
    at = torch.full((len(x0),), t)
    for change in (0.5, 2.0):
        xt = q_sample(x0, noise_like(x0), at, schedule)
        worse = linear.denoise(xt, schedule.at("alpha", at), change * schedule.at("sigma", at))
        assert error < slack * float(((worse - x0) ** 2).mean())


def test_without_noise_chips_stay_and_in_pure_noise_only_the_mean_is_left():
    linear = toy_linear(bands=2)
    xt = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    one, none = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    torch.testing.assert_close(linear.denoise(xt, one, 1e-4 * one), xt, rtol=0, atol=1e-3)
    torch.testing.assert_close(linear.denoise(xt, none, one), linear.mean.expand_as(xt))


def test_each_chip_has_its_own_noise_level():
    linear, schedule = toy_linear(bands=2), linear_schedule()
    xt, t = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 300, 999])
    together = linear.denoise(xt, schedule.at("alpha", t), schedule.at("sigma", t))
    for i in range(3):
        alone = linear.denoise(xt[i : i + 1], schedule.at("alpha", t[i : i + 1]), schedule.at("sigma", t[i : i + 1]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_mean_and_std_are_over_all_valid_pixels_and_bands():
    x0 = gaussian_chips(20, some_mixing(3), 8, 8, torch.tensor([0.0, 1.0, 5.0]))
    valid = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.2
    valid[:10] = True
    junk = torch.where(valid, x0, 1e3)
    linear = fit([make_batch(junk[:7], valid[:7]), make_batch(junk[7:], valid[7:])], average_d4=False)
    inside = x0.double().transpose(0, 1)[:, valid[:, 0]]
    torch.testing.assert_close(linear.mean.flatten().double(), inside.mean(1), rtol=1e-5, atol=1e-6)
    assert float(linear.std) == pytest.approx(float(inside.std(correction=0)), rel=1e-5)


def test_crops_with_nodata_do_not_count_for_the_spectra():
    x0 = gaussian_chips(30, some_mixing(2), 8, 8)
    valid = torch.ones(30, 1, 8, 8, dtype=torch.bool)
    valid[20:, :, 3, 3] = False
    mixed = torch.where(valid, x0, 50.0)
    whole = fit([make_batch(x0[:20])], average_d4=True)
    both = fit([make_batch(mixed, valid)], average_d4=True)
    # Whole batches of torn crops too, in any place.
    apart = fit([make_batch(mixed[20:], valid[20:]), make_batch(mixed[:20], valid[:20])], average_d4=True)
    away = (slice(None), slice(1, None))
    torch.testing.assert_close(both.eigenvalues[away], whole.eigenvalues[away])
    torch.testing.assert_close(apart.eigenvalues, both.eigenvalues)


def test_the_zero_frequency_is_the_scatter_about_the_mean_that_the_filter_subtracts():
    # Torn crops move the mean away from that of the crops that the spectra are of.
    x0 = gaussian_chips(40, some_mixing(2), 8, 8, torch.tensor([0.2, 0.4]))
    x0[20:] += 0.5
    valid = torch.ones(40, 1, 8, 8, dtype=torch.bool)
    valid[20:, :, 0, 0] = False
    linear = fit([make_batch(x0, valid)], average_d4=False)
    offsets = 8 * (x0[:20].mean((2, 3)) - linear.mean.flatten())
    scatter = torch.linalg.eigvalsh(offsets.T @ offsets / 20)
    torch.testing.assert_close(linear.eigenvalues[0, 0], scatter, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("average_d4", [False, True])
def test_batching_and_order_do_not_matter(average_d4):
    x0 = gaussian_chips(24, some_mixing(2), 8, 8)
    one = fit([make_batch(x0)], average_d4)
    many = fit([make_batch(x0[start : start + 5]) for start in (20, 5, 0, 15, 10)], average_d4)
    torch.testing.assert_close(one.eigenvalues, many.eigenvalues)


def test_averaged_over_flips_and_turns_the_filter_knows_no_direction():
    streaky = gaussian_chips(30, some_mixing(2), 8, 8)
    streaky = streaky + streaky.roll(1, -1) + streaky.roll(2, -1)
    linear, schedule = fit([make_batch(streaky)], average_d4=True), linear_schedule()
    alpha, sigma = schedule.at("alpha", torch.tensor([400])), schedule.at("sigma", torch.tensor([400]))
    for turns in range(4):
        for flip in (False, True):

            def turn(chips, turns=turns, flip=flip):
                chips = chips.flip(-1) if flip else chips
                return torch.rot90(chips, turns, (-2, -1))

            found = linear.denoise(turn(streaky), alpha, sigma)
            torch.testing.assert_close(found, turn(linear.denoise(streaky, alpha, sigma)), rtol=0, atol=1e-4)
    plain = fit([make_batch(streaky)], average_d4=False)
    found = plain.denoise(streaky.mT.contiguous(), alpha, sigma)
    assert float((found - plain.denoise(streaky, alpha, sigma).mT).abs().max()) > 0.01, "without averaging it does"


def test_few_crops_leave_no_negative_or_zero_power():
    linear = fit([make_batch(gaussian_chips(2, some_mixing(4), 8, 8))], average_d4=False)
    assert float(linear.eigenvalues.min()) > 0
    assert linear.expected_mse(linear_schedule()).isfinite().all()


def test_the_expected_error_is_right_where_float32_would_lose_the_noise():
    linear, schedule = toy_linear(bands=1), linear_schedule(first=1e-7)
    # With hardly any noise all power is kept, so that the error is the noise.
    assert float(linear.expected_mse(schedule)[0]) == pytest.approx(1e-7, rel=1e-4)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    for size in ((8, 8), (7, 9)):
        linear = fit([make_batch(gaussian_chips(10, some_mixing(3), *size))], average_d4=False)
        linear.save(tmp_path / "linear.safetensors")
        loaded = LinearDenoiser.load(tmp_path / "linear.safetensors")
        for name, tensor in linear.named_buffers():
            assert torch.equal(tensor, dict(loaded.named_buffers())[name]), name
        assert (loaded.bands, loaded.height, loaded.width) == (3, *size)
        xt, half = torch.randn(2, 3, *size), torch.full((2, 1, 1, 1), 0.5**0.5)
        assert torch.equal(loaded.denoise(xt, half, half), linear.denoise(xt, half, half))
    assert [path.name for path in tmp_path.iterdir()] == ["linear.safetensors"]


def test_mixed_precision_around_it_changes_nothing():
    linear, half = toy_linear(bands=2), torch.full((1, 1, 1, 1), 0.5**0.5)
    xt = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear.denoise(xt, half, half)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, linear.denoise(xt, half, half))


@pytest.mark.parametrize("size", [(8, 16), (16, 8), (16, 17), (32, 32)])
def test_chips_of_another_size_are_refused(size):
    one = torch.ones(1, 1, 1, 1)
    with pytest.raises(ValueError, match="fits 16 x 16 px, not"):
        toy_linear(bands=2).denoise(torch.zeros(1, 2, *size), one, one)


def test_without_a_whole_crop_the_message_says_what_to_do():
    valid = torch.ones(3, 1, 8, 8, dtype=torch.bool)
    valid[..., 0, 0] = False
    for average_d4 in (False, True):
        with pytest.raises(DataError, match=r"no 8 px crop .*nodata") as caught:
            fit([make_batch(torch.zeros(3, 2, 8, 8), valid)], average_d4)
        assert "crop_px" in str(caught.value)


def test_the_filter_of_another_size_denoises_nearly_as_well():
    mixing, chips = some_mixing(3), 64
    native = fit([make_batch(gaussian_chips(chips, mixing, 32, 32, 0.1))], average_d4=True)
    assert native.sized(32, 32) is native
    x0 = gaussian_chips(16, mixing, 64, 64, 0.1, seed=1)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    alpha, sigma = torch.full((16, 1, 1, 1), 0.9), torch.full((16, 1, 1, 1), 0.19**0.5)
    xt = alpha * x0 + sigma * noise
    wide = native.sized(64, 64)
    assert native.sized(64, 64) is wide
    middle = (..., slice(16, 48), slice(16, 48))
    found = (wide.denoise(xt, alpha, sigma) - x0)[middle].square().mean()
    own = fit([make_batch(gaussian_chips(chips, mixing, 64, 64, 0.1, seed=3))], average_d4=True)
    best = (own.denoise(xt, alpha, sigma) - x0)[middle].square().mean()
    assert found < 1.03 * best
    assert found < 0.6 * (xt / alpha - x0)[middle].square().mean()
    # odd sizes, and sides of their own
    assert wide.sized(41, 27).denoise(xt[..., :41, :27], alpha, sigma).isfinite().all()


def test_few_filters_of_other_sizes_are_remembered():
    native = toy_linear()
    for size in range(20, 30):
        native.sized(size, size)
    assert len(native._sized) == SIZES_KEPT
    assert not [name for name in native.state_dict() if "sized" in name]
