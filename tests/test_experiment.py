"""`earthprior experiment`, with a program in dvc's place that notes what it is asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from earthprior.errors import EarthPriorError, ParamsError
from earthprior.files import write_json
from earthprior.params import Params
from earthprior.tools import experiment

NOTE = 'echo "$*" >> calls\n'
ROOT = Path(__file__).parents[1]


@pytest.fixture
def root(tmp_path: Path, make_params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with chips, and `dvc` on PATH."""
    write_json(tmp_path / "params.yaml", make_params().model_dump(mode="json"))  # JSON is YAML
    (tmp_path / "data").mkdir()
    put_dvc(tmp_path, NOTE)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    return tmp_path


def put_dvc(root: Path, script: str) -> None:
    (root / "bin").mkdir(exist_ok=True)
    (root / "bin/dvc").write_text(f"#!/bin/sh\n{script}")
    (root / "bin/dvc").chmod(0o755)


def calls(root: Path) -> list[str]:
    return (root / "calls").read_text().splitlines() if (root / "calls").exists() else []


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        ([], "repro"),
        (["stats"], "repro stats"),
        (["--lr", "3e-4"], "exp run -S lr=3e-4"),
        (
            ["pretrain", "--lr", "3e-4", "--diffusion.noise_schedule", "cosine"],
            "exp run -S lr=3e-4 -S diffusion.noise_schedule=cosine pretrain",
        ),
        (
            ["pretrain", "--augmentation.br_range", "[-0.1, 0.1]"],
            "exp run -S augmentation.br_range=[-0.1, 0.1] pretrain",
        ),
        (
            ["--augmentation.flip", "False", "--grad_clip", "null"],
            "exp run -S augmentation.flip=False -S grad_clip=null",
        ),
        (["--augmentation.rotation_degree", "-15..15"], "exp run -S augmentation.rotation_degree=-15..15"),
    ],
)
def test_what_mlflow_appends_becomes_an_experiment(
    root: Path, arguments: list[str], call: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiment.run(root, arguments) == 0
    assert calls(root) == [call]
    assert capsys.readouterr().out.replace("'", "") == f"earthprior: dvc {call}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--noise_schedule", "cosine"], ["noise_schedule: unknown key; did you mean diffusion.noise_schedule?"]),
        (["--difusion.timesteps", "30"], ["difusion.timesteps: unknown key; did you mean diffusion.timesteps?"]),
        (["--lr", "fast", "--loss_fn", "msse"], ["2 faults", "lr: 'fast' is not allowed", "'charbonnier'"]),
        (["--lr", ""], ["lr: '' is not allowed"]),
        (["--lr", "1e-4,3e-4"], ["dvc exp run --queue -S lr=1e-4,3e-4"]),
        (["--data.dir", "it's"], ['data.dir: "it\'s" cannot be read']),
        (["pretrain", "--lr"], ["pretrain --lr: this is no stage and pairs"]),
        (["pretrain", "evaluate"], ["-P key=value"]),
        (["--lr", "1", "--lr", "2"], ["each key once"]),
        (["pretrain", "lr", "1"], ["pairs of --KEY VALUE"]),
    ],
)
def test_faults_are_found_before_dvc_writes_anything(root: Path, arguments: list[str], said: list[str]) -> None:
    before = (root / "params.yaml").read_bytes()
    with pytest.raises(ParamsError) as fault:
        experiment.run(root, arguments)
    assert [part for part in said if part not in str(fault.value)] == []
    assert calls(root) == []
    assert (root / "params.yaml").read_bytes() == before


@pytest.mark.parametrize(("script", "code"), [("exit 255", 255), ("kill -TERM $$", 143)])
def test_the_exit_code_is_that_of_dvc(root: Path, script: str, code: int) -> None:
    put_dvc(root, script)
    assert experiment.run(root, []) == code


def test_without_dvc_it_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(root / "none"))
    with pytest.raises(EarthPriorError, match="activate the environment"):
        experiment.run(root, [])


@pytest.mark.parametrize(("has_remote", "pulled"), [(True, "pull data"), (False, "pull -r sample data")])
def test_chips_that_are_not_there_are_pulled(root: Path, has_remote: bool, pulled: str) -> None:
    (root / "data").rmdir()
    (root / "data.dvc").touch()
    put_dvc(root, f'[ "$1" = remote ] && exit {int(not has_remote)}\n{NOTE}')
    assert experiment.run(root, ["stats"]) == 0
    assert calls(root) == [pulled, "repro stats"]


def test_half_of_the_chips_is_not_taken_for_all(root: Path) -> None:
    (root / "data").rmdir()
    (root / "data.dvc").touch()
    put_dvc(root, f"{NOTE}mkdir data; exit 1")
    assert experiment.run(root, ["stats"]) == 1
    assert calls(root) == ["remote default", "pull -r sample data"]
    assert not (root / "data").exists()


@pytest.mark.parametrize("killed", ["the verb", "who started it"])
def test_a_stage_is_asked_to_end_and_dvc_waited_for(root: Path, killed: str) -> None:
    stage = "trap 'sleep 0.3; echo saved >> calls; exit 143' TERM; touch ready; while :; do sleep 0.05; done; :"
    put_dvc(root, f'sh -c "{stage}"\necho "dvc saw $?" >> calls\nexit 255')
    # a shell that stays until its child ends, as `mlflow run` does
    started = start(root, [] if killed == "the verb" else ["sh", "-c", '"$@"; true', "sh"])
    started.terminate()
    assert started.wait() == (255 if killed == "the verb" else -signal.SIGTERM)
    wait_for(lambda: calls(root) == ["saved", "dvc saw 143"])


def test_dvc_is_asked_itself_where_it_runs_no_stage(root: Path) -> None:
    put_dvc(root, "touch ready\nexec sleep 60")
    started = start(root, [])
    started.terminate()
    assert started.wait() == 128 + signal.SIGTERM


def start(root: Path, starter: list[str]) -> subprocess.Popen[bytes]:
    """The verb in a process of its own, once dvc says that it is at work."""
    verb = [sys.executable, "-m", "earthprior", "experiment", "pretrain"]
    started = subprocess.Popen([*starter, *verb], cwd=root, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    wait_for(lambda: (root / "ready").exists())
    return started


def wait_for(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("text", ["x" * 100_000, "{a: " + "9" * 100_000, ",".join("12" * 50_000), "'" + "y" * 100_000])
def test_a_value_without_end_is_refused_in_a_few_words(text: str) -> None:
    for key in ("lr", "k" * 100_000):
        with pytest.raises(ParamsError) as caught:
            experiment._check(ROOT / "params.yaml", {key: text})
        assert len(str(caught.value)) < 2000
