"""The section `bench` of downstream/params.yaml: which methods are compared, on how many labels."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field

from earthprior.params.kinds import Int, PositiveFloat, PositiveInt, Section

Budget: TypeAlias = PositiveInt | Literal["all"]
Method: TypeAlias = Literal["finetune", "scratch", "probe", "untrained", "context", "context_mlp"]


def _different(values: tuple[object, ...]) -> tuple[object, ...]:
    if len(set(values)) < len(values):
        raise ValueError("the same entry stands twice; leave one")
    return values


class BenchParams(Section):
    """Label-efficiency curves."""

    budgets: Annotated[tuple[Budget, ...], Field(min_length=1), AfterValidator(_different)]
    seeds: Annotated[tuple[Int, ...], Field(min_length=1), AfterValidator(_different)]
    methods: Annotated[tuple[Method, ...], Field(min_length=1), AfterValidator(_different)]
    steps: PositiveInt
    lr: Annotated[tuple[PositiveFloat, ...], Field(min_length=1), AfterValidator(_different)]
    l2: Annotated[tuple[PositiveFloat, ...], Field(min_length=1), AfterValidator(_different)]
    holdout: PositiveInt
    tuning_labels: PositiveInt | None
    pixels: PositiveInt
