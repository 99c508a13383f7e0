from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from earthprior import build, losses
from earthprior.chips.batch import prepare
from earthprior.chips.normalize import Normalizer
from earthprior.diffusion.gain import denoising_table, gain_db, level_means, linear_denoiser, mse, noise_levels
from earthprior.diffusion.objective import OBJECTIVES
from earthprior.diffusion.sample import sample
from earthprior.diffusion.schedule import NOISE_SCHEDULES
from earthprior.diffusion.weighting import SNR_WEIGHTINGS
from earthprior.losses import LOSSES
from earthprior.networks.vgg16 import SHAPES
from earthprior.params import NormalizationParams
from earthprior.randomness import torch_generator
from earthprior.tasks.diffusion import DiffusionTask, input_channels
from support import gaussian_chips, linear_schedule, make_batch, some_mixing, toy_linear

PRECONDITIONS = ("none", "scalar", "wiener")
WEIGHTINGS = ("uniform", "linear", "min_snr", "soft_min_snr")
DRAWS = ("uniform", "stratified", "log_snr", "importance")
BANDS, SIZE, MEAN = 4, 16, 0.1
PLAIN = {"clip_percent": 0.0, "clip_val": None}


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
@pytest.mark.parametrize("precondition", PRECONDITIONS)
def test_the_loss_is_finite_and_every_weight_gets_a_finite_gradient(make_task, precondition, draw):
    task = make_task(precondition, draw=draw)
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


class Conv(nn.Module):
    """The smallest network that learns, its weights fixed."""

    def __init__(self, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, BANDS, 3, padding=1)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch_generator("conv", index)))

    def forward(self, x, t, cond=None):
        return self.conv(x)


def test_the_defaults_compute_what_they_always_did(make_task):
    """Wiener skip, weighting linear, mse: numbers that the first version of the loss gave, by the same seeds."""
    task = make_task(net=Conv(8))
    loss = task.loss(chips(), torch_generator(0, "step", 1))
    loss.total.backward()
    gradient = task.network.conv.weight.grad
    assert loss.t.tolist() == [751, 254, 38, 4]
    assert loss.total.item() == pytest.approx(1.624423861503601, rel=1e-6)
    assert loss.per_chip.tolist() == pytest.approx([1.286481023, 1.568992496, 1.756507397, 1.885714650], rel=1e-6)
    assert gradient.norm().item() == pytest.approx(1.7371621131896973, rel=1e-6)
    assert gradient.sum().item() == pytest.approx(12.55943775177002, rel=1e-5)


@pytest.fixture(scope="module")
def some_vgg():
    """Weights of VGG16's first layers, random, of the right size."""
    names = [f"features.{layer}.{part}" for layer in (0, 2, 5, 7) for part in ("weight", "bias")]
    generator = torch_generator("vgg")
    fan_in = {name: max(1, math.prod(SHAPES[name][1:])) for name in names}
    return {name: torch.randn(SHAPES[name], generator=generator) * (2 / fan_in[name]) ** 0.5 for name in names}


@pytest.fixture
def every_loss(monkeypatch, some_vgg):
    """Lets `perceptual` find weights."""
    monkeypatch.setattr(losses, "read_weights", lambda path: some_vgg)
    return {"perceptual.weights": "vgg16.pth", "loss_weights.gamma": 0.01}


def variants(params):
    """Every objective, weighting and end of the schedule that params.yaml may hold together with the precondition."""
    for objective, weighting, zero in itertools.product(OBJECTIVES, WEIGHTINGS, (False, True)):
        if zero and objective == "eps" and params.diffusion.precondition == "none":
            continue
        section = params.diffusion.model_copy(update={"weighting": weighting, "zero_terminal_snr": zero})
        yield params.model_copy(update={"objective": objective, "diffusion": section})


@pytest.mark.parametrize("loss_fn", LOSSES)
@pytest.mark.parametrize("precondition", PRECONDITIONS)
def test_every_combination_trains(make_params, linear, every_loss, precondition, loss_fn):
    base = make_params({"diffusion.precondition": precondition, "loss_fn": loss_fn, **every_loss})
    valid = torch.ones(4, 1, SIZE, SIZE, dtype=torch.bool)
    valid[1, :, :5, 3:9] = False
    batch, ends = make_batch(chips().x0, valid), torch.tensor([0, 1, 500, 999])
    for params in variants(base):
        network = Conv(input_channels(params))
        task = DiffusionTask(params, network, build.schedule(params), linear)
        task.timestep_sampler.draw = lambda count, generator: (ends, torch.ones(count))
        loss = task.loss(batch, torch_generator(0))
        loss.total.backward()
        what = (params.objective, params.diffusion.weighting, params.diffusion.zero_terminal_snr)
        assert loss.total.isfinite(), what
        assert all(parameter.grad.isfinite().all() for parameter in network.parameters()), what
        assert network.conv.weight.grad.abs().sum() > 0, what


