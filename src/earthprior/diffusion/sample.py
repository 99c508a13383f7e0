"""Chips out of noise, by the samplers of `diffusers`, which see nothing but denoise(xt, t) -> x0_hat.

Their own clipping and thresholding stay off, which know [-1, 1] only; estimates are clipped where x0's bounds are
given. diffusers is imported when sampling starts, because that takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from earthprior.diffusion.gain import Denoiser
from earthprior.diffusion.schedule import NoiseSchedule
from earthprior.randomness import torch_generator


def dpm_solver(betas: Any) -> Any:
    """DPM-Solver++ 2M with log-SNR steps. Source: Lu et al. 2022, arXiv:2211.01095, Algorithm 2."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        trained_betas=betas,
        num_train_timesteps=len(betas),
        prediction_type="sample",
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_lu_lambdas=True,
        final_sigmas_type="zero",
        thresholding=False,
    )


def ddim(betas: Any) -> Any:
    """Deterministic DDIM (eta 0). Source: Song et al. 2021, arXiv:2010.02502, Equation 12."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(
        trained_betas=betas,
        num_train_timesteps=len(betas),
        prediction_type="sample",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def ddpm(betas: Any) -> Any:
    """Ancestral sampling, fixed small variance. Source: Ho et al. 2020, arXiv:2006.11239, Algorithm 2."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(
        trained_betas=betas,
        num_train_timesteps=len(betas),
        prediction_type="sample",
        clip_sample=False,
        variance_type="fixed_small",
        timestep_spacing="trailing",
    )


SAMPLERS: dict[str, Callable[[Any], Any]] = {"dpm_solver": dpm_solver, "ddim": ddim, "ddpm": ddpm}


@torch.no_grad()
def sample(
    denoise: Denoiser,
    shape: Sequence[int],
    schedule: NoiseSchedule,
    sampler: str,
    steps: int,
    seed: int,
    progress: Callable[[Any], Any] = iter,
    bounds: tuple[float, float] | None = None,
) -> Tensor:
    """Draw chips from the prior that a denoiser stands for.

    Args:
        denoise: (xt, t) -> x0_hat.
        shape: (N, C, H, W), N chips.
        schedule: The forward process that the denoiser was trained on; it also says the device.
        sampler: A key of SAMPLERS; dpm_solver cannot start from pure noise (zero terminal SNR).
        steps: Network calls per chip.
        seed: Equal seeds give equal chips; each chip has its own noise, so N changes none of them.
        progress: Wraps the sequence of timesteps, for example tqdm.
        bounds: (low, high) that x0 keeps, so that each step's estimate may be cut there; None where it has none.

    Returns:
        Normalized chips (N, C, H, W), float32.
    """
    device = schedule.betas.device
    generators = [torch_generator("sample", seed, index) for index in range(shape[0])]
    noise = [torch.randn(tuple(shape[1:]), generator=generator) for generator in generators]
    scheduler = SAMPLERS[sampler](schedule.betas.double().cpu().numpy())
    scheduler.set_timesteps(steps, device=device)
    xt = torch.stack(noise).to(device) * scheduler.init_noise_sigma
    stochastic = {"generator": generators} if sampler == "ddpm" else {}
    for t in progress(scheduler.timesteps):
        batch_t = torch.full((shape[0],), int(t), device=device)
        x0_hat = denoise(xt, batch_t)
        if bounds is not None:
            x0_hat = x0_hat.clamp(*bounds)
        xt = scheduler.step(x0_hat, t, xt, return_dict=False, **stochastic)[0]
    x0: Tensor = xt.float()
    return x0
