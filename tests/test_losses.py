from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch.distributions import Normal, kl_divergence

from earthprior.errors import ParamsError
from earthprior.losses import LOSSES, charbonnier, l1, mean_over_valid, mse, normal_kl, one_minus_ssim
from earthprior.networks.vgg16 import SHAPES

EVERYWHERE = torch.ones(2, 1, 16, 16, dtype=torch.bool)
LEAST = {name: 0.001 if name == "charbonnier" else 0.0 for name in LOSSES}


@pytest.fixture(scope="module")
def vgg_path(tmp_path_factory):
    """A file of random weights, which measure images as well as any, only not as people see them."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) * (2 / (9 * shape[1])) ** 0.5
        if len(shape) == 4
        else torch.zeros(shape)
        for name, shape in SHAPES.items()
    }
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(weights, path)
    return path


@pytest.fixture
def make_loss(make_params, vgg_path):
    """`make_loss(name, **overrides)`: a loss as params.yaml with these overrides gives it."""

    def make(name, **overrides):
        settings = {"loss_fn": name, "perceptual.weights": str(vgg_path), "loss_weights.gamma": 0.5, **overrides}
        return LOSSES[name](make_params(settings))

    return make


def images(seed=0, shape=(2, 4, 16, 16)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def smooth_images(seed=0, shape=(2, 4, 24, 20)):
    """Images of unit variance that resemble each other, as a denoiser's output and its target."""
    a, b = images(seed, shape)
    a, b = (F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), 5, 1) * 5 for x in (a, b))
    return a, 0.8 * a + 0.6 * b


def holes(seed, shape):
    return torch.rand((shape[0], 1, *shape[2:]), generator=torch.Generator().manual_seed(seed)) > 0.3


@pytest.mark.parametrize(("name", "expected"), [("mse", 1.9366022), ("l1", 1.1077695)])
def test_values_of_the_tutorial(name, expected, make_loss):
    assert make_loss(name)(*images(), EVERYWHERE).mean().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("name", "expected"), [("mse", 0.03331706), ("l1", 0.16658522)])
def test_values_of_the_tutorial_without_random_numbers(name, expected, make_loss):
    a = torch.linspace(0, 1, 2048).view(2, 4, 16, 16)
    assert make_loss(name)(a, a**2, EVERYWHERE).mean().item() == pytest.approx(expected, rel=1e-6)


def test_charbonnier_by_hand():
    errors = torch.tensor([0.0, 0.001, 1.0, -20.0])
    assert torch.allclose(charbonnier(errors), torch.tensor([0.001, 0.001 * math.sqrt(2), 1.0, 20.0]), atol=1e-6)


@pytest.mark.parametrize("measure", [mse, l1, charbonnier])
def test_pixel_errors_are_even_and_grow(measure):
    errors = torch.linspace(0, 3, 50)
    assert bool((measure(errors).diff() > 0).all())
    assert torch.equal(measure(errors), measure(-errors))


