"""The best trial as a DVC experiment: for the record, and as the proof that it can be had again."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from earthprior.errors import EarthPriorError
from earthprior.identity import git_commit
from earthprior.params.editing import override
from earthprior.recorded import find

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# Those of a run that is going on here belong to it, not to the experiment.
NOT_HANDED_ON = ("MLFLOW_RUN_ID", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "DVC_STAGE", "DVC_ROOT")


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

    Raises:
        EarthPriorError: The experiment fails.
    """
    name = experiment_name(study, trial.number)
    if git_commit(root) is None or not (root / ".dvc").is_dir():
        print(f"no DVC experiment {name} was made: this is no git and DVC repository", file=sys.stderr)
        return
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
