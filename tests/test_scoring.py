"""scoring.py and ranking.py: the numbers of scikit-learn, from sums over chips, with intervals that mean something."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, r2_score

from earthprior import ranking, scoring
from earthprior.errors import EarthPriorError
from earthprior.ranking import RankedScores
from earthprior.scoring import Score, SegmentationScores, flat_scores, image_scores

Chips = list[tuple[np.ndarray, np.ndarray]]


def chips_of(seed: int, chips: int, pixels: int, share: float, skill: float, spread: float, shift: float) -> Chips:
    """Probabilities and truths; each chip has an offset of its own, as in life."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(chips):
        truth = generator.random(pixels) < share
        logit = shift + spread * (skill * truth + generator.normal(size=pixels) + 0.5 * generator.normal())
        found.append(((1 / (1 + np.exp(-logit))).astype(np.float32), truth))
    return found


def streamed(chips: Chips) -> float:
    ranked = RankedScores()
    for scores, truth in chips:
        ranked.add(scores, truth)
    return float(ranked.average_precision(np.ones((1, len(chips))))[0])


HARD = {
    "plain": {"share": 0.3, "skill": 1.5, "spread": 1.0, "shift": 0.0},
    "rare": {"share": 0.0005, "skill": 3.0, "spread": 1.0, "shift": -8.0},
    "rare, without skill": {"share": 0.002, "skill": 0.0, "spread": 1.0, "shift": 0.0},
    "saturated": {"share": 0.2, "skill": 1.5, "spread": 15.0, "shift": 10.0},
    "saturated, rare": {"share": 0.001, "skill": 2.0, "spread": 12.0, "shift": 15.0},
    "nearly constant": {"share": 0.1, "skill": 1.5, "spread": 1e-3, "shift": -2.0},
    "constant": {"share": 0.1, "skill": 1.0, "spread": 0.0, "shift": 0.3},
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("first", [10_000, 200_000])
def test_average_precision_from_histograms_is_scikit_learns(
    case: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "FIRST_PIXELS", first)
    chips = chips_of(1, 8, 20_000, **HARD[case])
    scores, truth = (np.concatenate(part) for part in zip(*chips, strict=True))
    assert streamed(chips) == pytest.approx(average_precision_score(truth, scores), abs=0.002)


def test_few_scores_are_ranked_exactly() -> None:
    chips = chips_of(2, 10, 300, 0.05, 1.0, 1.0, 0.0)
    hard = [((scores > 0.6).astype(np.float32), truth) for scores, truth in chips]
    for given in (chips, hard):
        scores, truth = (np.concatenate(part) for part in zip(*given, strict=True))
        assert streamed(given) == pytest.approx(average_precision_score(truth, scores), abs=1e-9)


def test_weights_stand_for_chips_taken_several_times() -> None:
    chips = chips_of(3, 6, 500, 0.1, 1.0, 1.0, 0.0)
    ranked = RankedScores()
    for scores, truth in chips:
        ranked.add(scores, truth)
    weights = np.array([[2, 0, 1, 3, 0, 0], [0, 0, 0, 0, 0, 6]])
    for row, found in zip(weights, ranked.average_precision(weights), strict=True):
        drawn = [chip for chip, times in zip(chips, row, strict=True) for _ in range(times)]
        scores, truth = (np.concatenate(part) for part in zip(*drawn, strict=True))
        assert found == pytest.approx(average_precision_score(truth, scores), abs=1e-9)


def test_a_large_map_leaves_little_behind() -> None:
    ranked = RankedScores()
    for scores, truth in chips_of(4, 3, 150_000, 0.2, 1.0, 1.0, 0.0):
        ranked.add(scores, truth)
    kept = sum(array.nbytes for sides in ranked._chips for side in sides for array in side)
    assert len(ranked._waiting) <= 1
    assert kept <= 3 * 2 * 6 * (ranking.BINS + 1)


def maps(classes: int, chips: int = 12, size: int = 16) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Probabilities (K, H, W), labels 10, 11, ... with 255 for unlabelled, and valid."""
    generator = np.random.default_rng(classes)
    found = []
    for _ in range(chips):
        truth = generator.integers(0, classes, (size, size))
        logits = generator.normal(size=(classes, size, size)) + 1.2 * np.eye(classes)[truth].transpose(2, 0, 1)
        probabilities = np.exp(logits) / np.exp(logits).sum(0)
        labels = np.where(generator.random((size, size)) < 0.1, 255, truth + 10)
        found.append((probabilities, labels, generator.random((size, size)) < 0.9))
    return found


@pytest.mark.parametrize("classes", [2, 4])
def test_maps_are_scored_as_scikit_learn_does(classes: int) -> None:
    values = list(range(10, 10 + classes))
    chips = maps(classes)
    scores, single = SegmentationScores(values), SegmentationScores(values[::-1])
    for probabilities, labels, valid in chips:
        scores.add(probabilities, labels, valid)
        # As single pixels, and with the classes in another order.
        at = valid & (labels != 255)
        single.add(probabilities[::-1, at].T, labels[at])
    truth = np.concatenate([labels[valid & (labels != 255)] for _, labels, valid in chips])
    asked = np.concatenate([p[:, valid & (labels != 255)].T for p, labels, valid in chips])
    guess = np.asarray(values)[asked.argmax(1)]
    found = scores.scores()
    average = {"average": "binary", "pos_label": 11} if classes == 2 else {"average": "macro"}
    assert found["f1"].value == pytest.approx(f1_score(truth, guess, **average))
    name = "iou" if classes == 2 else "mean_iou"
    assert found[name].value == pytest.approx(jaccard_score(truth, guess, **average))
    places = [1] if classes == 2 else range(classes)
    precision = np.mean([average_precision_score(truth == values[place], asked[:, place]) for place in places])
    assert found["average_precision"].value == pytest.approx(precision, abs=0.002)
    if classes == 4:
        assert found["accuracy"].value == pytest.approx(np.mean(truth == guess))
        for key, score in single.scores().items():
            assert score.value == pytest.approx(found[key].value, abs=1e-3)
    for score in found.values():
        assert score.low < score.value < score.high


def test_the_interval_is_that_of_the_chips_and_not_of_the_pixels() -> None:
    """Accuracies that differ from chip to chip: the interval is as wide as the standard error of their mean says."""
    generator = np.random.default_rng(0)
    accuracies = generator.uniform(0.5, 1.0, 60)
    scores = SegmentationScores([0, 1, 2])
    for accuracy in accuracies:
        right = generator.random(4000) < accuracy
        scores.add(np.eye(3)[np.where(right, 2, 0)], np.full(4000, 2))
    score = scores.scores()["accuracy"]
    expected = 2 * 1.96 * accuracies.std() / math.sqrt(60)
    assert score.high - score.low == pytest.approx(expected, rel=0.12)


def test_the_same_chips_give_the_same_interval() -> None:
    first, second = (SegmentationScores([10, 11]) for _ in range(2))
    for chip in maps(2):
        first.add(*chip)
        second.add(*chip)
    assert first.scores() == second.scores()
    assert sum(len(block) for block in scoring.resamples(5)) == scoring.RESAMPLES
    assert all((block.sum(1) == 5).all() for block in scoring.resamples(5))


def test_what_does_not_exist_is_nan_and_not_a_number_made_up() -> None:
    empty = SegmentationScores([0, 1])
    assert empty.add(np.ones((2, 4, 4)), np.full((4, 4), 9)).scores() == {}
    assert empty.chips == 0
    half = np.full((50, 2), 0.5)
    none = SegmentationScores([0, 1])
    for _ in range(4):
        none.add(half, np.zeros(50))
    assert math.isnan(none.scores()["average_precision"].value)
    # One chip of ten holds the class: a third of the resamples lack it, and what the others say is no interval.
    one = SegmentationScores([0, 1])
    for chip in range(10):
        one.add(half, (np.arange(50) < 5) * (chip == 0))
    score = one.scores()["average_precision"]
    assert score.value == pytest.approx(0.01)
    assert math.isnan(score.low)
    alone = SegmentationScores([0, 1]).add(half, np.arange(50) % 2)
    assert alone.scores()["average_precision"].value == pytest.approx(0.5)
    assert math.isnan(alone.scores()["average_precision"].low)
    assert flat_scores({"iou": Score(0.5, math.nan, math.nan), "f1": Score(0.4, 0.3, 0.5)}) == {
        "iou": 0.5, "f1": 0.4, "f1_low": 0.3, "f1_high": 0.5,
    }  # fmt: skip


def test_probabilities_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(EarthPriorError, match="diverged"):
        SegmentationScores([0, 1]).add(np.full((3, 2), np.nan), np.zeros(3))
    with pytest.raises(ValueError, match="3 classes"):
        SegmentationScores([0, 1, 2]).add(np.ones((3, 2)), np.zeros(3))


def test_images_are_scored_as_scikit_learn_does() -> None:
    generator = np.random.default_rng(5)
    truths = generator.integers(0, 3, 80)
    logits = generator.normal(size=(80, 3)) + np.eye(3)[truths]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = image_scores("classification", truths, probabilities)
    guess = probabilities.argmax(1)
    assert found["accuracy"].value == pytest.approx(np.mean(guess == truths))
    assert found["f1"].value == pytest.approx(f1_score(truths, guess, average="macro"))
    assert found["accuracy"].low < found["accuracy"].value < found["accuracy"].high
    two = image_scores("classification", truths > 0, np.stack([probabilities[:, 0], 1 - probabilities[:, 0]], 1))
    assert set(two) == {"average_precision", "f1", "accuracy"}
    assert two["average_precision"].value == pytest.approx(average_precision_score(truths > 0, 1 - probabilities[:, 0]))


def test_numbers_are_scored_as_scikit_learn_does() -> None:
    generator = np.random.default_rng(6)
    truths = 1e6 + generator.normal(size=70)
    guesses = truths + 0.5 * generator.normal(size=70)
    found = image_scores("regression", truths, guesses[:, None])
    assert found["r2"].value == pytest.approx(r2_score(truths, guesses))
    assert found["mae"].value == pytest.approx(np.abs(truths - guesses).mean())
    assert found["r2"].low < found["r2"].value < found["r2"].high
    assert math.isnan(image_scores("regression", np.full(9, 3.0), np.arange(9.0))["r2"].value)
