"""One run in MLflow, and the only module that imports it: what is written there and how.

Everything goes through MlflowClient with the run's id: MLflow's global "active run" is never touched.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from earthprior import tracking_view
from earthprior.files import write_json
from earthprior.identity import dvc_experiment, process_alive, process_tags
from earthprior.mirror import Point, Rejected, metric_name
from earthprior.naming import titled
from earthprior.tracking_store import RunRef, Store, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

EVALUATED = "earthprior.evaluated"
EVALUATION_METRICS, EVALUATION_PARAMS = "evaluate/", "evaluate."
PARAMS_AT_ONCE, POINTS_AT_ONCE, PARAM_LENGTH, TAG_LENGTH = 100, 500, 6000, 5000


def import_mlflow() -> bool:
    """Import MLflow with settings under which an outage is noticed in seconds; the user's own settings win."""
    settings = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        # The only network access is the tracking store.
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow  # noqa: F401
    except Exception as error:  # noqa: BLE001 (an installation can be broken in many ways)
        logger.warning("MLflow cannot be imported (%s); metrics are kept in the journal only", error)
        return False
    # What is worth telling about an outage is told by the mirror, once.
    levels = {"mlflow": "WARNING", "mlflow.system_metrics": "CRITICAL", "alembic": "WARNING", "urllib3": "ERROR"}
    for talkative, level in levels.items():
        logging.getLogger(talkative).setLevel(level)
    return True


@dataclass(frozen=True)
class Pretraining:
    """What evaluate knows of the training it judges; used where that training's own run cannot be read."""

    params: Mapping[str, Any]
    metrics: Mapping[str, float]


