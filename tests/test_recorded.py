from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from earthprior import mlflow_read, recorded
from earthprior.errors import EarthPriorError
from earthprior.files import write_json
from earthprior.tracking_store import locate

RUN = "0123456789abcdef0123456789abcdef"
OTHER = "f" * 32


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Git repository with two commits, and no MLflow store."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "DVC_", "GIT_"))]:
        monkeypatch.delenv(name)
    home = tmp_path / "project"
    home.mkdir()
    git(home, "init", "-q")
    for text in ("first", "second"):
        git(home, "commit", "-q", "--allow-empty", "-m", text)
    return home


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def experiment(root: Path, name: str, baseline: str, date: int) -> str:
    """Make what DVC makes of an experiment; its commit."""
    start = git(root, "rev-parse", baseline)
    tree = git(root, "rev-parse", f"{baseline}^{{tree}}")
    os.environ["GIT_COMMITTER_DATE"] = f"{date} +0000"
    try:
        commit = git(root, "commit-tree", tree, "-p", start, "-m", name)
    finally:
        del os.environ["GIT_COMMITTER_DATE"]
    git(root, "update-ref", f"refs/exps/{start[:2]}/{start[2:]}/{name}", commit)
    return commit


def kept(into: Path, params: str, tags: dict[str, str], **texts: str) -> mlflow_read.KeptRun:
    (into / "params.yaml").write_text(params)
    return mlflow_read.KeptRun("a name", texts, tags)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """MLflow's runs, id -> name, of which none can be read."""
    runs: dict[str, str] = {}
    monkeypatch.setattr(mlflow_read, "names", lambda store: runs)
    monkeypatch.setattr(mlflow_read, "read", lambda store, run_id, into: None)
    return runs


def test_an_experiment_of_the_commit_checked_out_comes_first(root: Path) -> None:
    assert recorded.experiment_commit(root, "calm-sea") is None
    here = experiment(root, "calm-sea", "HEAD", 1_700_000_000)
    elsewhere = experiment(root, "calm-sea", "HEAD~", 1_700_000_900)
    experiment(root, "calm-seas", "HEAD", 1_700_001_000)
    git(root, "update-ref", "refs/exps/exec/EXEC_BASELINE", "HEAD")
    assert recorded.experiment_commit(root, "calm-sea") == here
    git(root, "commit", "-q", "--allow-empty", "-m", "third")
    # else the newest
    assert recorded.experiment_commit(root, "calm-sea") == elsewhere
    assert recorded.experiment_commit(root, "EXEC_BASELINE") is None


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("calm-sae", "did you mean calm-sea?"),
        ("trial-001", f"go by their whole id here: did you mean {RUN}?"),
        (RUN[:8], f"go by their whole id here: did you mean {RUN}?"),
        ("unet-wave", f"did you mean unet-wavy (id {OTHER})?"),
        (RUN[:-1] + "0", f"did you mean {RUN}?"),
        ("something-else-altogether", "id of a run in sqlite:///mlflow.db; `dvc exp list"),
    ],
)
def test_an_unknown_run_is_told_with_the_nearest(
    root: Path, tmp_path: Path, store: dict[str, str], asked: str, told: str
) -> None:
    experiment(root, "calm-sea", "HEAD", 1_700_000_000)
    store.update({RUN: "trial-001: lr=0.01", OTHER: "unet-wavy"})
    with pytest.raises(EarthPriorError) as caught:
        recorded.find(root, asked, tmp_path / "into")
    assert told in str(caught.value)
    assert "`dvc exp list --all-commits` and `mlflow ui` list them all" in str(caught.value)


def test_looking_for_a_run_makes_no_store(root: Path, tmp_path: Path) -> None:
    with pytest.raises(EarthPriorError, match=f"run {RUN} is neither"):
        recorded.find(root, RUN, tmp_path / "into")
    assert not (root / "mlflow.db").exists()


