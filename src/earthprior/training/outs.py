"""What a training leaves when it is done: the files of `results/pretrain/`, or those of a trial.

network.safetensors (the best averaged weights), config.json (all that rebuilds it), linear.safetensors, history.csv,
environment.json and mlflow_run.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pandas as pd
from safetensors.torch import save

from earthprior import build
from earthprior.errors import StorageError, mended_by
from earthprior.files import sweep, write_atomic, write_csv, write_json
from earthprior.tasks.diffusion import DiffusionTask
from earthprior.tracking import Tracker
from earthprior.training.loop import Outcome
from earthprior.training.run import Home, Run


def write(
    outcome: Outcome, task: DiffusionTask, environment: Mapping[str, Any], run: Run, home: Home, tracker: Tracker
) -> None:
    """All outs under their final names, and copies of what a run should keep in MLflow.

    Args:
        outcome: Weights and history.
        task: That was trained.
        environment: See `identity.recorded_environment`.
        run: What was trained.
        home: Where.
        tracker: Of the MLflow run.

    Raises:
        StorageError: A file cannot be written; the run's state is untouched.
    """
    with told_where(home):
        _write(outcome, task, environment, run, home, tracker)


@contextmanager
def told_where(home: Home) -> Iterator[None]:
    """Says of a disk that refuses what a training leaves what that was, and that nothing is lost.

    Raises:
        StorageError: A file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{home.shown(home.results)}/ could not be written ({error.strerror or error}). To mend it: "
            f"{mended_by(error) or 'look at that folder'}; the same command then continues from the last checkpoint"
        ) from error


def _write(
    outcome: Outcome, task: DiffusionTask, environment: Mapping[str, Any], run: Run, home: Home, tracker: Tracker
) -> None:
    folder, results = home.folder, home.results
    sweep(results)
    write_atomic(folder / "last.safetensors", save(outcome.last))
    write_atomic(results / "network.safetensors", save(outcome.best))
    # From memory: this is the one that was trained with, whatever became of the file.
    task.linear.save(results / "linear.safetensors")
    write_csv(results / "history.csv", pd.DataFrame(outcome.history))
    config = build.config(run.params, run.fingerprint, run.foreign_files, outcome.best_epoch, task.linear, run.stats)
    write_json(results / "config.json", config)
    write_json(results / "environment.json", environment)
    write_json(results / "mlflow_run.json", tracker.ref.to_json())
    for path in (folder / "last.safetensors", results / "network.safetensors", results / "linear.safetensors"):
        tracker.log_artifact(path, "weights")
    for path in (home.params_path, home.root / "results/stats/stats.json"):
        tracker.log_artifact(path)
    for name in ("config.json", "environment.json", "history.csv"):
        tracker.log_artifact(results / name)
    tracker.log_artifact(folder / "metrics.jsonl")
