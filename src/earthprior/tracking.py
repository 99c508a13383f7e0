"""What a stage reports to: `Tracker.log` writes a line of the journal, and MLflow follows in the background.

Training never stops or waits for MLflow. Its store is `mlflow.db` under the main checkout unless MLFLOW_TRACKING_URI
says otherwise, the experiment `earthprior` unless MLFLOW_EXPERIMENT_NAME does, and the run of `mlflow run`
(MLFLOW_RUN_ID) is joined.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from earthprior.courier import Delivery
from earthprior.errors import Interrupted
from earthprior.identity import dvc_experiment, main_root, process_tags
from earthprior.journal import Journal
from earthprior.mirror import Mirror
from earthprior.mlflow_run import EVALUATION_METRICS, MlflowRun, import_mlflow, param_text
from earthprior.outbox import RECORD, UNDELIVERED, Outbox, RunRecord, Training, folder_of
from earthprior.tracking_store import RunRef, Store, locate, reason
from earthprior.tracking_view import BY_LEVEL
from earthprior.undelivered import deliver_others, must_wait, waiting

__all__ = ["Delivery", "Pretraining", "RunRef", "Tracker", "continue_or_open", "open_tracker"]

logger = logging.getLogger(__name__)

OPEN_SECONDS, CLOSE_SECONDS, STOPPED_SECONDS = 8.0, 60.0, 10.0


@dataclass(frozen=True)
class Pretraining:
    """What evaluate knows of the training it judges; used where that training's own run cannot be read."""

    params: Mapping[str, Any]
    metrics: Mapping[str, float]


