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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from earthprior import tracking_view
from earthprior.courier import Point, Rejected, metric_name
from earthprior.identity import process_alive, process_tags
from earthprior.mlflow_find import EVALUATED, PARENT, UID, Finder, find, is_empty
from earthprior.naming import titled
from earthprior.outbox import RunRecord, Training
from earthprior.tracking_store import RunRef, Store, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

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
        logger.warning(
            "MLflow cannot be imported (%s); what there is to tell waits in work/. Once it can be, deliver it with: "
            "earthprior sync-tracking",
            error,
        )
        return False
    # What is worth telling about an outage is told by the mirror, once.
    levels = {
        "mlflow": "WARNING", "mlflow.store.db": "CRITICAL", "mlflow.system_metrics": "CRITICAL", "alembic": "WARNING",
        "urllib3": "ERROR",
    }  # fmt: skip
    for talkative, level in levels.items():
        logging.getLogger(talkative).setLevel(level)
    return True


class MlflowRun:
    """One MLflow run, as `courier.RemoteRun` wants it. All methods run in one thread and may be repeated.

    Args:
        store: Where it is, or shall be.
        record: Who it is.
        remember: Called with its id, as soon as there is one.
        live: Its process is this one, and it goes on; else it ended long ago, and what it told is made up for.
        log_system_metrics: Let MLflow sample the machine.
    """

    def __init__(
        self,
        store: Store,
        record: RunRecord,
        remember: Callable[[str], None],
        live: bool = True,
        log_system_metrics: bool = False,
    ) -> None:
        self.ref = RunRef(store.shown, record.experiment, record.run_id, record.uid)
        self.page: str | None = None
        self._store, self._record, self._remember, self._live = store, record, remember, live
        self._log_system_metrics = log_system_metrics
        self._opened_id: str | None = None
        self._monitor: Any = None
        self._pictures: set[tuple[str, int]] | None = None
        self._evaluated: frozenset[tuple[str, int, float]] = frozenset()

    @property
    def _client(self) -> MlflowClient:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self._store.uri)

    @property
    def _finder(self) -> Finder:
        return Finder(self._client, self._record, self._live)

    @property
    def _run_id(self) -> str:
        assert self._opened_id is not None, "open() comes first"
        return self._opened_id

    def probe(self) -> None:
        """See `courier.RemoteRun`."""
        self._store.probe()

    def open(self) -> Mapping[str, int]:
        """Create or continue the run; the last step it holds of each curve, where it is this training's own run."""
        with self._store.first_contact():
            experiment_id = self._experiment_id()
        run = self._finder.existing(experiment_id, self._opened_id) or self._created(experiment_id)
        # At once, so that a process killed in the next line leaves no run that nobody continues.
        self._opened_id = run.info.run_id
        self.ref = replace(self.ref, run_id=run.info.run_id)
        self._attempt("run id", lambda: self._remember(run.info.run_id))
        self._describe(run, experiment_id)
        # Of a study's many trials none says it; the study's own run does.
        if self._store.address and self._record.parent is None:
            self.page = self._store.address + tracking_view.page(experiment_id)
        self._attempt("dataset", self._log_dataset)
        self._attempt("saved view", lambda: self._save_view(experiment_id))
        self._attempt("stale runs", lambda: self._end_stale_runs(experiment_id))
        self._attempt("trials", lambda: self._adopt(experiment_id))
        if self._finder.is_trainings(run):
            self._evaluated = self._points_of_evaluation(run)
        return last_steps(run) if self._record.training is None and self._finder.is_own(run) else {}

    def watch(self) -> None:
        """See `courier.RemoteRun`."""
        if self._log_system_metrics and self._monitor is None:
            self._attempt("system metrics", self._start_monitor)

    def log_points(self, points: Sequence[Point]) -> None:
        """See `courier.RemoteRun`."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        points = [p for p in points if (p.name, p.step, p.value) not in self._evaluated]
        for start in range(0, len(points), POINTS_AT_ONCE):
            metrics = [Metric(p.name, p.value, p.time_ms, p.step) for p in points[start : start + POINTS_AT_ONCE]]
            try:
                self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)
            except MlflowException as error:
                # It says the same of a run that somebody has deleted meanwhile, whose points are not at fault.
                if error.error_code == "INVALID_PARAMETER_VALUE" and find(self._client, self._run_id):
                    raise Rejected(reason(error)) from error
                raise

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See `courier.RemoteRun`."""
        from mlflow.entities import RunTag

        if tags:
            entries = [RunTag(metric_name(name), str(value)[:TAG_LENGTH]) for name, value in tags.items()]
            self._client.log_batch(self._run_id, tags=entries, synchronous=True)

    def upload(self, path: Path, folder: str) -> None:
        """See `courier.RemoteRun`."""
        if not path.exists():
            raise FileNotFoundError(path.name)
        self._client.log_artifact(self._run_id, str(path), folder or None)

    def upload_picture(self, path: Path, key: str, step: int) -> None:
        """See `courier.RemoteRun`."""
        from mlflow import Image

        if not path.exists():
            raise FileNotFoundError(path.name)
        if self._pictures is None:
            self._pictures = self._stored_pictures()
        if (key, step) not in self._pictures:
            self._client.log_image(self._run_id, Image(str(path)), key=key, step=step, synchronous=True)
            self._pictures.add((key, step))

    def finish(self, status: str, time_ms: int | None) -> None:
        """See `courier.RemoteRun`."""
        if self._monitor is not None:
            self._attempt("system metrics", self._monitor.finish)
            self._monitor = None
        experiment_id = self._client.get_run(self._run_id).info.experiment_id
        self.set_tags(self._parent_tag(experiment_id))
        self._attempt("empty twins", lambda: self._delete_twins(experiment_id))
        if self._record.training is not None and status == "FINISHED":
            self.set_tags({EVALUATED: "true"})
        self._client.set_terminated(self._run_id, status, time_ms)

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
        if self._record.experiment_id:
            return self._record.experiment_id
        name = self._record.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            return str(self._client.create_experiment(name, self._store.artifact_location))
        if found.lifecycle_stage != "active":
            raise RuntimeError(f"experiment {name!r} is deleted; restore it, or name another in MLFLOW_EXPERIMENT_NAME")
        return str(found.experiment_id)

    def _save_view(self, experiment_id: str) -> None:
        """Offer our view of the runs in the experiment's menu of views; what a person changed stays."""
        have = self._client.get_experiment(experiment_id).tags
        for name, text in tracking_view.tags(experiment_id).items():
            if name not in have:
                self._client.set_experiment_tag(experiment_id, name, text)

    def _created(self, experiment_id: str) -> Run:
        record = self._record
        tags = {**self._finder.own_tag, **{name: text for name, text in record.tags.items() if name in process_tags()}}
        name = titled(record.name, record.differs)
        return self._client.create_run(experiment_id, start_time=record.began_ms, tags=tags, run_name=name)

    def _delete_twins(self, experiment_id: str) -> None:
        """Delete what a server made of a request that was repeated because no answer came in time."""
        for run in self._finder.search(experiment_id, self._finder.own_tag):
            if run.info.run_id != self._run_id and is_empty(run):
                self._client.delete_run(run.info.run_id)

    def _describe(self, run: Run, experiment_id: str) -> None:
        """Give the run its parameters and tags; a run that is continued by its evaluation keeps what it has."""
        record, have = self._record, run.data.params
        params, tags = dict(record.params), {**record.tags, **self._finder.own_tag, **self._parent_tag(experiment_id)}
        process = {name: tags[name] for name in process_tags() if name in tags}
        if record.training is not None:
            if self._finder.is_trainings(run):
                tags = {name: value for name, value in tags.items() if name not in run.data.tags}
                tags |= {**process, **self._finder.own_tag}
            else:
                origin = self._finder.origin(experiment_id)
                params = self._copy_training(record.training, origin) | params
                tags["pretrain_run_id"] = origin.info.run_id if origin else record.training.run_id or "unknown"
        self._log_params({name: text for name, text in params.items() if name not in have})
        changed = {name: text for name, text in params.items() if name in have and not same_param(have[name], text)}
        self.set_tags(tags | {f"changed.{name}": text for name, text in changed.items()})
        # Run names of `mlflow run` are arbitrary words, or somebody's own.
        if run.info.run_id == record.joined and record.differs and record.differs not in (run.info.run_name or ""):
            self._client.update_run(run.info.run_id, name=titled(run.info.run_name, record.differs))
        # After the tags: a run that says RUNNING under the id of a dead process is taken for a stale one.
        if self._live and run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")

    def _parent_tag(self, experiment_id: str) -> dict[str, str]:
        """Nests a trial in its study's run, as far as that is there."""
        parent = self._record.parent
        if parent is None:
            return {}
        found = self._finder.search(experiment_id, {UID: parent})
        return {PARENT: parent} | ({"mlflow.parentRunId": found[0].info.run_id} if found else {})

    def _adopt(self, experiment_id: str) -> None:
        """Nest the trials that were there before their study's run."""
        for run in self._finder.search(experiment_id, {PARENT: self._record.uid}):
            if "mlflow.parentRunId" not in run.data.tags:
                self._client.set_tag(run.info.run_id, "mlflow.parentRunId", self._run_id)

    def _copy_training(self, training: Training, origin: Run | None) -> dict[str, str]:
        """Copy the final metrics of the training into this run; its parameters, to be logged with the others."""
        if origin is None:
            began_ms = self._record.began_ms
            points = [Point(metric_name(name), value, began_ms, 0) for name, value in training.metrics.items()]
            params = dict(training.params)
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

        digest = self._record.tags.get("dvc.data_md5")
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
