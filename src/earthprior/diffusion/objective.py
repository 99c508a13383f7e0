"""What a network predicts: a pair of functions per objective, its target and the way back to x0.

With xt = alpha x0 + sigma eps and alpha^2 + sigma^2 = 1; all tensors (B, C, H, W), alpha and sigma (B, 1, 1, 1). Where
alpha is 0 everything but EPS.x0_hat stands: pure noise says nothing of a chip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """A parameterization.

    Attributes:
        target: (x0, eps, alpha, sigma) -> what the network should say.
        x0_hat: (prediction, xt, alpha, sigma) -> the clean chip that the prediction stands for.
        prediction: (x0_hat, xt, alpha, sigma) -> the inverse of `x0_hat`.
        x0_gain: (alpha, sigma) -> |d prediction / d x0_hat| at fixed xt, so an x0 error e counts as x0_gain e here.
        eps_rate: (alpha, sigma) -> |d eps_hat / d prediction| at fixed xt, so an error e here is eps_rate e in eps.
    """

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    x0_hat: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    prediction: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    x0_gain: Callable[[Tensor, Tensor], Tensor]
    eps_rate: Callable[[Tensor, Tensor], Tensor]


EPS = Objective(
    target=lambda x0, eps, alpha, sigma: eps,
    x0_hat=lambda eps_hat, xt, alpha, sigma: (xt - sigma * eps_hat) / alpha,
    prediction=lambda x0_hat, xt, alpha, sigma: (xt - alpha * x0_hat) / sigma,
    x0_gain=lambda alpha, sigma: alpha / sigma,
    eps_rate=lambda alpha, sigma: torch.ones_like(alpha),
)
"""The noise. Source: Ho et al. 2020, arXiv:2006.11239, Equations 11 and 14."""

X0 = Objective(
    target=lambda x0, eps, alpha, sigma: x0,
    x0_hat=lambda x0_hat, xt, alpha, sigma: x0_hat,
    prediction=lambda x0_hat, xt, alpha, sigma: x0_hat,
    x0_gain=lambda alpha, sigma: torch.ones_like(alpha),
    eps_rate=lambda alpha, sigma: alpha / sigma,
)
"""The clean chip."""

V = Objective(
    target=lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    x0_hat=lambda v_hat, xt, alpha, sigma: alpha * xt - sigma * v_hat,
    prediction=lambda x0_hat, xt, alpha, sigma: (alpha * xt - x0_hat) / sigma,
    x0_gain=lambda alpha, sigma: 1 / sigma,
    eps_rate=lambda alpha, sigma: alpha,
)
"""The velocity. Source: Salimans & Ho 2022, arXiv:2202.00512, Section 4 and Appendix D."""

OBJECTIVES: dict[str, Objective] = {"eps": EPS, "x0": X0, "v": V}
