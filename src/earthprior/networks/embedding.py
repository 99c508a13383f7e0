"""Sinusoidal embedding of a timestep, in the tutorial's convention."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of t at geometrically falling frequencies.

    With half = dim // 2 and frequency_i = exp(-ln(10000) i / half), i = 0 .. half - 1, the result is
    [sin(t frequency_0), ..., cos(t frequency_0), ...]; an odd dim ends with a zero. Other codes put the cosines
    first or divide by half - 1; weights trained with one convention do not work with another.

    Args:
        t: Timesteps (B,), integer or floating.
        dim: Length of the embedding, at least 2.
    Returns:
        Embedding (B, dim), float32, in [-1, 1].
    Raises:
        ValueError: If dim is below 2 or t is not one-dimensional.
    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, Section 3.5; layout of eofm-tutorial.
    """
    if dim < 2:
        raise ValueError(f"timestep embedding: dim is {dim}, it must be at least 2")
    if t.ndim != 1:
        raise ValueError(f"timestep embedding: t has shape {tuple(t.shape)}, expected (B,)")
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.to(torch.float32)[:, None] * torch.exp(index * (-math.log(10000.0) / half))[None, :]
    embedding = torch.cat([angle.sin(), angle.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))
