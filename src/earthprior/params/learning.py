"""The sections about learning: diffusion, networks, losses, optimizers and LR schedules."""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from earthprior.params.kinds import (
    Blocks,
    Bool,
    Channels,
    Float,
    Fraction,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Section,
    Threads,
)
from earthprior.params.plain import shown

REFERENCE_TIMESTEPS = 1000
"""The T that beta_start and beta_end are meant for where `diffusion.scale_betas` is set."""


class DiffusionParams(Section):
    """The forward process and how the denoiser is trained on it."""

    timesteps: Annotated[Int, Field(ge=2, le=100_000)]
    noise_schedule: Literal["linear", "cosine", "clipped_cosine", "quadratic", "sigmoid"]
    beta_start: OpenFraction
    beta_end: OpenFraction
    scale_betas: Bool
    shift_reference_px: PositiveInt | None
    zero_terminal_snr: Bool
    precondition: Literal["none", "scalar", "wiener"]
    weighting: Literal["uniform", "min_snr", "soft_min_snr", "linear"]
    min_snr_gamma: PositiveFloat
    timestep_sampling: Literal["uniform", "stratified", "log_snr", "importance"]

    @property
    def beta_range(self) -> tuple[float, float]:
        """First and last beta, scaled by 1000 / T where asked.

        Source: Nichol & Dhariwal 2021, arXiv:2102.09672, their code's linear schedule.
        """
        scale = REFERENCE_TIMESTEPS / self.timesteps if self.scale_betas else 1.0
        return self.beta_start * scale, self.beta_end * scale

    @model_validator(mode="after")
    def _check(self) -> DiffusionParams:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} is above beta_end {self.beta_end}")
        # The cosine schedule knows no betas; all others would leave (0, 1).
        if self.noise_schedule != "cosine" and self.beta_range[1] >= 1:
            fewest = int(self.beta_end * REFERENCE_TIMESTEPS) + 1
            raise ValueError(
                f"scale_betas makes beta_end {self.beta_range[1]:g} with {self.timesteps} timesteps, and betas must "
                f"lie in (0, 1); use at least {fewest} timesteps, a lower beta_end, or scale_betas: false"
            )
        return self


class UNetFilmParams(Section):
    """The modern denoiser."""

    channels: Annotated[tuple[Channels, ...], Field(min_length=1, max_length=12)]
    blocks: Blocks
    attention: Bool
    dropout_rate: Fraction
    time_embedding_dim: Annotated[Int, Field(ge=2, le=16_384)]


class UNetAttDParams(Section):
    """The tutorial's attention U-Net."""

    filter_config: Annotated[tuple[Channels, ...], Field(min_length=2, max_length=12)]
    block_num: Annotated[tuple[Blocks, ...], Field(min_length=2, max_length=12)]
    dropout_rate: Fraction
    dropout_type: Literal["traditional", "spatial"]
    upmode: Literal["fixed", "deconv_1", "deconv_2", "DUC"]
    use_skipAtt: Bool
    time_embedding_dim: Annotated[Int, Field(ge=2, le=16_384)]
    time_injection: Literal["none", "bottleneck", "all"]

    @model_validator(mode="after")
    def _check(self) -> UNetAttDParams:
        if len(self.block_num) != len(self.filter_config):
            raise ValueError(
                f"block_num has {len(self.block_num)} entries, filter_config {len(self.filter_config)}; "
                "give one number of convolutions per level"
            )
        return self


class LossWeightsParams(Section):
    """Of the loss hybrid_light: alpha mse + beta (1 - ssim) + gamma kl."""

    alpha: NonNegativeFloat
    beta: NonNegativeFloat
    gamma: NonNegativeFloat

    @model_validator(mode="after")
    def _check(self) -> LossWeightsParams:
        if self.alpha + self.beta + self.gamma == 0:
            raise ValueError("alpha, beta and gamma are all 0, so there is nothing to learn; raise one of them")
        return self


class SSIMParams(Section):
    """Of the losses ssim and hybrid_light."""

    data_range: PositiveFloat


class PerceptualParams(Section):
    """Of the loss perceptual."""

    weights: str | None

    @model_validator(mode="after")
    def _check(self) -> PerceptualParams:
        if self.weights is not None and re.search(
            r"://[^/]*@|(?i:[?&][\w-]*(password|passwd|pwd|token|secret|signature|sig|key)=)", self.weights
        ):
            # The fault does not repeat it.
            raise ValueError(
                "weights holds a user, a password or a token, and params.yaml is kept with every run; give a path, or "
                "a URL without"
            )
        return self


Betas = tuple[Fraction, Fraction]

BaseOptimizer: TypeAlias = Literal[
    "adam", "adamw", "sgd", "rmsprop", "adagrad", "adadelta", "nadam", "adamax", "radam", "adabelief"
]


class AdamParams(Section):
    """Of the optimizers of Adam's family."""

    betas: Betas
    eps: PositiveFloat


class SGDParams(Section):
    """Of the optimizer sgd."""

    momentum: Fraction
    nesterov: Bool

    @model_validator(mode="after")
    def _check(self) -> SGDParams:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class RMSpropParams(Section):
    """Of the optimizer rmsprop."""

    alpha: Fraction
    eps: PositiveFloat
    momentum: Fraction


class AdagradParams(Section):
    """Of the optimizer adagrad."""

    lr_decay: NonNegativeFloat
    eps: PositiveFloat


class AdadeltaParams(Section):
    """Of the optimizer adadelta."""

    rho: Fraction
    eps: PositiveFloat


class NAdamParams(AdamParams):
    """Of the optimizer nadam."""

    momentum_decay: NonNegativeFloat


class SAMParams(Section):
    """Of the optimizer sam, which wraps another one; that one's own section stands."""

    base_optimizer: BaseOptimizer
    rho: PositiveFloat
    adaptive: Bool


class CosineParams(Section):
    """Of the LR schedule cosine: from lr to eta_min, over the run or t_max epochs."""

    t_max: PositiveInt | None
    eta_min: NonNegativeFloat


class CosineWarmParams(Section):
    """Of the LR schedule cosinewarm: cosine with warm restarts."""

    t_0: PositiveInt
    t_mult: PositiveInt
    eta_min: NonNegativeFloat


class StepParams(Section):
    """Of the LR schedule step."""

    step_size: PositiveInt
    gamma: PositiveFloat


class MultistepParams(Section):
    """Of the LR schedule multistep."""

    milestones: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    gamma: PositiveFloat

    @model_validator(mode="after")
    def _check(self) -> MultistepParams:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {shown(list(self.milestones))} must rise")
        return self


class PlateauParams(Section):
    """Of the LR schedule plateau."""

    patience: NonNegativeInt
    factor: OpenFraction
    min_lr: NonNegativeFloat


class PolyParams(Section):
    """Of the LR schedule poly: from lr to min_lr, over the run or max_decay_epochs."""

    max_decay_epochs: PositiveInt | None
    min_lr: NonNegativeFloat
    power: PositiveFloat


class OneCycleParams(Section):
    """Of the LR schedule onecycle, which has a warm-up of its own."""

    pct_start: OpenFraction
    div_factor: Annotated[Float, Field(ge=1)]
    final_div_factor: Annotated[Float, Field(ge=1)]


class OperationParams(Section):
    """What cannot change a result."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    readers: Threads
    activation_checkpointing: Bool
    checkpoint_interval: PositiveInt | None
    checkpoint_every_seconds: NonNegativeFloat
    log_every_steps: PositiveInt
