"""The forward process: how much of a chip is left at timestep t.

Words, said once: betas (T,), alpha_bar = cumprod(1 - betas), alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar);
xt = alpha x0 + sigma eps; snr = alpha_bar / (1 - alpha_bar), log_snr its natural logarithm. Zero terminal SNR: the last
beta is 1, so that alpha and snr are 0 and log_snr is -infinity at the last timestep.

A schedule is made in this order: the betas of a name in NOISE_SCHEDULES, then `shifted` to a width of chips, then
`with_zero_terminal_snr`; the latter two where asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from earthprior.errors import ParamsError
from earthprior.params import DiffusionParams


def linear_betas(params: DiffusionParams) -> Tensor:
    """Betas evenly spaced from the first to the last, (T,) float64.

    Source: Ho et al. 2020, arXiv:2006.11239, Section 4.
    """
    first, last = params.beta_range
    return torch.linspace(first, last, params.timesteps, dtype=torch.float64)


def cosine_betas(params: DiffusionParams) -> Tensor:
    """Betas of alpha_bar(t) ~ cos^2, at most 0.999, (T,) float64. beta_start and beta_end play no part.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, Equation 17, s = 0.008.
    """
    return _betas_of_cosine(params.timesteps, 0.008).clamp(max=0.999)


def clipped_cosine_betas(params: DiffusionParams) -> Tensor:
    """Betas of a cosine with s = 0.001, clipped to the beta range, (T,) float64: what eofm-tutorial calls cosine."""
    return _betas_of_cosine(params.timesteps, 0.001).clamp(*params.beta_range)


def quadratic_betas(params: DiffusionParams) -> Tensor:
    """Betas whose square roots are evenly spaced, (T,) float64.

    Source: Song et al. 2021, arXiv:2010.02502, their code's "quad"; Rombach et al. 2022 call it linear.
    """
    first, last = params.beta_range
    return torch.linspace(first**0.5, last**0.5, params.timesteps, dtype=torch.float64) ** 2


def sigmoid_betas(params: DiffusionParams) -> Tensor:
    """Betas along a logistic curve from -6 to 6, (T,) float64.

    Source: Xu et al. 2022 (GeoDiff), arXiv:2203.02923, their code's "sigmoid".
    """
    first, last = params.beta_range
    return torch.sigmoid(torch.linspace(-6, 6, params.timesteps, dtype=torch.float64)) * (last - first) + first


def _betas_of_cosine(timesteps: int, s: float) -> Tensor:
    edges = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((edges + s) / (1 + s) * math.pi / 2) ** 2
    return 1 - f[1:] / f[:-1]


def shifted(betas: Tensor, reference_px: int, width_px: int) -> Tensor:
    """Betas (T,) float64 for chips width_px wide that destroy what `betas` destroy of chips reference_px wide.

    Averaged over the pixels that show the same piece of ground, wider chips hide less under the same noise:
    log_snr + 2 log(reference_px / width_px).

    Source: Hoogeboom et al. 2023 (simple diffusion), arXiv:2301.11093, Section 3.1.
    """
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    log_snr = log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar)) + 2 * math.log(reference_px / width_px)
    return -torch.expm1(nn.functional.logsigmoid(log_snr).diff(prepend=log_snr.new_zeros(1)))


def with_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas (T,) float64 whose alphas are shifted and scaled: the first stays, the last becomes 0.

    Source: Lin et al. 2024, arXiv:2305.08891, Algorithm 1, written for the differences of alpha, in which small betas
        are not lost.
    """
    log_alpha = torch.log1p(-betas).cumsum(0) / 2
    before, last = log_alpha[:-1].exp(), log_alpha[-1].exp()
    fall = -before * torch.expm1(log_alpha.diff()) / (before - last)
    # A beta is 1 - (1 - fall)^2; the last alpha falls all the way, which rounding must not leave short.
    return torch.cat([betas[:1], (fall * (2 - fall))[:-1], betas.new_ones(1)])


class NoiseSchedule(nn.Module):
    """Tables of the forward process: float32 buffers (T,) computed in float64, in no state_dict (params make them).

    Args:
        betas: (T,) in (0, 1).
        zero_terminal_snr: The last beta is 1.

    Raises:
        ParamsError: A beta lies outside (0, 1), or the first or last timestep (the last but one with zero terminal SNR)
            is so clean or so noisy that float32 calls it pure chip or pure noise.
    """

    betas: Tensor
    alpha_bar: Tensor
    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor

    def __init__(self, betas: Tensor, zero_terminal_snr: bool = False) -> None:
        super().__init__()
        self.zero_terminal_snr = zero_terminal_snr
        betas = betas.double()
        mixed = betas[:-1] if zero_terminal_snr else betas
        # In float32, as samplers read them and subtract them from 1.
        if not bool(((1 - mixed.float() > 0) & (1 - mixed.float() < 1)).all()):
            raise ParamsError(
                f"the noise schedule's betas span [{mixed.min():.3g}, {mixed.max():.3g}], and betas must lie in (0, 1) "
                "where float32 can tell them from both; change diffusion.beta_start, diffusion.beta_end or "
                "diffusion.shift_reference_px"
            )
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
        first, last = float(self.sigma[0]), float(self.alpha[len(mixed) - 1])
        if first**2 < 1e-30 or last**2 < 1e-30:
            raise ParamsError(
                f"the noise schedule runs from sigma {first:.3g} to alpha {last:.3g}, and "
                "nothing can be learned of pure chips or pure noise; raise diffusion.beta_start, lower "
                "diffusion.beta_end or diffusion.timesteps, or bring diffusion.shift_reference_px nearer to the chips' "
                "width"
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
        """The timesteps (N,) whose log-SNR is nearest to the ones given (N,); pure noise is near to -infinity alone."""
        # log_snr falls with t, and searchsorted wants it rising.
        rising = self.log_snr.flip(0)
        above = torch.searchsorted(rising, log_snr.to(rising).contiguous()).clamp(1, self.timesteps - 1)
        # Said so that -infinity, whose distance to itself is NaN, is found.
        nearer_above = (log_snr - rising[above - 1]).abs() > (rising[above] - log_snr).abs()
        return self.timesteps - 1 - torch.where(nearer_above, above, above - 1)


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
    "clipped_cosine": clipped_cosine_betas,
    "quadratic": quadratic_betas,
    "sigmoid": sigmoid_betas,
}
