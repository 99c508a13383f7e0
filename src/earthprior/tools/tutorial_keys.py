"""The keys of the tutorial's ssl_train.yaml: what each is here, and what it did there.

Two principles. What acted there keeps the meaning that the tutorial's code gave it: weights and numbers go on
comparing. What had no effect there gets the meaning that its README promises. docs/params.md has the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from earthprior.params import CLIP_PERCENTS
from earthprior.tools.tutorial_values import (
    PATCH_SHIFT_PX,
    Convert,
    anything,
    betas,
    exact_word,
    file_name,
    flag,
    flips,
    integer,
    interval,
    listed,
    milestones,
    noise_schedule,
    number,
    optional,
    span,
    view_shift,
    word,
)

ABSENT: Final = object()
"""Stands where a key is missing, and where a rule has no such value."""


@dataclass(frozen=True)
class Rule:
    """What becomes of one key.

    Attributes:
        theirs: Dotted, below `Train_Validate`.
        here: Our dotted key; None for what has no place here.
        convert: From their value to ours; raises ValueError with what is needed instead.
        acted: Whether the tutorial's code let it have an effect.
        note: What differs.
        default: What the tutorial's code takes where the key is missing; ABSENT: nothing, and ours stays.
        off: Our value that does what the tutorial's code did, where that is not what the key says; else ABSENT.
    """

    theirs: str
    here: str | None
    convert: Convert
    acted: bool = True
    note: str = ""
    default: Any = ABSENT
    off: Any = ABSENT


Option = tuple[Rule, tuple[str, ...]]
"""A key, and the names of which its value is an option."""

_UNUSED = "there: stored, or not even read"
_AUGMENTATION = "there: imported, never called"

PLAIN_RULES = (
    Rule("data_path", None, anything, note="data.dir stays as it is; chips enter by: dvc add PATH -o data"),
    Rule("train_csv_name", "data.catalog", file_name, note="put the file into the chips' folder"),
    Rule("log_dir", None, anything, note="here: results/, MLflow, and work/ for what a killed run needs"),
    Rule("save_dir", None, anything, note="here: results/pretrain/ and MLflow"),
    Rule("data_size", "data.chip_size", integer, False, "there not enforced; here other sizes are an error"),
    Rule("buffer", "data.buffer", integer, note="there: zeros. Here: real pixels where the file has them", default=0),
    Rule("buffer_comp", None, anything, False, _UNUSED),
    Rule("global_stats", None, anything, note="the stats stage computes them"),
    Rule("catalog_index", None, anything, False, _UNUSED),
    Rule("trans", "augmentation.flip", flips, False, "there: stored, never applied; may name flips", None, False),
    Rule("parallel", None, anything, False, _UNUSED),
    Rule("downfactor", None, anything, False, f"{_UNUSED}; statistics are exact"),
    Rule("img_path_cols", "data.image_columns", listed(exact_word)),
    Rule("apply_normalization", "normalization.apply_normalization", flag, default=True),
    Rule("normal_strategy", "normalization.normal_strategy", word, default="min_max"),
    Rule("stat_procedure", "normalization.stat_procedure", word, default="lab"),
    Rule("nodata", "data.nodata", optional(listed(number)), note="here in no loss, statistic or metric", default=None),
    Rule("scale_factor", "augmentation.scale_factor", optional(span), False, _AUGMENTATION, None, None),
    Rule("crop_strategy", "augmentation.crop_strategy", word, False, _AUGMENTATION, "center", "center"),
    Rule(
        "rotation_degree", "augmentation.rotation_degree", optional(listed(number)), False,
        f"{_AUGMENTATION}; one of these angles. A range is written {{low: -15, high: 15}}", None, None,
    ),
    Rule("sigma_range", "augmentation.sigma_range", optional(span), False, _AUGMENTATION, None, None),
    Rule("br_range", "augmentation.br_range", optional(span), False, f"{_AUGMENTATION}; added", None, None),
    Rule("contrast_range", "augmentation.contrast_range", optional(span), False, _AUGMENTATION, None, None),
    Rule("bshift_gamma_range", "augmentation.bshift_gamma_range", optional(span), False, _AUGMENTATION, None, None),
    Rule(
        "patch_shift", "augmentation.patch_shift_px", view_shift, False,
        f"{_AUGMENTATION}; a shift by up to {PATCH_SHIFT_PX} px, as its README describes it", False, None,
    ),
    Rule("train_batch", "batch_size", integer),
    Rule("validate_batch", "val_batch_size", integer),
    Rule("diffusion.timesteps", "diffusion.timesteps", integer, default=1000),
    Rule(
        "diffusion.noise_schedule", "diffusion.noise_schedule", noise_schedule,
        note="its cosine clips betas at beta_end: clipped_cosine; its README's is cosine here", default="cosine",
    ),
    Rule("diffusion.beta_start", "diffusion.beta_start", number, default=1e-6),
    Rule("diffusion.beta_end", "diffusion.beta_end", number, default=0.02),
    Rule("model", None, anything, False, "network is unet_att_d, which is fixed in its code"),
    Rule("model_kwargs.filter_config", "unet_att_d.filter_config", listed(integer)),
    Rule("model_kwargs.block_num", "unet_att_d.block_num", listed(integer)),
    Rule(
        "model_kwargs.dropout_rate", "unet_att_d.dropout_rate", number,
        note="there without effect in blocks of one convolution", default=0.0,
    ),
    Rule("model_kwargs.dropout_type", "unet_att_d.dropout_type", word, default="traditional"),
    Rule("model_kwargs.upmode", "unet_att_d.upmode", exact_word, default="deconv_2"),
    Rule("model_kwargs.use_skipAtt", "unet_att_d.use_skipAtt", flag, default=False),
    Rule("model_kwargs.time_embedding_dim", "unet_att_d.time_embedding_dim", integer, default=128),
    Rule("epoch", "epochs", integer),
    Rule("weight_decay", "weight_decay", number, default=0.0),
    Rule("loss_fn", "loss_fn", word, note="over valid pixels only"),
    Rule(
        "checkpoint_interval", "operation.checkpoint_interval", interval, False, "there weights alone, every epoch",
        None, None,
    ),
)  # fmt: skip

FIXED: Mapping[str, tuple[Any, str]] = {
    "network": ("unet_att_d", "it makes no other, whatever `model` says"),
    "objective": ("eps", "it predicts the noise"),
    "grad_clip": (None, ""),
    "accumulation_steps": (1, ""),
    "early_stopping_epochs": (None, ""),
    "ema_decay": (0.0, "it averages no weights; 0.999 costs nothing and helps"),
    "data.crop_px": (None, "it trains on whole chips"),
    "data.crops_per_chip": (1, ""),
    "normalization.clip_percent": (0.0, ""),
    "normalization.clip_val": (None, ""),
    "augmentation.patch_gamma_range": (None, "its code's patch_shift, which never ran"),
    "diffusion.scale_betas": (False, ""),
    "diffusion.shift_reference_px": (None, ""),
    "diffusion.zero_terminal_snr": (False, ""),
    "diffusion.precondition": ("none", ""),
    "diffusion.weighting": ("uniform", ""),
    "diffusion.timestep_sampling": ("uniform", ""),
    "unet_att_d.time_injection": ("bottleneck", "none for weights from before its time embedding had an effect"),
}
"""What the tutorial's code fixes and our file chooses, with a note."""

