"""params.yaml as typed records: the only reader of that file.

All faults are reported at once, each with its dotted key, the value, what is allowed and, for a misspelt key, the
nearest known one. ruamel.yaml is used because DVC itself reads and writes the file with it: PyYAML takes the `1e-05`
that DVC writes for a string.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from earthprior.errors import ParamsError


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


Int: TypeAlias = Annotated[int, BeforeValidator(_no_bool)]
Float: TypeAlias = Annotated[float, BeforeValidator(_no_bool)]
PositiveInt: TypeAlias = Annotated[Int, Field(ge=1)]
PositiveFloat: TypeAlias = Annotated[Float, Field(gt=0)]
Fraction: TypeAlias = Annotated[Float, Field(ge=0, lt=1)]
Range: TypeAlias = Annotated[tuple[Float, Float], AfterValidator(_ordered)]
PositiveRange: TypeAlias = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ordered)]
Bool: TypeAlias = Annotated[bool, Field(strict=True)]


class Section(BaseModel):
    """A part of params.yaml: immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataParams(Section):
    """Which chips, and how files become arrays."""

    dir: str
    catalog: str
    image_columns: Annotated[tuple[str, ...], Field(min_length=1)]
    chip_size: PositiveInt
    bands: Annotated[tuple[str, ...], Field(min_length=1)]
    crop_px: PositiveInt | None
    crops_per_chip: PositiveInt
    nodata: tuple[Float, ...] | None
    buffer: Annotated[Int, Field(ge=0)]
    on_bad_chip: Literal["error", "skip"]
    max_bad_fraction: Annotated[Float, Field(ge=0, le=1)]

    @property
    def read_px(self) -> int:
        """Width and height of what is read, buffer included, px."""
        return self.chip_size + 2 * self.buffer

    @property
    def train_px(self) -> int:
        """Width and height of what the network sees, px."""
        return self.crop_px or self.read_px

    @model_validator(mode="after")
    def _check(self) -> DataParams:
        if len(set(self.bands)) != len(self.bands):
            raise ValueError(f"bands {list(self.bands)} name a band twice; each band needs its own name")
        if self.crop_px is not None and self.crop_px > self.read_px:
            raise ValueError(f"crop_px {self.crop_px} is larger than the chips ({self.read_px} px)")
        return self


class NormalizationParams(Section):
    """How physical values become x0."""

    apply_normalization: Bool
    normal_strategy: Literal["min_max", "z_value"]
    stat_procedure: Literal["lab", "lpb", "gab", "gpb"]


class AugmentationParams(Section):
    """Random changes to clean chips, on the device, before the diffusion corruption."""

    flip: Bool
    rotate_90: Bool
    scale_factor: PositiveRange | None
    br_range: Range | None
    contrast_range: PositiveRange | None
    crop_strategy: Literal["random", "center"]


class DiffusionParams(Section):
    """The forward process and how the denoiser is trained on it."""

    timesteps: Annotated[Int, Field(ge=2)]
    noise_schedule: Literal["linear", "cosine"]
    beta_start: Annotated[Float, Field(gt=0, lt=1)]
    beta_end: Annotated[Float, Field(gt=0, lt=1)]
    precondition: Literal["none", "scalar", "wiener"]
    weighting: Literal["uniform", "linear"]
    timestep_sampling: Literal["uniform", "log_snr"]

    @model_validator(mode="after")
    def _check(self) -> DiffusionParams:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} is above beta_end {self.beta_end}")
        return self


class UNetFilmParams(Section):
    """The modern denoiser."""

    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    blocks: PositiveInt
    attention: Bool
    dropout_rate: Fraction
    time_embedding_dim: Annotated[Int, Field(ge=2)]

    @property
    def stride(self) -> int:
        """Inputs must be divisible by this, px."""
        return int(2 ** (len(self.channels) - 1))


