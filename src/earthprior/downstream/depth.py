"""Which parts of a network work on features, in which order: what is trained, and how fast, goes by that.

A network is walked through once. Parts that follow each other at one resolution are one level: of a U-Net, the way
down gives one for each resolution, and the way up again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from earthprior.backbone import Backbone


def levels(backbone: Backbone, side: str) -> list[list[nn.Module]]:
    """The parts that features of a side pass through, a list for each level, from the input on.

    Parts without a resolution, such as the embedding of time, belong to the first level. Parts that are in no list have
    no share in these features.
    """
    ran: dict[str, tuple[nn.Module, int | None]] = {}

    def note(name: str, part: nn.Module, output: object) -> None:
        width = output.shape[-1] if isinstance(output, Tensor) and output.ndim == 4 else None
        ran.setdefault(name, (part, width))

    handles = [
        part.register_forward_hook(lambda module, _, output, name=name: note(name, module, output))
        for name, part in _parts(backbone.network)
    ]
    device = next(backbone.parameters()).device
    try:
        with torch.no_grad():
            blank = torch.zeros(1, len(backbone.bands), backbone.crop_px, backbone.crop_px, device=device)
            backbone.features(blank, side=side)
    finally:
        for handle in handles:
            handle.remove()
    found: list[list[nn.Module]] = [[part for part, width in ran.values() if width is None]]
    last = None
    for part, width in ran.values():
        if width is not None and width != last and last is not None:
            found.append([])
        if width is not None:
            found[-1].append(part)
            last = width
    return found


def _parts(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in network.named_children():
        if isinstance(part, nn.ModuleList):
            yield from ((f"{name}.{place}", inner) for place, inner in enumerate(part))
        else:
            yield name, part
