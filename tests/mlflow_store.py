"""Runs written to a real MLflow store in sqlite, and read back from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from earthprior.journal import Journal
from earthprior.tracking import Pretraining, RunRef, Tracker, continue_or_open, open_tracker

PARAMS = {
    "lr": 1e-05,
    "data.bands": ["red", "nir"],
    "unet_film.attention": True,
    "grad_clip": None,
    "task": "diffusion",
}
TRAINED = Pretraining({"lr": 0.5}, {"val/gain_db/mean": 1.5})


def client(root: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")


def runs(root: Path, experiment: str = "earthprior") -> list[Any]:
    found = client(root).get_experiment_by_name(experiment)
    return (
        list(client(root).search_runs([found.experiment_id], order_by=["attributes.start_time ASC"])) if found else []
    )


def history(root: Path, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client(root).get_metric_history(run_id, name)]


def open_plain(root: Path, journal: Journal | None = None, **options: Any) -> Tracker:
    arguments: dict[str, Any] = {"run_name": "r", "params": PARAMS, "tags": {}, "log_system_metrics": False} | options
    return open_tracker(root, journal=journal, **arguments)


def pretrained(root: Path, **options: Any) -> RunRef:
    """A finished training."""
    with open_plain(root, **options) as tracker:
        tracker.log({"val/gain_db/mean": 0.5}, 10)
        tracker.log({"val/gain_db/mean": 0.75}, 20)
    return tracker.ref


def evaluate(root: Path, ref: RunRef | None, gain: float = 2.0, status: str = "FINISHED", **options: Any) -> RunRef:
    tags = {"earthprior.fingerprint": "fresh"}
    params = {"evaluate.steps": 20}
    tracker = continue_or_open(root, ref, "evaluation", params, tags, TRAINED, **options)
    tracker.log({"gain_db/mean": gain}, 20)
    tracker.close(status)
    return tracker.ref
