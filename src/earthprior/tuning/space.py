"""The search space: which values a trial gets, and what all trials of a study share."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from earthprior.errors import ParamsError
from earthprior.params import SELECTORS, Params, TuneParams, active, fields, flatten, unchecked
from earthprior.params.editing import plain
from earthprior.params.search import DECIDING, ChoiceSpace, RangeSpace, is_integer, never_acts, ordered

if TYPE_CHECKING:
    from optuna import Trial

PROBE = ("evaluate.label_column", "evaluate.probe_rho", "evaluate.probe_pixels")


def searched(params: Params) -> TuneParams:
    """The section `tune`.

    Raises:
        ParamsError: There is none, or a key of its space acts under none of the searched choices.
    """
    tune = params.tune
    if tune is None:
        raise ParamsError("params.yaml has no section tune, which says what is searched; git checkout params.yaml")
    order = ordered(tune.space, SELECTORS)
    idle = [
        key
        for key in order
        if never_acts(key, order, tune.space, SELECTORS, lambda values: active(unchecked(params, values)))
    ]
    if idle:
        raise ParamsError(
            f"tune.space.{idle[0]}: {idle[0]} acts under none of the searched choices and params.yaml's others; remove "
            "it, or change or search what it belongs to"
        )
    return tune


def suggest(trial: Trial, params: Params, tune: TuneParams) -> dict[str, Any]:
    """Values by dotted key, for those keys of the space that act under the others and whose `when` is met."""
    values: dict[str, Any] = {}
    kinds = fields()
    for key in ordered(tune.space, SELECTORS):
        entry = tune.space[key]
        met = all(other in values and values[other] in allowed for other, allowed in entry.when.items())
        if met and key in active(unchecked(params, values)):
            values[key] = _draw(trial, key, entry, is_integer(kinds[key]))
    return values


def held_values(params: Params, tune: TuneParams, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """What params.yaml has for searched keys that act in a trial although its conditions kept them from being drawn."""
    acting = active(unchecked(params, drawn))
    return {key: acting[key] for key in tune.space if key in acting and key not in drawn}


def own_values(params: Params, tune: TuneParams) -> dict[str, Any]:
    """The values that params.yaml has for what is searched, as Optuna knows them; empty where one is not in the space.

    A search begins with them, so that its report tells what it gained.
    """
    acting = active(params)
    values: dict[str, Any] = {}
    for key in ordered(tune.space, SELECTORS):
        entry = tune.space[key]
        met = all(other in values and values[other] in allowed for other, allowed in entry.when.items())
        if key not in acting or not met:
            continue
        value = acting[key]
        if isinstance(entry, RangeSpace):
            if value is None or not entry.low <= value <= entry.high:
                return {}
            # Optuna takes what lies between two steps for the nearest one.
            if entry.step and abs((value - entry.low) / entry.step - round((value - entry.low) / entry.step)) > 1e-9:
                return {}
        elif value not in entry.choices:
            return {}
        values[key] = value if _is_scalar(value) else plain(value)
    return values


def _draw(trial: Trial, key: str, entry: RangeSpace | ChoiceSpace, whole: bool) -> Any:
    if isinstance(entry, ChoiceSpace):
        # Optuna keeps plain values only; a list is known to it by its text.
        labels = [value if _is_scalar(value) else plain(value) for value in entry.choices]
        return entry.choices[labels.index(trial.suggest_categorical(key, labels))]
    if whole:
        return trial.suggest_int(key, int(entry.low), int(entry.high), log=entry.log, step=int(entry.step or 1))
    return trial.suggest_float(key, entry.low, entry.high, log=entry.log, step=entry.step)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def shared(params: Params, tune: TuneParams, stats_sha256: str) -> dict[str, Any]:
    """What all trials of a study have in common, flat: under other values its numbers would not compare."""
    # What params.yaml itself has for a searched key must not matter, or applying a trial would begin another study.
    first = {key: e.choices[0] if isinstance(e, ChoiceSpace) else e.low for key, e in tune.space.items()}
    acting = set(active(unchecked(params, first)))
    deciding = {key: e.choices for key, e in tune.space.items() if isinstance(e, ChoiceSpace)}
    deciding = {key: deciding[key] for key in (*SELECTORS, *DECIDING) if key in deciding}
    # Two choices at a time: what acts never hangs on three.
    for keys in itertools.combinations([*deciding, *[*deciding][:1]], 2):
        for pair in itertools.product(*(deciding[key] for key in keys)):
            acting |= set(active(unchecked(params, {**first, **dict(zip(keys, pair, strict=True))})))
    if tune.metric != "gain":
        acting |= set(PROBE)
    values = dict(flatten(params.model_dump(mode="json", exclude={"tune", "operation"})))
    kept = {key: value for key, value in values.items() if key in acting - set(tune.space) - {"threads"}}
    if "epochs" in kept and tune.epochs is not None:
        kept["epochs"] = tune.epochs
    space = tune.model_dump(mode="json")["space"]
    return {**kept, "tune.metric": tune.metric, "tune.space": space, "results/stats/stats.json": stats_sha256[:12]}


def study_name(tune: TuneParams, common: Mapping[str, Any]) -> str:
    """`tune.study`, or a name made of what is searched and of what the trials share."""
    if tune.study is not None:
        return tune.study
    digest = hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:6]
    return "-".join([*(key.split(".")[-1] for key in list(tune.space)[:3]), digest])


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two `shared` differ in, a line each."""

    def told(values: Mapping[str, Any], key: str) -> str:
        return plain(values[key]) if key in values else "(absent)"

    keys = sorted(before.keys() | now.keys())
    return [f"{key}: {told(before, key)} -> {told(now, key)}" for key in keys if told(before, key) != told(now, key)]
