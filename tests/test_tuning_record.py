"""The best trial as a DVC experiment, where an earlier process was killed while it made it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from earthprior.errors import EarthPriorError, Interrupted
from earthprior.tuning import record as recording

GAINS = {"gain_db/mean": 1.5, "gain_db/rho_1": 1.5}
# Looks like a `dvc exp run` from outside, and makes its experiment: a file, when it is told to.
DVC = """
import pathlib, sys, time
root = pathlib.Path(sys.argv[-1])
while not (root / "go").exists():
    time.sleep(0.02)
if (root / "go").read_text() == "well":
    (root / sys.argv[sys.argv.index("-n") + 1]).touch()
"""
Orphan = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def orphan() -> Iterator[Orphan]:
    begun = []

    def start(root: Path, name: str = "mine-003", copy: str = ".") -> subprocess.Popen[bytes]:
        words = ["exp", "run", "--temp", "-n", name, "-S", "lr=0.01", str(root)]
        (root / copy).mkdir(parents=True, exist_ok=True)
        begun.append(subprocess.Popen([sys.executable, "-c", DVC, *words], cwd=root / copy))
        while recording.running(root, name) is None:
            assert begun[-1].poll() is None
            time.sleep(0.02)
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC repository in which an experiment is a file of its name, and whose dvc is only counted."""
    root = tmp_path / "project"
    (root / ".dvc").mkdir(parents=True)
    monkeypatch.setattr(recording, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(recording, "git_commit", lambda root: "1a2b3c")
    monkeypatch.setattr(recording, "_gains", lambda root, name: GAINS if (root / name).exists() else None)

    def run(command: list[str], cwd: Path, **options: Any) -> SimpleNamespace:
        (cwd / "runs.txt").open("a").write("run\n")
        (cwd / command[command.index("-n") + 1]).touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(recording, "subprocess", SimpleNamespace(run=run))
    return root


TRIAL: Any = SimpleNamespace(number=3, user_attrs={"settings": {"lr": 0.01}, "gain_db": {"mean": 1.5}})


def later(action: Callable[[], Any]) -> threading.Timer:
    timer = threading.Timer(0.3, action)
    timer.start()
    return timer


@pytest.mark.parametrize("copy", [".", ".dvc/tmp/exps/standalone/tmp1a2b"])
def test_an_experiment_that_a_killed_process_left_running_is_waited_for(
    root: Path, orphan: Orphan, copy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dvc = orphan(root, copy=copy)
    timer = later(lambda: (root / "go").write_text("well"))
    recording.record(root, "mine", TRIAL)
    timer.join()
    assert not (root / "runs.txt").exists(), "never a second time"
    said = capsys.readouterr()
    assert f"mine-003 is being run already, by process {dvc.pid}" in said.err
    assert "the same gains as the trial's, to the last digit" in said.out


def test_one_that_fails_meanwhile_is_run(root: Path, orphan: Orphan) -> None:
    orphan(root)
    timer = later(lambda: (root / "go").write_text("badly"))
    recording.record(root, "mine", TRIAL)
    timer.join()
    assert (root / "runs.txt").read_text() == "run\n"


@pytest.mark.parametrize(("elsewhere", "name"), [(True, "mine-003"), (False, "mine-0031")])
def test_another_folder_or_name_is_not_waited_for(
    root: Path, tmp_path: Path, orphan: Orphan, elsewhere: bool, name: str
) -> None:
    orphan(tmp_path if elsewhere else root, name)
    recording.record(root, "mine", TRIAL)
    assert (root / "runs.txt").read_text() == "run\n"


def test_a_request_to_stop_is_heard_while_another_runs_it(root: Path, orphan: Orphan) -> None:
    dvc = orphan(root)
    timer = later(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="mine-003 goes on in process") as caught:
        recording.record(root, "mine", TRIAL)
    timer.join()
    assert caught.value.exit_code == 143
    assert dvc.poll() is None
    assert not (root / "runs.txt").exists()


def test_one_that_fails_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = SimpleNamespace(run=lambda *arguments, **options: SimpleNamespace(returncode=1))
    monkeypatch.setattr(recording, "subprocess", failing)
    with pytest.raises(EarthPriorError, match="DVC experiment mine-003 failed"):
        recording.record(root, "mine", TRIAL)
