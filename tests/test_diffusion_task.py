from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from earthprior import build
from earthprior.chips.batch import prepare
from earthprior.chips.normalize import Normalizer
from earthprior.diffusion.gain import denoising_table, gain_db, level_means, linear_denoiser, mse, noise_levels
from earthprior.diffusion.objective import OBJECTIVES
from earthprior.diffusion.sample import sample
from earthprior.losses import LOSSES
from earthprior.params import NormalizationParams
from earthprior.randomness import torch_generator
from earthprior.tasks.diffusion import DiffusionTask, input_channels
from support import gaussian_chips, linear_schedule, make_batch, some_mixing, toy_linear

PRECONDITIONS = ("none", "scalar", "wiener")
WEIGHTINGS = ("uniform", "linear")
DRAWS = ("uniform", "log_snr")
BANDS, SIZE, MEAN = 4, 16, 0.1


@pytest.fixture(scope="module")
def linear():
    return toy_linear(BANDS, SIZE, 256, MEAN)


@pytest.fixture
def make_task(make_params, linear):
    """A task from four words, with the network of params.yaml or the one given."""

    def make(precondition="wiener", objective="eps", weighting="linear", draw="log_snr", net=None, **more):
        params = make_params(
            {
                "diffusion.precondition": precondition, "objective": objective, "diffusion.weighting": weighting,
                "diffusion.timestep_sampling": draw, **more,
            }
        )  # fmt: skip
        if net is None:
            return build.task(params, linear)
        return DiffusionTask(params, net, build.schedule(params), linear)

    return make


def chips(count=4, seed=7):
    return make_batch(gaussian_chips(count, some_mixing(BANDS), SIZE, SIZE, MEAN, seed))


def stir(network):
    """Leave the zeros that networks start at, else most gradients are zero."""
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            noise = torch.randn(parameter.shape, generator=torch_generator("stir", index))
            parameter.add_(0.05 * noise)


class Zero(nn.Module):
    """Answers 0, which is where networks start."""

    def forward(self, x, t, cond=None):
        return torch.zeros(len(x), BANDS, *x.shape[2:])


class Knowing(nn.Module):
    """Answers as a network whose x0_hat is `know(xt, t)` would have to, by the documentation of DiffusionTask."""

    def __init__(self, know, precondition, objective, linear):
        super().__init__()
        self.know, self.precondition, self.objective, self.linear = know, precondition, objective, linear
        self.schedule = linear_schedule()

    def forward(self, x, t, cond=None):
        alpha, sigma = self.schedule.at("alpha", t), self.schedule.at("sigma", t)
        mean, std = self.linear.mean, self.linear.std
        if self.precondition == "none":
            return OBJECTIVES[self.objective].prediction(self.know(x, t), x, alpha, sigma)
        scale_in = 1 / (alpha**2 * std**2 + sigma**2).sqrt()
        xt = x[:, :BANDS] / scale_in + alpha * mean
        if self.precondition == "scalar":
            skip = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (xt - alpha * mean)
            scale = std * sigma * scale_in
        else:
            skip = self.linear.denoise(xt, alpha, sigma)
            torch.testing.assert_close(x[:, BANDS:], (skip - mean) / std, rtol=1e-3, atol=1e-4)
            scale = self.linear.expected_mse(self.schedule)[t].sqrt().view(-1, 1, 1, 1)
        return (self.know(xt, t) - skip) / scale


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("precondition", PRECONDITIONS)
def test_the_loss_is_finite_and_every_weight_gets_a_finite_gradient(
    make_task, precondition, objective, weighting, draw
):
    task = make_task(precondition, objective, weighting, draw)
    stir(task.network)
    batch = chips()
    loss = task.loss(batch, torch_generator(0, "step", 1))
    loss.total.backward()
    assert loss.total.shape == ()
    assert loss.total.isfinite()
    assert loss.per_chip.shape == loss.t.shape == (4,)
    assert not loss.per_chip.requires_grad
    assert loss.total.item() == pytest.approx(loss.per_chip.mean().item(), rel=1e-5)
    for name, parameter in task.network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert task.network.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("network", build.NETWORKS)
