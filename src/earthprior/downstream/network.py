"""A backbone with a head: chips in, class scores or a number out, per pixel or per chip.

Features are standardized by what they are on the training chips before anything is trained. So a linear head on a
frozen backbone is the plain linear probe, and one learning rate fits features of any size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earthprior.backbone import Backbone
from earthprior.downstream.depth import levels

GROUPS = 8


class Head(nn.Module):
    """From a pyramid of features to K maps, or K numbers per chip.

    linear: one weight per feature and output. Per pixel each level is multiplied at its own resolution, doubled
        bilinearly and added up, which is the linear classifier on all levels upsampled and concatenated. Per chip the
        features are averaged over its valid pixels.
    nonlinear: each level is brought to `channels` channels likewise, and these go through a 3x3 convolution (per chip:
        a hidden layer).

    Args:
        widths: Channels per level, finest first.
        outputs: K.
        per_pixel: Maps, or numbers per chip.
        kind: linear or nonlinear.
        channels: Of what is hidden in a nonlinear head.
    """

    def __init__(self, widths: Sequence[int], outputs: int, per_pixel: bool, kind: str, channels: int) -> None:
        super().__init__()
        self.per_pixel, self.nonlinear = per_pixel, kind == "nonlinear"
        inner = channels if self.nonlinear else outputs
        self.project = nn.ModuleList(nn.Conv2d(width, inner, 1, bias=level == 0) for level, width in enumerate(widths))
        for level, width in enumerate(widths):
            self.register_buffer(f"mean_{level}", torch.zeros(1, width, 1, 1))
            self.register_buffer(f"std_{level}", torch.ones(1, width, 1, 1))
        if self.nonlinear:
            self.norm = nn.GroupNorm(math.gcd(channels, GROUPS), channels)
            self.hidden = nn.Conv2d(channels, channels, 3 if per_pixel else 1, padding=1 if per_pixel else 0)
            self.out = nn.Conv2d(channels, outputs, 1)
        else:
            # A convex problem, which begins at equal odds.
            for layer in self.project:
                for parameter in layer.parameters():
                    nn.init.zeros_(parameter)

    def forward(self, pyramid: Sequence[Tensor], valid: Tensor | None = None) -> Tensor:
        """(B, K, H, W), or (B, K).

        Args:
            pyramid: Levels (B, D_i, h_i, w_i), finest first.
            valid: (B, 1, H, W) bool; all where it is None.
        """
        scaled = [
            (level - getattr(self, f"mean_{place}")) / getattr(self, f"std_{place}")
            for place, level in enumerate(pyramid)
        ]
        if self.per_pixel:
            return self._read_out(_fused([layer(level) for layer, level in zip(self.project, scaled, strict=True)]))
        means = [layer(_mean(level, valid)) for layer, level in zip(self.project, scaled, strict=True)]
        return self._read_out(torch.stack(means).sum(0)).flatten(1)

    def _read_out(self, x: Tensor) -> Tensor:
        if not self.nonlinear:
            return x
        # A group of one value, per chip, would become 0.
        x = F.silu(self.norm(x) if self.per_pixel else x)
        out: Tensor = self.out(F.silu(self.hidden(x)))
        return out

    @torch.no_grad()
    def standardize(self, pyramids: Iterable[tuple[Sequence[Tensor], Tensor]]) -> None:
        """Take means and deviations of the features over the valid pixels of some chips.

        Args:
            pyramids: Batches of levels and of valid masks (B, 1, H, W).
        """
        sums: list[list[Any]] = []
        for pyramid, valid in pyramids:
            sums = sums or [[0.0, 0.0, 0.0] for _ in pyramid]
            for total, level in zip(sums, pyramid, strict=True):
                weight = _coverage(valid, level).double()
                values = level.double()
                total[0] = total[0] + weight.sum()
                total[1] = total[1] + (weight * values).sum((0, 2, 3))
                total[2] = total[2] + (weight * values**2).sum((0, 2, 3))
        for place, (count, first, second) in enumerate(sums):
            mean = first / count.clamp(min=1)
            std = (second / count.clamp(min=1) - mean**2).clamp(min=0).sqrt()
            # What does not vary says nothing, and stays as it is.
            std = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, 1.0)
            getattr(self, f"mean_{place}").copy_(mean.view(1, -1, 1, 1))
            getattr(self, f"std_{place}").copy_(std.view(1, -1, 1, 1))


def answer(output: Tensor, kind: str, mean: float | Tensor, std: float | Tensor) -> Tensor:
    """What a network's scores mean: probabilities of classes, or numbers in the label's unit.

    Args:
        output: (B, K, ...).
        kind: segmentation, classification or regression.
        mean: Of the numbers that it was trained on.
        std: Their deviation.
    """
    return output.float() * std + mean if kind == "regression" else output.float().softmax(dim=1)


class DownstreamNetwork(nn.Module):
    """Backbone and head.

    Args:
        backbone: Its weights are trained as `train` says.
        head: For its features.
        side: Whose features: decoder or encoder.
        t: At which timestep; None takes the one that serves best.
        train: head, last (the last `last_levels` levels that features pass through, too) or all.
        last_levels: See `depth.levels`.
    """

    def __init__(self, backbone: Backbone, head: Head, side: str, t: int | None, train: str, last_levels: int) -> None:
        super().__init__()
        self.backbone, self.head, self.side, self.t = backbone, head, side, backbone.t if t is None else t
        ordered = levels(backbone, side)
        trained = {"head": 0, "last": min(last_levels, len(ordered)), "all": len(ordered)}[train]
        self._trained = ordered[len(ordered) - trained :]
        learn = {id(p) for part in self._trained for module in part for p in module.parameters() if p.requires_grad}
        for parameter in backbone.parameters():
            # Several processes wait for the gradient of every weight that asks for one.
            parameter.requires_grad_(id(parameter) in learn)
        self.frozen = not learn

    def groups(self, lr: float, decay: float) -> list[dict[str, Any]]:
        """What is trained, with learning rates: lr for the head, and times `decay` for each level further from it."""
        found: list[dict[str, Any]] = [{"params": list(self.head.parameters()), "lr": lr}]
        for depth, level in enumerate(reversed(self._trained), start=1):
            learned = [p for module in level for p in module.parameters() if p.requires_grad]
            if learned:
                found.append({"params": learned, "lr": lr * decay**depth})
        return found

    def train(self, mode: bool = True) -> DownstreamNetwork:
        """What is frozen stays as in evaluation: no dropout, and no statistics that move."""
        super().train(mode)
        self.backbone.eval()
        # It computes activations twice, where that is asked for, in training alone.
        self.backbone.network.training = mode and not self.frozen
        for level in self._trained:
            for module in level:
                module.train(mode)
        return self

    def forward(self, x0: Tensor, valid: Tensor | None = None) -> Tensor:
        """Scores (B, K, H, W) or (B, K), of any size of chips.

        Args:
            x0: (B, C, H, W), normalized.
            valid: (B, 1, H, W) bool; all where it is None.
        """
        out: Tensor = self.head(self.pyramid(x0), valid)
        return out

    def pyramid(self, x0: Tensor) -> list[Tensor]:
        """The features that the head is given; without gradients where nothing of the backbone is trained."""
        if self.frozen:
            with torch.no_grad():
                return self.backbone.features(x0, self.t, self.side)
        return self.backbone.features(x0, self.t, self.side)


def _fused(maps: Sequence[Tensor]) -> Tensor:
    """Maps of one pyramid, added up at the finest resolution, coarse to fine."""
    total = maps[-1]
    for finer in reversed(maps[:-1]):
        height, width = finer.shape[-2:]
        # A level of ceil(H / 2) pixels reaches beyond the finer one by half a pixel of its own, if at all.
        total = F.interpolate(total, scale_factor=2.0, mode="bilinear", align_corners=False)[..., :height, :width]
        total = total + finer
    return total


def _coverage(valid: Tensor, level: Tensor) -> Tensor:
    """How much of each pixel of a level is valid, (B, 1, h, w) in [0, 1]."""
    return F.interpolate(valid.to(level.dtype), size=level.shape[-2:], mode="area")


def _mean(level: Tensor, valid: Tensor | None) -> Tensor:
    """(B, D, 1, 1), over the valid pixels."""
    if valid is None:
        return level.mean((2, 3), keepdim=True)
    weight = _coverage(valid, level)
    total: Tensor = (level * weight).sum((2, 3), keepdim=True) / weight.sum((2, 3), keepdim=True).clamp(min=1e-6)
    return total
