from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import earthprior
from earthprior import build
from earthprior.backbone import Backbone
from earthprior.errors import EarthPriorError, ParamsError
from earthprior.files import read_json, write_json
from earthprior.networks.sides import SIDES
from finished import BANDS, raw_chips
from support import make_batch

PRECONDITIONS = ("none", "scalar", "wiener")


@pytest.fixture(scope="module")
def raw():
    return raw_chips()


@pytest.mark.parametrize("network", build.NETWORKS)
@pytest.mark.parametrize("precondition", PRECONDITIONS)
def test_a_backbone_gives_the_features_of_its_task(make_finished, raw, network, precondition):
    done = make_finished(network=network, diffusion__precondition=precondition)
    backbone = earthprior.load_backbone(done.folder)
    x0, _ = build.normalizer(done.params, done.stats).normalize(raw, torch.ones(8, 16, 16, dtype=torch.bool))
    assert torch.equal(backbone.normalize(raw), x0)
    expected = done.task.features(make_batch(x0), done.params.evaluate.probe_rho)
    for level, wanted in zip(backbone.features(x0), expected, strict=True):
        assert torch.equal(level, wanted)
    assert backbone.rho == pytest.approx(done.params.evaluate.probe_rho, rel=0.1)
    assert (backbone.bands, backbone.crop_px) == (BANDS, 16)


@pytest.mark.parametrize("network", build.NETWORKS)
@pytest.mark.parametrize("side", SIDES)
def test_both_sides_are_pyramids_of_any_size(make_finished, network, side):
    backbone = earthprior.load_backbone(make_finished(network=network).folder)
    for height, width in ((16, 16), (32, 32), (21, 17)):
        pyramid = backbone.features(torch.randn(2, 4, height, width), side=side)
        assert [tuple(level.shape) for level in pyramid] == [
            (2, channels, -(-height // 2**i), -(-width // 2**i)) for i, channels in enumerate(backbone.widths[side])
        ]
    assert torch.equal(backbone.features(torch.ones(1, 4, 16, 16))[-1], pyramid_of(backbone, "encoder")[-1])


def pyramid_of(backbone, side):
    return backbone.features(torch.ones(1, 4, 16, 16), side=side)


def test_a_backbone_is_rebuilt_from_its_description_and_tensors(make_finished):
    backbone = earthprior.load_backbone(make_finished().folder)
    again = Backbone(backbone.description, backbone.tensors())
    x0 = torch.randn(2, 4, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(backbone.features(x0, 3), again.features(x0, 3), strict=True))
    assert all(name.startswith("network.") for name in backbone.state_dict())


def test_gradients_reach_the_chips_and_every_weight_but_the_head(make_finished):
    backbone = earthprior.load_backbone(make_finished().folder)
    x0 = torch.randn(2, 4, 16, 16, requires_grad=True)
    sum(level.square().mean() for level in backbone.features(x0)).backward()
    assert x0.grad.abs().sum() > 0
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())
    idle = {name.split(".")[1] for name, p in backbone.named_parameters() if not p.requires_grad}
    assert idle == {"head_norm", "head"}


def test_loading_draws_nothing(make_finished):
    folder = make_finished().folder
    before = torch.get_rng_state()
    earthprior.load_backbone(folder)
    assert torch.equal(before, torch.get_rng_state())


def test_timesteps_may_differ_between_chips(make_finished):
    backbone = earthprior.load_backbone(make_finished().folder)
    x0 = torch.randn(2, 4, 16, 16)
    both = backbone.features(x0, torch.tensor([3, 900]))
    for index, t in enumerate((3, 900)):
        alone = backbone.features(x0[index : index + 1], t)
        torch.testing.assert_close(both[0][index : index + 1], alone[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda b: b.features(torch.zeros(1, 3, 16, 16)), r"\(1, 3, 16, 16\): this backbone takes \(B, 4, H, W\)"),
        (lambda b: b.features(torch.zeros(4, 16, 16)), r"the bands red, green, blue, nir in this order"),
        (lambda b: b.features(torch.zeros(1, 4, 16, 16), t=1000), "t: 1000 is no timestep .* choose 0 to 999"),
        (lambda b: b.features(torch.zeros(1, 4, 16, 16), t=torch.tensor([1, 2])), r"t has shape \(2,\)"),
        (lambda b: b.features(torch.zeros(1, 4, 16, 16), t=torch.tensor([1.5])), r"t has shape \(1,\) .*float"),
        (
            lambda b: b.features(torch.zeros(2, 4, 16, 16), t=torch.tensor([3, 1000])),
            r"t: \[3, 1000\] are no timesteps",
        ),
        (lambda b: b.features(np.zeros((1, 4, 16, 16))), "chips are a ndarray; give a tensor"),
        (lambda b: b.features(torch.ones(1, 4, 16, 16).byte()), "x0 holds torch.uint8 values, as files do"),
        (lambda b: b.features(torch.zeros(1, 4, 16, 16), side="top"), "'top' is no side .* decoder or encoder"),
        (lambda b: b.normalize(torch.zeros(1, 5, 16, 16)), r"\(1, 5, 16, 16\)"),
    ],
)
def test_what_does_not_fit_is_refused(make_finished, call, words):
    with pytest.raises((EarthPriorError, ParamsError), match=words):
        call(earthprior.load_backbone(make_finished().folder))


