"""A run made again for real: a DVC experiment under code that its branch does not have, by its name and its MLflow id.

The tests share one repository and run in the order of this file, because each stage costs seconds.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from earthprior import checkout, recorded
from earthprior.errors import EarthPriorError
from earthprior.files import read_json, write_json
from earthprior.identity import data_version
from earthprior.tools import reproduce
from tiny_project import Project, edit_params, make_repository

CHANGED = "src/earthprior/training/optim.py"
COMMAND = ("env", "PYTHONPATH=src", "python", "-m", "earthprior", "reproduce")
OUTS = ("network.safetensors", "history.csv", "metrics.json")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, make_chips: Callable[..., Path]) -> Project:
    """A repository with the experiment `first`, made under code that was not committed."""
    made = make_repository(tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("state"), make_chips)
    edit_params(made.root / "params.yaml", {"epochs": 1, "warmup_epochs": 0})
    committed = (made.root / CHANGED).read_text()
    changed = committed.replace("lr=params.lr", "lr=2 * params.lr")
    assert changed != committed
    (made.root / CHANGED).write_text(changed)
    made.run("dvc", "exp", "run", "-n", "first", "-S", "lr=2e-3")
    (made.root / CHANGED).write_text(committed)
    edit_params(made.root / "params.yaml", {"lr": 0.5})
    return made


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "DVC_"))]:
        monkeypatch.delenv(name)


def run_id(project: Project) -> str:
    return str(read_json(project.root / "results/pretrain/mlflow_run.json")["run_id"])


def reproduce_command(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=project.root, env=project.environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip


@pytest.mark.soak
def test_an_experiment_comes_out_the_same(project: Project) -> None:
    outputs, runs = project.outputs(), project.mlflow("select count(*) from runs")
    done = reproduce_command(project, "first")
    assert done.returncode == 0, done.stdout
    assert "identical: network.safetensors, history.csv, metrics.json" in done.stdout
    for kind in ("code", "data", "params", "packages", "hardware"):
        assert re.search(rf"^  {kind} +same$", done.stdout, re.MULTILINE), done.stdout
    # it was computed and not restored, and nothing of it is left
    assert "training 8 steps" in done.stdout
    assert project.outputs() == outputs
    assert project.mlflow("select count(*) from runs") == runs
    assert not list((project.root / "work/reproduce").iterdir())


@pytest.mark.soak
def test_an_mlflow_run_is_made_from_its_experiments_commit(project: Project, tmp_path: Path) -> None:
    by_id = recorded.find(project.root, run_id(project), tmp_path / "id")
    by_name = recorded.find(project.root, "first", tmp_path / "name")
    assert {by_name.run_id, by_name.experiment, by_id.experiment} == {run_id(project), "first"}
    assert by_id.content == by_name.content
    assert by_id.content["lr"] == 2e-3
    assert by_id.data_md5 == by_name.data_md5
    assert by_id.metrics == by_name.metrics
    assert by_id.history.equals(by_name.history)
    for name in (*OUTS, "params.yaml", "config.json", "linear.safetensors", "stats.json", "environment.json"):
        assert (by_id.folder / name).is_file(), name
    # MLflow knows the commit that was checked out, which has not the code that ran
    assert by_id.commit == project.run("git", "rev-parse", "HEAD").strip()
    assert by_name.commit != by_id.commit
    assert reproduce._commit(project.root, by_id, tmp_path / "made") == by_name.commit


@pytest.mark.soak
def test_a_run_of_lost_code_comes_out_otherwise_and_its_files_are_named(project: Project) -> None:
    project.run("dvc", "exp", "remove", "first")
    asked = run_id(project)
    ((artifacts,),) = project.mlflow(f"select artifact_uri from runs where run_uuid = '{asked}'")
    # as of a run that was not evaluated, to save the time
    (Path(artifacts.removeprefix("file://")) / "evaluate/metrics.json").unlink()
    done = reproduce_command(project, asked, "--keep")
    assert done.returncode == 2, done.stdout
    assert re.search(rf"^  code +differs: {CHANGED}$", done.stdout, re.MULTILINE), done.stdout
    for kind in ("data", "params", "packages", "hardware"):
        assert re.search(rf"^  {kind} +same$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^  validation gain, dB: mean +\S+ +\S+ +[+-]\S+$", done.stdout, re.MULTILINE), done.stdout
    assert "stage evaluate" not in done.stdout
    verdict = r"^earthprior: run first.* came out otherwise \(network.safetensors, history.csv\): code differs; "
    assert re.search(verdict + r"validation gain \S+ -> \S+ dB", done.stdout, re.MULTILINE), done.stdout
    (kept,) = (project.root / "work/reproduce").iterdir()
    assert f"kept in work/reproduce/{kept.name}: " in done.stdout
    assert read_json(kept / "copy/results/pretrain/config.json")["params"]["lr"] == 2e-3


@pytest.mark.soak
def test_sigterm_leaves_nothing(project: Project) -> None:
    home = project.root / "work/reproduce"
    before = set(home.iterdir())
    command = subprocess.Popen(
        [*COMMAND, run_id(project)], cwd=project.root, env=project.environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not [path for path in home.glob("*/copy/data") if path.parents[1] not in before]:
        assert command.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    command.send_signal(signal.SIGTERM)
    said, _ = command.communicate()
    assert command.returncode == 143, said
    assert said.splitlines()[-2:] == [
        "earthprior: stopped by SIGTERM", f"continue with: python -m earthprior reproduce {run_id(project)}",
    ]  # fmt: skip
    assert set(home.iterdir()) == before


@pytest.mark.soak
def test_chips_come_by_their_md5_from_whatever_remote_has_them(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    found = recorded.find(project.root, run_id(project), tmp_path / "found")
    chip = project.root / "data/chips/chip_000.tif"
    pixels = chip.read_bytes()
    # a remote of this checkout alone, whose path is relative to it; and a commit with other chips than the run's
    project.run("dvc", "remote", "add", "--local", "storage", str(Path("..") / "storage"))
    project.run("dvc", "push", "-q", "-r", "storage", "data.dvc")
    chip.unlink()
    chip.write_bytes(pixels + b"more")
    project.run("dvc", "add", "-q", "data")
    project.run("git", "commit", "-qam", "other chips")
    shutil.rmtree(project.root / ".dvc/cache")

    copy = tmp_path / "copy"
    checkout.at(project.root, project.run("git", "rev-parse", "HEAD").strip(), copy)
    checkout.get_chips(project.root, found, copy)
    assert (copy / "data/chips/chip_000.tif").read_bytes() == pixels
    assert data_version(copy) == (found.data_md5, 25)

    unknown = recorded.RecordedRun(**{**vars(found), "data_md5": f"{'0' * 32}.dir"})
    with pytest.raises(EarthPriorError, match=r"not in DVC's cache nor in the remotes sample, storage; fetch them"):
        checkout.get_chips(project.root, unknown, copy)


@pytest.mark.soak
def test_chips_outside_dvc_cannot_be_had_again(project: Project, tmp_path: Path) -> None:
    found = recorded.find(project.root, run_id(project), tmp_path)
    elsewhere = {**found.content, "data": {**found.content["data"], "dir": "chips/of/mine"}}
    with pytest.raises(EarthPriorError, match=r"read its chips from chips/of/mine .*dvc add PATH -o data"):
        reproduce._check(recorded.RecordedRun(**{**vars(found), "content": elsewhere}))


def test_a_commit_that_is_not_here_is_named(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    with pytest.raises(EarthPriorError, match=r"commit 1111111111.* is not in this repository; git fetch"):
        checkout.at(tmp_path, "1" * 40, tmp_path / "copy")


def test_a_stage_that_fails_under_other_code_says_so(tmp_path: Path) -> None:
    stages = {name: {"cmd": "python -c exit(3)"} for name in ("stats", "pretrain")}
    write_json(tmp_path / "dvc.yaml", {"stages": stages})  # JSON is YAML
    write_json(tmp_path / "environment.json", {"code": {"losses.py": "0" * 64}})
    then = recorded.RecordedRun("asked", "title", {}, "1" * 40, "a.dir", pd.DataFrame(), {}, tmp_path)
    told = r"run asked could not be made again: its stage stats ended with exit code 3 .*\(src/earthprior/losses.py\)"
    with pytest.raises(EarthPriorError, match=told):
        reproduce._run_stages(then, tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages: []")
    with pytest.raises(EarthPriorError, match="has no stages stats, pretrain"):
        reproduce._run_stages(then, tmp_path)
