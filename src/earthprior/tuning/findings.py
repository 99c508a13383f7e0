"""What an Optuna study found, as plain records: its trials, its searched dials, what mattered, which are best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from earthprior.figures.trials import Dial, Trial, shown_from
from earthprior.params.editing import plain
from earthprior.tuning.study import best_trials

ENOUGH_TRIALS = 12
"""With 8, even a parameter that matters twice as much as the next is not named first in a third of studies."""

_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_GOOD_SHARE, _GOOD_AT_LEAST = 4, 3


@dataclass(frozen=True)
class Findings:
    """A study, as it stands.

    Attributes:
        metrics: The objectives' names.
        frozen: Its trials.
        trials: The same as records.
        dials: What was searched, the dials that mattered most first.
        shares: See `importances`.
        finished: The trials that have values, by the first objective, best first.
        best: The best trial, or the Pareto front in the order of `finished`; empty as long as nothing has finished.
        good: The front, or the best quarter of the finished trials where that is some.
    """

    metrics: Sequence[str]
    frozen: Sequence[FrozenTrial]
    trials: Sequence[Trial]
    dials: Sequence[Dial]
    shares: Mapping[str, Mapping[str, float]]
    finished: Sequence[Trial]
    best: Sequence[Trial]
    good: Sequence[Trial]

    @classmethod
    def of(cls, study: optuna.Study) -> Findings:
        """Of a study whose objectives are maximized."""
        frozen, metrics = study.get_trials(deepcopy=False), metrics_of(study)
        dials = dials_of(frozen)
        trials = trials_of(frozen, dials)
        shares = importances(trials, dials, metrics)
        first = next(iter(shares.values()), {})
        finished = sorted((t for t in trials if t.values), key=lambda trial: (-trial.values[0], trial.number))
        numbers = set(_best_numbers(study, finished))
        best = [trial for trial in finished if trial.number in numbers]
        quarter = len(finished) // _GOOD_SHARE
        good = best if len(metrics) > 1 else finished[:quarter] if quarter >= _GOOD_AT_LEAST else []
        by_share = sorted(dials, key=lambda dial: -first.get(dial.name, -1.0))
        return cls(metrics, frozen, trials, by_share, shares, finished, best, good)

    def count(self, state: str) -> int:
        """How many trials are in a state."""
        return sum(trial.state == state for trial in self.trials)

    def attributes(self, trial: Trial) -> Mapping[str, Any]:
        """What the study's storage knows of a trial besides."""
        return next(raw.user_attrs for raw in self.frozen if raw.number == trial.number)


def metrics_of(study: optuna.Study) -> list[str]:
    """The objectives' names, one each."""
    named = [str(name) for name in study.user_attrs.get("metrics", ())]
    return named if len(named) == len(study.directions) else [f"value {i + 1}" for i in range(len(study.directions))]


def trials_of(frozen: Sequence[FrozenTrial], dials: Sequence[Dial]) -> list[Trial]:
    """Optuna's trials as records. A value that is not finite counts as none, and its trial as failed."""
    chosen = {dial.name for dial in dials if dial.choices}
    continued = {trial.user_attrs.get("continues") for trial in frozen}
    found = []
    for trial in frozen:
        state = _STATES[trial.state]
        values = [float(value) for value in trial.values or ()] if state == "finished" else []
        if not all(math.isfinite(value) for value in values):
            state, values = "failed", []
        if state == "failed" and trial.number in continued:
            state = "continued"
        curve = {step: float(value) for step, value in trial.intermediate_values.items() if math.isfinite(value)}
        params = {name: plain(value) if name in chosen else value for name, value in trial.params.items()}
        found.append(Trial(trial.number, state, tuple(values), params, curve))
    return found


def dials_of(frozen: Sequence[FrozenTrial]) -> list[Dial]:
    """Every key that any trial searched, in the order of its first appearance.

    Where the space changed between trials, the dial spans all that was searched; one that was searched among choices
    in any trial is a dial of choices.
    """
    seen: dict[str, list[tuple[BaseDistribution, Any]]] = {}
    for trial in frozen:
        for name, distribution in trial.distributions.items():
            seen.setdefault(name, []).append((distribution, trial.params[name]))
    return [_dial(name, found) for name, found in seen.items()]


