"""Chips of any size in networks that halve it: grown at bottom and right on the way in, cut back on the way out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Mirrors the chip at its bottom and right edge, just as far as needed; x itself where nothing is.

    Along a side too short to mirror that far, the last row or column is repeated.

    Args:
        x: (B, C, H, W).
        multiple: What both sides of the result are multiples of, px.
    """
    bottom, right = (-x.shape[axis] % multiple for axis in (2, 3))
    for missing, size, pad in ((bottom, x.shape[2], (0, 0, 0, bottom)), (right, x.shape[3], (0, right, 0, 0))):
        if missing:
            x = F.pad(x, pad, mode="reflect" if missing < size else "replicate")
    return x


def crop_levels(pyramid: Sequence[Tensor], height: int, width: int) -> list[Tensor]:
    """What of a padded chip's pyramid belongs to the chip: level i keeps ceil(height / 2**i) x ceil(width / 2**i).

    Args:
        pyramid: (B, C_i, h_i, w_i), where a pixel of level i stands for 2**i x 2**i pixels of the chip.
        height: Of the chip, px.
        width: Of the chip, px.
    """
    return [level[..., : -(-height // 2**i), : -(-width // 2**i)] for i, level in enumerate(pyramid)]