FIXED_AS_RUN: Mapping[str, tuple[Any, str]] = {"precision": ("float32", "it knows no other")}

TORCH_EPS = {
    **dict.fromkeys(("adam", "adamw", "rmsprop", "nadam", "adamax", "radam"), 1e-8),
    "adagrad": 1e-10, "adadelta": 1e-6, "adabelief": 1e-16,
}  # fmt: skip
"""The defaults of `eps`, adabelief's from its own package; sgd has none."""

OPTIMIZER_OPTIONS: tuple[Option, ...] = (
    (
        Rule("betas", "betas", betas, default=[0.9, 0.999]),
        ("adam", "adamw", "nadam", "adamax", "radam", "adabelief"),
    ),
    *(
        (Rule("eps", "eps", number, False, "there never handed on: torch's default holds", eps, eps), (name,))
        for name, eps in TORCH_EPS.items()
    ),
    (Rule("momentum", "momentum", number, default=0.9), ("sgd", "rmsprop")),
    (Rule("nesterov", "nesterov", flag, default=False), ("sgd",)),
    (Rule("base_optimizer", "base_optimizer", word, default="sgd"), ("sam",)),
    (Rule("rho", "rho", number, default=0.05), ("sam",)),
    (Rule("adaptive", "adaptive", flag, default=False), ("sam",)),
)
"""Options and the optimizers that know them; `here` is the key in the optimizer's own section."""

