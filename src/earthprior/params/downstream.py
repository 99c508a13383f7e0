"""downstream/params.yaml: what a pretrained backbone is finetuned on, and how."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from earthprior.params.acting import flatten
from earthprior.params.bench import BenchParams
from earthprior.params.chips import AugmentationParams, FileParams
from earthprior.params.kinds import (
    BatchSize,
    Channels,
    Epochs,
    Float,
    Fraction,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Thousands,
    Threads,
)
from earthprior.params.learning import AdamParams, CosineParams, OperationParams, SGDParams
from earthprior.params.whole import fields_of

DecayFactor = Annotated[Float, Field(gt=0, le=1)]


class DownstreamParams(Section):
    """The whole of downstream/params.yaml; words that params.yaml has, too, mean the same."""

    seed: Int
    threads: Threads
    precision: Literal["auto", "float32", "bfloat16"]
    pretrained: str
    start: Literal["pretrained", "untrained"]
    task: Literal["segmentation", "classification", "regression"]
    label_column: str
    ignore_value: Int | None
    labels: PositiveInt | None
    class_weights: Literal["none", "balanced"]
    side: Literal["decoder", "encoder"] | None
    t: NonNegativeInt | None
    head: Literal["linear", "nonlinear"]
    head_channels: Channels
    train: Literal["head", "last", "all"]
    last_levels: PositiveInt
    lr: PositiveFloat
    lr_decay: DecayFactor
    weight_decay: NonNegativeFloat
    batch_size: BatchSize
    accumulation_steps: PositiveInt
    val_batch_size: BatchSize
    epochs: Epochs
    steps_per_epoch: Thousands
    warmup_epochs: NonNegativeInt
    early_stopping_epochs: PositiveInt | None
    keep: Literal["best", "last"]
    grad_clip: PositiveFloat | None
    optimizer: Literal["adam", "adamw", "sgd"]
    lr_schedule: Literal["cosine", "none"]
    ema_decay: Fraction
    data: FileParams
    augmentation: AugmentationParams
    adam: AdamParams
    adamw: AdamParams
    sgd: SGDParams
    cosine: CosineParams
    operation: OperationParams
    bench: BenchParams | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, whatever the number of labelled chips."""
        return self.epochs * self.steps_per_epoch

    def steps_in_epoch(self, chips: int) -> int:
        """Optimizer steps between two validations; the same for any number of labelled chips."""
        return self.steps_per_epoch

    def visits_per_chip(self, chips: int) -> int:
        """How often an epoch's order names each of so many train chips, at least."""
        return -(-self.steps_per_epoch * self.batch_size // chips)

    def epoch_fault(self, train_chips: int) -> str | None:
        """Why so many train chips cannot be trained on, or None."""
        return None if train_chips else "no train chip has a label"

    @model_validator(mode="after")
    def _check(self) -> DownstreamParams:
        faults = []
        if self.warmup_epochs >= self.epochs:
            faults.append(f"warmup_epochs {self.warmup_epochs} leaves no epoch of {self.epochs} to train in; lower it")
        if self.batch_size % self.accumulation_steps:
            faults.append(
                f"batch_size {self.batch_size} cannot be worked through in {self.accumulation_steps} equal parts; "
                "use an accumulation_steps that divides it"
            )
        if self.lr_schedule == "cosine" and self.cosine.eta_min > self.lr:
            faults.append(f"cosine.eta_min {self.cosine.eta_min:g} is above lr {self.lr:g}; lower it")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def active(self) -> dict[str, Any]:
        """The parameters that can change the weights, flat under their dotted keys, in the file's order.

        Where the pretrained weights lie is none of them: what they are is recorded beside.
        """
        sections = {"adam", "adamw", "sgd"} - {self.optimizer}
        sections |= {"cosine"} if self.lr_schedule == "none" else set()
        without = {"pretrained"}
        without |= set() if self.task == "segmentation" else {"ignore_value"}
        without |= {"class_weights"} if self.task == "regression" else set()
        without |= set() if self.head == "nonlinear" else {"head_channels"}
        without |= set() if self.train == "last" else {"last_levels"}
        without |= {"lr_decay"} if self.train == "head" else set()
        tree = self.model_dump(mode="json", exclude={"operation", "bench"} | sections | without)
        return dict(flatten(tree))


@cache
def downstream_fields() -> Mapping[str, Any]:
    """The type of every dotted key that downstream/params.yaml may hold, with its limits."""
    return fields_of(DownstreamParams)