def test_every_network_trains_under_every_precondition(make_task, network):
    small = {"unet_att_d.filter_config": [4, 8], "unet_att_d.block_num": [1, 1], "network": network}
    for precondition in PRECONDITIONS:
        task = make_task(precondition, **small)
        batch = chips()
        assert task.loss(batch, torch_generator(0)).total.isfinite()
        assert task.denoiser(batch)(batch.x0, torch.tensor([0, 1, 500, 999])).shape == batch.x0.shape
        assert task.features(batch, 0.2)[0].shape[2:] == batch.x0.shape[2:]


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_every_loss_function_acts(make_task, loss_fn):
    values = {
        name: make_task(loss_fn=name, net=Zero()).loss(chips(), torch_generator(0)).total.item() for name in LOSSES
    }
    assert sum(value == values[loss_fn] for value in values.values()) == 1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_with_the_wiener_skip_an_untrained_network_is_the_linear_filter(make_task, linear, objective):
    task, batch = make_task("wiener", objective), chips(8)
    t = torch.tensor([0, 1, 100, 300, 500, 700, 900, 999])
    xt = batch.x0 + torch.randn(batch.x0.shape, generator=torch_generator(1))
    expected = linear_denoiser(linear, task.schedule)(xt, t)
    with torch.no_grad():
        assert torch.equal(task.denoise(xt, t), expected)
    makers = {"network": task.denoiser, "linear": lambda batch: linear_denoiser(linear, task.schedule)}
    levels = noise_levels(task.schedule, float(linear.std))
    table = denoising_table(makers, [(batch, list("abcdefgh"))], task.schedule, levels, list("rgbn"), {"mse": mse})
    assert set(gain_db(level_means(table, "mse")).values()) == {0.0}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_with_the_scalar_skip_an_untrained_network_is_the_best_scalar_filter(make_task, linear, objective):
    task, batch = make_task("scalar", objective), chips(3)
    t = torch.tensor([0, 400, 999])
    alpha, sigma = task.schedule.at("alpha", t), task.schedule.at("sigma", t)
    weight = alpha * linear.std**2 / (alpha**2 * linear.std**2 + sigma**2)
    with torch.no_grad():
        found = task.denoise(batch.x0, t)
    torch.testing.assert_close(found, linear.mean + weight * (batch.x0 - alpha * linear.mean))


