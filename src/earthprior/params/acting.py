"""Which parameters act: the part of params.yaml that a run depends on, flat under dotted keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from earthprior.params.whole import SELECTORS, Params, fields


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

    Sections that no selector chose, `evaluate`, `operation` and `tune` are left out: this is what a run's fingerprint
    is made of and, with `evaluate` beside it, what MLflow shows.
    """
    inactive = {"evaluate", "operation", "tune"} | {name for names in SELECTORS.values() for name in names}
    inactive -= _selected(params)
    tree = {key: value for key, value in params.model_dump(mode="json").items() if key not in inactive}
    without_effect = set(_without_effect(params))
    return {key: value for key, value in flatten(tree) if key not in without_effect}


def evaluation(params: Params) -> dict[str, Any]:
    """The parameters that only the evaluate stage reads, flat under their dotted keys."""
    return dict(flatten({"evaluate": params.evaluate.model_dump(mode="json")}))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a part of params.yaml under their dotted keys; a value that is a mapping itself stays whole."""
    known = set(known_keys())
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and dotted not in known:
            yield from flatten(value, f"{dotted}.")
        else:
            yield dotted, value


def known_keys() -> list[str]:
    """Every dotted key that params.yaml may hold."""
    return list(fields())


def unchecked(params: Params, values: Mapping[str, Any]) -> Params:
    """The params with other values by dotted key, not checked: to ask which keys would act."""
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if section:
            params = params.model_copy(update={section: getattr(params, section).model_copy(update={name: value})})
        else:
            params = params.model_copy(update={name: value})
    return params