@pytest.mark.parametrize("name", LOSSES)
def test_no_error_is_the_least_loss_and_has_no_gradient(name, make_loss):
    target, _ = images()
    prediction = target.clone().requires_grad_()
    loss = make_loss(name)(prediction, target, EVERYWHERE)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([LEAST[name]] * 2, abs=1e-6)
    assert prediction.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_one_float32_per_chip_and_falls_towards_the_target(name, make_loss):
    loss = make_loss(name)
    target, noise = smooth_images()
    valid = holes(1, target.shape)
    values = torch.stack([loss(target + size * noise, target, valid) for size in (0.5, 0.1, 0.01)])
    assert values.dtype == torch.float32
    assert values.shape == (3, 2)
    assert bool((values.diff(dim=0) < 0).all())
    assert bool((values[-1] < 0.1 * values[0]).all())


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_down_the_gradient_helps(name, make_loss):
    loss = make_loss(name)
    target, start = smooth_images()
    valid = holes(1, target.shape)
    prediction = start.clone().requires_grad_()
    before = loss(prediction, target, valid)
    (gradient,) = torch.autograd.grad(before.sum(), prediction)
    after = loss(start - 1e-2 * gradient / gradient.square().mean().sqrt(), target, valid)
    assert bool((after < before).all())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_what_lies_under_nodata_reaches_neither_loss_nor_gradient(name, junk, make_loss):
    loss = make_loss(name)
    prediction, target = smooth_images()
    valid = holes(1, target.shape)
    valid[..., :3, :] = False
    expected = loss(prediction, target, valid)
    for place in ("prediction", "target", "both"):
        p = torch.where(valid, prediction, junk if place != "target" else prediction).requires_grad_()
        t = torch.where(valid, target, junk if place != "prediction" else target)
        value = loss(p, t, valid)
        value.sum().backward()
        assert torch.equal(value, expected)
        assert bool(p.grad.isfinite().all())
        assert p.grad.masked_select(~valid).abs().sum() == 0
        assert p.grad.masked_select(valid).abs().sum() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_chip_without_valid_pixels_is_zero_and_leaves_the_others_alone(name, make_loss):
    loss = make_loss(name)
    prediction, target = smooth_images()
    valid = holes(1, target.shape)
    alone = loss(prediction[1:], target[1:], valid[1:])
    valid[0] = False
    prediction[0] = float("nan")
    prediction.requires_grad_()
    value = loss(prediction, target, valid)
    value.sum().backward()
    assert value[0] == 0
    assert value[1].item() == pytest.approx(alone.item(), rel=1e-5)
    assert bool(prediction.grad.isfinite().all())
    assert prediction.grad[0].abs().sum() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_one_valid_pixel_and_small_chips_are_finite(name, make_loss):
    loss = make_loss(name)
    for height, width in ((4, 4), (5, 3), (2, 16)):
        prediction, target = images(shape=(1, 3, height, width))
        one = torch.zeros(1, 1, height, width, dtype=torch.bool)
        one[..., -1, -1] = True
        for valid in (one, ~one):
            prediction = prediction.detach().requires_grad_()
            value = loss(prediction, target, valid)
            value.sum().backward()
            assert 0 < value.item() < 1e6
            assert bool(prediction.grad.isfinite().all())


@pytest.mark.parametrize("name", LOSSES)
def test_a_constant_prediction_has_a_finite_loss_and_gradient(name, make_loss):
    """What a network gives whose last layer begins at 0."""
    target, _ = smooth_images()
    prediction = torch.zeros_like(target).requires_grad_()
    for wanted in (target, torch.ones_like(target)):
        value = make_loss(name)(prediction, wanted, holes(1, target.shape))
        value.sum().backward()
        assert bool(value.isfinite().all())
        assert bool(prediction.grad.isfinite().all())


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing_and_bfloat16_is_computed_in_float32(name, make_loss):
    loss = make_loss(name)
    prediction, target = (values.bfloat16() for values in smooth_images())
    valid = holes(1, target.shape)
    expected = loss(prediction.float(), target.float(), valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(prediction, target, valid)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


def test_the_mean_is_over_valid_pixels_of_each_chip():
    values = torch.arange(2 * 2 * 2 * 2, dtype=torch.float32).view(2, 2, 2, 2)
    valid = torch.tensor([[True, False, False, True], [False, True, False, False]]).view(2, 1, 2, 2)
    # Chip 0: 0, 3 of band 0 and 4, 7 of band 1; chip 1: 9 and 13.
    assert mean_over_valid(values, valid).tolist() == [3.5, 11.0]


def skimage_ssim(a, b, data_range):
    """SSIM maps (C, H, W) of two images, float64; right in the interior only, as it mirrors at the borders."""
    _, full = structural_similarity(
        a.double().numpy(), b.double().numpy(), channel_axis=0, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, data_range=data_range, full=True,
    )  # fmt: skip
    return full


@pytest.mark.parametrize("data_range", [1.0, 4.0])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_ssim_is_that_of_scikit_image(data_range, offset):
    a, b = (x + offset for x in smooth_images())
    found = 1 - one_minus_ssim(a, b, torch.ones(2, 1, 24, 20, dtype=torch.bool), data_range)
    for chip in range(2):
        expected = skimage_ssim(a[chip], b[chip], data_range)
        assert np.abs(found[chip].numpy() - expected)[:, 5:-5, 5:-5].max() < 1e-4
        assert 0.1 < expected.mean() < 0.95, "a comparison of zeros or ones shows nothing"


def test_ssim_of_a_real_chip_is_that_of_scikit_image(real_data):
    with rasterio.open(min((real_data / "naip_urban_trees_224").rglob("*.tif"))) as source:
        chip = torch.from_numpy(source.read(out_dtype="float32"))[None, :, :64, :64]
    chip = (chip - chip.mean((2, 3), keepdim=True)) / chip.std((2, 3), keepdim=True)
    noisy = chip + 0.5 * images(shape=chip.shape)[0]
    found = 1 - one_minus_ssim(noisy, chip, torch.ones(1, 1, 64, 64, dtype=torch.bool), 1.0)
    expected = skimage_ssim(noisy[0], chip[0], 1.0)
    assert np.abs(found[0].numpy() - expected)[:, 5:-5, 5:-5].max() < 1e-4


def test_ssim_at_borders_and_beside_nodata_sees_valid_pixels_only():
    a, b = smooth_images(shape=(1, 1, 15, 13))
    valid = holes(3, a.shape)
    found = one_minus_ssim(torch.where(valid, a, 0.0), torch.where(valid, b, 0.0), valid, 1.0)[0, 0]
    x, y, mask = a[0, 0].double().numpy(), b[0, 0].double().numpy(), valid[0, 0].numpy()
    rows, columns = np.mgrid[:15, :13]
    for row, column in ((0, 0), (14, 6), (7, 7), (3, 12), (11, 2)):
        mask_window = mask & (abs(rows - row) <= 5) & (abs(columns - column) <= 5)
        weight = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * 1.5**2))[mask_window]
        p, t = x[mask_window], y[mask_window]
        (vp, c), (_, vt) = np.cov(p, t, aweights=weight, ddof=0)
        mp, mt = np.average(p, weights=weight), np.average(t, weights=weight)
        ssim = (2 * mp * mt + 1e-4) * (2 * c + 9e-4) / ((mp**2 + mt**2 + 1e-4) * (vp + vt + 9e-4))
        assert found[row, column].item() == pytest.approx(1 - ssim, abs=2e-5)