@pytest.mark.parametrize("precondition", PRECONDITIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_denoise_is_what_the_network_stands_for(make_task, linear, precondition, objective):
    def know(xt, t):
        return xt.roll(1, -1) * 0.3 + 0.2

    task = make_task(precondition, objective, net=Knowing(know, precondition, objective, linear))
    xt, t = chips(5).x0, torch.tensor([20, 100, 400, 800, 999])
    torch.testing.assert_close(task.denoiser(chips(5))(xt, t), know(xt, t), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("precondition", PRECONDITIONS)
def test_a_perfect_network_has_no_loss(make_task, linear, precondition, objective, weighting, draw):
    batch = chips()
    network = Knowing(lambda xt, t: batch.x0, precondition, objective, linear)
    task = make_task(precondition, objective, weighting, draw, network)
    assert task.loss(batch, torch_generator(0)).total.item() < 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("precondition", PRECONDITIONS)
def test_weighting_linear_gives_the_linear_filter_a_loss_of_1(make_task, linear, precondition, objective):
    schedule = linear_schedule()
    network = Knowing(linear_denoiser(linear, schedule), precondition, objective, linear)
    task = make_task(precondition, objective, "linear", "log_snr", network)
    losses = [task.loss(chips(64, seed), torch_generator(seed)).total.item() for seed in range(100, 110)]
    assert sum(losses) / len(losses) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("draw", DRAWS)
def test_with_wiener_skip_and_linear_weighting_an_untrained_network_has_a_loss_of_1(make_task, draw):
    task = make_task("wiener", "eps", "linear", draw, Zero())
    losses = [task.loss(chips(64, seed), torch_generator(seed)) for seed in range(100, 110)]
    assert sum(loss.total.item() for loss in losses) / 10 == pytest.approx(1, abs=0.05)
    per_chip, t = torch.cat([loss.per_chip for loss in losses]), torch.cat([loss.t for loss in losses])
    for part in (t < 300, t >= 300):
        assert per_chip[part].mean().item() == pytest.approx(1, abs=0.1), "at low and at high noise alike"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_uniform_weighting_is_the_objectives_own_loss(make_task, linear, objective):
    """The same estimates cost the same under every precondition, and what the plain objective says."""
    batch, totals = chips(), []
    for precondition in PRECONDITIONS:
        network = Knowing(lambda xt, t: 0.5 * xt, precondition, objective, linear)
        task = make_task(precondition, objective, "uniform", "uniform", network)
        totals.append(task.loss(batch, torch_generator(5)).total.item())
    assert totals == pytest.approx([totals[0]] * 3, rel=1e-3)
    zero = make_task("none", objective, "uniform", "uniform", Zero()).loss(batch, torch_generator(5))
    if objective == "eps":
        assert zero.total.item() == pytest.approx(1, abs=0.1)
    if objective == "x0":
        expected = (batch.x0**2).mean((1, 2, 3))
        torch.testing.assert_close(zero.per_chip, expected)


@pytest.mark.parametrize("draw", DRAWS)
def test_the_same_address_repeats_the_loss_and_another_one_does_not(make_task, draw):
    task, batch = make_task(draw=draw), chips()
    first, again, other = (task.loss(batch, torch_generator(0, "step", step)) for step in (3, 3, 4))
    assert torch.equal(first.total, again.total)
    assert torch.equal(first.t, again.t)
    assert not torch.equal(first.per_chip, other.per_chip)


class Spreading(nn.Module):
    """Answers with what it is given, blurred: what lies under nodata would reach the pixels around."""

    def forward(self, x, t, cond=None):
        return nn.functional.avg_pool2d(x, 5, 1, 2)[:, :BANDS]


@pytest.mark.parametrize("precondition", PRECONDITIONS)
def test_what_the_files_hold_under_nodata_changes_no_loss(make_task, precondition):
    raw = (1000 + 300 * chips().x0).clone()
    valid = torch.ones(4, SIZE, SIZE, dtype=torch.bool)
    valid[:, 4:9, 2:7] = False
    stats = {
        "bands": list("rgbn"), "all_bands": {},
        "per_band": {name: {"min": 0, "max": 3000, "mean": 1000, "std": 300} for name in "rgbn"},
    }  # fmt: skip
    section = NormalizationParams(apply_normalization=True, normal_strategy="z_value", stat_procedure="gpb")
    task, totals = make_task(precondition, net=Spreading()), []
    for junk in (0.0, 65_535.0, float("nan")):
        raw[:, :, 4:9, 2:7] = junk
        batch = prepare(SimpleNamespace(pixels=raw, valid=valid), Normalizer(section, stats), torch.device("cpu"))
        totals.append(task.loss(batch, torch_generator(0)).total.item())
    assert totals[0] == totals[1] == totals[2]


def test_prepare_leaves_the_readers_buffer_to_the_reader():
    raw = SimpleNamespace(pixels=torch.ones(1, 1, 4, 4), valid=torch.ones(1, 4, 4, dtype=torch.bool))
    stats = {"bands": ["b"], "all_bands": {}, "per_band": {"b": {"min": 0, "max": 1, "mean": 0, "std": 1}}}
    section = NormalizationParams(apply_normalization=False, normal_strategy="z_value", stat_procedure="gpb")
    batch = prepare(raw, Normalizer(section, stats), torch.device("cpu"))
    raw.pixels.fill_(9)
    raw.valid.fill_(False)
    assert batch.x0.max() == 1
    assert batch.valid.shape == (1, 1, 4, 4)
    assert batch.valid.all()


@pytest.mark.parametrize("precondition", PRECONDITIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_errors_at_invalid_pixels_do_not_count(make_task, linear, precondition, weighting):
    batch = chips()
    valid = torch.ones_like(batch.valid)
    valid[:, :, 4:9, 2:7] = False

    def know(xt, t):
        return torch.where(valid, batch.x0, 100.0)

    task = make_task(precondition, "eps", weighting, net=Knowing(know, precondition, "eps", linear))
    assert task.loss(make_batch(batch.x0, valid), torch_generator(0)).total.item() < 1e-4
    assert task.loss(batch, torch_generator(0)).total.item() > 1


def test_a_chip_without_valid_pixels_has_no_say(make_task):
    task, batch = make_task(net=Zero()), chips()
    valid = torch.ones_like(batch.valid)
    valid[1] = False
    loss = task.loss(make_batch(batch.x0, valid), torch_generator(0))
    every = task.loss(batch, torch_generator(0))
    assert loss.per_chip[1] == 0
    assert loss.total.item() == pytest.approx(every.per_chip[[0, 2, 3]].mean().item(), rel=1e-5)
    nothing = task.loss(make_batch(batch.x0, torch.zeros_like(valid)), torch_generator(0))
    assert nothing.total.item() == 0


def test_uniform_timesteps_are_uniform_and_log_snr_ones_cover_the_judged_levels(make_task, linear):
    count = 4000
    batch = make_batch(torch.zeros(count, BANDS, SIZE, SIZE))
    uniform = make_task(draw="uniform", net=Zero()).loss(batch, torch_generator(0)).t
    assert uniform.dtype == torch.int64
    assert (int(uniform.min()), int(uniform.max())) == (0, 999)
    assert uniform.float().mean().item() == pytest.approx(499.5, abs=20)
    task = make_task(draw="log_snr", net=Zero())
    drawn = task.loss(batch, torch_generator(0)).t
    log_snr = task.schedule.log_snr[drawn] + 2 * linear.std.log()
    assert log_snr.min().item() == pytest.approx(-7, abs=0.1)
    assert log_snr.max().item() == pytest.approx(8, abs=0.5)
    # Equal parts of the range get equal shares, apart from what the lowest timesteps round away.
    counts = torch.histc(log_snr, bins=5, min=-7, max=8)
    assert counts.tolist() == pytest.approx([800] * 5, rel=0.15)
    ratios = (-0.5 * log_snr).exp()
    assert ratios.min() < 0.05
    assert ratios.max() > 5


def test_a_small_batch_sees_low_and_high_noise_at_every_step(make_task):
    task = make_task(draw="log_snr", net=Zero())
    for step in range(20):
        t = task.loss(chips(), torch_generator(0, step)).t
        assert t.min() < 150 < 500 < t.max()


def test_weights_start_from_the_seed_alone(make_task):
    torch.manual_seed(1)
    one = make_task(seed=3).network.state_dict()
    torch.manual_seed(2)
    same, other = make_task(seed=3).network.state_dict(), make_task(seed=4).network.state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_only_the_network_is_state(make_task):
    assert all(name.startswith("network.") for name in make_task().state_dict())


def test_input_channels(make_params):
    assert [input_channels(make_params({"diffusion.precondition": word})) for word in PRECONDITIONS] == [4, 4, 8]


def test_features_are_a_pyramid_that_depends_on_the_chip_and_the_noise_level_alone(make_task):
    task, batch = make_task(), chips()
    stir(task.network)
    with torch.no_grad():
        pyramid = task.features(batch, 0.2)
        assert [tuple(level.shape) for level in pyramid] == [(4, 8, 16, 16), (4, 16, 8, 8)]
        torch.manual_seed(5)
        alone = task.features(make_batch(batch.x0[2:3]), 0.2)
        torch.testing.assert_close(alone[0], pyramid[0][2:3], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(task.features(batch, 2.0)[0], pyramid[0])


def test_samples_of_the_untrained_wiener_network_have_the_spread_of_the_chips(make_task, linear):
    task = make_task("wiener")
    drawn = sample(task.denoise, (16, BANDS, SIZE, SIZE), task.schedule, "dpm_solver", 20, seed=0)
    assert float(drawn.std()) == pytest.approx(float(linear.std), rel=0.2)