class UNetAttDParams(Section):
    """The tutorial's attention U-Net."""

    filter_config: Annotated[tuple[PositiveInt, ...], Field(min_length=2)]
    block_num: Annotated[tuple[PositiveInt, ...], Field(min_length=2)]
    dropout_rate: Fraction
    dropout_type: Literal["traditional", "spatial"]
    upmode: Literal["fixed", "deconv_1", "deconv_2", "DUC"]
    use_skipAtt: Bool
    time_embedding_dim: Annotated[Int, Field(ge=2)]

    @property
    def stride(self) -> int:
        """Inputs must be divisible by this, px."""
        return int(2 ** (len(self.filter_config) - 1))

    @model_validator(mode="after")
    def _check(self) -> UNetAttDParams:
        if len(self.block_num) != len(self.filter_config):
            raise ValueError(
                f"block_num has {len(self.block_num)} entries, filter_config {len(self.filter_config)}; "
                "give one number of convolutions per level"
            )
        return self


class AdamWParams(Section):
    """Of the optimizer adamw."""

    betas: tuple[Fraction, Fraction]
    eps: PositiveFloat


class CosineParams(Section):
    """Of the LR schedule cosine: from lr to eta_min over the run."""

    eta_min: Annotated[Float, Field(ge=0)]


class CosineWarmParams(Section):
    """Of the LR schedule cosinewarm: cosine with warm restarts."""

    t_0: PositiveInt
    t_mult: PositiveInt
    eta_min: Annotated[Float, Field(ge=0)]


class EvaluateParams(Section):
    """How a trained network is judged."""

    sampler: Literal["dpm_solver", "ddim", "ddpm"]
    steps: PositiveInt
    samples: PositiveInt
    sampling_seed: Int
    label_column: str
    probe_rho: PositiveFloat
    probe_pixels: PositiveInt


class OperationParams(Section):
    """What cannot change a result."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    readers: PositiveInt
    checkpoint_every_seconds: Annotated[Float, Field(ge=0)]
    log_every_steps: PositiveInt


class Params(Section):
    """The whole of params.yaml."""

    seed: Int
    threads: PositiveInt
    precision: Literal["auto", "float32", "bfloat16"]
    task: Literal["diffusion"]
    network: Literal["unet_film", "unet_att_d"]
    objective: Literal["eps", "x0", "v"]
    loss_fn: Literal["mse", "l1", "charbonnier"]
    lr: PositiveFloat
    weight_decay: Annotated[Float, Field(ge=0)]
    batch_size: PositiveInt
    val_batch_size: PositiveInt
    epochs: PositiveInt
    warmup_epochs: Annotated[Int, Field(ge=0)]
    grad_clip: PositiveFloat | None
    optimizer: Literal["adamw"]
    lr_schedule: Literal["cosine", "cosinewarm", "none"]
    ema_decay: Fraction
    data: DataParams
    normalization: NormalizationParams
    augmentation: AugmentationParams
    diffusion: DiffusionParams
    unet_film: UNetFilmParams
    unet_att_d: UNetAttDParams
    adamw: AdamWParams
    cosine: CosineParams
    cosinewarm: CosineWarmParams
    evaluate: EvaluateParams
    operation: OperationParams

    @model_validator(mode="after")
    def _check(self) -> Params:
        faults = []
        stride = getattr(self, self.network).stride
        if self.data.train_px % stride:
            source = "data.crop_px" if self.data.crop_px else "data.chip_size + 2 * data.buffer"
            faults.append(
                f"{source} is {self.data.train_px} px, which {self.network} cannot halve {int(math.log2(stride))} "
                f"times; use a multiple of {stride}"
            )
        if self.warmup_epochs >= self.epochs:
            faults.append(f"warmup_epochs {self.warmup_epochs} leaves no epoch of {self.epochs} to train in")
        if self.evaluate.steps > self.diffusion.timesteps:
            faults.append(f"evaluate.steps {self.evaluate.steps} exceed diffusion.timesteps {self.diffusion.timesteps}")
        if faults:
            raise ValueError("; ".join(faults))
        return self


SELECTORS = {
    "task": ("diffusion",),
    "network": ("unet_film", "unet_att_d"),
    "optimizer": ("adamw",),
    "lr_schedule": ("cosine", "cosinewarm"),
}
"""Keys whose word selects one of several sections; the sections not selected are inactive."""


def load(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        ParamsError: The file is missing, is no YAML mapping, or has faults; the message lists all of them.
    """
    return parse(read_mapping(path), path.name)


