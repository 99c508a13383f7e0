"""Samplers and pruners of a study."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from earthprior.params import TuneParams
from earthprior.randomness import seed_of


class AddressedSampler(BaseSampler):
    """A sampler whose draws are a function of (seed, trial number, the study so far).

    A study that is continued would otherwise draw its first values again, and processes that share a study the same
    values as one another.
    """

    def __init__(self, tune: TuneParams) -> None:
        self._tune = tune
        self._inner: dict[int, BaseSampler] = {}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """See optuna."""
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See optuna."""
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """See optuna."""
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """See optuna."""
        self._of(trial).before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """See optuna."""
        self._of(trial).after_trial(study, trial, state, values)
        self._inner.pop(trial.number, None)

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number not in self._inner:
            seed = seed_of(self._tune.sampler_seed, "trial", trial.number) % 2**32
            self._inner[trial.number] = self._made(seed)
        return self._inner[trial.number]

    def _made(self, seed: int) -> BaseSampler:
        if self._tune.sampler == "random":
            return RandomSampler(seed=seed)
        with warnings.catch_warnings():
            # What multivariate and grouped TPE do is published (Falkner et al. 2018), their switches may yet change.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return TPESampler(
                n_startup_trials=self._tune.startup_trials,
                multivariate=True,
                group=True,
                constant_liar=True,
                seed=seed,
            )


def pruner(tune: TuneParams, epochs: int) -> BasePruner:
    """The pruner of `tune.pruner`; one step is an epoch.

    Args:
        tune: The section.
        epochs: Of a trial.
    """
    if tune.pruner == "median":
        return MedianPruner(n_startup_trials=tune.startup_trials, n_warmup_steps=tune.pruning_warmup_epochs)
    if tune.pruner == "hyperband":
        return HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3)
    return NopPruner()
