"""Runs read back from MLflow's store: the counterpart of mlflow_run.py, which writes them."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from earthprior.errors import EarthPriorError
from earthprior.mlflow_find import find
from earthprior.mlflow_run import import_mlflow
from earthprior.tracking_store import Store, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

# The files of a run that others ask for: name here -> artifact.
ARTIFACTS = {
    "params.yaml": "params.yaml",
    "stats.json": "stats.json",
    "config.json": "config.json",
    "history.csv": "history.csv",
    "environment.json": "environment.json",
    "network.safetensors": "weights/network.safetensors",
    "linear.safetensors": "weights/linear.safetensors",
    "metrics.json": "evaluate/metrics.json",
    "serving.json": "weights/serving.json",
}
NAMES_AT_MOST = 500


@dataclass(frozen=True)
class KeptRun:
    """A run as MLflow holds it.

    Attributes:
        name: For the eye.
        params: MLflow's texts by dotted key, see `mlflow_run.param_text`.
        tags: As `identity.identity_tags` made them, and MLflow's own.
    """

    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]


def read(store: Store, run_id: str, into: Path) -> KeptRun | None:
    """Read a run and copy its files, as far as they are there; None if the store does not know it.

    An evaluation that has a run of its own holds no training: those files are taken from its training's run.

    Args:
        store: To look in.
        run_id: Of the run.
        into: Folder that gets files by the names of ARTIFACTS.

    Raises:
        EarthPriorError: The store cannot be read.
    """
    try:
        client = _client(store)
        run = find(client, run_id) if client else None
        if client is None or run is None:
            return None
        _copy(client, run_id, into)
        tags = dict(run.data.tags)
        trained = find(client, tags.get("pretrain_run_id", ""))
        if trained is not None:
            _copy(client, trained.info.run_id, into)
    except EarthPriorError:
        raise
    except Exception as error:
        raise EarthPriorError(
            f"{store.shown} cannot be read ({reason(error)}); check MLFLOW_TRACKING_URI and whether its server runs"
        ) from error
    return KeptRun(str(run.info.run_name or run_id), dict(run.data.params), tags)


def download(store: Store, uri: str, into: Path) -> Path:
    """Copy a folder that MLflow keeps, and say where it is.

    Args:
        store: To look in.
        uri: runs:/ID/FOLDER, models:/NAME/VERSION or models:/NAME@ALIAS.
        into: Folder for the copy.

    Raises:
        EarthPriorError: The store cannot be read, or keeps no such thing.
    """
    try:
        if _client(store) is None:
            raise EarthPriorError(f"{uri}: there is no {store.shown} yet")
        from mlflow.artifacts import download_artifacts

        return Path(download_artifacts(artifact_uri=uri, dst_path=str(into), tracking_uri=store.uri))
    except EarthPriorError:
        raise
    except Exception as error:
        raise EarthPriorError(f"{uri} cannot be had from {store.shown} ({reason(error)})") from error


def names(store: Store) -> dict[str, str]:
    """The newest runs of the store's experiment, id -> name; none where it cannot be read."""
    try:
        client = _client(store)
        found = client.get_experiment_by_name(store.experiment) if client else None
        if client is None or found is None:
            return {}
        runs = client.search_runs([found.experiment_id], max_results=NAMES_AT_MOST)
    except Exception as error:  # noqa: BLE001 (only hints are made of it)
        logger.debug("MLflow: %s", reason(error))
        return {}
    return {run.info.run_id: str(run.info.run_name or "") for run in runs}


def _client(store: Store) -> MlflowClient | None:
    """None where there is no store yet: asking would make one."""
    if store.database is not None and not store.database.is_file():
        return None
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if not import_mlflow():
        raise EarthPriorError("MLflow cannot be imported, so its runs cannot be read; pip install -r requirements.txt")
    from mlflow import MlflowClient

    store.probe()
    with store.first_contact():
        client = MlflowClient(tracking_uri=store.uri)
        client.get_experiment_by_name(store.experiment)
    return client


def _copy(client: MlflowClient, run_id: str, into: Path) -> None:
    """Copy what the run holds and `into` lacks."""
    held = {
        file.path for folder in ("", "weights", "evaluate") for file in client.list_artifacts(run_id, folder or None)
    }
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        for name, artifact in ARTIFACTS.items():
            if artifact in held and not (into / name).exists():
                shutil.move(client.download_artifacts(run_id, artifact, scratch), into / name)