SCHEDULE_OPTIONS: tuple[Option, ...] = (
    (Rule("t_0", "t_0", integer, default=10, note="from the end of warm-up"), ("cosinewarm",)),
    (Rule("t_mult", "t_mult", integer, default=1), ("cosinewarm",)),
    (Rule("T_max", "t_max", integer, default=100, note="from the end of warm-up"), ("cosine",)),
    (Rule("eta_min", "eta_min", number, default=0.0), ("cosine", "cosinewarm")),
    (Rule("step_size", "step_size", integer, default=30), ("step",)),
    (Rule("gamma", "gamma", number, default=0.1), ("step", "multistep")),
    (Rule("milestones", "milestones", milestones, default=[30, 60, 90]), ("multistep",)),
    (Rule("patience", "patience", integer, default=10), ("plateau",)),
    (Rule("factor", "factor", number, default=0.1), ("plateau",)),
    (Rule("min_lr", "min_lr", number, default=0.0), ("plateau",)),
    (Rule("max_decay_steps", "max_decay_epochs", integer, default=100, note="its steps are epochs"), ("poly",)),
    (Rule("min_learning_rate", "min_lr", number, default=1e-6), ("poly",)),
    (Rule("power", "power", number, default=1.0), ("poly",)),
    (Rule("mode", None, anything, note="a higher gain is better"), ("plateau",)),
    (Rule("threshold", None, anything, note="any rise of the gain is one"), ("plateau",)),
    (Rule("threshold_mode", None, anything, note="any rise of the gain is one"), ("plateau",)),
    (Rule("cooldown", None, anything, note="there is none"), ("plateau",)),
    (Rule("verbose", None, anything, note="MLflow shows the rate; there recent torch fails at the word"), ("plateau",)),
    (Rule("pct_start", "pct_start", number, default=0.3), ("onecycle",)),
    (Rule("div_factor", "div_factor", number, default=25.0), ("onecycle",)),
    (Rule("final_div_factor", "final_div_factor", number, default=1e4), ("onecycle",)),
    (Rule("anneal_strategy", None, anything, note="along a cosine"), ("onecycle",)),
    *(
        (Rule(key, None, anything, note="the cycle lasts as long as the run, see epochs"), ("onecycle",))
        for key in ("total_steps", "epochs", "steps_per_epoch")
    ),
)
"""Options and the LR schedules that know them; `here` is the key in the schedule's own section."""

SCHEDULE_NOTES = {
    **dict.fromkeys(("cosine", "cosinewarm", "poly"), "per step; there per epoch, warm-up written over its beginning"),
    **dict.fromkeys(("step", "multistep"), "falls after the same epochs as there, none during warm-up"),
    "plateau": "per epoch, as there; watches the gain, there the validation loss; there an error on recent torch",
    "onecycle": "one cycle over the run, per step; there 100 x 100 epochs unless epochs, steps_per_epoch say else",
}
"""What differs in an LR schedule of the same name."""

LOSS_OPTIONS: tuple[Option, ...] = tuple(
    (Rule(f"loss_weights.{name}", name, number, default=default), ("hybrid_light",))
    for name, default in (("alpha", 1.0), ("beta", 0.1), ("gamma", 0.01))
)
"""Weights of the loss hybrid_light."""


def clip_rule(strategy: Any, procedure: Any) -> Rule:
    """`clip_val`, which is a percentile with min_max there, and nothing with z_value.

    Args:
        strategy: normal_strategy.
        procedure: stat_procedure.
    """
    if strategy == "z_value":
        note = "there without effect on z_value; its README bounds normalized values"
        return Rule(
            "clip_val", "normalization.clip_val", lambda value: number(value or 0) or None, False, note, 0, None
        )

    def percent(value: Any) -> float:
        found = number(value or 0)
        return found if procedure in ("lab", "lpb") else min(CLIP_PERCENTS, key=lambda kept: abs(kept - found))

    note = "there a percentile cut that leaves the limits alone; here the limits are taken after the cut"
    if procedure not in ("lab", "lpb"):
        note += "; the nearest percentile that stats.json keeps"
    return Rule("clip_val", "normalization.clip_percent", percent, note=note, default=0)


KEYS = (
    *(rule.theirs for rule in PLAIN_RULES),
    *(rule.theirs for rule, _ in (*OPTIMIZER_OPTIONS, *SCHEDULE_OPTIONS, *LOSS_OPTIONS)),
    *("clip_val", "channels", "optimizer", "learning_rate_init", "warmup_period", "scheduler", "max_lr"),
)
"""Every key that the tutorial's README or code knows."""

HALLMARKS = (
    "train_csv_name", "img_path_cols", "train_batch", "validate_batch", "model_kwargs", "learning_rate_init",
    "warmup_period", "stat_procedure", "save_dir", "epoch",
)  # fmt: skip
"""Top-level keys that tell the tutorial's file from any other, params.yaml among them."""