def test_weights_that_do_not_fit_are_named(make_finished):
    done = make_finished()
    folder, weights = done.folder, done.task.network.state_dict()
    weights["stem.weight"] = torch.zeros(8, 3, 3, 3)
    weights["extra"] = weights.pop("stem.bias")
    save_file(weights, folder / "network.safetensors")
    words = r"missing: network.stem.bias \(8,\); unexpected: network.extra \(8,\); network.stem.weight: \(8, 3, 3, 3\)"
    with pytest.raises(EarthPriorError, match=words):
        earthprior.load_backbone(folder)


def test_results_of_before_take_their_statistics_from_stats(make_finished, raw):
    done = make_finished()
    folder, stats = done.folder, done.stats
    config = read_json(folder / "config.json")
    del config["statistics"]
    write_json(folder / "config.json", config)
    with pytest.raises(EarthPriorError, match=r"no statistics to normalize with .*stats.json is missing"):
        earthprior.load_backbone(folder)
    for name in BANDS:
        stats["per_band"][name]["percentiles"] = {"0.1": 0.0, "99.9": 1.0}
    stats["all_bands"]["percentiles"] = {"0.1": 0.0, "99.9": 1.0}
    stats["chips"] = {"train": 8, "validate": 1, "test": 0, "skipped_lines": []}
    write_json(folder.parent / "stats/stats.json", stats)
    assert earthprior.load_backbone(folder).normalize(raw).std() == pytest.approx(1, abs=0.3)


def test_the_level_that_evaluate_found_serves_its_own_weights_alone(make_finished):
    folder = make_finished().folder
    found = {"fingerprint": "f" * 12, "rho": 0.5, "t": 100, "side": "encoder"}
    write_json(folder.parent / "evaluate/serving.json", found)
    backbone = earthprior.load_backbone(folder.parents[1])
    assert (backbone.t, backbone.rho) == (100, 0.5)
    x0 = torch.randn(1, 4, 16, 16)
    assert torch.equal(backbone(x0)[0], backbone.features(x0, 100, "encoder")[0])
    write_json(folder.parent / "evaluate/serving.json", found | {"fingerprint": "0" * 12})
    assert earthprior.load_backbone(folder).t != 100


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(EarthPriorError, match="holds no pretrained backbone"):
        earthprior.load_backbone(tmp_path)


def test_importing_earthprior_is_quick():
    program = "import sys, earthprior\nsys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
