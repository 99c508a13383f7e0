from __future__ import annotations

import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
import torch
from click.testing import CliRunner, Result

from earthprior import cli, last_words
from earthprior.errors import DataError, DivergedError, Interrupted, ParamsError, StorageError
from earthprior.files import write_json
from earthprior.params import Params, load

VERBS = [
    "stats", "pretrain", "evaluate", "finetune", "predict", "embed", "tune", "bench", "sync-tracking", "compare",
    "reproduce", "export", "check", "catalog", "synth", "augmentations", "preset", "import-config", "import-weights",
]  # fmt: skip


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


@pytest.fixture
def root(tmp_path: Path, make_params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's root with its params.yaml, as the working directory."""
    write_json(tmp_path / "params.yaml", make_params().model_dump(mode="json"))  # JSON is YAML
    (tmp_path / "downstream").mkdir()
    shutil.copy(Path(__file__).parents[1] / "downstream/params.yaml", tmp_path / "downstream")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/earthprior"])
    for name in ("DVC_STAGE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def fails_with(error: BaseException) -> Callable[..., None]:
    def run(*arguments: Any) -> None:
        raise error

    return run


MENDED, STOPPED = "then continue with: earthprior stats", "continue with: earthprior stats"


@pytest.mark.parametrize(
    ("error", "code", "said", "last"),
    [
        (DataError("chips/a.tif (catalog line 3): truncated"), 2, "chips/a.tif (catalog line 3): truncated", MENDED),
        (ParamsError("lr: -1 is not allowed"), 2, "lr: -1 is not allowed", MENDED),
        (MemoryError(), 2, "out of memory. End other programs that use it, lower operation.readers", MENDED),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                "to allocate 99 bytes. Error code 12 (Cannot allocate memory)"
            ),
            2,
            (
                "out of memory (DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes. Error code "
                "12 (Cannot allocate memory)). End other programs that use it, lower operation.readers, cut each batch "
                "into more parts (accumulation_steps), or lower batch_size or data.crop_px"
            ),
            MENDED,
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation"),
            2,
            (
                "out of memory (CUDA out of memory. Tried to allocate 2 GiB.). End other programs that use it, lower "
                "operation.readers, set operation.device to cpu, cut"
            ),
            MENDED,
        ),
        # where another program holds the device's memory
        (RuntimeError("CUDA error: out of memory\nFor"), 2, "out of memory (CUDA error: out of memory)", MENDED),
        (DivergedError("training diverged at step 7"), 3, "training diverged at step 7", MENDED),
        (StorageError("checkpoint of step 9 not written"), 4, "checkpoint of step 9 not written", STOPPED),
        (OSError(errno.ENOSPC, "No space left on device"), 4, "No space left on device; free some space", STOPPED),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a/b.csv"), 4, "a/b.csv: Disk quota exceeded; your", STOPPED),
        (OSError(errno.EFBIG, "File too large"), 4, "File too large; a limit on the size of files", STOPPED),
        (OSError(errno.EIO, "Input/output error"), 4, "Input/output error; the disk or network share", STOPPED),
        (OSError(errno.EROFS, "Read-only file system", "x"), 4, "x: Read-only file system; this file system", STOPPED),
        (PermissionError(errno.EACCES, "Permission denied", "x/y"), 4, "x/y: Permission denied; look at its", STOPPED),
        (FileNotFoundError(errno.ENOENT, "No such file", "x/y"), 4, "x/y: No such file; it was there", STOPPED),
        (FileExistsError(errno.EEXIST, "File exists", "x"), 4, "x: File exists; a file stands", STOPPED),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "x"), 4, "x: Not a directory; a file stands", STOPPED),
        (Interrupted("saved step 5 of 9", 2), 130, "saved step 5 of 9", STOPPED),
        (Interrupted("saved step 5 of 9", 15), 143, "saved step 5 of 9", STOPPED),
        (KeyboardInterrupt(), 130, "stopped by SIGINT", STOPPED),
    ],
    ids=repr,
)
def test_an_error_is_one_message_an_exit_code_and_the_command_that_continues(
    root: Path, error: BaseException, code: int, said: str, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("earthprior.stages.stats.run", fails_with(error))
    result = invoke("stats")
    assert result.exit_code == code
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith(f"earthprior: {said}")
    assert second == last


def test_a_dvc_that_has_died_was_asked_before_what_it_was_given(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dvc = ["python", "/env/bin/dvc", "exp", "run", "-S", "lr=3e-4"]
    monkeypatch.setenv("DVC_STAGE", "stats")
    monkeypatch.setenv("DVC_EXP_NAME", "lean-tofu")
    monkeypatch.setattr(psutil.Process, "cmdline", lambda process: dvc)

    def run(*arguments: Any) -> None:
        dvc.clear()
        raise StorageError("no room")

    monkeypatch.setattr("earthprior.stages.stats.run", run)
    assert invoke("stats").stderr.splitlines()[-1] == "continue with: dvc exp run -S lr=3e-4"


@pytest.mark.parametrize("verb", [["sync-tracking"], ["reproduce", "lean-tofu"]])
def test_outside_a_project_no_verb_pretends(tmp_path: Path, verb: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*verb)
    assert result.exit_code == 2
    assert "params.yaml not found" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_request_that_comes_at_the_very_end_silences_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dvc's death is seen twice, by the training, which saves, and then by whoever waits for it to end."""
    say = last_words.say

    def asked_meanwhile(*arguments: Any) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return say(*arguments)

    monkeypatch.setattr(last_words, "say", asked_meanwhile)
    monkeypatch.setattr("earthprior.stages.stats.run", fails_with(StorageError("checkpoint of step 9 not written")))
    result = invoke("stats")
    assert result.exit_code == 4
    assert result.stderr == f"earthprior: checkpoint of step 9 not written\n{STOPPED}\n"


def test_debug_shows_where_it_came_from(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("earthprior.stages.stats.run", fails_with(DataError("chips/a.tif: truncated")))
    result = invoke("--debug", "stats")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "fails_with" in result.stderr or "in run" in result.stderr
    assert result.stderr.endswith("earthprior: chips/a.tif: truncated\nthen continue with: earthprior --debug stats\n")


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), ConnectionError("no answer"), OSError("what?")])
def test_our_own_bugs_keep_their_traceback_and_say_whose_they_are(
    root: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("earthprior.stages.stats.run", fails_with(error))
    result = invoke("stats")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    *_, said, last = result.stderr.splitlines()
    assert said.startswith(f"earthprior: this is a fault of EarthPrior itself ({type(error).__name__}: {error})")
    assert last == "continue with: earthprior stats"


# What stands behind each verb, and arguments under which it is called.
CALLS = {
    "stats": ("stages.stats.run", []),
    "pretrain": ("stages.pretrain.run", ["--accept-code"]),
    "evaluate": ("stages.evaluate.run", []),
    "finetune": ("tools.finetune.run", []),
    "predict": ("tools.predict.run", ["my scene.tif", "--overlap", "8"]),
    "embed": ("tools.embed.run", ["data/catalog.csv", "--out", "features.parquet"]),
    "tune": ("tools.tune.run", ["--jobs", "2"]),
    "bench": ("tools.bench.run", ["--jobs", "2"]),
    "sync-tracking": ("tools.sync_tracking.run", []),
    "compare": ("tools.compare.run", ["a b", "c"]),
    "reproduce": ("tools.reproduce.run", ["lean-tofu"]),
    "export": ("tools.export.run", ["--run", "lean-tofu", "--out", "my backbone"]),
    "check": ("tools.check.run", ["data", "--readers", "2"]),
    "catalog": ("tools.catalog.run", ["data"]),
    "synth": ("tools.synth.run", ["data", "-n", "6"]),
    "augmentations": ("tools.augmentations.run", []),
    "preset": ("tools.preset.run", ["fast"]),
    "import-config": ("tools.import_config.run", ["ssl_train.yaml"]),
    "import-weights": ("tools.import_weights.run", ["best.pth"]),
    "experiment": ("tools.experiment.run", ["pretrain", "--lr", "3e-4"]),
}


@pytest.mark.parametrize("verb", CALLS)
def test_every_verb_ends_with_the_command_as_it_was_typed(
    root: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CALLS.keys() == cli.main.commands.keys()
    name, arguments = CALLS[verb]
    monkeypatch.setattr(f"earthprior.{name}", fails_with(Interrupted("stopped", signal.SIGTERM)))
    result = invoke(verb, *arguments)
    assert result.exit_code == 143
    assert result.stderr.splitlines()[-1] == f"continue with: {shlex.join(['earthprior', verb, *arguments])}"


def test_an_exit_code_of_dvc_is_handed_on_with_last_words(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("earthprior.tools.experiment.run", lambda *_: 255)
    result = invoke("experiment")
    assert result.exit_code == 255
    assert result.stderr == "continue with: earthprior experiment\n"
    monkeypatch.setattr("earthprior.tools.experiment.run", lambda *_: 0)
    assert (invoke("experiment").exit_code, invoke("experiment").stderr) == (0, "")


def test_outside_a_project_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("stats")
    assert result.exit_code == 2
    assert "params.yaml not found" in result.stderr


@pytest.mark.parametrize(("typed", "meant"), [("pretrian", "pretrain"), ("stat", "stats"), ("eval", "evaluate")])
def test_a_misspelt_command_is_answered_with_the_nearest(typed: str, meant: str) -> None:
    result = invoke(typed)
    assert result.exit_code == 2
    assert f"'{meant}'" in result.stderr


def test_the_help_lists_every_verb_stages_first() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert [verb for verb, command in cli.main.commands.items() if not command.hidden] == VERBS
    places = [result.output.index(f"\n  {verb} ") for verb in VERBS]
    assert places == sorted(places)
    assert "..." not in result.output[places[0] :], "a summary is too long for the list"


@pytest.mark.parametrize("verb", [*VERBS, "experiment"])
def test_every_verb_has_help_with_an_example_that_parses(verb: str) -> None:
    result = invoke(verb, "--help")
    assert result.exit_code == 0
    command = cli.main.commands[verb]
    examples = [line.split("Example: ", 1)[1] for line in (command.help or "").splitlines() if "Example: " in line]
    assert examples
    for example in examples:
        assert example in result.output
        program, name, *arguments = example.split()
        assert (program, name) == ("earthprior", verb)
        command.make_context(verb, arguments)
    assert all(option.help for option in command.params if isinstance(option, click.Option))


@pytest.mark.parametrize("verb", ["stats", "pretrain", "evaluate"])
def test_a_stage_gets_the_params_and_the_root(root: Path, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(f"earthprior.stages.{verb}.run", lambda *arguments: seen.append(arguments))
    assert invoke(verb).exit_code == 0
    ((params, folder, *rest),) = seen
    assert params == load(root / "params.yaml")
    assert folder == root
    assert rest == ([False] if verb == "pretrain" else [])


@pytest.mark.parametrize(
    ("arguments", "environment", "accepted"),
    [([], {}, False), (["--accept-code"], {}, True), ([], {"EARTHPRIOR_ACCEPT_CODE": "1"}, True)],
)
def test_changed_code_is_accepted_by_option_or_environment(
    root: Path, arguments: list[str], environment: dict[str, str], accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("earthprior.stages.pretrain.run", lambda params, root, accept: seen.append(accept))
    assert CliRunner(env=environment).invoke(cli.main, ["pretrain", *arguments]).exit_code == 0
    assert seen == [accepted]


def test_the_tools_do_what_they_are_asked(root: Path) -> None:
    made = invoke("synth", "data", "-n", "6", "--size", "16", "--workers", "1", "--validate-fraction", "0.5")
    assert made.exit_code == 0, made.output
    assert len(list((root / "data/chips").glob("*.tif"))) == 6

    refused = invoke("catalog", "data")
    assert refused.exit_code == 2
    assert "catalog.csv" in refused.stderr
    out = root / "data/other.csv"
    cataloged = invoke("catalog", "data/chips", "--out", str(out), "--seed", "3", "--validate-fraction", "0.5")
    assert cataloged.exit_code == 0, cataloged.output
    assert out.read_text().startswith("image,usage,group")

    (root / "presets").mkdir()
    (root / "presets/fast.yaml").write_text("epochs: 3\n")
    laid = invoke("preset", "fast")
    assert laid.exit_code == 0, laid.output
    assert load(root / "params.yaml").epochs == 3
    assert invoke("preset", "slow").exit_code == 2


def test_help_needs_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'mlflow', 'rasterio', 'pandas', 'matplotlib']));"
        "sys.argv = ['earthprior', 'stats', '--help']; from earthprior.cli import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "statistics" in done.stdout
