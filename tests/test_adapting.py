from __future__ import annotations

import pytest
import torch

import earthprior
from earthprior import build
from earthprior.diffusion import linear
from earthprior.errors import EarthPriorError
from earthprior.networks import NETWORKS
from finished import BANDS, raw_chips
from support import gaussian_chips, make_batch, some_mixing, stats_of

EDGE = {"red_edge": {"min": 0.0, "max": 4000.0, "mean": 1500.0, "std": 300.0}}


@pytest.mark.parametrize("network", build.NETWORKS)
@pytest.mark.parametrize("precondition", ["none", "scalar", "wiener"])
def test_the_same_bands_in_another_order_give_the_same_features(make_finished, network, precondition):
    folder = make_finished(network=network, diffusion__precondition=precondition).folder
    backbone = earthprior.load_backbone(folder)
    turned = earthprior.load_backbone(folder, bands=["NIR", "red", "green", "blue"])
    assert turned.bands == ("NIR", "red", "green", "blue")
    order = [3, 0, 1, 2]
    raw = raw_chips()
    x0 = turned.normalize(raw[:, order])
    torch.testing.assert_close(x0, backbone.normalize(raw)[:, order])
    for level, wanted in zip(turned.features(x0), backbone.features(x0[:, [1, 2, 3, 0]]), strict=True):
        torch.testing.assert_close(level, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", build.NETWORKS)
@pytest.mark.parametrize("precondition", ["none", "wiener"])
def test_fewer_and_more_bands_follow_the_rule(make_finished, network, precondition, caplog):
    folder = make_finished(network=network, diffusion__precondition=precondition).folder
    old = earthprior.load_backbone(folder)
    stem = f"network.{NETWORKS[network].STEM}"
    before = old.tensors()[stem]
    fewer = earthprior.load_backbone(folder, bands=["blue", "red"])
    more = earthprior.load_backbone(folder, bands=[*BANDS, "red_edge"], statistics=EDGE)
    torch.testing.assert_close(fewer.tensors()[stem][:, :2], 2 * before[:, [2, 0]])
    torch.testing.assert_close(more.tensors()[stem][:, :4], 0.8 * before[:, :4])
    torch.testing.assert_close(more.tensors()[stem][:, 4], 0.8 * before[:, :4].mean(1))
    if precondition == "wiener":
        torch.testing.assert_close(fewer.tensors()[stem][:, 2:], 2 * before[:, [6, 4]])
    assert fewer.adapted[0] == "kept the slices of the first convolution for blue, red"
    assert "left out green, nir" in fewer.adapted
    assert "gave red_edge the mean of the slices of red, green, blue, nir" in more.adapted
    assert "multiplied the first convolution's weights by 4 / 5" in more.adapted
    assert all(sentence in caplog.text for sentence in more.adapted)
    for backbone in (fewer, more):
        pyramid = backbone.features(torch.randn(1, len(backbone.bands), 16, 16))
        assert all(level.isfinite().all() for level in pyramid)
    assert old.adapted == []


def test_the_filter_of_some_bands_is_the_one_that_a_fit_on_them_gives(make_finished):
    folder = make_finished(diffusion__precondition="wiener").folder
    found = earthprior.load_backbone(folder, bands=["nir", "green"]).linear
    chips = gaussian_chips(64, some_mixing(4), 16, 16, 0.1)
    fitted = linear.fit([make_batch(chips[:, [3, 1]])], average_d4=True)
    xt, alpha, sigma = torch.randn(2, 2, 16, 16), torch.full((2, 1, 1, 1), 0.8), torch.full((2, 1, 1, 1), 0.6)
    torch.testing.assert_close(found.denoise(xt, alpha, sigma), fitted.denoise(xt, alpha, sigma), rtol=1e-3, atol=1e-3)


def test_the_activations_keep_their_scale(make_finished):
    folder = make_finished(diffusion__precondition="none").folder
    x0 = torch.randn(16, 1, 16, 16).expand(-1, 6, -1, -1)
    three = {f"b{i}": EDGE["red_edge"] for i in range(2)}
    wide = earthprior.load_backbone(folder, bands=[*BANDS, *three], statistics=three)
    old = earthprior.load_backbone(folder)
    torch.testing.assert_close(wide.network.stem(x0), old.network.stem(x0[:, :4]), rtol=1e-3, atol=1e-4)


def test_statistics_may_come_from_a_stats_json_and_replace_known_ones(make_finished):
    folder, raw = make_finished().folder, raw_chips()
    other = stats_of(raw * 3, BANDS)
    backbone = earthprior.load_backbone(folder, statistics=other)
    assert "normalizes red, green, blue, nir by the statistics given, not by the pretraining's" in backbone.adapted
    torch.testing.assert_close(
        backbone.normalize(raw * 3), earthprior.load_backbone(folder).normalize(raw), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("procedure", ["lpb", "gab"])
def test_procedures_without_statistics_per_band_need_none(make_finished, procedure):
    folder = make_finished(normalization__stat_procedure=procedure).folder
    backbone = earthprior.load_backbone(folder, bands=["red", "green", "swir"])
    assert backbone.normalize(torch.rand(1, 3, 16, 16)).isfinite().all()


@pytest.mark.parametrize(
    ("bands", "statistics", "words"),
    [
        (["vv", "vh"], None, r"none of the bands vv, vh is one of the backbone's \(red, green, blue, nir\)"),
        (["red", "Red"], None, "give each band once"),
        ([], None, "at least one"),
        (["red", "swir"], None, r"band swir was not among those of the pretraining .* statistics="),
        (["red", "swir"], {"swir": {"min": 0, "max": 1, "mean": 0.5}}, "statistics of band swir: std is missing"),
        (["swir", "red"], {"swir": {"min": 0, "max": 1, "mean": float("nan"), "std": 1}}, "swir: mean is missing"),
        (["swir", "red"], {"swir": {"min": 0, "max": 1, "mean": 0.5, "std": -1}}, "swir: std is negative"),
        (["swir", "red"], {"swir": [0, 1]}, "statistics of band swir: give "),
        ("vv", None, "none of the bands vv is one"),
    ],
)
def test_what_no_rule_covers_is_refused(make_finished, bands, statistics, words):
    with pytest.raises(EarthPriorError, match=words):
        earthprior.load_backbone(make_finished().folder, bands=bands, statistics=statistics)


def test_clipped_statistics_are_asked_for_where_they_are_used(make_finished):
    folder = make_finished(normalization__clip_percent=1.0).folder
    with pytest.raises(EarthPriorError, match=r"statistics of band red_edge: clipped.1 is missing"):
        earthprior.load_backbone(folder, bands=["red", "red_edge"], statistics=EDGE)


def test_the_trained_head_does_not_matter(make_finished):
    backbone = earthprior.load_backbone(make_finished().folder, bands=["red"])
    assert backbone.network.head.out_channels == 4
