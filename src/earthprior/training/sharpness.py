"""Sharpness-aware minimization: step with the gradient of the highest loss nearby, and so towards flat minima.

pytorch_optimizer has a SAM that does the same (the tests compare the two), as an optimizer around another: its radius
and Adadelta's decay would share one entry, `rho`, of the parameter groups, and its step leaves no place for clipping.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def ascended(network: nn.Module, rho: float, adaptive: bool) -> Iterator[None]:
    """Inside, the weights w stand at w + e, where the loss is highest within rho; afterwards at w again, to the bit.

    To first order e = rho T^2 g / ||T g|| with the gradient g that the weights hold on entering, its norm taken over
    the whole network, and T = 1, or T = |w| if `adaptive`: then scaling one layer up and the next one down changes
    nothing. The statistics of batch norm stay as they are inside: they moved with the pass before.

    Source: Foret et al. 2021, arXiv:2010.01412, Equation 2; Kwon et al. 2021, arXiv:2102.11600, Section 3 (adaptive).
    """
    weights = [weight for weight in network.parameters() if weight.grad is not None]
    kept = [weight.detach().clone() for weight in weights]
    # Not by a momentum of 0, which would still count the batch.
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    _ascend(weights, rho, adaptive)
    for module in norms:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in norms:
            module.track_running_stats = True
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


@torch.no_grad()
def _ascend(weights: list[nn.Parameter], rho: float, adaptive: bool) -> None:
    slopes = [weight.grad for weight in weights if weight.grad is not None]
    scales = [weight.abs() if adaptive else 1.0 for weight in weights]
    # Above 0, so that a vanishing gradient leads nowhere instead of to NaN.
    length = nn.utils.get_total_norm([s * g for s, g in zip(scales, slopes, strict=True)]) + 1e-12
    for weight, scale, slope in zip(weights, scales, slopes, strict=True):
        weight.add_(scale * scale * slope * (rho / length))
