"""`earthprior experiment`, which MLproject calls: `--lr 3e-4` becomes `dvc exp run -S lr=3e-4`.

MLflow appends `-P lr=3e-4` in that form to the command of an entry point that does not declare `lr`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from earthprior import params
from earthprior.errors import EarthPriorError, ParamsError
from earthprior.params.plain import LONGEST_TEXT, key_shown, shown
from earthprior.tracking_store import EXPERIMENT, RunRef, locate
from earthprior.training.stop import stop_requests

POLL_SECONDS = 0.1


def run(root: Path, arguments: Sequence[str]) -> int:
    """Run the pipeline through DVC: as an experiment where values are given, else `dvc repro`.

    Args:
        root: The project's root, with dvc.yaml and params.yaml.
        arguments: `[STAGE] [--KEY VALUE]...`, with any dotted key of params.yaml.

    Returns:
        The exit code of dvc, 128 + number of the signal that ended it.

    Raises:
        ParamsError: A key that does not exist, or a value that it cannot have; params.yaml is as it was.
        EarthPriorError: No dvc.
    """
    stage, values = _split(arguments)
    _check(root / "params.yaml", values)
    overrides = [word for key, value in values.items() for word in ("-S", f"{key}={value}")]
    command = ["dvc", *(["exp", "run", *overrides] if values else ["repro"]), *stage]
    if shutil.which("dvc") is None:
        raise EarthPriorError("dvc is not on PATH; activate the environment that it is installed in")
    if os.environ.get("MLFLOW_EXPERIMENT_ID") == "0":
        print(
            f"this run is kept in MLflow's experiment Default; with --experiment-name {EXPERIMENT} it stands beside "
            "the others"
        )
    code = _pull_chips(root) or _call(command, root)
    if code == 0 and (run_id := os.environ.get("MLFLOW_RUN_ID")):
        _explain_if_empty(root, run_id, shlex.join(command))
    return code


def _split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The stage, if one is named, and the texts of the values by their keys."""
    count = 1 if arguments and not arguments[0].startswith("--") else 0
    words = arguments[count:]
    values = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=False)}
    if len(words) != 2 * len(values) or not all(key.startswith("--") for key in words[::2]):
        raise ParamsError(
            f"{shlex.join(arguments)}: this is no stage and pairs of --KEY VALUE, each key once; to mlflow run, give "
            "every value as -P key=value"
        )
    return list(arguments[:count]), values


def _check(path: Path, values: Mapping[str, str]) -> None:
    """See `run`: what DVC would only find out after it has written params.yaml."""
    content = params.load(path).model_dump(mode="json")
    known = set(params.known_keys())
    for key, text in values.items():
        # Unknown keys stay whole: the nearest known one is looked for by all of their name.
        *sections, last = key.split(".") if key in known else [key]
        node = content
        for section in sections:
            node = node[section]
        node[last] = _read(key, text)
    given = key_shown(" ".join(f"{key}={text}" for key, text in values.items()))
    params.parse(content, f"{path.name} with {given}")


def _read(key: str, text: str) -> Any:
    """The value that DVC reads from a text."""
    from dvc.utils.hydra import to_hydra_overrides

    if len(text) > LONGEST_TEXT:
        # Its parser takes minutes over what no key takes in the end.
        raise ParamsError(
            f"{key_shown(key)}: {shown(text)} has {len(text):,} characters; no value needs {LONGEST_TEXT:,}"
        )
    try:
        (override,) = to_hydra_overrides([f"value={text}"])
    except Exception as error:  # noqa: BLE001 (a parser's own, of a package that only DVC needs)
        why = key_shown(str(error).splitlines()[0])
        raise ParamsError(f"{key_shown(key)}: {shown(text)} cannot be read ({why}); quote what is text") from None
    if override.is_sweep_override():
        raise ParamsError(
            f"{key_shown(key)}: {shown(text)} is several values, and this is one run; write a list as [1, 2], and for "
            f"a grid use dvc exp run --queue -S {key_shown(shlex.quote(f'{key}={text}'))}"
        )
    return override.value()


def _pull_chips(root: Path) -> int:
    """Get the chips as `make run` does where there are none, as in the clone that MLflow makes of a git address."""
    data = root / "data"
    if data.exists() or not (root / "data.dvc").exists():
        return 0
    own_remote = (
        subprocess.run(["dvc", "remote", "default"], cwd=root, capture_output=True, check=False).returncode == 0
    )
    code = _call(["dvc", "pull", *([] if own_remote else ["-r", "sample"]), "data"], root)
    if code:
        # `dvc repro` would take half of the chips for a new version.
        shutil.rmtree(data, ignore_errors=True)
    return code


def _call(command: Sequence[str], root: Path) -> int:
    """Say what is run and wait for it, also when somebody wants it to stop: the stage saves first."""
    print(f"earthprior: {shlex.join(command)}", flush=True)
    starter = os.getppid()
    with stop_requests() as stop:
        child = subprocess.Popen(command, cwd=root)
        told = False
        while (code := child.poll()) is None:
            # Ctrl-C reaches dvc and its stage by itself; `kill` of mlflow does not even reach this process.
            if not told and (stop.signal_number == signal.SIGTERM or os.getppid() != starter):
                _ask_to_end(child.pid)
                told = True
            time.sleep(POLL_SECONDS)
    return code if code >= 0 else 128 - code


def _ask_to_end(dvc: int) -> None:
    """Ask the stage, whose end dvc tidies up after: a `dvc exp run` that is ended itself leaves git's HEAD detached."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(dvc)
        for asked in process.children() or [process]:
            asked.terminate()


def _explain_if_empty(root: Path, run_id: str, command: str) -> None:
    """Say so where all was up to date: MLflow has made a run by then, and it holds nothing."""
    from earthprior.mlflow_run import describe_if_empty

    made_by = RunRef.read(root / "results/pretrain/mlflow_run.json")
    text = f"`{command}` trained and evaluated nothing, so this run is empty."
    if made_by and made_by.run_id:
        text += f" The network in results/pretrain/ is that of run {made_by.run_id}."
    if describe_if_empty(locate(root), run_id, text):
        print(f"earthprior: {text}")
