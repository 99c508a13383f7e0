from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from earthprior.chips.catalog import ChipRow
from earthprior.downstream import labels
from earthprior.downstream.fitting import Setup, fit, untrained, whole_chips
from earthprior.downstream.judging import judge
from earthprior.downstream.saved import load_finetuned
from earthprior.errors import EarthPriorError, ParamsError
from labelled import backbone_of, setup_of, small, with_columns
from tiny_training import bits

SMALL_NETWORK = {"unet_film.attention": False, "unet_film.time_embedding_dim": 16}
ATT_D = {"network": "unet_att_d", "unet_att_d.filter_config": [4, 8], "unet_att_d.block_num": [1, 1]}
TASKS = {"segmentation": "label", "classification": "cover", "regression": "height"}


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_chips):
    root = tmp_path_factory.mktemp("labelled")
    with_columns(make_chips(root / "data", n=12, size=32, labels=True))
    return root


@pytest.fixture
def backbone(make_params):
    return backbone_of(make_params(SMALL_NETWORK))


def weights(model):
    return bits(dict(model.state_dict()))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("head", ["linear", "nonlinear"])
def test_a_network_learns_its_labels_and_comes_back_from_its_files(root, backbone, tmp_path, task, head):
    setup, rows, validate = setup_of(root, backbone, task=task, label_column=TASKS[task], head=head)
    model = fit(setup, rows, validate)
    assert model.kind == task
    assert model.bands == backbone.bands
    assert model.crop_px == 16
    x0 = next(whole_chips(setup, validate)).x0
    found = model.predict(x0)
    outputs = {"segmentation": (4, 2, 32, 32), "classification": (4, 2), "regression": (4, 1)}
    assert found.shape == outputs[task]
    if task != "regression":
        assert torch.allclose(found.sum(1), torch.ones(()))
    model.save(tmp_path)
    assert torch.equal(load_finetuned(tmp_path).predict(x0), found)
    scores = judge(model, whole_chips(setup, validate))
    assert set(scores) > ({"r2"} if task == "regression" else {"average_precision"})


def test_the_same_call_gives_the_same_bits_and_leaves_the_backbone_alone(root, backbone):
    before = bits(dict(backbone.state_dict()))
    setup, rows, _ = setup_of(root, backbone)
    first, second = (fit(setup, rows) for _ in range(2))
    assert weights(first) == weights(second)
    assert bits(dict(backbone.state_dict())) == before
    other, rows, _ = setup_of(root, backbone, seed=1)
    assert weights(fit(other, rows)) != weights(first)


@pytest.mark.parametrize("network", [SMALL_NETWORK, ATT_D])
@pytest.mark.parametrize("side", ["decoder", "encoder"])
@pytest.mark.parametrize(("train", "moved"), [("head", 0), ("last", 1), ("all", None)])
def test_what_is_frozen_stays_to_the_bit(root, make_params, network, side, train, moved):
    backbone = backbone_of(make_params(network))
    setup, rows, _ = setup_of(root, backbone, train=train, last_levels=1, side=side, epochs=1)
    model = fit(setup, rows)
    before, after = backbone.network.state_dict(), model.backbone.network.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    if moved == 0:
        assert not changed
    elif train == "last":
        finest = {
            "decoder": {"up", "skip", "decoder", "decoder_1", "conv1", "Att1"},
            "encoder": {"down", "bottom", "encoder_2"},
        }
        assert changed
        assert changed <= finest[side]
    else:
        assert changed & {"stem", "encoder_1"}
        # What has no part in the features of this side has nothing to learn.
        assert not changed & {"head", "head_norm", "output_conv"}
        assert side == "decoder" or not changed & {"decoder", "up", "skip", "decoder_1", "conv1"}


def test_levels_further_from_the_head_learn_slower(root, backbone):
    setup, rows, _ = setup_of(root, backbone, lr_decay=0.5)
    from earthprior.downstream.fitting import BackboneNormalizer, KeptChips, make_trainer
    from earthprior.training.distributed import World
    from earthprior.training.order import TrainingChips

    chips = TrainingChips(rows, KeptChips(setup, rows).read, BackboneNormalizer(backbone))
    trainer = make_trainer(setup, chips, (), World())
    rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([0.01 * 0.5**depth for depth in range(len(rates))])
    # Two levels: down there is the fine and the coarse one, and up the fine one again.
    assert len(rates) == 4


def test_from_scratch_is_the_same_network_with_the_weights_of_its_seed(root, backbone):
    fresh, again, other = (untrained(backbone, seed) for seed in (0, 0, 1))
    assert fresh.description == backbone.description
    assert bits(dict(fresh.state_dict())) == bits(dict(again.state_dict()))
    assert bits(dict(fresh.state_dict())) != bits(dict(other.state_dict()))
    assert bits(dict(fresh.state_dict())) != bits(dict(backbone.state_dict()))


def test_any_number_of_labels_has_the_same_steps(root, backbone):
    setup, rows, _ = setup_of(root, backbone)
    assert [setup.params.steps_in_epoch(count) for count in (1, 3, 8)] == [3, 3, 3]
    fit(setup, rows[:1])


def test_what_cannot_be_is_refused(root, backbone):
    setup, rows, _ = setup_of(root, backbone)
    for changes, told in (({"t": 5000}, "no timestep"), ({"data__bands": ["red", "green", "blue", "swir"]}, "swir")):
        with pytest.raises(ParamsError, match=told):
            fit(Setup(small(**changes), backbone, setup.labels, setup.device), rows)
    for changes, told in (
        ({"label_column": "lable"}, "no column 'lable'"),
        ({"label_column": "cover"}, "needs paths of label rasters"),
        ({"task": "classification"}, "Set task: segmentation"),
        ({"task": "regression", "label_column": "cover"}, "no finite number"),
        ({"task": "classification", "label_column": "image"}, "not paths of rasters"),
    ):
        with pytest.raises(EarthPriorError, match=told):
            setup_of(root, backbone, **changes)
    with pytest.raises(EarthPriorError, match="no finetuned network"):
        load_finetuned(root)


def test_a_class_that_no_train_chip_has_judges_nothing():
    rows = [
        ChipRow(line, "validate", (f"{line}.tif",), {"kind": kind}) for line, kind in enumerate(["a", "", "c", "7"])
    ]
    of_images = labels.Labels("classification", "kind", (7, "a"), Path(), None)
    assert [row.line for row in labels.judgeable(of_images, rows)] == [0, 3]
    assert [row.line for row in labels.judgeable(replace(of_images, task="segmentation"), rows)] == [0, 2, 3]
