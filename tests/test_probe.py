"""probe.py and representations.py: the right pixels, the right features, and scores that mean something."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.neural_network import MLPClassifier
from torch.nn import functional as F

from earthprior import probe, probe_models
from earthprior.chips.batch import Batch
from earthprior.chips.normalize import Affine
from earthprior.probe_models import PIXEL_PROBES
from earthprior.representations import (
    CONTEXT_WINDOWS_PX,
    FrozenFeatures,
    PooledFeatures,
    Representation,
    assign,
    at_pixels,
    image_statistics,
    raw_context,
    raw_pixels,
)
from earthprior.scoring import image_scores

SIZE = 24


def batch_of(seed: int, count: int = 2, bands: int = 2) -> Batch:
    x0 = torch.randn(count, bands, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    valid = torch.ones(count, 1, SIZE, SIZE, dtype=torch.bool)
    return Batch(x0, valid, Affine(torch.full((count, bands, 1, 1), 50.0), torch.full((count, bands, 1, 1), 4.0)))


def every_pixel() -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE))


def test_features_at_pixels_are_the_bilinearly_upsampled_pyramid() -> None:
    pyramid = [torch.randn(3, SIZE, SIZE), torch.randn(5, SIZE // 2, SIZE // 2), torch.randn(2, 3, 3)]
    whole = torch.cat(
        [F.interpolate(level[None], size=SIZE, mode="bilinear", align_corners=False)[0] for level in pyramid]
    )
    assert torch.allclose(at_pixels(pyramid, every_pixel(), SIZE), whole.flatten(1).T, atol=1e-5)


@pytest.mark.parametrize("px", [21, 6, 3])
def test_features_of_odd_sizes_lie_where_their_pixels_are(px: int) -> None:
    """A level's pixel stands for 2**i x 2**i px also where these do not divide px: the last ones reach beyond."""
    whole = [torch.randn(3, 32 >> i, 32 >> i) for i in range(6)]
    sizes = [-(-px // 2**i) for i in range(6)]
    repeated = [F.pad(level[:, :n, :n], (0, 32, 0, 32), "replicate") for level, n in zip(whole, sizes, strict=True)]
    expected = torch.cat(
        [
            F.interpolate(level[None], scale_factor=2**i, mode="bilinear", align_corners=False)[0, :, :px, :px]
            for i, level in enumerate(repeated)
        ]
    )
    points = torch.cartesian_prod(torch.arange(px), torch.arange(px))
    found = at_pixels([level[:, :n, :n] for level, n in zip(whole, sizes, strict=True)], points, px)
    assert torch.allclose(found, expected.flatten(1).T, atol=1e-5)


def test_each_pixel_is_read_from_a_crop_that_holds_it_near_the_middle() -> None:
    points, px = every_pixel(), 8
    seen = torch.zeros(len(points), dtype=torch.long)
    for (top, left), served in assign(points, (SIZE, SIZE), px).items():
        inside = points[served] - torch.tensor([top, left])
        assert inside.min() >= 0
        assert inside.max() < px
        for axis, origin in enumerate((top, left)):
            rim = torch.minimum(inside[:, axis], px - 1 - inside[:, axis])
            at_chip_edge = (origin == 0) | (origin == SIZE - px)
            assert at_chip_edge or rim.min() >= px // 8
        seen[served] += 1
    assert (seen == 1).all()


def test_frozen_features_of_a_pixelwise_network_do_not_depend_on_the_crops() -> None:
    batch = batch_of(0)
    points = [every_pixel(), every_pixel()[::7]]
    expected = [
        rows * 2 for rows in raw_pixels(Batch(batch.x0, batch.valid, Affine(batch.x0 * 0, batch.x0 * 0 + 1)), points)
    ]
    for crop_px, at_once in ((8, 3), (16, 1), (SIZE, 64)):
        found = FrozenFeatures(lambda crops: [crops.x0 * 2], crop_px, at_once)(batch, points)
        for got, want in zip(found, expected, strict=True):
            assert torch.allclose(got, want, atol=1e-5)


def test_raw_pixels_are_physical() -> None:
    batch = batch_of(1)
    (rows, _) = raw_pixels(batch, [torch.tensor([[3, 5]]), torch.tensor([[0, 0]])])
    assert torch.allclose(rows, batch.x0[0, :, 3, 5][None] * 4 + 50)


def test_context_is_mean_and_std_of_valid_pixels_in_the_window() -> None:
    batch = batch_of(2)
    batch.valid[:, :, 9:11, 4:9] = False
    y, x = 11, 6
    (rows, _) = raw_context(batch, [torch.tensor([[y, x]]), torch.tensor([[0, 0]])])
    physical = (batch.x0[0] * 4 + 50).numpy()
    expected = [physical[:, y, x]]
    for window in CONTEXT_WINDOWS_PX:
        half = window // 2
        area = (slice(max(0, y - half), y + half + 1), slice(max(0, x - half), x + half + 1))
        inside = physical[(slice(None), *area)][:, batch.valid[0, 0].numpy()[area]]
        expected += [inside.mean(1), inside.std(1)]
    assert np.allclose(rows[0], np.concatenate(expected), rtol=1e-3)


def test_context_ignores_what_lies_under_nodata() -> None:
    batch = batch_of(3)
    batch.valid[:, :, 10, 10] = False
    before = raw_context(batch, [torch.tensor([[11, 11]])] * 2)
    batch.x0[:, :, 10, 10] = 1e3
    after = raw_context(batch, [torch.tensor([[11, 11]])] * 2)
    assert torch.allclose(before[0], after[0])


def test_points_are_labelled_valid_and_a_function_of_the_path() -> None:
    label = np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % 3
    valid = np.ones((SIZE, SIZE), bool)
    valid[:12] = False
    points = probe.sample_points("a.tif", label, valid, [1, 2], 50)
    assert len(points) == 50
    assert len(np.unique(points, axis=0)) == 50
    assert points[:, 0].min() >= 12
    assert 0 not in label[points[:, 0], points[:, 1]]
    assert np.array_equal(points, probe.sample_points("a.tif", label, valid, [1, 2], 50))
    assert not np.array_equal(points, probe.sample_points("b.tif", label, valid, [1, 2], 50))


@pytest.mark.parametrize(
    ("values", "nodata", "classes"),
    [
        ([0, 1], None, [0, 1]),
        ([0, 1], 0, [0, 1]),
        ([0, 1, 2], 0, [1, 2]),
        ([0, 1, 2], None, [0, 1, 2]),
        ([0, 1, 255], 255, [0, 1]),
        ([4], None, []),
        ([0.5, 1.0], None, []),
        (list(range(200)), None, []),
    ],
)
def test_classes(values: list[float], nodata: float | None, classes: list[int]) -> None:
    found, reason = probe.choose_classes([np.array([values])], nodata)
    assert found == classes
    assert (reason is None) == bool(classes)


def labelled(seeds: range, classes: int) -> list[tuple[Batch, list[str], list[np.ndarray]]]:
    """Labels that follow the first band alone."""
    batches = []
    for seed in seeds:
        batch = batch_of(seed)
        edges = torch.linspace(-0.5, 0.5, classes - 1)
        labels = [torch.bucketize(chip, edges).numpy() for chip in batch.x0[:, 0]]
        batches.append((batch, [f"{seed}_0", f"{seed}_1"], labels))
    return batches


def noise(batch: Batch, points: list[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(int(batch.x0.abs().sum()))
    return [torch.randn(len(at), 2, generator=generator) for at in points]


def pixels_of(seeds: range, classes: int, represent: Representation, count: int = 100) -> probe.Pixels:
    return probe.collect(labelled(seeds, classes), represent, list(range(classes)), count)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", PIXEL_PROBES)
def test_probes_reward_the_representation_that_knows(name: str, classes: int) -> None:
    found = {}
    for representation, represent in (("pixels", raw_pixels), ("noise", noise)):
        fit, judged = (pixels_of(seeds, classes, represent) for seeds in (range(3), range(10, 12)))
        assert fit.values.shape == (600, 2)
        assert fit.counts == [100] * 6
        scores, converged = probe.judge(PIXEL_PROBES[name], fit, judged, list(range(classes)))
        assert converged
        assert scores.chips == 4
        found[representation] = scores.values()
    for score in ("average_precision", *(("accuracy", "mean_iou") if classes == 3 else ("f1",))):
        assert found["pixels"][score] > found["noise"][score] + 0.1, score
    assert found["pixels"]["average_precision"] > 0.75


def test_a_small_network_learns_what_a_line_cannot_also_of_a_rare_class() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(size=(6000, 4)).astype(np.float32)
    truths = ((values[:, 0] * values[:, 1] + 0.3 * generator.normal(size=6000)) > 1.5).astype(np.int64)
    assert 0.02 < truths.mean() < 0.08
    found = {
        name: average_precision_score(truths[4000:], model(values[:4000], truths[:4000], values[4000:])[0][:, 1])
        for name, model in PIXEL_PROBES.items()
    }
    assert found["mlp"] > 0.6
    assert found["linear"] < 0.3


def test_a_small_network_learns_from_all_pixels_at_the_cost_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    learn = MLPClassifier.partial_fit

    def noted(model: MLPClassifier, values: np.ndarray, *rest: Any, **more: Any) -> MLPClassifier:
        seen.append(values)
        return learn(model, values, *rest, **more)

    monkeypatch.setattr(MLPClassifier, "partial_fit", noted)
    monkeypatch.setattr(probe_models, "ROUND_PIXELS", 700)
    generator = np.random.default_rng(1)
    values = generator.normal(size=(6000, 4)).astype(np.float32)
    truths = (values[:, 0] * values[:, 1] > 0).astype(np.int64)
    answer, _ = probe_models.mlp(values[:4000], truths[:4000], values[4000:])
    assert average_precision_score(truths[4000:], answer[:, 1]) > 0.95
    assert {len(part) for part in seen} == {700}
    assert len(np.unique(np.concatenate(seen), axis=0)) == 3600


def test_quick_probes_rank_as_the_whole_ones_do() -> None:
    fit, judged = (pixels_of(seeds, 2, raw_pixels) for seeds in (range(3), range(10, 12)))
    quick = probe.judge(probe_models.quick_linear, fit, judged, [0, 1])[0].values()
    whole = probe.judge(probe_models.linear, fit, judged, [0, 1])[0].values()
    assert quick["average_precision"] == pytest.approx(whole["average_precision"], abs=0.01)


def test_a_class_that_no_fitted_pixel_has_gets_no_probability() -> None:
    fit, judged = pixels_of(range(2), 2, raw_pixels), pixels_of(range(2, 4), 3, raw_pixels)
    scores, _ = probe.judge(probe_models.linear, fit, judged, [0, 1, 2])
    share = np.mean(judged.classes == 2)
    assert 0 < share < 0.5
    assert set(scores.values()) == {"average_precision", "accuracy", "mean_iou", "f1"}
    assert np.isfinite(list(scores.values().values())).all()


def test_one_class_among_the_pixels_is_no_score() -> None:
    fit = pixels_of(range(2), 2, raw_pixels, 50)
    judged = probe.collect(labelled(range(2, 3), 2), raw_pixels, [1], 50)
    assert probe.unprobeable(fit.classes, fit.classes) is None
    assert "judged pixels" in str(probe.unprobeable(fit.classes, judged.classes))
    assert "fitted pixels" in str(probe.unprobeable(probe.collect([], raw_pixels, [0, 1], 50).classes, fit.classes))


def test_pooled_features_are_means_and_deviations_of_valid_pixels() -> None:
    batch = batch_of(5)
    batch.valid[1, :, :, : SIZE // 2] = False
    pooled = PooledFeatures(lambda crops: [crops.x0, F.avg_pool2d(crops.x0, 2)], 8, 4, 100)(batch)
    assert pooled.shape == (2, 8)
    for chip, left in ((0, 0), (1, SIZE // 2)):
        kept = batch.x0[chip, :, :, left:]
        expected = [kept.mean((1, 2)), kept.std((1, 2), correction=0)]
        assert torch.allclose(pooled[chip, :4], torch.cat(expected), atol=1e-4)
        assert torch.allclose(pooled[chip, 4:6], kept.mean((1, 2)), atol=1e-4)
    few = PooledFeatures(lambda crops: [crops.x0], 8, 4, 2)(batch)
    ends = torch.cat([batch.x0[0, :, :8, :8], batch.x0[0, :, -8:, -8:]], dim=2)
    assert torch.allclose(few[0, :2], ends.mean((1, 2)), atol=1e-4)


def test_image_statistics_are_physical_and_of_valid_pixels() -> None:
    batch = batch_of(6)
    batch.valid[0, :, 0] = False
    batch.valid[1] = False
    found = image_statistics(batch)
    kept = (batch.x0[0, :, 1:] * 4 + 50).flatten(1).double().numpy()
    assert found.shape == (2, 14)
    assert np.allclose(found[0, :4], np.concatenate([kept.mean(1), kept.std(1)]), rtol=1e-5)
    assert np.allclose(found[0, 4:6], np.percentile(kept, 2, axis=1), rtol=1e-5)
    assert (found[1] == 0).all()


@pytest.mark.parametrize("kind", probe_models.IMAGE_PROBES)
def test_image_probes_find_what_is_there(kind: str) -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(120, 6)).astype(np.float32)
    hidden = values[:, 0] + 0.5 * values[:, 1]
    truths = np.digitize(hidden, [-0.5, 0.5]) if kind == "classification" else 100 + hidden
    for name, model in probe_models.IMAGE_PROBES[kind].items():
        answer, converged = model(values[:80], truths[:80], values[80:])
        scores = image_scores(kind, truths[80:], answer)
        assert converged
        assert scores["accuracy" if kind == "classification" else "r2"].value > (0.5 if name == "knn" else 0.7)
