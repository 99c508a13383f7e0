"""How much the loss at each timestep counts, by its signal-to-noise ratio.

A weighting is said here for squared errors of eps; an error e of another objective's prediction is an error
eps_rate e of eps, so there it counts eps_rate^2 times as much. `uniform` leaves each objective its own loss, and
`linear` changes the units that errors are in (`tasks.diffusion`) instead of weighing them afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from earthprior.diffusion.objective import Objective
from earthprior.diffusion.schedule import NoiseSchedule


def min_snr(snr: Tensor, gamma: float) -> Tensor:
    """min(snr, gamma) / snr for eps, hence min(snr, gamma) for x0 and min(snr, gamma) / (snr + 1) for v.

    Pure noise (zero terminal SNR) therefore counts nothing for x0 and v.

    Source: Hang et al. 2023, arXiv:2303.09556, Section 3.4.
    """
    return gamma / snr.clamp(min=gamma)


def soft_min_snr(snr: Tensor, gamma: float) -> Tensor:
    """gamma / (snr + gamma) for eps, hence snr gamma / (snr + gamma) for x0: `min_snr` without its corner.

    Source: Crowson et al. 2024, arXiv:2401.11605, the weighting Soft-Min-SNR, 1 / (sigma^2 + 1 / gamma) for x0 with
        sigma^2 = 1 / snr.
    """
    return gamma / (snr + gamma)


SNR_WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {"min_snr": min_snr, "soft_min_snr": soft_min_snr}


def timestep_weights(weighting: str, gamma: float, objective: Objective, schedule: NoiseSchedule) -> Tensor:
    """What to multiply the loss of a chip at each timestep by, (T,) float32.

    Args:
        weighting: A key of SNR_WEIGHTINGS; any other weighs nothing afterwards, so all weights are 1.
        gamma: The SNR above which timesteps count no more.
        objective: What the loss is measured in.
        schedule: The forward process.
    """
    if weighting not in SNR_WEIGHTINGS:
        return torch.ones_like(schedule.alpha)
    weights = SNR_WEIGHTINGS[weighting](schedule.log_snr.double().exp(), gamma)
    return (weights * objective.eps_rate(schedule.alpha.double(), schedule.sigma.double()) ** 2).float()