def _dial(name: str, found: Sequence[tuple[BaseDistribution, Any]]) -> Dial:
    numeric = [each for each, _ in found if isinstance(each, FloatDistribution | IntDistribution)]
    if len(numeric) < len(found):
        listed = [each.choices if isinstance(each, CategoricalDistribution) else (value,) for each, value in found]
        return Dial(name, choices=tuple(dict.fromkeys(plain(choice) for choices in listed for choice in choices)))
    low, high = min(each.low for each in numeric), max(each.high for each in numeric)
    log = any(each.log for each in numeric) and low > 0
    return Dial(name, float(low), float(high), log, all(isinstance(each, IntDistribution) for each in numeric))


def importances(trials: Sequence[Trial], dials: Sequence[Dial], metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """Each dial's share of the differences between trials, by objective: mean decrease in impurity of a random forest.

    On studies of known answer it is right as often as fANOVA, which takes longer, and far more often than Optuna's
    default (benchmarks/importances.py). Pruned trials count too: pruning takes away just those that a setting made bad,
    and what is left would make that setting look harmless. Values far below the others are raised to the lowest that
    pictures show, so that one diverged trial is not all that matters. A dial that not every trial had is left out.

    Returns:
        By objective, shares that sum to 1, greatest first; empty with too few trials or fewer than two dials.
    """
    shares: dict[str, dict[str, float]] = {}
    for objective, metric in enumerate(metrics):
        judged = [trial for trial in trials if trial.reached(objective) is not None]
        compared = [dial for dial in dials if _varies(dial, judged)]
        if len(judged) < ENOUGH_TRIALS or len(compared) < 2:
            return {}
        study = as_study(judged, compared, foreseen(judged, objective))
        evaluator = optuna.importance.MeanDecreaseImpurityImportanceEvaluator(seed=0)
        shares[metric] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return shares


def foreseen(trials: Sequence[Trial], objective: int) -> list[float]:
    """The trials' values, a pruned one's being its last plus what finished trials gained from that epoch on (median).

    Without that every pruned trial would stand far below all finished ones, only because it ended early.
    """
    values = []
    finished = [trial for trial in trials if trial.values and trial.curve]
    for trial in trials:
        if trial.values:
            values.append(trial.values[objective])
        else:
            epoch = max(trial.curve)
            rises = [other.values[objective] - other.curve[epoch] for other in finished if epoch in other.curve]
            values.append(trial.curve[epoch] + (median(rises) if rises else 0.0))
    return values


def _varies(dial: Dial, trials: Sequence[Trial]) -> bool:
    """Whether every trial had the dial, and not all at the same place."""
    values = {trial.params[dial.name] for trial in trials if dial.name in trial.params}
    return len(values) > 1 and all(dial.name in trial.params for trial in trials)


def as_study(trials: Sequence[Trial], dials: Sequence[Dial], values: Sequence[float]) -> optuna.Study:
    """A study in memory of these trials over these dials alone."""
    lowest = shown_from(values)
    space = {dial.name: _distribution(dial) for dial in dials}
    study = optuna.create_study(storage=optuna.storages.InMemoryStorage(), direction="maximize")
    study.add_trials(
        optuna.trial.create_trial(
            params={dial.name: trial.params[dial.name] for dial in dials},
            distributions=space,
            value=max(value, lowest),
        )
        for trial, value in zip(trials, values, strict=True)
    )
    return study


def _distribution(dial: Dial) -> BaseDistribution:
    if dial.choices:
        return CategoricalDistribution(dial.choices)
    return FloatDistribution(dial.low, dial.high, log=dial.log)


def _best_numbers(study: optuna.Study, finished: Sequence[Trial]) -> list[int]:
    """Numbers of the best trials; one that only repeats another's result (`same_as`) stands back behind it."""
    known = {trial.number for trial in finished}
    found = [trial for trial in best_trials(study) if trial.number in known]
    numbers = sorted(trial.number for trial in found if trial.user_attrs.get("same_as") not in known)
    return numbers if len(study.directions) > 1 else numbers[:1]


def seconds_of(trial: FrozenTrial) -> float | None:
    """How long a trial computed: as it says, else from its start to its end."""
    if isinstance(said := trial.user_attrs.get("seconds"), int | float):
        return float(said)
    return trial.duration.total_seconds() if trial.duration else None
