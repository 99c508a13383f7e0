from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

import earthprior
from earthprior import made_of
from earthprior.assembling import newest_checkpoint
from earthprior.errors import EarthPriorError, Interrupted
from earthprior.files import write_json
from earthprior.mlflow_register import register
from earthprior.params import active
from earthprior.tools import export
from earthprior.tracking_store import locate
from mlflow_store import client, open_plain
from support import stats_of
from tiny_training import StopAt, judged, train


def same(one, other):
    x0 = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return all(torch.equal(a, b) for a, b in zip(one.features(x0), other.features(x0), strict=True))


@pytest.fixture
def stopped(tiny, tmp_path):
    """A function that trains so many steps, and gives the folder of the checkpoints and the trainer."""

    def stop(step):
        trainer = judged(tiny.trainer())
        folder = tmp_path / "project/work/pretrain/ffffffffffff"
        with pytest.raises(Interrupted):
            train(trainer, folder, stop=StopAt(trainer, step))
        tiny.linear.save(folder / "linear.safetensors")
        stats = stats_of(torch.rand(4, 4, 8, 8), tiny.params.data.bands) | {"data": {"catalog_sha256": "c"}}
        made_of.write(folder, active(tiny.params), {}, stats)
        content = tiny.params.model_dump(mode="json")
        # That run's own params count, not what has been written there since.
        content["unet_film"]["channels"] = [4]
        write_json(tmp_path / "project/params.yaml", content)
        return folder, trainer

    return stop


@pytest.mark.parametrize(("step", "of"), [(6, "best"), (2, "average")])
def test_a_checkpoint_gives_its_best_or_its_averaged_weights(stopped, step, of):
    folder, trainer = stopped(step)
    path = newest_checkpoint(folder)
    backbone = earthprior.load_backbone(path)
    wanted = trainer.best if of == "best" else trainer.average.module.state_dict()
    found = backbone.network.state_dict()
    assert wanted
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert same(backbone, earthprior.load_backbone(folder))
    assert backbone.description["step"] == step


def test_a_damaged_or_foreign_checkpoint_is_refused(stopped, tmp_path):
    folder, _ = stopped(2)
    path = newest_checkpoint(folder)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(EarthPriorError, match="is damaged"):
        earthprior.load_backbone(path)
    other = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(1)}, other)
    with pytest.raises(EarthPriorError, match="is missing; a checkpoint counts with its manifest"):
        earthprior.load_backbone(other)


def test_a_checkpoint_with_another_filter_is_refused(stopped, make_finished):
    folder, _ = stopped(2)
    shutil.copy(make_finished().folder / "linear.safetensors", folder)
    with pytest.raises(EarthPriorError, match=r"linear.safetensors is not the one of this checkpoint"):
        earthprior.load_backbone(folder)


def test_the_root_of_a_project_and_a_file_in_its_results_will_do(make_finished):
    folder = make_finished().folder
    backbone = earthprior.load_backbone(folder)
    for place in (folder.parents[1], str(folder), folder / "network.safetensors"):
        assert same(earthprior.load_backbone(place), backbone)


@pytest.mark.parametrize("name", ["config.json", "linear.safetensors"])
def test_a_missing_file_is_named(make_finished, name):
    folder = make_finished().folder
    (folder / name).unlink()
    with pytest.raises(EarthPriorError, match=f"pretrain/ lacks {name}"):
        earthprior.load_backbone(folder)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (None, "got None; give a folder"),
        ("nowhere/pretrain", "nowhere/pretrain does not exist"),
        ("weights.safetensors", "weights.safetensors does not exist"),
        ("README.md", "README.md is no backbone"),
        ("alone.safetensors", "config.json is missing"),
    ],
)
def test_what_is_none_is_refused(tmp_path, monkeypatch, asked, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("x")
    save_file({"a": torch.zeros(1)}, tmp_path / "alone.safetensors")
    with pytest.raises(EarthPriorError, match=words):
        earthprior.load_backbone(asked)


@pytest.fixture
def kept(make_finished, tracked_root, monkeypatch, own_store_only):
    """A finished pretraining, the id of the MLflow run that keeps it, and its project as the working directory."""
    done = make_finished()
    monkeypatch.chdir(tracked_root)
    write_json(tracked_root / "params.yaml", done.params.model_dump(mode="json"))
    with open_plain(tracked_root) as tracker:
        for name in ("network.safetensors", "linear.safetensors"):
            tracker.log_artifact(done.folder / name, "weights")
        write_json(tracked_root / "serving.json", {"fingerprint": "f" * 12, "rho": 0.5, "t": 100, "side": "encoder"})
        tracker.log_artifact(tracked_root / "serving.json", "weights")
        for path in (done.folder / "config.json", tracked_root / "params.yaml"):
            tracker.log_artifact(path)
    return done, str(tracker.ref.run_id), tracked_root


def test_mlflow_gives_a_run_a_folder_and_a_registered_model(kept, tmp_path):
    done, run_id, root = kept
    backbone = earthprior.load_backbone(done.folder)
    for asked in (run_id, f"runs:/{run_id}"):
        found = earthprior.load_backbone(asked)
        assert found.t == 100, "as evaluate found"
        found.t = backbone.t
        assert same(found, backbone)
    export.write(backbone, tmp_path / "exported", {})
    told = register(locate(root), tmp_path / "exported", "trees", run_id)
    assert told.version == "1"
    for asked in ("models:/trees/1", f"runs:/{told.run_id}/export"):
        assert same(earthprior.load_backbone(asked), backbone)
    run = client(root).get_run(told.run_id)
    assert run.data.tags["pretrain_run_id"] == run_id
    assert run.info.status == "FINISHED"
    # by the id of the run that holds the export, the weights of its training are found
    assert earthprior.load_backbone(told.run_id).t == 100
    for asked, words in (("models:/trees/7", "cannot be had"), (f"runs:/{run_id}/nothing", "cannot be had")):
        with pytest.raises(EarthPriorError, match=words):
            earthprior.load_backbone(asked)


def test_without_a_store_a_model_is_not_had(tmp_path, monkeypatch, own_store_only):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EarthPriorError, match=r"there is no sqlite:///mlflow.db yet"):
        earthprior.load_backbone("models:/trees/1")
