"""The kinds of value that params.yaml holds, each with its check."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _no_bool(value: Any) -> Any:
    """YAML's true is Python's 1 to a lax parser; for a number that is a slip, not a value."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    if isinstance(value, str):
        raise ValueError("a number is needed, not text")
    return value


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("the range runs backwards")
    return value


# Far beyond any sense, and still a number that torch can count with.
Int: TypeAlias = Annotated[int, BeforeValidator(_no_bool), Field(ge=-(2**53), le=2**53)]
Float: TypeAlias = Annotated[float, BeforeValidator(_no_bool)]
PositiveInt: TypeAlias = Annotated[Int, Field(ge=1)]
# Limits that nobody meets who means it: what lies beyond would only fill the memory, or never end.
Pixels: TypeAlias = Annotated[Int, Field(ge=1, le=16_384)]
Channels: TypeAlias = Annotated[Int, Field(ge=1, le=16_384)]
Blocks: TypeAlias = Annotated[Int, Field(ge=1, le=100)]
Epochs: TypeAlias = Annotated[Int, Field(ge=1, le=1_000_000)]
BatchSize: TypeAlias = Annotated[Int, Field(ge=1, le=1_000_000)]
Threads: TypeAlias = Annotated[Int, Field(ge=1, le=1024)]
Thousands: TypeAlias = Annotated[Int, Field(ge=1, le=100_000)]
NonNegativeInt: TypeAlias = Annotated[Int, Field(ge=0)]
PositiveFloat: TypeAlias = Annotated[Float, Field(gt=0)]
NonNegativeFloat: TypeAlias = Annotated[Float, Field(ge=0)]
Fraction: TypeAlias = Annotated[Float, Field(ge=0, lt=1)]
OpenFraction: TypeAlias = Annotated[Float, Field(gt=0, lt=1)]
Range: TypeAlias = Annotated[tuple[Float, Float], AfterValidator(_ordered)]
NonNegativeRange: TypeAlias = Annotated[tuple[NonNegativeFloat, NonNegativeFloat], AfterValidator(_ordered)]
PositiveRange: TypeAlias = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ordered)]
Bool: TypeAlias = Annotated[bool, Field(strict=True)]


class Section(BaseModel):
    """A part of params.yaml: immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