@pytest.mark.parametrize("precondition", PRECONDITIONS)
@pytest.mark.parametrize("noise_schedule", NOISE_SCHEDULES)
def test_denoising_is_finite_at_every_timestep(make_params, linear, precondition, noise_schedule):
    base = make_params({"diffusion.precondition": precondition, "diffusion.noise_schedule": noise_schedule})
    every, xt = torch.arange(1000), chips(1).x0.expand(1000, -1, -1, -1)
    with torch.no_grad():
        for params in variants(base):
            if params.diffusion.weighting == "uniform":
                task = DiffusionTask(params, Conv(input_channels(params)), build.schedule(params), linear)
                assert task.denoise(xt, every).isfinite().all(), (params.objective, params.diffusion.zero_terminal_snr)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_every_loss_function_acts(make_task, every_loss, loss_fn):
    values = {
        name: make_task(loss_fn=name, net=Zero(), **every_loss).loss(chips(), torch_generator(0)).total.item()
        for name in LOSSES
    }
    assert sum(value == values[loss_fn] for value in values.values()) == 1


def test_a_loss_of_several_layers_moves_with_the_task_but_is_no_state(make_task, every_loss):
    task = make_task(loss_fn="perceptual", **every_loss)
    task.loss(chips(), torch_generator(0))
    assert all(name.startswith("network.") for name in task.state_dict())
    assert {parameter.data_ptr() for parameter in task.parameters() if parameter.requires_grad} == {
        parameter.data_ptr() for parameter in task.network.parameters()
    }


