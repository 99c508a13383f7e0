"""The best trial as a DVC experiment: for the record, and as the proof that it can be had again."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import psutil

from earthprior.errors import EarthPriorError, Interrupted
from earthprior.identity import git_commit
from earthprior.params.editing import override
from earthprior.recorded import find
from earthprior.training.stop import stop_requests

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# Those of a run that is going on here belong to it, not to the experiment.
NOT_HANDED_ON = ("MLFLOW_RUN_ID", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "DVC_STAGE", "DVC_ROOT")

POLL_SECONDS = 0.5


def experiment_name(study: str, number: int) -> str:
    """Of the DVC experiment of a trial."""
    return f"{study}-{number:03d}"


def arguments(study: str, trial: FrozenTrial) -> list[str]:
    """Those of `dvc exp run` that repeat a trial."""
    settings: Mapping[str, Any] = trial.user_attrs.get("settings", {})
    values = [part for key, value in settings.items() for part in ("-S", override(key, value))]
    return ["-n", experiment_name(study, trial.number), *values]


def record(root: Path, study: str, trial: FrozenTrial) -> None:
    """Run a trial as a DVC experiment in a temporary copy, unless there is one, and compare the gains.

    One that a killed process left running is waited for, and never run a second time.

    Raises:
        EarthPriorError: The experiment fails.
        Interrupted: Asked to stop while another process runs it; that one goes on.
    """
    name = experiment_name(study, trial.number)
    if git_commit(root) is None or not (root / ".dvc").is_dir():
        print(f"no DVC experiment {name} was made: this is no git and DVC repository", file=sys.stderr)
        return
    gains = _gains(root, name)
    if gains is None and (dvc := running(root, name)):
        _wait(dvc, name)
        gains = _gains(root, name)
    if gains is None:
        print(f"running the best trial as DVC experiment {name}", file=sys.stderr, flush=True)
        environment = {key: value for key, value in os.environ.items() if key not in NOT_HANDED_ON}
        # The stages run `python`, which must be this one.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "exp", "run", "--temp", *arguments(study, trial)],
            cwd=root, env=environment, check=False,
        )  # fmt: skip
        gains = _gains(root, name) if done.returncode == 0 else None
        if gains is None:
            raise EarthPriorError(
                f"DVC experiment {name} failed, see above (its copy holds no files that git does not "
                "know); the study itself is unharmed"
            )
    found: Mapping[str, float] = trial.user_attrs.get("gain_db", {})
    same = all(gains.get(f"gain_db/{level}") == gain for level, gain in found.items())
    verdict = "the same gains as the trial's, to the last digit" if same else "OTHER gains than the trial's"
    print(f"DVC experiment {name}: {gains['gain_db/mean']:+.4f} dB, {verdict}; take it with: dvc exp apply {name}")


def running(root: Path, name: str) -> psutil.Process | None:
    """The living `dvc exp run` of this user and of this root that makes the experiment of this name."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.uids().real != os.getuid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            words = process.cmdline()
            # Without its shell, in whose one word the whole command may stand.
            named = any(pair == ("-n", name) for pair in pairwise(words))
            if named and ("exp", "run") in pairwise(words) and _is_of(root, Path(process.cwd())):
                return process
    return None


def _is_of(root: Path, folder: Path) -> bool:
    """Whether dvc works there for this root: in the root, and in its temporary copy as soon as it has one."""
    root, folder = root.resolve(), folder.resolve()
    return folder == root or folder.is_relative_to(root / ".dvc/tmp")


def _wait(dvc: psutil.Process, name: str) -> None:
    """Until it has ended, or somebody wants this process to stop."""
    print(
        f"DVC experiment {name} is being run already, by process {dvc.pid}, as a killed tune leaves it; waiting for it",
        file=sys.stderr,
        flush=True,
    )
    with stop_requests() as stop:
        # It knows its start, so that a process that gets its number later is not taken for it.
        while dvc.is_running() and not _is_over(dvc):
            if stop.signal_number:
                raise Interrupted(
                    f"DVC experiment {name} goes on in process {dvc.pid}; the study is whole", stop.signal_number
                )
            time.sleep(POLL_SECONDS)


def _is_over(process: psutil.Process) -> bool:
    """Whether it has ended and its parent has yet to hear of it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _gains(root: Path, name: str) -> dict[str, float] | None:
    """The row of the best epoch of an experiment; None where there is none of this name."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            history: pd.DataFrame = find(root, name, Path(folder)).history
        except EarthPriorError:
            return None
    if history.empty:
        return None
    rows = history.to_dict("records")
    best = max(rows, key=lambda row: float(row["gain_db/mean"]))
    return {str(key): float(value) for key, value in best.items()}