class Tracker:
    """Where a stage reports to: everything goes to the run's outbox at once, and to MLflow in the background.

    No method raises or waits because of MLflow; only `close` waits, for a limited time.
    """

    def __init__(self, outbox: Outbox, remote: MlflowRun, store: Store, mirror: Mirror | None, prefix: str) -> None:
        self._outbox, self._remote, self._store, self._mirror, self._prefix = outbox, remote, store, mirror, prefix
        self._troubled = False
        self._delivery: Delivery | None = None
        self.hurried: Callable[[], bool] = lambda: False
        """Whether somebody waits for this process to end; asked while `close` waits for a store."""

    @property
    def ref(self) -> RunRef:
        """Where the run is; without a run id as long as MLflow has not answered."""
        return self._remote.ref

    @property
    def mirrors(self) -> bool:
        """Whether there is an MLflow to follow."""
        return self._mirror is not None

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
        with self._unharmed(self._outbox.journal.path.name):
            values = {self._named(name): float(value) for name, value in metrics.items()}
            record = {"step": int(step), "time_ms": time.time_ns() // 1_000_000, "metrics": values}
            known = {"epoch": epoch, "seconds": seconds, "at": at}
            self._outbox.journal.append(record | {key: value for key, value in known.items() if value is not None})

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
        """Store a file (or folder), as it is now, with the run, soon; beside the journal it must stay until `close`."""
        with self._unharmed(path.name):
            self._outbox.put(path, folder)

    def log_picture(self, path: Path, key: str, step: int) -> None:
        """Store a PNG that lies beside the journal as one step of a series of pictures, soon.

        A step that the run holds already is not stored again.
        """
        with self._unharmed(path.name):
            self._outbox.put_picture(path, key, step)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tag the run."""
        with self._unharmed(self._outbox.messages.path.name):
            self._outbox.tag(tags)

    def close(self, status: str = "FINISHED", timeout_seconds: float = CLOSE_SECONDS) -> Delivery:
        """Deliver what is left and end the run; a second call does nothing.

        Args:
            status: FINISHED, FAILED or KILLED.
            timeout_seconds: How long a slow store is waited for. What it misses stays in the outbox, for the next stage
                that reaches the store, and for `earthprior sync-tracking`.
        """
        if self._delivery is None:
            with self._unharmed(self._outbox.messages.path.name):
                self._outbox.end(status)
            if status == "KILLED":
                # Who asked has no patience, and kills after a while; what is missed is delivered later.
                timeout_seconds = min(timeout_seconds, STOPPED_SECONDS)
            hurried = (lambda: False) if status == "KILLED" else self.hurried
            self._delivery = self._mirror.close(timeout_seconds, hurried) if self._mirror else Delivery(0, 0, False)
            self._outbox.close()
            self._outbox.release()
            if self._mirror:
                self._tell(self._delivery, status)
            if self._delivery and self._outbox.folder.parent.name == Path(UNDELIVERED).name:
                self._outbox.remove()
        return self._delivery

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        killed = kind is not None and issubclass(kind, Interrupted | KeyboardInterrupt)
        self.close("KILLED" if killed else "FAILED" if kind else "FINISHED")

    def _tell(self, delivery: Delivery, status: str) -> None:
        shown = self._store.shown
        told = f"{delivery} to {shown}" if delivery.total else f"not all of the run is in {shown}"
        if not delivery:
            rest = "the rest waits" if delivery.delivered < delivery.total else "its files, tags or end wait"
            logger.warning("MLflow: %s; %s in work/, deliver it with: earthprior sync-tracking", told, rest)
            return
        if delivery.total:
            logger.info("MLflow: %s", told)
        # Of what was stopped or failed there is nothing to compare yet.
        if status == "FINISHED" and self._remote.page:
            start = "" if self._store.database is None else "mlflow ui, then "
            logger.info("MLflow: compare runs with: %s%s", start, self._remote.page)

    def _named(self, name: str) -> str:
        return name if name.startswith(self._prefix) else self._prefix + name

    @contextmanager
    def _unharmed(self, what: str) -> Iterator[None]:
        """A full disk is told once, and no reason to stop."""
        try:
            yield
        except (OSError, TypeError, ValueError) as error:
            if not self._troubled:
                logger.warning("%s: could not be written (%s); the run goes on", what, error)
            self._troubled = True


def open_tracker(
    root: Path,
    run_name: str | None,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    journal: Journal | None = None,
    resume: RunRef | None = None,
    log_system_metrics: bool = True,
    wait_seconds: float = OPEN_SECONDS,
    parent: str | None = None,
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
        journal: The source of truth, in the folder that shall be the run's outbox; None makes one that is removed when
            MLflow has everything.
        resume: The run to continue.
        log_system_metrics: Let MLflow sample processor, memory, disk, network and GPU use.
        wait_seconds: How long a slow store may delay the return; it is opened in the background after that.
        parent: The uid of the study whose trial this is. It does not join MLFLOW_RUN_ID's run, which is the study's.
        differs: What the run has otherwise, see `naming.differences`; stands behind its name.

    Returns:
        A tracker; without MLflow it only keeps the outbox. Never raises because of MLflow.
    """
    store = locate(root)
    before = Outbox(journal.path.parent).record() if journal else None
    if resume is None and before is not None:
        resume = RunRef(before.tracking_uri, before.experiment, before.run_id, before.uid)
    own = {"run_id": resume.run_id if resume else None, "uid": resume.uid if resume else None}
    record = _record(store, run_name, params, tags, differs, own, parent)
    return _started(root, store, record, journal, "", wait_seconds, log_system_metrics)


def continue_or_open(
    root: Path,
    ref: RunRef | None,
    run_name: str | None,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    pretraining: Pretraining,
    log_system_metrics: bool = False,
    wait_seconds: float = 0.0,
    differs: str = "",
) -> Tracker:
    """Continue a training's run with its evaluation, or open a new one where that run is not to be had.

    It is continued if this store has it, or has yet to hear of it, and it holds no finished evaluation. A new run is
    named as by `open_tracker`, tagged `pretrain_run_id`, and gets the training's parameters and final metrics, so that
    its row tells everything. A run that holds a finished evaluation is never changed.

    Args:
        root: The folder that the stage runs in.
        ref: From results/pretrain/mlflow_run.json.
        run_name: Name of a new run outside DVC experiments.
        params: The parameters of the evaluation (`evaluate.*`).
        tags: For a new run; a continued one keeps its own and gets only those that it lacks.
        pretraining: Copied into a new run if the training's run cannot be read.
        log_system_metrics: As for `open_tracker`.
        wait_seconds: As for `open_tracker`. By default none: nobody asks for the run's id, and the sooner all is told,
            the less a kill can cost.
        differs: As for `open_tracker`.

    Returns:
        A tracker whose metrics get the prefix `evaluate/` where they lack it. Closing it as FINISHED marks the run as
        evaluated.
    """
    store = locate(root)
    finite = {name: value for name, value in pretraining.metrics.items() if math.isfinite(value)}
    training = Training(ref.uid if ref else None, ref.run_id if ref else None, _texts(pretraining.params), finite)
    record = _record(store, run_name, params, tags, differs, {"run_id": None, "uid": None}, None, training)
    return _started(root, store, record, None, EVALUATION_METRICS, wait_seconds, log_system_metrics)


def _record(
    store: Store,
    run_name: str | None,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    differs: str,
    own: Mapping[str, str | None],
    parent: str | None,
    training: Training | None = None,
) -> RunRecord:
    """All that a later process needs to know, of the environment too."""
    by_id = not os.environ.get("MLFLOW_EXPERIMENT_NAME")
    return RunRecord(
        uid=own["uid"] or uuid.uuid4().hex,
        tracking_uri=store.shown,
        experiment=store.experiment,
        experiment_id=(os.environ.get("MLFLOW_EXPERIMENT_ID") or None) if by_id else None,
        run_id=own["run_id"],
        joined=None if parent else os.environ.get("MLFLOW_RUN_ID") or None,
        name=dvc_experiment() or run_name,
        differs=differs,
        params=_texts(params),
        tags={**tags, **process_tags()},
        began_ms=time.time_ns() // 1_000_000,
        parent=parent,
        training=training,
    )


def _texts(params: Mapping[str, object]) -> dict[str, str]:
    return {name: param_text(value) for name, value in params.items()}


def _started(
    root: Path,
    store: Store,
    record: RunRecord,
    journal: Journal | None,
    prefix: str,
    wait_seconds: float,
    log_system_metrics: bool,
) -> Tracker:
    home = main_root(root)
    folder = journal.path.parent if journal else folder_of(home, record)
    outbox = Outbox(folder, journal)
    try:
        if not outbox.hold() and journal is None:
            # Another process works on the same study.
            outbox = Outbox(folder.with_name(f"{folder.name}-{os.getpid()}"))
            outbox.hold()
        if journal is None:
            # Of a study that goes on: it will say again all that it said.
            outbox.journal.path.unlink(missing_ok=True)
        outbox.begin(record)
        if journal is not None:
            # It was done already, and goes on once more from its last checkpoint: it will say all that again. Only now
            # is it known that it will.
            _drop(folder_of(home, record))
    except OSError as error:
        logger.warning("%s: could not be written (%s); the run goes on", RECORD, error)
    remote = MlflowRun(store, record, outbox.remember, log_system_metrics=log_system_metrics)
    # Here and not in the background: importing from two threads at once is fragile, and it takes two seconds anyway.
    if not import_mlflow():
        return Tracker(outbox, remote, store, None, prefix)

    def forerunner() -> Generator[None]:
        """An evaluation goes into its training's run, which the store may have yet to hear of."""
        if record.awaits is None or record.parent is not None:
            return
        yield from deliver_others(home, store, record.awaits)
        if must_wait(record, [pair for pair in waiting(home) if pair[1].tracking_uri == store.shown]):
            raise RuntimeError("the training's run, which this belongs to, has yet to be delivered")

    mirror = Mirror(outbox, remote, partial(reason, name=store.shown), forerunner, lambda: deliver_others(home, store))
    mirror.start(wait_seconds)
    return Tracker(outbox, remote, store, mirror, prefix)


def _drop(folder: Path) -> None:
    """Remove an outbox that another stands for, unless it is being delivered."""
    if folder.is_dir():
        superseded = Outbox(folder)
        with superseded.held() as mine:
            if mine:
                superseded.remove()
