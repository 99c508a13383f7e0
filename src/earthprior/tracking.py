"""What a stage reports to: `Tracker.log` writes a line of the journal, and MLflow follows in the background.

Training never stops or waits for MLflow. Its store is `mlflow.db` under the main checkout unless MLFLOW_TRACKING_URI
says otherwise, the experiment `earthprior` unless MLFLOW_EXPERIMENT_NAME does, and the run of `mlflow run`
(MLFLOW_RUN_ID) is joined.
"""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from earthprior.errors import Interrupted
from earthprior.journal import Journal
from earthprior.mirror import Delivery, Mirror
from earthprior.mlflow_run import EVALUATION_METRICS, MlflowRun, Pretraining, import_mlflow
from earthprior.tracking_store import RunRef, Store, locate, reason
from earthprior.tracking_view import BY_LEVEL

__all__ = ["Delivery", "Pretraining", "RunRef", "Tracker", "continue_or_open", "open_tracker"]

logger = logging.getLogger(__name__)

OPEN_SECONDS, CLOSE_SECONDS = 15.0, 60.0


class Tracker:
    """Where a stage reports to: every value goes to the journal at once, and to MLflow in the background.

    No method raises or waits because of MLflow; only `close` waits, for a limited time.
    """

    def __init__(
        self, journal: Journal, remote: MlflowRun | None, store: Store, prefix: str = "", scratch: Any = None
    ) -> None:
        self._journal = journal
        self._store = store
        self._remote = remote
        self._mirror = Mirror(journal, remote, reason) if remote else None
        self._prefix = prefix
        self._scratch = scratch
        self._troubled = False
        self._delivery: Delivery | None = None

    @property
    def ref(self) -> RunRef:
        """Where the run is; without a run id as long as MLflow has not answered."""
        return self._remote.ref if self._remote else RunRef(self._store.shown, self._store.experiment, None)

    @property
    def mirrors(self) -> bool:
        """Whether there is an MLflow to follow."""
        return self._mirror is not None

    def start(self, wait_seconds: float) -> None:
        """Begin to mirror; `open_tracker` and `continue_or_open` have done this."""
        if self._mirror:
            self._mirror.start(wait_seconds)

    def log(
        self,
        metrics: Mapping[str, float],
        step: int,
        epoch: int | None = None,
        seconds: float | None = None,
        at: int | None = None,
    ) -> None:
        """Record values of a step.

        Args:
            metrics: Values by name; non-finite ones are kept in the journal and left out of MLflow.
            step: Optimizer steps done, from 0.
            epoch: Epoch of that step.
            seconds: Training time so far, over all sessions of the run.
            at: Optimizer steps done, where `step` says something else.
        """
        try:
            values = {self._named(name): float(value) for name, value in metrics.items()}
            record = {"step": int(step), "time_ms": time.time_ns() // 1_000_000, "metrics": values}
            known = {"epoch": epoch, "seconds": seconds, "at": at}
            self._journal.append(record | {key: value for key, value in known.items() if value is not None})
        except (OSError, TypeError, ValueError) as error:
            if not self._troubled:
                logger.warning("%s: could not be written (%s); the run goes on", self._journal.path.name, error)
            self._troubled = True

    def log_levels(self, gain_db: Mapping[str, float], at: int | None = None) -> None:
        """Record the gains named `rho_0.5`, ..., as a curve over noise levels: its steps are 100 rho.

        Args:
            gain_db: By name; other names are left out.
            at: Optimizer steps done, in a training that may be continued from an earlier one.
        """
        for name, gain in gain_db.items():
            if level := re.search(r"(?:^|/)rho_([\d.]+)$", name):
                self.log({f"{self._prefix or 'val/'}{BY_LEVEL}": gain}, round(100 * float(level[1])), at=at)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Store a file (or folder) with the run, soon; it must stay where it is until `close`."""
        if self._mirror:
            self._mirror.upload(path, folder)

    def log_picture(self, path: Path, key: str, step: int) -> None:
        """Store a PNG as one step of a series of pictures, soon; it must stay where it is until `close`.

        A step that the run holds already is not stored again.
        """
        if self._mirror:
            self._mirror.upload_picture(path, key, step)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tag the run."""
        if self._mirror:
            self._mirror.set_tags(tags)

    def close(self, status: str = "FINISHED", timeout_seconds: float = CLOSE_SECONDS) -> Delivery:
        """Deliver what is left and end the run; a second call does nothing.

        Args:
            status: FINISHED, FAILED or KILLED.
            timeout_seconds: How long a slow store is waited for. What it misses stays in the journal, and opening a
                tracker on that journal again delivers it.
        """
        if self._delivery is None:
            self._delivery = self._mirror.close(status, timeout_seconds) if self._mirror else Delivery(0, 0, False)
            self._journal.close()
            if self._remote:
                level = logging.INFO if self._delivery else logging.WARNING
                logger.log(level, "MLflow: %s to %s", self._delivery, self._store.shown)
                if self._delivery and self._remote.page:
                    start = "" if self._store.database is None else "mlflow ui, then "
                    logger.info("MLflow: compare runs with: %s%s", start, self._remote.page)
            if self._scratch is not None:
                self._scratch.cleanup()
        return self._delivery

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        killed = kind is not None and issubclass(kind, Interrupted | KeyboardInterrupt)
        self.close("KILLED" if killed else "FAILED" if kind else "FINISHED")

    def _named(self, name: str) -> str:
        return name if name.startswith(self._prefix) else self._prefix + name


def open_tracker(
    root: Path,
    run_name: str | None,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    journal: Journal | None = None,
    resume: RunRef | None = None,
    log_system_metrics: bool = True,
    wait_seconds: float = OPEN_SECONDS,
    join: bool = True,
    differs: str = "",
) -> Tracker:
    """Open the run of a training, or continue it.

    The run is MLFLOW_RUN_ID's if set, else the one in `resume` or in run.json beside the journal, else a new one named
    after the DVC experiment and what differs. Points of the journal that the run does not hold yet are delivered.

    Args:
        root: The folder that the stage runs in.
        run_name: Name of a new run outside DVC experiments; None lets MLflow invent one.
        params: Flat, under their dotted names. Those that a continued run has otherwise become tags `changed.<name>`.
        tags: See `identity.identity_tags`; `dvc.data_md5` is also shown as the run's dataset.
        journal: The source of truth; None keeps one in a temporary folder.
        resume: The run to continue.
        log_system_metrics: Let MLflow sample processor, memory, disk, network and GPU use.
        wait_seconds: How long a slow store may delay the return; it is opened in the background after that.
        join: Join MLFLOW_RUN_ID's run; a trial of a study must not, since that is the study's.
        differs: What the run has otherwise, see `naming.differences`; stands behind its name.

    Returns:
        A tracker; without MLflow it only keeps the journal. Never raises because of MLflow.
    """
    ref_path = journal.path.with_name("run.json") if journal else None
    if resume is None and ref_path is not None:
        resume = RunRef.read(ref_path)
    store = locate(root)
    remote = MlflowRun(store, run_name, params, tags, resume, None, ref_path, log_system_metrics, join, differs)
    return _started(store, remote, journal, "", wait_seconds)


def continue_or_open(
    root: Path,
    ref: RunRef | None,
    run_name: str | None,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    pretraining: Pretraining,
    log_system_metrics: bool = False,
    wait_seconds: float = OPEN_SECONDS,
    differs: str = "",
) -> Tracker:
    """Continue a training's run with its evaluation, or open a new one where that run is not to be had.

    It is continued if this store has it and it holds no finished evaluation. A new run is named as by `open_tracker`,
    tagged `pretrain_run_id`, and gets the training's parameters and final metrics, so that its row tells
    everything. A run that holds a finished evaluation is never changed.

    Args:
        root: The folder that the stage runs in.
        ref: From results/pretrain/mlflow_run.json.
        run_name: Name of a new run outside DVC experiments.
        params: The parameters of the evaluation (`evaluate.*`).
        tags: For a new run; a continued one keeps its own and gets only those that it lacks.
        pretraining: Copied into a new run if the training's run cannot be read.
        log_system_metrics: As for `open_tracker`.
        wait_seconds: As for `open_tracker`.
        differs: As for `open_tracker`.

    Returns:
        A tracker whose metrics get the prefix `evaluate/` where they lack it. Closing it as FINISHED marks the run as
        evaluated.
    """
    store = locate(root)
    remote = MlflowRun(store, run_name, params, tags, ref, pretraining, None, log_system_metrics, differs=differs)
    return _started(store, remote, None, EVALUATION_METRICS, wait_seconds)


def _started(store: Store, remote: MlflowRun, journal: Journal | None, prefix: str, wait_seconds: float) -> Tracker:
    scratch = None
    if journal is None:
        scratch = tempfile.TemporaryDirectory(prefix="earthprior-", ignore_cleanup_errors=True)
        journal = Journal(Path(scratch.name) / "metrics.jsonl")
    # Here and not in the background: importing from two threads at once is fragile, and it takes two seconds anyway.
    available = import_mlflow()
    tracker = Tracker(journal, remote if available else None, store, prefix, scratch)
    tracker.start(wait_seconds)
    return tracker