def test_ssim_keeps_a_small_error():
    """1 - SSIM of 1e-7 is lost when computed as 1 minus a quotient of rounded terms."""
    target, noise = smooth_images()
    everywhere = torch.ones(2, 1, 24, 20, dtype=torch.bool)
    found = one_minus_ssim(target + 1e-4 * noise, target, everywhere, 1.0)
    exact = one_minus_ssim(target.double() + 1e-4 * noise.double(), target.double(), everywhere, 1.0)
    assert exact.mean() < 1e-6
    assert found.mean().item() == pytest.approx(exact.mean().item(), rel=0.02)


def test_the_gradient_of_ssim_and_kl_is_right():
    a, b = (x.double() for x in smooth_images(shape=(1, 2, 7, 6)))
    valid = holes(3, a.shape)
    a = torch.where(valid, a, 0.0).requires_grad_()
    b = torch.where(valid, b, 0.0)
    assert torch.autograd.gradcheck(lambda x: mean_over_valid(one_minus_ssim(x, b, valid, 1.0), valid), a)
    assert torch.autograd.gradcheck(lambda x: normal_kl(x, b, valid, 1.0), a)


def test_ssims_data_range_acts(make_loss):
    a, b = smooth_images()
    everywhere = torch.ones(2, 1, 24, 20, dtype=torch.bool)
    for name in ("ssim", "hybrid_light"):
        strict = make_loss(name)(a, b, everywhere)
        lenient = make_loss(name, **{"ssim.data_range": 100.0})(a, b, everywhere)
        assert bool((lenient < strict).all())


def test_kl_is_that_of_the_normal_distributions_of_valid_pixels():
    prediction, target = images()
    prediction = 0.7 * prediction + 0.3
    valid = holes(3, prediction.shape)
    found = normal_kl(prediction, target, valid, 1.0)
    for chip in range(2):
        p, t = (x[chip][:, valid[chip, 0]].double() for x in (prediction, target))
        expected = kl_divergence(Normal(p.mean(), p.std()), Normal(t.mean(), t.std()))
        assert found[chip].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_chip_without_contrast_does_not_own_the_batch():
    prediction = torch.full((1, 4, 8, 8), 0.1, requires_grad=True)
    loss = normal_kl(prediction, torch.zeros(1, 4, 8, 8), EVERYWHERE[:1, :, :8, :8], 1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.1**2 / (2 * 0.03**2), rel=1e-4)
    assert float(prediction.grad.norm()) < 10


