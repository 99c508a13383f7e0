"""The sections about chips: which, how they become x0, and how training varies them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from earthprior.params.kinds import (
    Bool,
    Float,
    Int,
    NonNegativeRange,
    Pixels,
    PositiveFloat,
    PositiveInt,
    PositiveRange,
    Range,
    Section,
    Thousands,
)
from earthprior.params.plain import shown

LARGEST_ANGLE = 3600
"""Degrees; what turns further is a slip."""

CLIP_PERCENTS = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)
"""What `normalization.clip_percent` may be with global statistics: the limits that the stats stage keeps."""


class FileParams(Section):
    """Which chips, and how files become arrays, whatever is made of them."""

    dir: str
    catalog: str
    image_columns: Annotated[tuple[str, ...], Field(min_length=1, max_length=1000)]
    chip_size: Pixels
    bands: Annotated[tuple[str, ...], Field(min_length=1, max_length=1000)]
    crop_px: PositiveInt | None
    nodata: tuple[Float, ...] | None
    buffer: Annotated[Int, Field(ge=0, le=8192)]

    @property
    def read_px(self) -> int:
        """Width and height of what is read, buffer included, px."""
        return self.chip_size + 2 * self.buffer

    @property
    def train_px(self) -> int:
        """Width and height of what the network sees, px."""
        return self.crop_px or self.read_px

    @model_validator(mode="after")
    def _check(self) -> FileParams:
        if len(set(self.bands)) != len(self.bands):
            raise ValueError(f"bands {shown(list(self.bands))} name a band twice; each band needs its own name")
        if self.crop_px is not None and self.crop_px > self.read_px:
            raise ValueError(f"crop_px {self.crop_px} is larger than the chips ({self.read_px} px)")
        return self


class DataParams(FileParams):
    """The chips of the pretraining."""

    crops_per_chip: Thousands
    on_bad_chip: Literal["error", "skip"]
    max_bad_fraction: Annotated[Float, Field(ge=0, le=1)]


class NormalizationParams(Section):
    """How physical values become x0."""

    apply_normalization: Bool
    normal_strategy: Literal["min_max", "z_value"]
    stat_procedure: Literal["lab", "lpb", "gab", "gpb"]
    clip_percent: Annotated[Float, Field(ge=0, lt=50)]
    clip_val: PositiveFloat | None

    @property
    def is_local(self) -> bool:
        """Whether each chip is normalized by its own statistics."""
        return self.stat_procedure in ("lab", "lpb")

    @model_validator(mode="after")
    def _check(self) -> NormalizationParams:
        if not self.is_local and self.clip_percent not in CLIP_PERCENTS:
            allowed = ", ".join(f"{percent:g}" for percent in CLIP_PERCENTS)
            raise ValueError(
                f"clip_percent {self.clip_percent:g} is not among the percentiles that stats.json keeps for "
                f"stat_procedure {self.stat_procedure}; use one of {allowed}"
            )
        return self


def _rotation(value: Any) -> Any:
    """Angles to choose from, or a range of angles, told apart by their form."""
    form = "give angles to choose from, as [0, 90, 180, 270], a range as {low: -15, high: 15} or -15..15, or null"
    if value is None:
        return None
    if isinstance(value, str):
        # dvc exp run -S puts no mapping in the place of a list.
        try:
            low, high = map(float, value.split(".."))
        except ValueError:
            raise ValueError(form) from None
        value = {"low": low, "high": high}
    ranged = isinstance(value, Mapping)
    numbers = list(value.values()) if ranged else value
    if (ranged and set(value) != {"low", "high"}) or not isinstance(numbers, list | tuple) or not numbers:
        raise ValueError(form)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= LARGEST_ANGLE:
            raise ValueError(f"{shown(number)} is no angle in degrees; {form}")
    if ranged and value["low"] > value["high"]:
        raise ValueError("the range runs backwards")
    return value


Rotation = Annotated[tuple[float, ...] | dict[str, float] | None, BeforeValidator(_rotation)]


class AugmentationParams(Section):
    """Random changes to clean chips, on the device, before the diffusion corruption."""

    flip: Bool
    rotation_degree: Rotation
    scale_factor: PositiveRange | None
    crop_strategy: Literal["random", "center"]
    patch_shift_px: PositiveInt | None
    contrast_range: PositiveRange | None
    br_range: Range | None
    bshift_gamma_range: PositiveRange | None
    patch_gamma_range: PositiveRange | None
    sigma_range: NonNegativeRange | None


AS_THEY_ARE = AugmentationParams(
    flip=False,
    rotation_degree=None,
    scale_factor=None,
    crop_strategy="random",
    patch_shift_px=None,
    contrast_range=None,
    br_range=None,
    bshift_gamma_range=None,
    patch_gamma_range=None,
    sigma_range=None,
)
"""Crops of chips, and nothing else changed."""
