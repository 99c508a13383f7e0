"""Exported backbones in MLflow: kept by a run of their own, and registered as a version of a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from earthprior.errors import EarthPriorError
from earthprior.mlflow_run import import_mlflow
from earthprior.tracking_store import Store, reason

FOLDER = "export"


class Registered(NamedTuple):
    """A version of a registered model, and the run that keeps its files."""

    name: str
    version: str
    run_id: str


def register(store: Store, folder: Path, name: str, trained_by: str | None) -> Registered:
    """Keep an exported backbone in MLflow as the next version of a model; `models:/NAME/VERSION` then names it.

    A run that is finished is never changed, so the files get a run of their own, which names the training's.

    Args:
        store: Where.
        folder: That `earthprior export` wrote.
        name: Of the model; made when new.
        trained_by: The id of the training's run, if known.

    Raises:
        EarthPriorError: MLflow is missing, or the store refuses.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if not import_mlflow():
        raise EarthPriorError("MLflow cannot be imported, so nothing is registered; pip install -r requirements.txt")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        store.probe()
        with store.first_contact():
            client = MlflowClient(tracking_uri=store.uri, registry_uri=store.uri)
            known = client.get_experiment_by_name(store.experiment)
            experiment = (
                known.experiment_id if known else client.create_experiment(store.experiment, store.artifact_location)
            )
        tags = {"pretrain_run_id": trained_by} if trained_by else {}
        run = client.create_run(experiment, tags=tags, run_name=f"export of {name}")
        client.log_artifacts(run.info.run_id, str(folder), FOLDER)
        client.set_terminated(run.info.run_id, "FINISHED")
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        made = client.create_model_version(name, f"{run.info.artifact_uri}/{FOLDER}", run.info.run_id)
    except Exception as error:
        raise EarthPriorError(
            f"{folder.name}/ is written, and {store.shown} did not register it as {name} ({reason(error)}); check "
            "MLFLOW_TRACKING_URI and export again"
        ) from error
    return Registered(name, str(made.version), str(run.info.run_id))
