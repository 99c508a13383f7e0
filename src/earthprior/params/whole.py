"""The whole of params.yaml."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from earthprior.params import search
from earthprior.params.chips import AugmentationParams, DataParams, NormalizationParams
from earthprior.params.kinds import (
    BatchSize,
    Bool,
    Epochs,
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
from earthprior.params.learning import (
    AdadeltaParams,
    AdagradParams,
    AdamParams,
    BaseOptimizer,
    CosineParams,
    CosineWarmParams,
    DiffusionParams,
    LossWeightsParams,
    MultistepParams,
    NAdamParams,
    OneCycleParams,
    OperationParams,
    PerceptualParams,
    PlateauParams,
    PolyParams,
    RMSpropParams,
    SAMParams,
    SGDParams,
    SSIMParams,
    StepParams,
    UNetAttDParams,
    UNetFilmParams,
)
from earthprior.params.search import TuneParams


class EvaluateParams(Section):
    """How a trained network is judged."""

    sampler: Literal["dpm_solver", "ddim", "ddpm"]
    steps: PositiveInt
    samples: Thousands
    sampling_seed: Int
    clip_sample: Bool
    label_column: str
    image_label_column: str | None
    probe_rhos: Annotated[tuple[PositiveFloat, ...], Field(min_length=1, max_length=32)]
    probe_rho: PositiveFloat
    probe_pixels: PositiveInt


SELECTORS = {
    "task": ("diffusion",),
    "network": ("unet_film", "unet_att_d"),
    "loss_fn": ("loss_weights", "ssim", "perceptual"),
    "optimizer": (*get_args(BaseOptimizer), "sam"),
    "lr_schedule": ("cosine", "cosinewarm", "step", "multistep", "plateau", "poly", "onecycle"),
}  # fmt: skip
"""Keys whose word selects some of several sections; the sections not selected are inactive."""


class Params(Section):
    """The whole of params.yaml."""

    seed: Int
    threads: Threads
    precision: Literal["auto", "float32", "bfloat16"]
    task: Literal["diffusion"]
    network: Literal["unet_film", "unet_att_d"]
    objective: Literal["eps", "x0", "v"]
    loss_fn: Literal["mse", "l1", "charbonnier", "ssim", "perceptual", "hybrid_light"]
    lr: PositiveFloat
    weight_decay: NonNegativeFloat
    batch_size: BatchSize
    accumulation_steps: PositiveInt
    val_batch_size: BatchSize
    epochs: Epochs
    warmup_epochs: NonNegativeInt
    early_stopping_epochs: PositiveInt | None
    grad_clip: PositiveFloat | None
    optimizer: Literal[BaseOptimizer, "sam"]
    lr_schedule: Literal["cosine", "cosinewarm", "step", "multistep", "plateau", "poly", "onecycle", "none"]
    ema_decay: Fraction
    data: DataParams
    normalization: NormalizationParams
    augmentation: AugmentationParams
    diffusion: DiffusionParams
    unet_film: UNetFilmParams
    unet_att_d: UNetAttDParams
    loss_weights: LossWeightsParams
    ssim: SSIMParams
    perceptual: PerceptualParams
    adam: AdamParams
    adamw: AdamParams
    sgd: SGDParams
    rmsprop: RMSpropParams
    adagrad: AdagradParams
    adadelta: AdadeltaParams
    nadam: NAdamParams
    adamax: AdamParams
    radam: AdamParams
    adabelief: AdamParams
    sam: SAMParams
    cosine: CosineParams
    cosinewarm: CosineWarmParams
    step: StepParams
    multistep: MultistepParams
    plateau: PlateauParams
    poly: PolyParams
    onecycle: OneCycleParams
    evaluate: EvaluateParams
    operation: OperationParams
    tune: TuneParams | None = None

    def visits_per_chip(self, chips: int) -> int:
        """How often an epoch visits each of so many train chips."""
        return self.data.crops_per_chip

    def steps_in_epoch(self, chips: int) -> int:
        """How many batches an epoch's visits fill; what fills none is left out."""
        return chips * self.data.crops_per_chip // self.batch_size

    def epoch_fault(self, train_chips: int) -> str | None:
        """Why so many train chips cannot be trained on, or None."""
        visits = train_chips * self.data.crops_per_chip
        if visits >= self.batch_size:
            return None
        return (
            f"batch_size {self.batch_size} is more than an epoch has: {train_chips} train chips x data.crops_per_chip "
            f"{self.data.crops_per_chip} are {visits}; lower batch_size"
        )

    @model_validator(mode="after")
    def _check(self) -> Params:
        faults = []
        if self.warmup_epochs >= self.epochs and self.lr_schedule != "onecycle":
            faults.append(f"warmup_epochs {self.warmup_epochs} leaves no epoch of {self.epochs} to train in; lower it")
        if self.evaluate.steps > self.diffusion.timesteps:
            faults.append(f"evaluate.steps {self.evaluate.steps} exceed diffusion.timesteps {self.diffusion.timesteps}")
        if self.batch_size % self.accumulation_steps:
            faults.append(
                f"batch_size {self.batch_size} cannot be worked through in {self.accumulation_steps} equal parts; "
                "use an accumulation_steps that divides it"
            )
        faults += self._diffusion_faults() + self._rate_faults()
        if self.tune is not None:
            faults += search.faults(self.tune, fields(), SELECTORS)
        if self.loss_fn == "perceptual" and self.perceptual.weights is None:
            faults.append(
                "loss_fn perceptual needs VGG16 weights; give their path or URL in perceptual.weights (torchvision's "
                "vgg16-397923af.pth, or the same tensors as .safetensors)"
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _diffusion_faults(self) -> list[str]:
        """Zero terminal SNR leaves nothing of the chip at the last timestep, which not everything can stand."""
        if not self.diffusion.zero_terminal_snr:
            return []
        faults = []
        if self.objective == "eps" and self.diffusion.precondition == "none":
            faults.append(
                "diffusion.zero_terminal_snr with objective eps: pure noise says nothing of the chip it hides; use "
                "objective v or x0, or a precondition"
            )
        if self.evaluate.sampler == "dpm_solver":
            faults.append(
                "evaluate.sampler dpm_solver divides by the last alpha, which diffusion.zero_terminal_snr makes 0; use "
                "ddim or ddpm"
            )
        return faults

    def _rate_faults(self) -> list[str]:
        """LR schedules whose end lies above their beginning, or that never come to act."""
        floors = {
            "cosine": ("eta_min", self.cosine.eta_min),
            "cosinewarm": ("eta_min", self.cosinewarm.eta_min),
            "plateau": ("min_lr", self.plateau.min_lr),
            "poly": ("min_lr", self.poly.min_lr),
        }
        key, floor = floors.get(self.lr_schedule, ("", 0.0))
        if floor > self.lr:
            return [f"{self.lr_schedule}.{key} {floor:g} is above lr {self.lr:g}; lower it"]
        falls: dict[str, tuple[str, Iterable[int]]] = {
            "step": ("step_size", range(self.step.step_size, self.epochs, self.step.step_size)),
            "multistep": ("milestones", self.multistep.milestones),
        }
        key, epochs = falls.get(self.lr_schedule, ("", ()))
        if key and not any(self.warmup_epochs < epoch < self.epochs for epoch in epochs):
            return [f"{self.lr_schedule}.{key} names no epoch of {self.epochs} after warm-up: the rate never falls"]
        return []


@cache
def fields() -> Mapping[str, Any]:
    """The type of every dotted key that params.yaml may hold, with its limits."""
    return fields_of(Params, {"tune": TuneParams})


def fields_of(model: type[Section], optional: Mapping[str, type[Section]] | None = None) -> dict[str, Any]:
    """The type of every dotted key of a file of parameters, with its limits.

    Args:
        model: The whole file.
        optional: Sections that may be absent, by name.
    """
    found: dict[str, Any] = {}
    sections = {**{name: field.annotation for name, field in model.model_fields.items()}, **(optional or {})}
    for name, kind in sections.items():
        if isinstance(kind, type) and issubclass(kind, Section):
            found |= {f"{name}.{inner}": _type(field) for inner, field in kind.model_fields.items()}
        else:
            found[name] = _type(model.model_fields[name])
    return found


def _type(field: FieldInfo) -> Any:
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
