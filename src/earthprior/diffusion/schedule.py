"""The forward process: how much of a chip is left at timestep t.

Words, said once: betas (T,), alpha_bar = cumprod(1 - betas), alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar);
xt = alpha x0 + sigma eps; snr = alpha_bar / (1 - alpha_bar).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from earthprior.errors import ParamsError
from earthprior.params import DiffusionParams


def linear_betas(params: DiffusionParams) -> Tensor:
    """Betas evenly spaced from beta_start to beta_end, (T,) float64.

    Source: Ho et al. 2020, arXiv:2006.11239, Section 4.
    """
    return torch.linspace(params.beta_start, params.beta_end, params.timesteps, dtype=torch.float64)


def cosine_betas(params: DiffusionParams) -> Tensor:
    """Betas of alpha_bar(t) ~ cos^2, at most 0.999, (T,) float64. beta_start and beta_end play no part.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, Equation 17, s = 0.008.
    """
    edges = torch.arange(params.timesteps + 1, dtype=torch.float64) / params.timesteps
    f = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


class NoiseSchedule(nn.Module):
    """Tables of the forward process: float32 buffers (T,) computed in float64, in no state_dict (params make them).

    Args:
        betas: (T,) in (0, 1).

    Raises:
        ValueError: A beta lies outside (0, 1).
        ParamsError: The first or last timestep is so clean or so noisy that float32 calls it pure chip or pure noise.
    """

    betas: Tensor
    alpha_bar: Tensor
    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor

    def __init__(self, betas: Tensor) -> None:
        super().__init__()
        betas = betas.double()
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas must lie in (0, 1); they span [{betas.min():.3g}, {betas.max():.3g}]")
        # Logarithms throughout: 1 - cumprod(1 - beta) would lose small betas, and cumprod vanish for large ones.
        log_alpha_bar = torch.log1p(-betas).cumsum(0)
        sigma_sq = -torch.expm1(log_alpha_bar)
        tables = {
            "betas": betas,
            "alpha_bar": log_alpha_bar.exp(),
            "alpha": (log_alpha_bar / 2).exp(),
            "sigma": sigma_sq.sqrt(),
            "log_snr": log_alpha_bar - sigma_sq.log(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)
        # Squares of both are divided by, in float32.
        if float(self.sigma[0]) ** 2 < 1e-30 or float(self.alpha[-1]) ** 2 < 1e-30:
            raise ParamsError(
                f"the noise schedule runs from sigma {self.sigma[0]:.3g} to alpha {self.alpha[-1]:.3g}, and nothing "
                "can be learned of pure chips or pure noise; raise diffusion.beta_start, or lower diffusion.beta_end "
                "or diffusion.timesteps"
            )

    @property
    def timesteps(self) -> int:
        """T."""
        return int(self.betas.shape[0])

    def at(self, name: str, t: Tensor) -> Tensor:
        """A table's entries at t (B,), shaped (B, 1, 1, 1)."""
        table: Tensor = getattr(self, name)
        return table[t].reshape(-1, 1, 1, 1)

    def nearest(self, log_snr: Tensor) -> Tensor:
        """The timesteps (N,) whose log-SNR is nearest to the ones given (N,)."""
        # log_snr falls with t, and searchsorted wants it rising.
        rising = self.log_snr.flip(0)
        above = torch.searchsorted(rising, log_snr.to(rising).contiguous()).clamp(1, self.timesteps - 1)
        nearer_below = (log_snr - rising[above - 1]).abs() <= (rising[above] - log_snr).abs()
        return self.timesteps - 1 - torch.where(nearer_below, above - 1, above)


def q_sample(x0: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Noisy chips at timestep t: xt = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps.

    Args:
        x0: Clean chips (B, C, H, W), normalized.
        eps: Standard normal noise, like x0.
        t: Timesteps (B,), int64 in [0, T).
        schedule: The forward process.

    Returns:
        Noisy chips (B, C, H, W).

    Source: Ho et al. 2020, arXiv:2006.11239, Equation 4.
    """
    return schedule.at("alpha", t) * x0 + schedule.at("sigma", t) * eps


NOISE_SCHEDULES: dict[str, Callable[[DiffusionParams], Tensor]] = {
    "linear": linear_betas,
    "cosine": cosine_betas,
}
