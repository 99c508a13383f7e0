"""Chips out of noise, by samplers which see nothing but denoise(xt, t) -> x0_hat.

DPM-Solver++ and ancestral sampling are those of `diffusers`, which is imported when sampling starts, because that takes
seconds. Their own clipping and thresholding stay off, which know [-1, 1] only; estimates are clipped where x0's bounds
are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from earthprior.diffusion.gain import Denoiser
from earthprior.diffusion.schedule import NoiseSchedule
from earthprior.randomness import torch_generator

Progress = Callable[[Any], Any]


@dataclass(frozen=True)
class Draw:
    """What every sampler is given.

    Attributes:
        denoise: (xt, t) -> x0_hat.
        noise: Where it starts, (N, C, H, W), standard normal.
        schedule: The forward process.
        steps: Network calls.
        generators: One per chip, for noise on the way.
        progress: Wraps the sequence of timesteps.
    """

    denoise: Denoiser
    noise: Tensor
    schedule: NoiseSchedule
    steps: int
    generators: Sequence[torch.Generator]
    progress: Progress


def dpm_solver(draw: Draw) -> Tensor:
    """DPM-Solver++ 2M with log-SNR steps. Source: Lu et al. 2022, arXiv:2211.01095, Algorithm 2."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        trained_betas=_betas(draw.schedule),
        num_train_timesteps=draw.schedule.timesteps,
        prediction_type="sample",
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_lu_lambdas=True,
        final_sigmas_type="zero",
        thresholding=False,
    )
    scheduler.set_timesteps(draw.steps, device=draw.noise.device)
    # Where log-SNR is steep, two steps round to one timestep; the scheduler would begin at the second of them.
    scheduler.set_begin_index(0)
    return _by_diffusers(scheduler, draw)


def ddim(draw: Draw) -> Tensor:
    """Deterministic DDIM (eta 0), the last step into x0_hat itself.

    Our own, because that of diffusers steps by T // steps over timesteps that are T / steps apart, and so leaves noise
    in the chips where steps do not divide T. Source: Song et al. 2021, arXiv:2010.02502, Equation 12.
    """
    schedule, xt = draw.schedule, draw.noise
    timesteps = _trailing(schedule.timesteps, draw.steps)
    for t, later in zip(draw.progress(timesteps), [*timesteps[1:], None], strict=True):
        x0_hat = draw.denoise(xt, torch.full((len(xt),), t, device=xt.device))
        if later is None:
            xt = x0_hat
        else:
            eps_hat = (xt - schedule.alpha[t] * x0_hat) / schedule.sigma[t]
            xt = schedule.alpha[later] * x0_hat + schedule.sigma[later] * eps_hat
    return xt


def ddpm(draw: Draw) -> Tensor:
    """Ancestral sampling, fixed small variance. Source: Ho et al. 2020, arXiv:2006.11239, Algorithm 2."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler(
        trained_betas=_betas(draw.schedule),
        num_train_timesteps=draw.schedule.timesteps,
        prediction_type="sample",
        clip_sample=False,
        variance_type="fixed_small",
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(draw.steps, device=draw.noise.device)
    return _by_diffusers(scheduler, draw, generator=list(draw.generators))


SAMPLERS: dict[str, Callable[[Draw], Tensor]] = {"dpm_solver": dpm_solver, "ddim": ddim, "ddpm": ddpm}


def _betas(schedule: NoiseSchedule) -> Any:
    return schedule.betas.double().cpu().numpy()


def _trailing(timesteps: int, steps: int) -> list[int]:
    """`steps` timesteps from T - 1 down, evenly spread. Source: Lin et al. 2024, arXiv:2305.08891, Table 2."""
    return [round(timesteps - step * timesteps / steps) - 1 for step in range(steps)]


def _by_diffusers(scheduler: Any, draw: Draw, **options: Any) -> Tensor:
    xt: Tensor = draw.noise * scheduler.init_noise_sigma
    for t in draw.progress(scheduler.timesteps):
        x0_hat = draw.denoise(xt, torch.full((len(xt),), int(t), device=xt.device))
        xt = scheduler.step(x0_hat, t, xt, return_dict=False, **options)[0]
    return xt


@torch.no_grad()
def sample(
    denoise: Denoiser,
    shape: Sequence[int],
    schedule: NoiseSchedule,
    sampler: str,
    steps: int,
    seed: int,
    progress: Progress = iter,
    bounds: tuple[float, float] | None = None,
) -> Tensor:
    """Draw chips from the prior that a denoiser stands for.

    Args:
        denoise: (xt, t) -> x0_hat.
        shape: (N, C, H, W), N chips.
        schedule: The forward process that the denoiser was trained on; it also says the device.
        sampler: A key of SAMPLERS; dpm_solver cannot start from pure noise (zero terminal SNR).
        steps: Network calls per chip, at most T.
        seed: Equal seeds give equal chips; each chip has its own noise, so N changes none of them.
        progress: Wraps the sequence of timesteps, for example tqdm.
        bounds: (low, high) that x0 keeps, so that each step's estimate may be cut there; None where it has none.

    Returns:
        Normalized chips (N, C, H, W), float32.
    """
    generators = [torch_generator("sample", seed, index) for index in range(shape[0])]
    noise = torch.stack([torch.randn(tuple(shape[1:]), generator=generator) for generator in generators])

    def bounded(xt: Tensor, t: Tensor) -> Tensor:
        x0_hat = denoise(xt, t)
        return x0_hat if bounds is None else x0_hat.clamp(*bounds)

    start = noise.to(schedule.betas.device)
    return SAMPLERS[sampler](Draw(bounded, start, schedule, steps, generators, progress)).float()