def test_the_values_that_acted_win_over_an_edited_file(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(store: Any, run_id: str, into: Path) -> mlflow_read.KeptRun:
        write_json(into / "config.json", {"params": {"lr": 1e-05, "data": {"dir": "data"}, "evaluate": {"steps": 20}}})
        write_json(into / "metrics.json", {"gain_db": {"mean": 1.5, "rho_0.5": 2}, "judged_chips": 4})
        params = "lr: 0.5\nepochs: 3\ndata: {dir: elsewhere}\nevaluate: {steps: 10, samples: 4, label_column: label}\n"
        tags = {"git.commit": "c" * 40, "dvc.data_md5": "d.dir", "dvc.exp_name": "calm-sea", "earthprior.code": "abc"}
        told = {"evaluate.steps": "3", "evaluate.label_column": "null", "lr": "1e-05"}
        return kept(into, params, tags, **told)

    monkeypatch.setattr(mlflow_read, "read", read)
    run = recorded.find(root, RUN, tmp_path / "into")
    assert run.content == {
        "lr": 1e-05, "epochs": 3, "data": {"dir": "data"},
        "evaluate": {"steps": 3, "samples": 4, "label_column": None},
    }  # fmt: skip
    assert run.metrics == {"gain_db/mean": 1.5, "gain_db/rho_0.5": 2.0, "judged_chips": 4.0}
    assert (run.title, run.commit, run.data_md5, run.experiment, run.run_id, run.code) == (
        "a name", "c" * 40, "d.dir", "calm-sea", RUN, "abc",
    )  # fmt: skip
    assert run.history.empty
    assert run.read("environment.json") == {}


def test_a_run_that_kept_no_params_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_read, "read", lambda store, run_id, into: mlflow_read.KeptRun("a", {}, {}))
    with pytest.raises(EarthPriorError, match=r"its params.yaml was not kept.* Name a finished run"):
        recorded.find(root, RUN, tmp_path / "into")


def test_runs_are_read_back_from_mlflow(root: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    store = locate(root)
    client = MlflowClient(tracking_uri=store.uri)
    place = client.create_experiment(store.experiment, store.artifact_location)
    trained = client.create_run(place, run_name="trained").info.run_id
    client.log_param(trained, "lr", "1e-05")
    client.log_text(trained, "lr: 0.00001\n", "params.yaml")
    client.log_text(trained, "weights", "weights/network.safetensors")
    client.log_text(trained, "{}", "evaluate/metrics.json")
    # an evaluation that has a run of its own
    evaluated = client.create_run(place, run_name="evaluated", tags={"pretrain_run_id": trained}).info.run_id
    client.log_param(evaluated, "evaluate.steps", "3")
    client.log_text(evaluated, '{"judged_chips": 4}', "evaluate/metrics.json")
    client.log_text(evaluated, "", "report.html")

    run = recorded.find(root, evaluated, tmp_path / "into")
    assert (run.title, run.content, run.metrics) == (
        "evaluated", {"lr": 1e-05, "evaluate": {"steps": 3}}, {"judged_chips": 4.0},
    )  # fmt: skip
    assert sorted(path.name for path in run.folder.iterdir()) == ["metrics.json", "network.safetensors", "params.yaml"]
    assert mlflow_read.names(store) == {trained: "trained", evaluated: "evaluated"}
    client.delete_run(evaluated)
    with pytest.raises(EarthPriorError, match=f"did you mean {trained}"):
        recorded.find(root, trained[:9], tmp_path / "again")
    with pytest.raises(EarthPriorError, match=f"run {evaluated} is neither"):
        recorded.find(root, evaluated, tmp_path / "again")


def test_a_store_that_does_not_answer_is_told(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    with pytest.raises(
        EarthPriorError, match=r"http://\*\*\*@127.0.0.1:9 cannot be read .*MLFLOW_TRACKING_URI"
    ) as caught:
        recorded.find(root, RUN, tmp_path / "into")
    assert "secret" not in str(caught.value)
