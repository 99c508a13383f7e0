from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from safetensors.torch import save_file

from earthprior.downstream import finetuning
from earthprior.downstream.saved import load_finetuned
from earthprior.errors import CodeChangedError, DataError, Interrupted
from earthprior.files import read_json, write_json
from earthprior.tools import finetune
from earthprior.training.stop import StopRequest
from labelled import backbone_of, small, with_columns
from tiny_training import bits


@pytest.fixture(scope="module")
def measured_root(tmp_path_factory, make_chips):
    root = tmp_path_factory.mktemp("labelled")
    with_columns(make_chips(root / "data", n=12, size=32, labels=True))
    return root


@pytest.fixture
def root(measured_root, make_params, tmp_path, monkeypatch):
    """A project with labelled chips and an exported backbone, as the working directory; MLflow is not there."""
    root = tmp_path / "project"
    shutil.copytree(measured_root, root)
    (root / "downstream").mkdir()
    (root / "downstream/params.yaml").write_text("# kept with the run\n")
    backbone = backbone_of(make_params({"unet_film.attention": False, "unet_film.time_embedding_dim": 16}))
    (root / "backbone").mkdir()
    save_file(backbone.tensors(), root / "backbone/backbone.safetensors")
    write_json(root / "backbone/config.json", backbone.description)
    monkeypatch.chdir(root)
    monkeypatch.setattr("earthprior.tracking.import_mlflow", lambda: False)
    return root


def run(root: Path, **overrides) -> Path:
    finetune.run(small(**{"pretrained": "backbone", **overrides}), root)
    return root / finetune.RESULTS


def weights(results: Path):
    return bits(dict(load_finetuned(results).state_dict()))


class StopsAfter(StopRequest):
    """Asks to stop after a number of looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self._left = looks

    @property
    def signal_number(self):
        self._left -= 1
        return 15 if self._left < 0 else None


def interrupted(root: Path, looks: int, **overrides) -> None:
    class Requests:
        def __enter__(self):
            return StopsAfter(looks)

        def __exit__(self, *exception):
            return None

    with patch.object(finetune, "stop_requests", Requests), pytest.raises(Interrupted, match="saved step"):
        run(root, **overrides)


def test_a_run_leaves_a_network_its_scores_and_a_report(root):
    results = run(root, labels=4)
    found = {path.name for path in results.iterdir()}
    assert found == {
        "model.safetensors", "config.json", "history.csv", "environment.json", "mlflow_run.json", "metrics.json",
        "report.html", "figures",
    }  # fmt: skip
    metrics = read_json(results / "metrics.json")
    assert metrics["train_chips"] == 4
    assert 0 <= metrics["average_precision_low"] <= metrics["average_precision"] <= metrics["average_precision_high"]
    page = (results / "report.html").read_text()
    assert "Learned from 4 labelled chips (of 8)" in page
    assert read_json(results / "config.json")["fingerprint"]


@pytest.mark.parametrize("looks", [1, 4])
def test_a_run_that_was_stopped_ends_with_the_same_bits(root, looks, capsys):
    whole = weights(run(root))
    shutil.rmtree(root / finetune.RESULTS)
    interrupted(root, looks)
    assert not (root / finetune.RESULTS).exists()
    assert weights(run(root)) == whole
    assert "continuing at step" in capsys.readouterr().err


def test_other_labels_or_weights_are_another_run(root, make_params, capsys):
    interrupted(root, 2)
    first = {path.name for path in (root / "work/finetune").iterdir()}
    for changes in ({"labels": 4}, {"start": "untrained"}, {"class_weights": "balanced"}):
        interrupted(root, 2, **changes)
    assert len({path.name for path in (root / "work/finetune").iterdir()} - first) == 3
    assert "is another run: labels" in capsys.readouterr().err
    # Where the weights lie does not matter, what they are does.
    (root / "backbone").rename(root / "moved")
    interrupted(root, 1, pretrained="moved")
    assert len(list((root / "work/finetune").iterdir())) == 4


def test_state_stays_until_dvc_has_what_it_made(root, monkeypatch, capsys):
    """dvc deletes outs before a stage runs: killed before its dvc.lock, it would train anew."""
    monkeypatch.setenv("DVC_STAGE", "finetune")
    changes = {"operation.checkpoint_interval": 1}
    whole = weights(run(root, **changes))
    (folder,) = (root / "work/finetune").iterdir()
    md5 = read_json(folder / "done.json")["md5"]
    shutil.rmtree(root / finetune.RESULTS)
    assert weights(run(root, **changes)) == whole
    assert "continuing at step" in capsys.readouterr().err
    outs = {"outs": [{"path": "downstream/results/finetune/model.safetensors", "md5": md5}]}
    write_json(root / "downstream/dvc.lock", {"stages": {"finetune": outs}})
    monkeypatch.setattr(finetune.under_dvc, "_in_cache", lambda folder, root: True)
    assert weights(run(root, **changes)) == whole
    assert "continuing at step" not in capsys.readouterr().err


def test_other_code_is_refused(root):
    interrupted(root, 2)
    changed = finetuning.identity.CodeHash({"downstream/task.py": "0" * 64}, "0" * 64)
    with (
        patch.object(finetuning.identity, "code_hash", lambda *a, **k: changed),
        pytest.raises(CodeChangedError, match="--accept-code after finetune"),
    ):
        run(root)


def test_chips_without_a_label_are_left_out_and_counted(root):
    catalog = root / "data/catalog.csv"
    text = catalog.read_text().replace("labels/chip_000.tif", "").replace("labels/chip_002.tif", "")
    catalog.write_text(text)
    page = (run(root) / "report.html").read_text()
    assert "Learned from 7 labelled chips (of 7)" in page
    assert "2 chips without a label were left out" in page
    catalog.write_text(text.replace("labels/", "gone/"))
    with pytest.raises(DataError, match=r"gone/chip_001\.tif"):
        run(root)
