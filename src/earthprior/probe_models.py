"""The classifiers and regressors that frozen features are probed with: scikit-learn's, seeded, small on purpose.

What they are given is standardized first. A probe that could learn anything would say nothing about the features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from earthprior.randomness import numpy_generator, seed_of

Array: TypeAlias = NDArray[Any]
Probe: TypeAlias = Callable[[Array, Array, Array], tuple[Array, bool]]

ITERATIONS = 1000
QUICK_ITERATIONS = 100
HIDDEN, ROUNDS, PATIENCE, MLP_BATCH, MLP_RATE = 64, 60, 5, 256, 0.002
ROUND_PIXELS = 20_000
"""Learned from between two looks at what is held out, so that many pixels cost no more than these, 60 times."""

NEIGHBOURS = 10
RIDGE_STRENGTHS = tuple(10.0**power for power in range(-1, 6))


def linear(values: Array, truths: Array, asked: Array, iterations: int = ITERATIONS) -> tuple[Array, bool]:
    """A logistic regression; see `PIXEL_PROBES`.

    Args:
        values: (N, D), fitted on.
        truths: (N,) classes, each of 0 .. K - 1 at least once.
        asked: (M, D).
        iterations: At most.

    Returns:
        Probabilities (M, K), and whether the fit converged.
    """
    from sklearn.linear_model import LogisticRegression

    return _probabilities(LogisticRegression(max_iter=iterations), values, truths, asked)


def quick_linear(values: Array, truths: Array, asked: Array) -> tuple[Array, bool]:
    """The same, stopped early: enough to tell better features from worse."""
    return linear(values, truths, asked, QUICK_ITERATIONS)


def mlp(values: Array, truths: Array, asked: Array) -> tuple[Array, bool]:
    """One hidden layer, stopped when the last tenth, which it does not learn from, is not explained better.

    Pixels come chip by chip, so that this tenth are chips of their own; and they are judged by the log loss: accuracy,
    by which scikit-learn itself would stop, is blind to classes that are rare.
    """
    from sklearn.metrics import log_loss
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(values)
    held_out = max(1, len(values) // 10)
    known = np.arange(truths.max() + 1)
    fit, other = np.split(scaler.transform(values), [-held_out])
    model = MLPClassifier(
        (HIDDEN,),
        batch_size=min(MLP_BATCH, len(fit)),
        learning_rate_init=MLP_RATE,
        random_state=seed_of("probe mlp") % 2**32,
    )
    best, waited = np.inf, 0
    kept: tuple[list[Array], list[Array]] = ([], [])
    size = min(ROUND_PIXELS, len(fit))
    # scikit-learn shuffles what it is given; what it is given in turn must be mixed, too.
    order = numpy_generator("probe mlp").permutation(len(fit)) if size < len(fit) else np.arange(size)
    # Its rounds are a budget, and spending it all is no fault.
    for number in range(ROUNDS):
        now = order.take(np.arange(number * size, (number + 1) * size), mode="wrap")
        model.partial_fit(fit[now], truths[now], classes=known)
        loss = log_loss(truths[-held_out:], model.predict_proba(other), labels=known)
        waited = 0 if loss < best else waited + 1
        if waited == 0:
            best, kept = loss, ([part.copy() for part in model.coefs_], [part.copy() for part in model.intercepts_])
        if waited == PATIENCE:
            break
    model.coefs_, model.intercepts_ = kept
    return model.predict_proba(scaler.transform(asked)), True


def nearest_classes(values: Array, truths: Array, asked: Array) -> tuple[Array, bool]:
    """The classes of the ten nearest chips, by distance."""
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(min(NEIGHBOURS, len(values)), weights="distance")
    return _probabilities(model, values, truths, asked)


def nearest_numbers(values: Array, truths: Array, asked: Array) -> tuple[Array, bool]:
    """The mean number of the ten nearest chips, by distance: (M,)."""
    from sklearn.neighbors import KNeighborsRegressor

    model = KNeighborsRegressor(min(NEIGHBOURS, len(values)), weights="distance")
    return _fitted(model, values, truths)[0].predict(asked), True


def ridge(values: Array, truths: Array, asked: Array) -> tuple[Array, bool]:
    """A ridge regression, its strength by leave-one-out over the fitted chips: (M,)."""
    from sklearn.linear_model import RidgeCV

    return _fitted(RidgeCV(RIDGE_STRENGTHS), values, truths)[0].predict(asked), True


PIXEL_PROBES: dict[str, Probe] = {"linear": linear, "mlp": mlp}
"""Of single pixels, by name: (values (N, D), truths (N,), asked (M, D)) -> answer (M, K) or (M,), converged."""

IMAGE_PROBES: dict[str, dict[str, Probe]] = {
    "classification": {"logistic": linear, "knn": nearest_classes},
    "regression": {"ridge": ridge, "knn": nearest_numbers},
}
"""Of whole chips, by kind of label and name."""


def _probabilities(model: Any, values: Array, truths: Array, asked: Array) -> tuple[Array, bool]:
    fitted, converged = _fitted(model, values, truths)
    return fitted.predict_proba(asked), converged


def _fitted(model: Any, values: Array, truths: Array) -> tuple[Any, bool]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pipeline = make_pipeline(StandardScaler(), model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline.fit(values, truths)
    return pipeline, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
