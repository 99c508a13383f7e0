from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from earthprior import cli
from earthprior.errors import DataError, DivergedError, Interrupted, ParamsError, StorageError
from earthprior.files import write_json
from earthprior.params import Params, load

VERBS = [
    "stats", "pretrain", "evaluate", "tune", "compare", "reproduce", "catalog", "synth", "augmentations", "preset",
    "import-config", "import-weights",
]  # fmt: skip


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


@pytest.fixture
def root(tmp_path: Path, make_params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's root with its params.yaml, as the working directory."""
    write_json(tmp_path / "params.yaml", make_params().model_dump(mode="json"))  # JSON is YAML
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails_with(error: BaseException) -> Callable[..., None]:
    def run(*arguments: Any) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("chips/a.tif (catalog line 3): truncated"), 2),
        (ParamsError("lr: -1 is not allowed"), 2),
        (DivergedError("training diverged at step 7"), 3),
        (StorageError("checkpoint of step 9 not written"), 4),
        (OSError(errno.ENOSPC, "No space left on device", "results/stats/stats.json"), 4),
        (Interrupted("saved step 5 of 9", 2), 130),
        (Interrupted("saved step 5 of 9", 15), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_is_one_message_and_an_exit_code(
    root: Path, error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("earthprior.stages.stats.run", fails_with(error))
    result = invoke("stats")
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("earthprior: ")
    assert str(error) in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_where_it_came_from(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("earthprior.stages.stats.run", fails_with(DataError("chips/a.tif: truncated")))
    result = invoke("--debug", "stats")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "fails_with" in result.stderr or "in run" in result.stderr
    assert result.stderr.endswith("earthprior: chips/a.tif: truncated\n")


def test_our_own_bugs_keep_their_traceback(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("earthprior.stages.stats.run", fails_with(PermissionError(errno.EACCES, "denied", "x")))
    result = invoke("stats")
    assert result.exit_code == 1
    assert isinstance(result.exception, PermissionError)


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