def read_mapping(path: Path) -> dict[str, Any]:
    """The plain mapping of a YAML 1.2 file, unchecked.

    Raises:
        ParamsError: The file is missing, empty, not UTF-8, not a mapping, or not YAML (with line and column).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent.resolve().name
        raise ParamsError(f"{path.name} not found in {folder}/; run from the project's root") from None
    except OSError as error:
        raise ParamsError(f"{path.name} cannot be read: {error.strerror}; check what it is and its mode") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path.name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    try:
        content = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, LookupError, RecursionError) as error:
        raise ParamsError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        what = "empty" if content is None else f"a {type(content).__name__}, not a mapping of keys to values"
        raise ParamsError(f"{path.name} is {what}; restore it with: git checkout {path.name}")
    return content


def parse(content: Mapping[str, Any], source: str) -> Params:
    """Check a plain mapping.

    Args:
        content: As read from YAML.
        source: The file's name, for the message.

    Raises:
        ParamsError: With every fault at once.
    """
    try:
        return Params.model_validate(dict(content))
    except ValidationError as error:
        faults = [_describe(fault, source) for fault in error.errors()]
    raise ParamsError("\n".join([f"{source} has {len(faults)} fault{'s' * (len(faults) > 1)}:", *faults]))


def _describe(fault: Any, source: str) -> str:
    """One line for one pydantic fault: dotted key, value, what is allowed, nearest known key."""
    location = [str(part) for part in fault["loc"] if part not in ("tuple[float, float]",)]
    key = ".".join(location)
    if fault["type"] == "extra_forbidden":
        # First a key that is merely in the wrong section, then one that is misspelt.
        near = [known for known in known_keys() if known.split(".")[-1] == location[-1]][:1]
        near = near or difflib.get_close_matches(key, list(known_keys()), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "remove it"
        return f"  {key}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"  {key}: missing; add it (git checkout {source} restores the default)"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" and isinstance(fault["input"], Mapping | BaseModel):
        return f"  {key}: {message}" if key else f"  {message}"
    return f"  {key}: {fault['input']!r} is not allowed; {message}"


def known_keys() -> Iterator[str]:
    """Every dotted key that params.yaml may hold."""
    for name, field in Params.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from (f"{name}.{inner}" for inner in field.annotation.model_fields)
        else:
            yield name


def active(params: Params) -> dict[str, Any]:
    """The parameters that can change the weights, flat under their dotted keys, in the file's order.

    Sections that no selector chose, `evaluate` and `operation` are left out: this is what a run's fingerprint is made
    of and, with `evaluate` beside it, what MLflow shows.
    """
    inactive = {"evaluate", "operation"}
    for selector, sections in SELECTORS.items():
        inactive |= set(sections) - {getattr(params, selector)}
    if params.diffusion.precondition != "none" and params.diffusion.weighting == "linear":
        # The network then says the linear denoiser's residual, in units of its own size, whatever the objective.
        inactive.add("objective")
    return dict(flatten({key: value for key, value in params.model_dump(mode="json").items() if key not in inactive}))


def evaluation(params: Params) -> dict[str, Any]:
    """The parameters that only the evaluate stage reads, flat under their dotted keys."""
    return dict(flatten({"evaluate": params.evaluate.model_dump(mode="json")}))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree of mappings under their dotted keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
