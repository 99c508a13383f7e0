"""Whether images hold such values as the pretraining's chips: in another unit, they would become maps of nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor

from earthprior.backbone import Backbone
from earthprior.prediction.chips import WholeChips

STRANGE_SHARE = 0.5
"""Of an image's values outside the range of the pretraining's chips, beyond which it is told of."""

EVERY_PX = 8
"""Of so many pixels each way one is looked at."""

BOTTOM_SHARE = 0.002
"""Of the range, which counts as outside: reflectances in [0, 1] are there for chips of 0 to 10,000."""


class Ranges:
    """Looks at images' values on the way, tells of the first image that is strange, and at the end of how many are.

    Where each chip is normalized by its own statistics (lab, lpb), units do not matter, and none is strange.

    Args:
        backbone: With the statistics that it normalizes by.
        say: Gets the lines.
    """

    def __init__(self, backbone: Backbone, say: Callable[[str], None]) -> None:
        normalization = backbone.description["normalization"]
        self._acts = not normalization["apply_normalization"] or normalization["stat_procedure"] in ("gab", "gpb")
        self._named: dict[str, tuple[float, float]] = {}
        if self._acts:
            known = normalization["statistics"]["per_band"]
            self._named = {band: (known[band]["min"], known[band]["max"]) for band in backbone.bands}
            limits = torch.tensor(list(self._named.values()), dtype=torch.float32).view(-1, 2, 1, 1)
            self._low = limits[:, 0] + BOTTOM_SHARE * (limits[:, 1] - limits[:, 0])
            self._high = limits[:, 1]
        self._say = say
        self._looked = self._strange = 0

    def __enter__(self) -> Ranges:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._strange > 1:
            self._say(
                f"{self._strange:,} of {self._looked:,} images hold mostly values outside the pretraining's range"
            )

    def count(self, raw: Tensor, valid: Tensor) -> Tensor:
        """Values outside the range, and values in all, of each image: (B, 2).

        Args:
            raw: (B, C, H, W), physical values.
            valid: (B, H, W) bool.
        """
        if not self._acts:
            return torch.zeros(len(raw), 2)
        few = raw[..., ::EVERY_PX, ::EVERY_PX].float()
        mask = valid[:, None, ::EVERY_PX, ::EVERY_PX].expand_as(few)
        outside = ((few < self._low.to(few.device)) | (few > self._high.to(few.device))) & mask
        return torch.stack([outside.sum((1, 2, 3)), mask.sum((1, 2, 3))], dim=1).float()

    def look(self, chips: WholeChips) -> None:
        """Judge each of some chips."""
        for image, counted in zip(chips.images, self.count(chips.pixels, chips.valid), strict=True):
            self.tell(image.files[0], counted)

    def tell(self, name: str, counted: Tensor) -> None:
        """Judge an image by its counts (2,)."""
        outside, values = counted.tolist()
        self._looked += 1
        if not values or outside / values <= STRANGE_SHARE:
            return
        self._strange += 1
        if self._strange == 1:
            ranges = ", ".join(f"{band} {low:g} to {high:g}" for band, (low, high) in self._named.items())
            self._say(
                f"{name}: {outside / values:.0%} of its values lie outside what the pretraining's chips had, or at the "
                f"very bottom of it ({ranges}). What comes of it means little: give images of the same product in the "
                "same unit"
            )
