"""Chips drawn from the learned prior, and the real chips that they are compared with, both in physical units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from earthprior.chips.batch import Batch
from earthprior.chips.normalize import denormalize
from earthprior.diffusion.sample import sample
from earthprior.params import EvaluateParams
from earthprior.tasks.diffusion import DiffusionTask


@dataclass(frozen=True)
class Samples:
    """Real crops and sampled ones.

    Args:
        real: (N, C, H, W) physical units.
        valid: (N, H, W), of the real ones.
        sampled: (M, C, H, W) physical units.
    """

    real: NDArray[Any]
    valid: NDArray[np.bool_]
    sampled: NDArray[Any]


@torch.no_grad()
def draw(
    task: DiffusionTask,
    real: Batch,
    params: EvaluateParams,
    progress: Callable[[Any], Any] = iter,
    bounds: tuple[float, float] | None = None,
) -> Samples:
    """Draw `params.samples` chips of the real crops' size.

    Args:
        task: The trained task, in evaluation mode.
        real: Real crops. Where the normalization is per chip, a sample has no scale of its own and takes that of a
            real crop.
        params: The section `evaluate`.
        progress: Wraps the sampler's steps.
        bounds: The range of normalized values (`Normalizer.range`), which `params.clip_sample` keeps estimates in.
    """
    # A crop without data has no scale of its own to lend.
    usable = real.valid.any((1, 2, 3)).nonzero().flatten()
    usable = usable if len(usable) else torch.arange(len(real), device=real.x0.device)
    lender = real.affine[usable[torch.arange(params.samples, device=usable.device) % len(usable)]]
    shape = (params.samples, *real.x0.shape[1:])
    clip = bounds if params.clip_sample else None
    x0 = sample(
        task.denoiser(real), shape, task.schedule, params.sampler, params.steps, params.sampling_seed, progress, clip
    )
    return Samples(
        denormalize(real.x0, real.affine).cpu().numpy(),
        real.valid[:, 0].cpu().numpy(),
        denormalize(x0, lender).cpu().numpy(),
    )