def test_hybrid_light_is_the_tutorials_for_one_chip(make_loss):
    prediction, target = images(shape=(1, 4, 16, 16))
    prediction = 0.7 * prediction + 0.3
    weights = {"loss_weights.alpha": 1.0, "loss_weights.beta": 0.0, "loss_weights.gamma": 0.25}
    m1, s1, m2, s2 = prediction.mean(), prediction.std(), target.mean(), target.std()
    kl = torch.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5
    expected = F.mse_loss(prediction, target) + 0.25 * kl
    assert kl > 0.05
    found = make_loss("hybrid_light", **weights)(prediction, target, EVERYWHERE[:1])
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_hybrid_light_is_the_sum_of_its_weighted_parts(make_loss):
    prediction, target = smooth_images()
    valid = holes(1, target.shape)

    def hybrid(alpha, beta, gamma):
        weights = {"loss_weights.alpha": alpha, "loss_weights.beta": beta, "loss_weights.gamma": gamma}
        return make_loss("hybrid_light", **weights)(prediction, target, valid)

    assert torch.allclose(hybrid(2.0, 0.0, 0.0), 2 * make_loss("mse")(prediction, target, valid))
    assert torch.allclose(hybrid(0.0, 2.0, 0.0), 2 * make_loss("ssim")(prediction, target, valid))
    assert torch.allclose(
        hybrid(0.9, 0.1, 0.01), 0.9 * hybrid(1.0, 0.0, 0.0) + 0.1 * hybrid(0.0, 1.0, 0.0) + 0.01 * hybrid(0.0, 0.0, 1.0)
    )


def test_a_part_of_weight_zero_is_not_computed(make_loss, monkeypatch):
    monkeypatch.setattr("earthprior.losses.one_minus_ssim", lambda *images: pytest.fail("computed"))
    weights = {"loss_weights.alpha": 1.0, "loss_weights.beta": 0.0, "loss_weights.gamma": 0.0}
    make_loss("hybrid_light", **weights)(*images(), EVERYWHERE)


def perceptual_by_hand(prediction, target, weights):
    """The first four convolutions of VGG16 on each band as a grey image, written out; chips are valid everywhere."""

    def features(x):
        x = 0.449 + 0.226 * x.reshape(-1, 1, *x.shape[2:]).repeat(1, 3, 1, 1)
        x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        for index in (0, 2):
            x = F.relu(F.conv2d(x, weights[f"features.{index}.weight"], weights[f"features.{index}.bias"], padding=1))
        y = F.max_pool2d(x, 2)
        for index in (5, 7):
            y = F.relu(F.conv2d(y, weights[f"features.{index}.weight"], weights[f"features.{index}.bias"], padding=1))
        return x, y

    pairs = zip(features(prediction), features(target), strict=True)
    return sum((a - b).abs().reshape(len(prediction), -1).mean(1) for a, b in pairs)


@pytest.mark.parametrize("bands", [1, 3, 4, 13])
def test_perceptual_of_any_band_count_equals_vgg16_written_out(bands, make_loss, vgg_path):
    prediction, target = smooth_images(shape=(2, bands, 16, 16))
    expected = perceptual_by_hand(prediction, target, torch.load(vgg_path, weights_only=True))
    found = make_loss("perceptual")(prediction, target, EVERYWHERE)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert bool((expected > 0.1).all())


def test_perceptual_judges_each_band_alike(make_loss):
    loss = make_loss("perceptual")
    prediction, target = smooth_images(shape=(2, 4, 16, 16))
    assert torch.allclose(
        loss(prediction, target, EVERYWHERE), loss(prediction.flip(1), target.flip(1), EVERYWHERE), rtol=1e-5
    )
    for band in range(4):
        worse = target.clone()
        worse[:, band] = prediction[:, band]
        assert bool((loss(worse, target, EVERYWHERE) > 0.01).all()), "no band is left out"


def test_perceptual_is_frozen_follows_its_device_and_stays_out_of_checkpoints(make_loss):
    loss = make_loss("perceptual")
    prediction, target = smooth_images(shape=(2, 4, 16, 16))
    prediction, target = prediction.requires_grad_(), target.requires_grad_()
    value = loss(prediction, target, EVERYWHERE)
    value.sum().backward()
    assert prediction.grad is not None
    assert target.grad is None
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    assert {values.device.type for values in loss.buffers()} == {"cpu"}
    assert len(list(loss.buffers())) == 10
    assert {values.device.type for values in copy.deepcopy(loss).to("meta").buffers()} == {"meta"}
    assert torch.equal(copy.deepcopy(loss)(prediction, target, EVERYWHERE), value)


def test_perceptual_without_its_weights_fails_when_it_is_first_used(make_loss, tmp_path):
    # Not before: a pretrained network is evaluated where nobody has these weights.
    loss = make_loss("perceptual", **{"perceptual.weights": str(tmp_path / "nowhere.pth")})
    with pytest.raises(ParamsError, match=r"perceptual.weights: .*nowhere.pth cannot be read"):
        loss(*images(), EVERYWHERE)