class MlflowRun:
    """One MLflow run, as `mirror.RemoteRun` wants it. All methods run in the mirror's thread and may be repeated."""

    def __init__(
        self,
        store: Store,
        run_name: str | None,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        resume: RunRef | None,
        pretraining: Pretraining | None,
        ref_path: Path | None,
        log_system_metrics: bool,
        join: bool = True,
        differs: str = "",
    ) -> None:
        self.ref = RunRef(store.shown, store.experiment, None)
        self.page: str | None = None
        self._store = store
        self._run_name = titled(dvc_experiment() or run_name, differs)
        self._differs = differs
        self._params = {name: param_text(value) for name, value in params.items()}
        self._tags = {**tags, **process_tags()}
        self._resume_id = resume.run_id if resume else None
        self._pretraining = pretraining
        self._ref_path = ref_path
        self._log_system_metrics = log_system_metrics
        self._join = join
        self._monitor: Any = None
        self._pictures: set[tuple[str, int]] | None = None
        self._evaluated: frozenset[tuple[str, int, float]] = frozenset()
        self._began_ms = time.time_ns() // 1_000_000

    @property
    def _client(self) -> MlflowClient:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self._store.uri)

    @property
    def _run_id(self) -> str:
        assert self.ref.run_id is not None, "open() comes first"
        return self.ref.run_id

    def probe(self) -> None:
        """See `mirror.RemoteRun`."""
        self._store.probe()

    def open(self) -> Mapping[str, int]:
        """Create or continue the run; the last step it holds of each curve, where it is this training's own run."""
        with self._store.first_contact():
            experiment_id = self._experiment_id()
        run = self._existing() or self._created(experiment_id)
        # At once, so that a process killed in the next line leaves no run that nobody continues.
        self.ref = RunRef(self._store.shown, self._store.experiment, run.info.run_id)
        if (path := self._ref_path) is not None:
            self._attempt(path.name, lambda: write_json(path, self.ref.to_json()))
        continued = run.info.run_id == self._resume_id
        self._describe(run, continued)
        # Of a study's many trials none says it; the study's own run does.
        if self._store.address and "mlflow.parentRunId" not in self._tags:
            self.page = self._store.address + tracking_view.page(experiment_id)
        self._attempt("dataset", self._log_dataset)
        self._attempt("saved view", lambda: self._save_view(experiment_id))
        self._attempt("stale runs", lambda: self._end_stale_runs(experiment_id))
        if self._log_system_metrics and self._monitor is None:
            self._attempt("system metrics", self._start_monitor)
        if continued and self._pretraining is not None:
            self._evaluated = self._points_of_evaluation(run)
        return last_steps(run) if continued and self._pretraining is None else {}

    def log_points(self, points: Sequence[Point]) -> None:
        """See `mirror.RemoteRun`."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        points = [p for p in points if (p.name, p.step, p.value) not in self._evaluated]
        for start in range(0, len(points), POINTS_AT_ONCE):
            metrics = [Metric(p.name, p.value, p.time_ms, p.step) for p in points[start : start + POINTS_AT_ONCE]]
            try:
                self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)
            except MlflowException as error:
                if error.error_code == "INVALID_PARAMETER_VALUE":
                    raise Rejected(reason(error)) from error
                raise

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See `mirror.RemoteRun`."""
        from mlflow.entities import RunTag

        if tags:
            entries = [RunTag(metric_name(name), str(value)[:TAG_LENGTH]) for name, value in tags.items()]
            self._client.log_batch(self._run_id, tags=entries, synchronous=True)

    def upload(self, path: Path, folder: str) -> None:
        """See `mirror.RemoteRun`."""
        if not path.exists():
            raise FileNotFoundError(path.name)
        self._client.log_artifact(self._run_id, str(path), folder or None)

    def upload_picture(self, path: Path, key: str, step: int) -> None:
        """See `mirror.RemoteRun`."""
        from mlflow import Image

        if not path.exists():
            raise FileNotFoundError(path.name)
        if self._pictures is None:
            self._pictures = self._stored_pictures()
        if (key, step) not in self._pictures:
            self._client.log_image(self._run_id, Image(str(path)), key=key, step=step, synchronous=True)
            self._pictures.add((key, step))

    def finish(self, status: str) -> None:
        """See `mirror.RemoteRun`."""
        if self._monitor is not None:
            self._attempt("system metrics", self._monitor.finish)
            self._monitor = None
        if self._pretraining is not None and status == "FINISHED":
            self.set_tags({EVALUATED: "true"})
        self._client.set_terminated(self._run_id, status)

    def _points_of_evaluation(self, run: Run) -> frozenset[tuple[str, int, float]]:
        """What a killed evaluation left in the run: the next one sends what is new, be it of other evaluate.* keys."""
        names = [name for name in run.data.metrics if name.startswith(EVALUATION_METRICS)]
        found = [point for name in names for point in self._client.get_metric_history(run.info.run_id, name)]
        return frozenset((point.key, point.step, point.value) for point in found)

    def _stored_pictures(self) -> set[tuple[str, int]]:
        """Keys and steps of the pictures that the run holds, from the names that MLflow gives to their files."""
        names = [file.path.rpartition("/")[2] for file in self._client.list_artifacts(self._run_id, "images")]
        found = [re.match(r"(.+)\+step\+(\d+)\+timestamp\+", name) for name in names]
        return {(match[1], int(match[2])) for match in found if match}

    def _experiment_id(self) -> str:
        if (given := os.environ.get("MLFLOW_EXPERIMENT_ID")) and not os.environ.get("MLFLOW_EXPERIMENT_NAME"):
            return given
        found = self._client.get_experiment_by_name(self._store.experiment)
        if found is None:
            return str(self._client.create_experiment(self._store.experiment, self._store.artifact_location))
        if found.lifecycle_stage != "active":
            name = self._store.experiment
            raise RuntimeError(f"experiment {name!r} is deleted; restore it, or name another in MLFLOW_EXPERIMENT_NAME")
        return str(found.experiment_id)

    def _save_view(self, experiment_id: str) -> None:
        """Offer our view of the runs in the experiment's menu of views; what a person changed stays."""
        have = self._client.get_experiment(experiment_id).tags
        for name, text in tracking_view.tags(experiment_id).items():
            if name not in have:
                self._client.set_experiment_tag(experiment_id, name, text)

    @property
    def _joined(self) -> str | None:
        return os.environ.get("MLFLOW_RUN_ID") if self._join else None

    def _existing(self) -> Run | None:
        """The run to go on with: the one that an attempt before made, MLFLOW_RUN_ID's, or the one to resume."""
        joined = self._joined
        for run_id in dict.fromkeys([self.ref.run_id] if self.ref.run_id else [joined, self._resume_id]):
            run = self._find(run_id)
            if run is not None and EVALUATED not in run.data.tags:
                return run
            if run_id and run_id == joined:
                logger.warning("MLflow: MLFLOW_RUN_ID is unknown or holds a finished evaluation; it is not used")
        return None

    def _find(self, run_id: str | None) -> Run | None:
        from mlflow.exceptions import MlflowException

        if not run_id:
            return None
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _created(self, experiment_id: str) -> Run:
        return self._client.create_run(experiment_id, tags=process_tags(), run_name=self._run_name)

    def _describe(self, run: Run, continued: bool) -> None:
        """Give the run its parameters and tags; a run that is continued by its evaluation keeps what it has."""
        params, tags = dict(self._params), dict(self._tags)
        if self._pretraining is not None:
            if continued:
                tags = {name: value for name, value in tags.items() if name not in run.data.tags} | process_tags()
            else:
                params = self._copy_pretraining(self._pretraining) | params
                tags["pretrain_run_id"] = self._resume_id or "unknown"
        have = run.data.params
        self._log_params({name: text for name, text in params.items() if name not in have})
        changed = {name: text for name, text in params.items() if name in have and not same_param(have[name], text)}
        self.set_tags(tags | {f"changed.{name}": text for name, text in changed.items()})
        # Run names of `mlflow run` are arbitrary words, or somebody's own.
        if run.info.run_id == self._joined and self._differs and self._differs not in (run.info.run_name or ""):
            self._client.update_run(run.info.run_id, name=titled(run.info.run_name, self._differs))
        # After the tags: a run that says RUNNING under the id of a dead process is taken for a stale one.
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")

    def _copy_pretraining(self, pretraining: Pretraining) -> dict[str, str]:
        """Copy the final metrics of the training into this run; its parameters, to be logged with the others."""
        origin = self._find(self._resume_id)
        if origin is None:
            points = [Point(metric_name(name), value, self._began_ms, 0) for name, value in pretraining.metrics.items()]
            params = {name: param_text(value) for name, value in pretraining.params.items()}
        else:
            last = origin.data.to_proto().metrics
            points = [Point(m.key, m.value, m.timestamp, m.step) for m in last]
            params = dict(origin.data.params)
        # Of a curve over noise levels the last value is only the last level's.
        left_out = (EVALUATION_METRICS, "system/", f"val/{tracking_view.BY_LEVEL}")
        self.log_points([point for point in points if not point.name.startswith(left_out)])
        return {name: text for name, text in params.items() if not name.startswith(EVALUATION_PARAMS)}

    def _log_params(self, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        entries = [Param(metric_name(name), text[:PARAM_LENGTH]) for name, text in params.items()]
        for start in range(0, len(entries), PARAMS_AT_ONCE):
            self._client.log_batch(self._run_id, params=entries[start : start + PARAMS_AT_ONCE], synchronous=True)

    def _log_dataset(self) -> None:
        """Show the data as the run's input, so that runs can be searched by `dataset.digest`."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        digest = self._tags.get("dvc.data_md5")
        if digest:
            chips = Dataset("chips", digest[:36], "local", json.dumps({"uri": "data"}))
            self._client.log_inputs(self._run_id, [DatasetInput(chips, [InputTag("mlflow.data.context", "training")])])

    def _start_monitor(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self._run_id, resume_logging=True, tracking_uri=self._store.uri)
        monitor.start()
        self._monitor = monitor

    def _end_stale_runs(self, experiment_id: str) -> None:
        """End the runs that a killed process of this machine left RUNNING; resuming one sets it RUNNING again."""
        query = f"attributes.status = 'RUNNING' and tags.`earthprior.host` = '{socket.gethostname()}'"
        for run in self._client.search_runs([experiment_id], query, max_results=100):
            if run.info.run_id != self._run_id and not process_alive(run.data.tags):
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        """For what is nice to have: a failure is no reason to do without the run."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 (see above)
            logger.warning("MLflow: %s left out (%s)", what, reason(error))


def last_steps(run: Run) -> dict[str, int]:
    """The last step of each curve that a run holds; asking for whole histories would load them into memory."""
    return {metric.key: int(metric.step) for metric in run.data.to_proto().metrics}


def param_text(value: Any) -> str:
    """A parameter as params.yaml spells it: true, null, 1e-05, [32, 48]."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def same_param(first: str, second: str) -> bool:
    """Whether two spellings mean the same: `mlflow run -P lr=1e-4` logs the text, quoted for the shell."""
    return first == second[:PARAM_LENGTH] or _meaning(first) == _meaning(second)


def _meaning(text: str) -> Any:
    try:
        words = shlex.split(text)
        return YAML(typ="safe", pure=True).load(words[0] if len(words) == 1 else text)
    except (ValueError, YAMLError):
        return text


def describe_if_empty(store: Store, run_id: str, text: str) -> bool:
    """Give a run a description if no stage has joined it; whether it was so."""
    if not import_mlflow():
        return False
    from mlflow import MlflowClient

    try:
        client = MlflowClient(tracking_uri=store.uri)
        empty = not process_tags().keys() <= client.get_run(run_id).data.tags.keys()
        if empty:
            client.set_tag(run_id, "mlflow.note.content", text)
    except Exception as error:  # noqa: BLE001 (MLflow is no reason for a pipeline to fail)
        logger.warning("MLflow: run %s was not looked at (%s)", run_id, reason(error))
        return False
    return empty
