"""Denoising diffusion: the network learns to tell a chip from the noise that was mixed into it.

Source: Ho et al. 2020, arXiv:2006.11239, Algorithm 1; preconditioning after Karras et al. 2022, arXiv:2206.00364,
Section 5, written for alpha^2 + sigma^2 = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from earthprior.chips.batch import Batch
from earthprior.diffusion.gain import Denoiser, nearest_timestep
from earthprior.diffusion.linear import LinearDenoiser
from earthprior.diffusion.objective import OBJECTIVES
from earthprior.diffusion.schedule import NoiseSchedule, q_sample
from earthprior.losses import LOSSES, mean_over_valid
from earthprior.params import Params
from earthprior.randomness import torch_generator
from earthprior.tasks.task import Loss

LOG_SNR_RANGE = (-7.0, 8.0)
"""Where `timestep_sampling: log_snr` draws, as log(std(x0)^2 alpha^2 / sigma^2): the judged levels lie in [-3.2, 6]."""


class DiffusionTask(nn.Module):
    """Predict eps, x0 or v from xt.

    Args:
        params: The whole of params.yaml.
        network: Takes `input_channels(params)` and gives C channels.
        schedule: The forward process.
        linear: The linear denoiser fitted on the same normalized crops; gives means, scales and the Wiener skip.

    The three preconditions, with m the band means, s the chips' standard deviation and F the network:
        none: F(xt, t) is the objective's prediction.
        scalar: x0_hat = m + c_skip (xt - alpha m) + c_out F(c_in (xt - alpha m), t), the best scalar filter as skip.
        wiener: x0_hat = W_t xt + c_out F([c_in (xt - alpha m), (W_t xt - m) / s], t), the best linear filter as skip
            and as extra input; c_out is that filter's own root-mean-square error.
    """

    network: nn.Module
    schedule: NoiseSchedule
    linear: LinearDenoiser
    _linear_rms: Tensor

    def __init__(self, params: Params, network: nn.Module, schedule: NoiseSchedule, linear: LinearDenoiser) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.linear = linear
        self._params = params.diffusion
        self._objective = OBJECTIVES[params.objective]
        self._loss = LOSSES[params.loss_fn]
        self.register_buffer("_linear_rms", linear.expected_mse(schedule).sqrt(), persistent=False)

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """The denoising loss of a batch at random timesteps; see `tasks.task.Task`."""
        t = self._draw_timesteps(len(batch), generator)
        # Drawn contiguous: normal noise into a channels_last tensor is six times slower.
        eps = torch.randn(batch.x0.shape, generator=generator, device=batch.x0.device)
        xt = q_sample(batch.x0, eps, t, self.schedule)
        per_chip = mean_over_valid(self._loss(self._error(xt, batch.x0, eps, t)), batch.valid)
        # A chip without valid pixels has no say, also not as a zero that pulls the mean down.
        counted = batch.valid.flatten(1).any(1)
        total = per_chip.sum() / counted.sum().clamp(min=1)
        return Loss(total, per_chip.detach(), t)

    def after_step(self, loss: Loss) -> None:
        """Nothing follows the network here."""

    def denoiser(self, batch: Batch) -> Denoiser:
        """denoise(xt, t) -> x0_hat; the batch carries no condition for this task."""
        return self.denoise

    def denoise(self, xt: Tensor, t: Tensor) -> Tensor:
        """The network's estimate of x0 (B, C, H, W), float32."""
        output, skip, scale = self._call(xt, t)
        if scale is not None:
            return skip + scale * output
        return self._objective.x0_hat(output, xt, self.schedule.at("alpha", t), self.schedule.at("sigma", t))

    def features(self, batch: Batch, rho: float) -> list[Tensor]:
        """Features of chips at noise-to-signal ratio rho, one fixed noise field for all; see `tasks.task.Task`."""
        t = torch.full((len(batch),), nearest_timestep(self.schedule, rho, float(self.linear.std)))
        t = t.to(batch.x0.device)
        eps = torch.randn((1, *batch.x0.shape[1:]), generator=torch_generator("features")).to(batch.x0.device)
        inputs, _, _ = self._inputs(q_sample(batch.x0, eps.expand_as(batch.x0), t, self.schedule), t)
        pyramid: list[Tensor] = self.network.features(inputs, t)  # type: ignore[operator]
        return pyramid

    def _error(self, xt: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the loss measures (B, C, H, W): the prediction's error, in units of the linear denoiser's if asked."""
        alpha, sigma = self.schedule.at("alpha", t), self.schedule.at("sigma", t)
        linear_rms = self._linear_rms[t].reshape(-1, 1, 1, 1)
        x0_gain = self._objective.x0_gain(alpha, sigma)
        output, skip, scale = self._call(xt, t)
        if scale is None:
            error = output - self._objective.target(x0, eps, alpha, sigma)
        elif self._params.weighting == "linear":
            # Dividing early keeps a tiny residual from being lost in the rounding of skip + scale * output.
            return scale / linear_rms * output - (x0 - skip) / linear_rms
        else:
            error = x0_gain * (skip + scale * output - x0)
        return error / (x0_gain * linear_rms) if self._params.weighting == "linear" else error

    def _call(self, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The network's raw output (float32), and what `_inputs` says of skip and scale."""
        inputs, skip, scale = self._inputs(xt, t)
        output = self.network(inputs, t)
        return output.float(), skip, scale

    def _inputs(self, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The network's input, the skip (B, C, H, W) and the scale of its output (B, 1, 1, 1) or None for neither."""
        if self._params.precondition == "none":
            return xt, xt, None
        alpha, sigma = self.schedule.at("alpha", t), self.schedule.at("sigma", t)
        mean, std = self.linear.mean, self.linear.std
        centred = xt - alpha * mean
        c_in = torch.rsqrt(alpha**2 * std**2 + sigma**2)
        if self._params.precondition == "scalar":
            skip = mean + alpha * std**2 * c_in**2 * centred
            return c_in * centred, skip, std * sigma * c_in
        skip = self.linear.denoise(xt, alpha, sigma)
        return torch.cat([c_in * centred, (skip - mean) / std], dim=1), skip, self._linear_rms[t].reshape(-1, 1, 1, 1)

    def _draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps (count,) int64: uniform in t, or uniform in log-SNR over LOG_SNR_RANGE."""
        device = self.schedule.betas.device
        if self._params.timestep_sampling == "uniform":
            return torch.randint(0, self.schedule.timesteps, (count,), generator=generator, device=device)
        low, high = LOG_SNR_RANGE
        # Stratified: one draw per equal slice, so that a small batch sees all noise levels.
        places = (torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)) / count
        return self.schedule.nearest(low + (high - low) * places - 2 * self.linear.std.log())


def input_channels(params: Params) -> int:
    """How many channels the network is given: the bands, twice where the Wiener estimate comes along."""
    return len(params.data.bands) * (2 if params.diffusion.precondition == "wiener" else 1)
