"""Optimizers and the running average of weights: torch's own where it has them, chosen by name.

Weight decay is decoupled in adamw and adabelief, as published; in all others it is added to the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from earthprior.params import LearningParams, Params

Weights: TypeAlias = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
"""What is trained, all with one learning rate, or in groups {"params": ..., "lr": ...}."""

Maker = Callable[[Weights, LearningParams], Optimizer]


def _maker(name: str, kind: Callable[..., Optimizer], fused: bool | None = None) -> Maker:
    """Makes an optimizer from lr, weight_decay and its own section, whose keys are the arguments' names."""
    more = {} if fused is None else {"fused": fused}

    def make(parameters: Weights, params: LearningParams) -> Optimizer:
        section = getattr(params, name).model_dump()
        return kind(parameters, lr=params.lr, weight_decay=params.weight_decay, **section, **more)

    return make


def _adabelief(parameters: Weights, **options: object) -> Optimizer:
    # Loads a hundred optimizers, so only when this one is wanted.
    from pytorch_optimizer import AdaBelief

    return AdaBelief(parameters, **options)  # type: ignore[arg-type]


def _sam(parameters: Weights, params: LearningParams) -> Optimizer:
    """The base optimizer; what makes it sharpness-aware is where the gradient is taken, see `sharpness.ascended`."""
    return OPTIMIZERS[cast(Params, params).sam.base_optimizer](parameters, params)


OPTIMIZERS: dict[str, Maker] = {
    "adam": _maker("adam", optim.Adam, fused=True),  # Kingma & Ba 2015, arXiv:1412.6980
    "adamw": _maker("adamw", optim.AdamW, fused=True),  # Loshchilov & Hutter 2019, arXiv:1711.05101
    "sgd": _maker("sgd", optim.SGD, fused=True),
    "rmsprop": _maker("rmsprop", optim.RMSprop),  # Tieleman & Hinton 2012
    "adagrad": _maker("adagrad", optim.Adagrad),  # Duchi et al. 2011, JMLR 12
    "adadelta": _maker("adadelta", optim.Adadelta),  # Zeiler 2012, arXiv:1212.5701
    "nadam": _maker("nadam", optim.NAdam),  # Dozat 2016
    "adamax": _maker("adamax", optim.Adamax),  # Kingma & Ba 2015, arXiv:1412.6980, Section 7.1
    "radam": _maker("radam", optim.RAdam),  # Liu et al. 2020, arXiv:1908.03265
    "adabelief": _maker("adabelief", _adabelief),  # Zhuang et al. 2020, arXiv:2010.07468
    "sam": _sam,  # Foret et al. 2021, arXiv:2010.01412
}


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a network's weights and buffers.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that short runs are not an average of their start.
    Buffers (batch norm statistics) are averaged too; counters are copied.
    """

    @torch.no_grad()
    def update(average: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor | int) -> None:
        if not average[0].is_floating_point():
            for mine, theirs in zip(average, current, strict=True):
                mine.copy_(theirs)
            return
        n = int(updates)
        torch._foreach_lerp_(list(average), list(current), 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(network, multi_avg_fn=update, use_buffers=True)
