"""The whole of params.yaml, and which part of it a run depends on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from earthprior.params.chips import AugmentationParams, DataParams, NormalizationParams
from earthprior.params.kinds import (
    Bool,
    Fraction,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
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


class EvaluateParams(Section):
    """How a trained network is judged."""

    sampler: Literal["dpm_solver", "ddim", "ddpm"]
    steps: PositiveInt
    samples: PositiveInt
    sampling_seed: Int
    clip_sample: Bool
    label_column: str
    probe_rho: PositiveFloat
    probe_pixels: PositiveInt


class OperationParams(Section):
    """What cannot change a result."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    readers: PositiveInt
    activation_checkpointing: Bool
    checkpoint_interval: PositiveInt | None
    checkpoint_every_seconds: NonNegativeFloat
    log_every_steps: PositiveInt


class Params(Section):
    """The whole of params.yaml."""

    seed: Int
    threads: PositiveInt
    precision: Literal["auto", "float32", "bfloat16"]
    task: Literal["diffusion"]
    network: Literal["unet_film", "unet_att_d"]
    objective: Literal["eps", "x0", "v"]
    loss_fn: Literal["mse", "l1", "charbonnier", "ssim", "perceptual", "hybrid_light"]
    lr: PositiveFloat
    weight_decay: NonNegativeFloat
    batch_size: PositiveInt
    accumulation_steps: PositiveInt
    val_batch_size: PositiveInt
    epochs: PositiveInt
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
        if self.loss_fn == "perceptual" and self.perceptual.weights is None:
            faults.append(
                "loss_fn perceptual needs VGG16 weights; give their path or URL in perceptual.weights (torchvision's "
                "vgg16-397923af.pth, or the same tensors as .safetensors)"
            )
        if faults:
            raise ValueError("; ".join(faults))
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


SELECTORS = {
    "task": ("diffusion",),
    "network": ("unet_film", "unet_att_d"),
    "loss_fn": ("loss_weights", "ssim", "perceptual"),
    "optimizer": (*get_args(BaseOptimizer), "sam"),
    "lr_schedule": ("cosine", "cosinewarm", "step", "multistep", "plateau", "poly", "onecycle"),
}  # fmt: skip
"""Keys whose word selects some of several sections; the sections not selected are inactive."""


def _selected(params: Params) -> set[str]:
    """The sections that the selectors chose: the one of the word's own name, and what that one rests on."""
    chosen = {getattr(params, selector) for selector in SELECTORS}
    if params.loss_fn == "hybrid_light":
        chosen |= {"loss_weights", "ssim"}
    if params.optimizer == "sam":
        chosen.add(params.sam.base_optimizer)
    return chosen


def _without_effect(params: Params) -> Iterator[str]:
    """Dotted keys of active sections that the other choices leave without effect."""
    diffusion = params.diffusion
    if diffusion.precondition != "none" and diffusion.weighting == "linear":
        # The network then says the linear denoiser's residual, in units of its own size, whatever the objective.
        yield "objective"
    if diffusion.noise_schedule == "cosine":
        yield from ("diffusion.beta_start", "diffusion.beta_end", "diffusion.scale_betas")
    if diffusion.weighting not in ("min_snr", "soft_min_snr"):
        yield "diffusion.min_snr_gamma"
    if params.lr_schedule == "onecycle":
        yield "warmup_epochs"
    if not params.normalization.apply_normalization:
        # What is left of it chooses the neutral value.
        yield from ("normalization.normal_strategy", "normalization.clip_percent", "normalization.clip_val")


def active(params: Params) -> dict[str, Any]:
    """The parameters that can change the weights, flat under their dotted keys, in the file's order.

    Sections that no selector chose, `evaluate` and `operation` are left out: this is what a run's fingerprint is made
    of and, with `evaluate` beside it, what MLflow shows.
    """
    inactive = {"evaluate", "operation"} | {name for names in SELECTORS.values() for name in names}
    inactive -= _selected(params)
    tree = {key: value for key, value in params.model_dump(mode="json").items() if key not in inactive}
    without_effect = set(_without_effect(params))
    return {key: value for key, value in flatten(tree) if key not in without_effect}


def evaluation(params: Params) -> dict[str, Any]:
    """The parameters that only the evaluate stage reads, flat under their dotted keys."""
    return dict(flatten({"evaluate": params.evaluate.model_dump(mode="json")}))


def known_keys() -> Iterator[str]:
    """Every dotted key that params.yaml may hold."""
    for name, field in Params.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from (f"{name}.{inner}" for inner in field.annotation.model_fields)
        else:
            yield name


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a part of params.yaml under their dotted keys; a value that is a mapping itself stays whole."""
    known = set(known_keys())
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and dotted not in known:
            yield from flatten(value, f"{dotted}.")
        else:
            yield dotted, value
