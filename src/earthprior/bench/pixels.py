"""Classifiers of single pixels: on frozen features of a network, or, without any, on what is around the pixel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from earthprior.randomness import numpy_generator

Array: TypeAlias = NDArray[Any]
Classifier: TypeAlias = Callable[[Array], Array]
"""Values (N, D) float32 -> probabilities (N, K) float32."""

MAX_PIXELS = 100_000
"""Of all labelled chips together; they share it."""

NEVER = -1e4
"""The score of a class that never occurred."""

MAX_ITERATIONS = 300
HIDDEN, MLP_BATCH, UPDATES = 64, 256, 2000


@dataclass(frozen=True)
class Linear:
    """Scores of classes as weighted sums of values; a classifier.

    Args:
        weights: (K, D) float32.
        bias: (K,) float32; very low for a class that never occurred.
    """

    weights: Array
    bias: Array

    def __call__(self, values: Array) -> Array:
        """See `Classifier`."""
        return torch.from_numpy(values @ self.weights.T + self.bias).softmax(dim=1).numpy()

    def of_pyramid(self, pyramid: Sequence[Tensor]) -> Tensor:
        """The same of every pixel of a pyramid of features whose levels are doubled to the finest and concatenated.

        Multiplied at each level's own resolution, since weighted sums and bilinear doubling can change places.

        Args:
            pyramid: Levels (B, D_i, h_i, w_i), whose pixels stand for 1, 2, 4, ... px each way.

        Returns:
            Probabilities (B, K, h_0, w_0).
        """
        height, width = pyramid[0].shape[-2:]
        total = torch.from_numpy(self.bias).to(pyramid[0].device).view(1, -1, 1, 1)
        ends = np.cumsum([level.shape[1] for level in pyramid])[:-1]
        for place, (level, part) in enumerate(zip(pyramid, np.split(self.weights, ends, axis=1), strict=True)):
            scores = F.conv2d(level.float(), torch.from_numpy(part[:, :, None, None]).to(level.device))
            if place:
                scores = F.interpolate(scores, scale_factor=2**place, mode="bilinear", align_corners=False)
            total = total + scores[..., :height, :width]
        return total.softmax(dim=1)


def draw(key: str, label: Array, count: int) -> Array:
    """Some labelled pixels of a chip, (N, 2) int64, chosen by the chip's path alone.

    Args:
        key: Of the chip.
        label: Classes (H, W), below 0 where there is none.
        count: At most.
    """
    where = np.flatnonzero(label >= 0)
    if len(where) > count:
        where = np.sort(numpy_generator("bench pixels", key).choice(where, count, replace=False))
    return np.stack(np.unravel_index(where, label.shape), axis=1).astype(np.int64)


def linear(values: Array, classes: Array, count: int, l2: float, seed: int) -> Linear:
    """Logistic regression on standardized values.

    Args:
        values: (N, D).
        classes: (N,), in 0 .. count - 1.
        count: How many classes there are, though not all need occur.
        l2: Half the weights' sum of squares counts so much beside the mean loss.
        seed: Not used: the fit has one solution.
    """
    from sklearn.linear_model import LogisticRegression

    known, (mean, scale) = np.unique(classes), _standard(values)
    weights, bias = np.zeros((count, values.shape[1])), np.full(count, NEVER)
    bias[known] = 0
    if len(known) > 1:
        model = LogisticRegression(C=1 / (l2 * len(values)), max_iter=MAX_ITERATIONS)
        _fit(model, values, classes, mean, scale)
        # Of two classes there is one row of weights, the second one's.
        rows = known if len(known) > 2 else known[1:]
        weights[rows] = model.coef_ / scale
        bias[rows] = model.intercept_ - weights[rows] @ mean
    return Linear(weights.astype(np.float32), bias.astype(np.float32))


def perceptron(values: Array, classes: Array, count: int, l2: float, seed: int) -> Classifier:
    """One hidden layer on standardized values, for about `UPDATES` steps of any number of pixels; as `linear`."""
    from sklearn.neural_network import MLPClassifier

    known, (mean, scale) = np.unique(classes), _standard(values)
    batch = min(MLP_BATCH, len(values))
    # scikit-learn divides the penalty by the batch. Its early stopping goes by accuracy, which says nothing where one
    # class is rare.
    model = MLPClassifier(
        (HIDDEN,), alpha=l2 * batch, batch_size=batch, max_iter=max(1, round(UPDATES * batch / len(values))),
        n_iter_no_change=UPDATES, random_state=seed % 2**32,
    )  # fmt: skip
    if len(known) > 1:
        _fit(model, values, classes, mean, scale)

    def classify(asked: Array) -> Array:
        probabilities = np.zeros((len(asked), count), np.float32)
        probabilities[:, known] = model.predict_proba((asked - mean) / scale) if len(known) > 1 else 1
        return probabilities

    return classify


def _standard(values: Array) -> tuple[Array, Array]:
    mean, scale = values.mean(axis=0, dtype=np.float64), values.std(axis=0, dtype=np.float64)
    return mean.astype(np.float32), np.where(scale > 0, scale, 1).astype(np.float32)


def _fit(model: Any, values: Array, classes: Array, mean: Array, scale: Array) -> None:
    with warnings.catch_warnings():
        # A fit that is stopped early is a fit; what it is worth is measured.
        warnings.simplefilter("ignore")
        model.fit((values - mean) / scale, classes)