@pytest.mark.parametrize("precondition", PRECONDITIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("weighting", SNR_WEIGHTINGS)
def test_snr_weightings_multiply_the_loss_of_each_chip(make_task, weighting, objective, precondition):
    changes = {"draw": "uniform", "diffusion.min_snr_gamma": 2.0}
    weighed, plain = (
        make_task(precondition, objective, name, net=Conv(8 if precondition == "wiener" else 4), **changes).loss(
            chips(32), torch_generator(0)
        )
        for name in (weighting, "uniform")
    )
    schedule = linear_schedule()
    snr = schedule.log_snr[weighed.t].exp()
    of_x0 = snr.clamp(max=2) if weighting == "min_snr" else 2 * snr / (snr + 2)
    expected = of_x0 / {"eps": snr, "x0": 1, "v": snr + 1}[objective]
    torch.testing.assert_close(weighed.per_chip, expected * plain.per_chip, rtol=1e-4, atol=1e-7)
    assert weighed.total.item() == pytest.approx(weighed.per_chip.mean().item(), rel=1e-5)


@pytest.mark.parametrize("weighting", SNR_WEIGHTINGS)
def test_behind_a_skip_snr_weightings_of_squared_errors_do_not_depend_on_the_objective(make_task, weighting):
    totals = [
        make_task("scalar", name, weighting, net=Conv(4)).loss(chips(8), torch_generator(0)).total.item()
        for name in OBJECTIVES
    ]
    assert totals == pytest.approx([totals[0]] * 3, rel=1e-4)


def remembering(make_task, steps=40, **more):
    """A task with importance sampling over ten timesteps, after some steps."""
    schedule = {
        "diffusion.timesteps": 10,
        "diffusion.scale_betas": True,
        "evaluate.steps": 5,
        "diffusion.beta_end": 0.005,
    }
    task = make_task("scalar", "eps", "uniform", "importance", Conv(4), **schedule, **more)
    for step in range(steps):
        task.after_step(task.loss(chips(8), torch_generator(0, step)))
    return task


def test_importance_sampling_remembers_what_chips_cost_and_weighs_the_total_only(make_task):
    task = remembering(make_task)
    assert bool((task.timestep_sampler.history > 0).all())
    loss = task.loss(chips(64), torch_generator(9))
    t, factors = task.timestep_sampler.draw(64, torch_generator(9))
    assert torch.equal(t, loss.t)
    assert factors.unique().numel() > 2
    assert loss.total.item() == pytest.approx((factors * loss.per_chip).mean().item(), rel=1e-5)
    # The dearer a timestep, the more often it is drawn.
    cost = task.timestep_sampler.history.square().mean(1)
    assert torch.equal(cost[t].argsort(stable=True), (-factors).argsort(stable=True))


def test_judging_neither_uses_nor_touches_the_history(make_task):
    task = remembering(make_task)
    before = task.timestep_sampler.history.clone()
    task.eval()
    judged = task.loss(chips(64), torch_generator(9))
    assert judged.total.item() == pytest.approx(judged.per_chip.mean().item(), rel=1e-5)
    assert torch.equal(judged.t, make_task("none", draw="stratified", net=Zero(), **{"diffusion.timesteps": 20}).loss(
        chips(64), torch_generator(9)).t // 2)  # fmt: skip
    assert torch.equal(task.timestep_sampler.history, before)


def test_a_task_continues_from_its_state_bit_by_bit(make_task):
    """As the training loop restores it: everything but the network from the task's state_dict."""
    whole, resumed = remembering(make_task), remembering(make_task, steps=0)
    state = {name: value.clone() for name, value in whole.state_dict().items() if not name.startswith("network.")}
    assert list(state) == ["timestep_sampler.history"]
    resumed.load_state_dict(state, strict=False)
    for step in range(100, 105):
        one, other = (task.loss(chips(8), torch_generator(0, step)) for task in (whole, resumed))
        assert torch.equal(one.t, other.t)
        assert torch.equal(one.total, other.total)
        whole.after_step(one)
        resumed.after_step(other)
    assert torch.equal(whole.timestep_sampler.history, resumed.timestep_sampler.history)
    fresh = remembering(make_task, steps=0).loss(chips(8), torch_generator(0, 100))
    assert not torch.equal(fresh.total, whole.loss(chips(8), torch_generator(0, 100)).total)


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


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("precondition", PRECONDITIONS)
def test_a_perfect_network_has_no_loss(make_task, linear, precondition, objective, weighting):
    batch = chips()
    network = Knowing(lambda xt, t: batch.x0, precondition, objective, linear)
    task = make_task(precondition, objective, weighting, net=network)
    assert task.loss(batch, torch_generator(0)).total.item() < 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("precondition", PRECONDITIONS)
def test_weighting_linear_gives_the_linear_filter_a_loss_of_1(make_task, linear, precondition, objective):
    schedule = linear_schedule()
    network = Knowing(linear_denoiser(linear, schedule), precondition, objective, linear)
    task = make_task(precondition, objective, "linear", "log_snr", network)
    totals = [task.loss(chips(64, seed), torch_generator(seed)).total.item() for seed in range(100, 110)]
    assert sum(totals) / len(totals) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("draw", DRAWS)
def test_with_wiener_skip_and_linear_weighting_an_untrained_network_has_a_loss_of_1(make_task, draw):
    task = make_task("wiener", "eps", "linear", draw, Zero())
    found = [task.loss(chips(64, seed), torch_generator(seed)) for seed in range(100, 110)]
    assert sum(loss.total.item() for loss in found) / 10 == pytest.approx(1, abs=0.05)
    per_chip, t = torch.cat([loss.per_chip for loss in found]), torch.cat([loss.t for loss in found])
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
    section = NormalizationParams(apply_normalization=True, normal_strategy="z_value", stat_procedure="gpb", **PLAIN)
    task, totals = make_task(precondition, net=Spreading()), []
    for junk in (0.0, 65_535.0, float("nan")):
        raw[:, :, 4:9, 2:7] = junk
        batch = prepare(
            SimpleNamespace(pixels=raw, valid=valid, extra={}), Normalizer(section, stats), torch.device("cpu")
        )
        totals.append(task.loss(batch, torch_generator(0)).total.item())
    assert totals[0] == totals[1] == totals[2]


def test_prepare_leaves_the_readers_buffer_to_the_reader():
    raw = SimpleNamespace(pixels=torch.ones(1, 1, 4, 4), valid=torch.ones(1, 4, 4, dtype=torch.bool), extra={})
    stats = {"bands": ["b"], "all_bands": {}, "per_band": {"b": {"min": 0, "max": 1, "mean": 0, "std": 1}}}
    section = NormalizationParams(apply_normalization=False, normal_strategy="z_value", stat_procedure="gpb", **PLAIN)
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
    assert task.loss(batch, torch_generator(0)).total.item() > 0.1


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
