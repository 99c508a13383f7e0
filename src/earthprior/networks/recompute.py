"""Activation checkpointing: what a level computed on its way is forgotten, and computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_level(function: Callable[..., Tensor], *inputs: Any, recompute: bool) -> Tensor:
    """function(*inputs); with `recompute`, only the inputs are kept for the backward pass.

    The second computation draws the first one's dropout and leaves running statistics alone, so outputs, gradients
    and buffers have the same bits either way.

    Args:
        function: May move the buffers of modules that it is given (BatchNorm's); free of side effects otherwise.
        inputs: Its arguments: tensors, modules and others.
        recompute: Whether to save memory; without gradients there is none to save.
    """
    if not (recompute and torch.is_grad_enabled()):
        return function(*inputs)
    kept = _Kept([buffer for module in inputs if isinstance(module, nn.Module) for buffer in module.buffers()])
    out: Tensor = checkpoint(function, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), kept))
    return out


class _Kept(AbstractContextManager[None]):
    """Gives buffers back their values at the end; may be entered again, as a graph may be walked again."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self._buffers = buffers
        self._values: list[Tensor] = []

    def __enter__(self) -> None:
        self._values = [buffer.clone() for buffer in self._buffers]

    def __exit__(self, *exception: object) -> None:
        for buffer, value in zip(self._buffers, self._values, strict=True):
            buffer.copy_(value)
        self._values = []
