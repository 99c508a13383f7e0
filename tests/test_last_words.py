from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from earthprior.errors import DataError
from earthprior.files import write_json
from earthprior.last_words import continue_command, say
from earthprior.params import Params

LAUNCHED = (
    "DVC_STAGE", "DVC_EXP_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "TORCHELASTIC_RUN_ID",
)  # fmt: skip


@pytest.fixture(autouse=True)
def from_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "program", "arguments", "command"),
    [
        ({}, "/somewhere/earthprior/__main__.py", ["pretrain"], "python -m earthprior pretrain"),
        ({}, "/somewhere/bin/earthprior", ["pretrain"], "earthprior pretrain"),
        ({}, "earthprior", ["--debug", "compare", "a b"], "earthprior --debug compare 'a b'"),
        ({"WORLD_SIZE": "2"}, "earthprior", ["pretrain"], "torchrun --nproc-per-node=2 -m earthprior pretrain"),
        (
            {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}, "earthprior", ["pretrain"],
            "torchrun --nnodes=2 --nproc-per-node=4 -m earthprior pretrain",
        ),
        ({"DVC_STAGE": "pretrain"}, "earthprior", ["pretrain"], "dvc repro"),
        ({"DVC_STAGE": "pretrain", "DVC_EXP_NAME": "x"}, "earthprior", ["pretrain"], "the same dvc exp run"),
    ],
)  # fmt: skip
def test_the_command_that_continues(
    environment: dict[str, str], program: str, arguments: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [program, "of the tests"])
    assert continue_command(arguments) == command


@pytest.mark.parametrize(
    ("parent", "command"),
    [
        (["/env/bin/python", "/env/bin/dvc", "repro", "-f", "pretrain"], "dvc repro -f pretrain"),
        (["python", "-m", "dvc", "exp", "run", "-S", "lr=3e-4"], "dvc exp run -S lr=3e-4"),
        (["python", "-m", "dvc", "exp", "queue-worker", "dvc-exp-1"], "the same dvc exp run"),
        (["bash", "dvc.sh"], "the same dvc exp run"),
    ],
)
def test_under_dvc_it_is_what_dvc_was_given(parent: list[str], command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "pretrain")
    monkeypatch.setenv("DVC_EXP_NAME", "lean-tofu")
    monkeypatch.setattr(psutil.Process, "cmdline", lambda process: parent)
    assert continue_command(["pretrain"]) == command


def environment(folder: Path, **more: str) -> dict[str, str]:
    """For a program that puts `folder` first on its path: a sitecustomize.py there runs before it."""
    path = os.pathsep.join([str(folder), *(entry for entry in sys.path if entry)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


# Stops the program inside the verb, in the middle of a file.
HANGING = """
import sys, time
from pathlib import Path
import earthprior.stages, types
stage = types.ModuleType("earthprior.stages.{stage}")
def run(*arguments):
    from earthprior.files import replacing
    with replacing(Path("results/{stage}/out.json")) as temporary:
        temporary.write_text("half")
        Path("ready").touch()
        time.sleep(30)
stage.run = run
sys.modules["earthprior.stages.{stage}"] = stage
"""


@pytest.fixture
def root(tmp_path: Path, make_params: Callable[..., Params]) -> Path:
    write_json(tmp_path / "params.yaml", make_params().model_dump(mode="json"))  # JSON is YAML
    return tmp_path


def test_a_stop_while_modules_are_imported_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "earthprior.cli":
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "earthprior.cli", raising=False)
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("earthprior", run_name="__main__")
    assert caught.value.code == 130
    assert "the same command begins" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "number"),
    [("stats", signal.SIGTERM), ("evaluate", signal.SIGINT), ("pretrain", signal.SIGTERM), ("stats", signal.SIGHUP)],
)
def test_a_signal_ends_any_verb_with_its_code_and_no_partial_file(
    root: Path, stage: str, number: signal.Signals
) -> None:
    (root / "sitecustomize.py").write_text(HANGING.format(stage=stage))
    with subprocess.Popen(
        [sys.executable, "-m", "earthprior", stage], cwd=root, env=environment(root), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        wait_for(lambda: (root / "ready").exists(), process)
        process.send_signal(number)
        out, said = process.communicate(timeout=20)
    assert process.returncode == 128 + number, said
    assert said.splitlines() == [
        f"earthprior: stopped by {number.name}", f"continue with: python -m earthprior {stage}",
    ]  # fmt: skip
    assert out == ""
    assert not list((root / f"results/{stage}").iterdir())


def wait_for(happened: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


# The console script's way in, and a verb that says much or little.
TALKING = "import sys; from earthprior import cli; {patch}; sys.argv[0] = 'earthprior'; sys.exit(cli.main())"


@pytest.mark.parametrize("lines", [3, 100_000])
def test_a_reader_that_goes_away_is_no_traceback(root: Path, lines: int) -> None:
    patch = f"from earthprior.stages import stats; stats.run = lambda *_: print('a line\\n' * {lines})"
    program = shlex.join([sys.executable, "-c", TALKING.format(patch=patch), "stats"])
    done = subprocess.run(
        ["bash", "-c", f"{program} | true; echo ${{PIPESTATUS[0]}}"], cwd=root, env=environment(root),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_a_line_is_written_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or those of two processes would come into one another."""
    pieces: list[bytes] = []

    class Terminal(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, piece: Any) -> int:
            pieces.append(bytes(piece))
            return len(piece)

    with monkeypatch.context() as patch:
        # As `python -u` opens it, which torchrun calls.
        patch.setattr(sys, "stderr", io.TextIOWrapper(Terminal(), write_through=True))  # type: ignore[type-var]
        assert say(DataError("chips/a.tif: truncated"), None, "dvc repro pretrain", debug=False) == 2
    first, last = filter(None, pieces)
    assert first == b"earthprior: chips/a.tif: truncated\n"
    assert re.fullmatch(rb"then continue with: dvc repro pretrain\n", last)


def test_a_folder_that_may_not_be_written_is_told_in_words(root: Path) -> None:
    """By the console script, whose name the last line has; a file stands where results/ should be."""
    (root / "results").write_text("mine")
    patch = (
        "from pathlib import Path; from earthprior.files import write_json; from earthprior.stages import stats;"
        "stats.run = lambda *_: write_json(Path('results/stats/stats.json'), {})"
    )
    done = subprocess.run(
        [sys.executable, "-c", TALKING.format(patch=patch), "stats"], cwd=root, env=environment(root),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    first, last = done.stderr.splitlines()
    assert first.startswith("earthprior: results"), first
    assert "move it away" in first
    assert last == "continue with: earthprior stats"
