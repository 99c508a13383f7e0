"""Which timesteps a step of training looks at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from earthprior.diffusion.schedule import NoiseSchedule

LOG_SNR_RANGE = (-7.0, 8.0)
"""Where `log_snr` draws, as log(std(x0)^2 alpha^2 / sigma^2): the judged levels lie in [-3.2, 6]."""

HISTORY = 10
"""Losses that `importance` remembers."""

MOST_BINS = 100
"""Neighbouring timesteps share a history where there are more."""

UNIFORM_SHARE = 0.001
"""Of the draws of `importance`, so that no timestep is forgotten."""

_EMPTY = -1.0


class TimestepSampler(nn.Module):
    """Draws timesteps, each with the factor that its loss is multiplied by.

    Args:
        how: `diffusion.timestep_sampling`.
        schedule: The forward process.
        std: () standard deviation of x0.

    The ways, in which all but the first draw once from each of B equal slices of probability, so that a small batch
    sees all noise levels:
        uniform: in t.
        stratified: uniform in t.
        log_snr: uniform in log-SNR over LOG_SNR_RANGE; pure noise (zero terminal SNR), which has none, gets one draw in
            T, as it would in t.
        importance: a timestep is drawn in proportion to the root mean square of its last HISTORY losses, and its loss
            is multiplied by 1 / (T p_t), so that the expected loss is that of `uniform` with less variance. Until the
            history is full, and in evaluation mode, as `stratified`.

    Source of importance: Nichol & Dhariwal 2021, arXiv:2102.09672, Equation 18 and Section 3.3, with the share of
        uniform draws of their code. Departs from it in that at most MOST_BINS equal bins of t have a history (with one
        per timestep a batch of 16 would be 1,000 steps and more in filling it) and in stratified draws.
    """

    history: Tensor

    def __init__(self, how: str, schedule: NoiseSchedule, std: Tensor) -> None:
        super().__init__()
        self._how = how
        self.schedule = schedule
        self._log_variance = 2 * float(std.log())
        if how == "importance":
            bins = min(schedule.timesteps, MOST_BINS)
            # Oldest first. Part of the state_dict: a resumed run draws what it would have drawn.
            self.register_buffer("history", torch.full((bins, HISTORY), _EMPTY))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps (count,) int64, and the factors of their losses (count,) float32."""
        timesteps, device = self.schedule.timesteps, self.schedule.betas.device
        ones = torch.ones(count, device=device)
        if self._how == "uniform":
            return torch.randint(0, timesteps, (count,), generator=generator, device=device), ones
        places = (torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)) / count
        if self._how == "log_snr":
            low, high = LOG_SNR_RANGE
            t = self.schedule.nearest(low + (high - low) * places - self._log_variance)
            return torch.where(places * timesteps < 1, timesteps - 1, t) if self.schedule.zero_terminal_snr else t, ones
        if self._how == "importance" and self.training:
            p = self._probabilities()
            t = torch.searchsorted(p.cumsum(0), places.double()).clamp(max=timesteps - 1)
            return t, (1 / (timesteps * p[t])).float()
        return (places * timesteps).long().clamp(max=timesteps - 1), ones

    def record(self, t: Tensor, losses: Tensor) -> None:
        """Remember the losses (B,) of chips at timesteps t (B,), without the factors that `draw` gave.

        Chips without valid pixels count too: their loss of 0 is at random timesteps, so it favours none.
        """
        if self._how != "importance":
            return
        bins = len(self.history)
        inside = self._bin(t) == torch.arange(bins, device=t.device)[:, None]
        losses = torch.cat([self.history, losses.to(self.history).expand(bins, -1)], dim=1)
        present = torch.cat([self.history != _EMPTY, inside], dim=1)
        # A stable sort moves a bin's entries to the end, in their order; no entry is looked at by the CPU.
        latest = present.int().argsort(dim=1, stable=True)[:, -HISTORY:]
        self.history = torch.where(present.gather(1, latest), losses.gather(1, latest), _EMPTY)

    def _bin(self, t: Tensor) -> Tensor:
        return t * len(self.history) // self.schedule.timesteps

    def _probabilities(self) -> Tensor:
        """Of every timestep, (T,) float64, all above 0."""
        timesteps = self.schedule.timesteps
        rms = self.history.double().square().mean(1).sqrt() + 1e-30
        p = rms[self._bin(torch.arange(timesteps, device=rms.device))]
        p = UNIFORM_SHARE / timesteps + (1 - UNIFORM_SHARE) * p / p.sum()
        full = (self.history != _EMPTY).all()
        return torch.where(full, p, 1 / timesteps)
