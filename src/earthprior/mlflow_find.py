"""Which run in MLflow is whose: found by its id, or by our own name for it where MLflow's was not heard in time."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from earthprior.outbox import RunRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

EVALUATED = "earthprior.evaluated"
UID, EVALUATION, PARENT = "earthprior.uid", "earthprior.evaluation", "earthprior.study"


class Finder:
    """Finds the runs that a record has to do with.

    Args:
        client: Of the store.
        record: The record.
        live: Its process goes on; else it ended long ago, and what it told is made up for.
    """

    def __init__(self, client: MlflowClient, record: RunRecord, live: bool) -> None:
        self._client, self._record, self._live = client, record, live

    @property
    def own_tag(self) -> dict[str, str]:
        """By which the run is found again where its id is not known: what asked for it was not told of it in time."""
        return {UID if self._record.training is None else EVALUATION: self._record.uid}

    def is_own(self, run: Run) -> bool:
        """Whether the run was opened for this record before."""
        return str(run.info.run_id) == self._record.run_id or self.own_tag.items() <= run.data.tags.items()

    def is_trainings(self, run: Run) -> bool:
        """Whether the run is the one of the training that this evaluation judges."""
        training = self._record.training
        return training is not None and (
            str(run.info.run_id) == training.run_id
            or (training.uid is not None and run.data.tags.get(UID) == training.uid)
        )

    def _may_go_on(self, run: Run) -> bool:
        """A run that holds a finished evaluation is never changed, except by what that very run has yet to tell."""
        made_up_for = self._record.training is not None or not self._live
        return EVALUATED not in run.data.tags or (made_up_for and self.own_tag.items() <= run.data.tags.items())

    def existing(self, experiment_id: str, opened_id: str | None) -> Run | None:
        """The run to go on with: one that was opened for this record before, MLFLOW_RUN_ID's, or the training's.

        Args:
            experiment_id: Where to search.
            opened_id: What an attempt before came to.
        """
        record, training = self._record, self._record.training
        known = [record.joined, record.run_id, training.run_id if training else None]
        for run_id in dict.fromkeys([opened_id] if opened_id else filter(None, known)):
            run = find(self._client, run_id)
            if run is not None and self._may_go_on(run):
                return run
            if run_id == record.joined:
                logger.warning("MLflow: MLFLOW_RUN_ID is unknown or holds a finished evaluation; it is not used")
        found = self.search(experiment_id, self.own_tag)
        if training is not None and training.uid:
            found += self.search(experiment_id, {UID: training.uid})
        return next(filter(self._may_go_on, found), None)

    def search(self, experiment_id: str, tag: Mapping[str, str]) -> list[Run]:
        """Runs with a tag, those with content first: an outage may have left twins without any."""
        ((name, value),) = tag.items()
        query = f"tags.`{name}` = '{value}'"
        found = self._client.search_runs([experiment_id], query, order_by=["attributes.start_time ASC"])
        return sorted(found, key=is_empty)

    def origin(self, experiment_id: str) -> Run | None:
        """The run of the training that this evaluation judges, also where it must not be changed any more."""
        training = self._record.training
        run = find(self._client, training.run_id) if training else None
        if run is None and training is not None and training.uid:
            run = next(iter(self.search(experiment_id, {UID: training.uid})), None)
        return run


def find(client: MlflowClient, run_id: str | None) -> Run | None:
    """The run of this id; None where it is unknown or deleted."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def is_empty(run: Run) -> bool:
    """Whether nothing was ever told of the run but who it is."""
    return not run.data.metrics and not run.data.params
