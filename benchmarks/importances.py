"""Which importance names the parameter that matters, in TPE studies whose answer is known?

    PYTHONPATH=src python benchmarks/importances.py

Each study searches three numbers and two choices whose effects on the final gain have standard deviations in the ratio
1 : 0.5 : 0.25 : 0.05 : 0 over the whole space, in random order; a median pruner stops trials. Counted is how often the
greatest effect is named first, and among the first two. The naive way is Optuna's default over the finished trials
alone. All draws are seeded. The effects add up and are smooth, which is kinder than a real search.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections import defaultdict

import numpy as np
import optuna
from optuna.importance import (
    FanovaImportanceEvaluator,
    MeanDecreaseImpurityImportanceEvaluator,
    PedAnovaImportanceEvaluator,
)

from earthprior.tuning import findings

NAMES = ("x", "y", "z", "a", "b")
EVALUATORS = {
    "PED-ANOVA (Optuna's default)": PedAnovaImportanceEvaluator(),
    "fANOVA": FanovaImportanceEvaluator(seed=0),
    "mean decrease in impurity": MeanDecreaseImpurityImportanceEvaluator(seed=0),
}


class Truth:
    """The final gain as a function of the settings, and which of them matters most."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.centres = rng.uniform(0.2, 0.8, 3)
        self.choices = [rng.permutation(np.linspace(-1, 1, number)) for number in (4, 2)]
        weights = rng.permutation([1.0, 0.5, 0.25, 0.05, 0.0])
        points = zip(rng.random((4000, 3)), rng.integers(0, 4, 4000), rng.integers(0, 2, 4000), strict=True)
        self.scales = 0.15 * weights / np.std([self.terms(*point) for point in points], axis=0)
        self.first = NAMES[int(np.argmax(weights))]

    def terms(self, numbers: np.ndarray, a: int, b: int) -> np.ndarray:
        return np.array([*(-((numbers - self.centres) ** 2)), self.choices[0][a], self.choices[1][b]])

    def study(self, trials: int, seed: int) -> optuna.Study:
        rng = np.random.default_rng(seed)
        study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=8),
            pruner=optuna.pruners.MedianPruner(8, 2),
        )

        def objective(trial: optuna.Trial) -> float:
            numbers = np.array([trial.suggest_float(name, 0, 1) for name in NAMES[:3]])
            a, b = (trial.suggest_categorical(name, range(n)) for name, n in (("a", 4), ("b", 2)))
            final = 0.3 + float(self.scales @ self.terms(numbers, a, b)) + 0.02 * rng.normal()
            for epoch in range(1, 9):
                gain = final * (1 - math.exp(-epoch / 3)) - math.exp(-epoch / 1.5) + 0.02 * rng.normal()
                trial.report(gain, epoch)
                if epoch < 8 and trial.should_prune():
                    raise optuna.TrialPruned
            return gain

        study.optimize(objective, trials)
        return study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=30)
    parser.add_argument("--trials", type=int, nargs="+", default=[12, 20, 40, 80])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print("| trials | evaluator | trials counted | first | in the first two |\n|---|---|---|---|---|")
    for number in arguments.trials:
        hits = defaultdict(list)
        for seed in range(arguments.studies):
            truth = Truth(np.random.default_rng(1000 + seed))
            study = truth.study(number, seed)
            dials = findings.dials_of(study.trials)
            trials = findings.trials_of(study.trials, dials)
            for kind, counted in (("finished", [t for t in trials if t.values]), ("and pruned", trials)):
                comparable = findings.as_study(counted, dials, findings.foreseen(counted, 0))
                for name, evaluator in EVALUATORS.items():
                    shares = optuna.importance.get_param_importances(comparable, evaluator=evaluator)
                    named = sorted(shares, key=lambda key: -shares[key])
                    hits[name, kind].append((named[0] == truth.first, truth.first in named[:2]))
        for (name, kind), found in hits.items():
            first, two = np.mean(found, axis=0)
            print(f"| {number} | {name} | {kind} | {first:.0%} | {two:.0%} |", flush=True)


if __name__ == "__main__":
    main()
