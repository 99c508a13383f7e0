"""Outboxes that MLflow has yet to hear of, and their delivery: by `sync-tracking`, and by any later stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path

from earthprior.courier import Courier, Delivery
from earthprior.mlflow_run import MlflowRun
from earthprior.outbox import UNDELIVERED, Outbox, RunRecord
from earthprior.tracking_store import Store, reason

logger = logging.getLogger(__name__)

PLACES = (f"{UNDELIVERED}/*", "work/pretrain/*", "work/finetune/*", "work/tune/*/*/state")
"""Of outboxes, under the main checkout. All but the first are trainings that are under way, or were left."""


def waiting(home: Path) -> list[tuple[Outbox, RunRecord]]:
    """All outboxes with something to deliver, those first that others await; also those that a process has in hand."""
    folders = [folder for place in PLACES for folder in sorted(home.glob(place)) if not folder.name.startswith(".")]
    found = [(outbox, record) for outbox in map(Outbox, folders) if (record := outbox.record()) and outbox.waits]
    return sorted(found, key=lambda pair: (pair[1].parent is not None, pair[1].training is not None, pair[1].began_ms))


def must_wait(record: RunRecord, found: Sequence[tuple[Outbox, RunRecord]]) -> bool:
    """Whether the run that this one goes into, or is nested in, has yet to be made from one of these outboxes."""
    awaited = [outbox.record() for outbox, other in found if other.uid == record.awaits]
    return any(other is not None and other.run_id is None for other in awaited)


def deliver(
    outbox: Outbox, record: RunRecord, store: Store, report: Callable[[RunRecord, Delivery], None]
) -> Generator[None]:
    """Deliver one outbox whose process is gone, piece by piece.

    One that a process has in hand is left to that, and one whose forerunner is not in the store yet is left for later.
    A training's folder stays, so that it can still be continued; other outboxes are removed when all is delivered,
    unless a file of theirs was given up, which is then nowhere else.

    Args:
        outbox: To deliver.
        record: Its record.
        store: To deliver to.
        report: Called with what became of it, also when the store fails.
    """
    home_place = outbox.folder.parent.name == Path(UNDELIVERED).name
    with outbox.held() as mine:
        if not mine:
            return
        if home_place and (outbox.record() is None or (record.training is not None and not _whole(outbox))):
            # Delivered by another a moment ago; or an evaluation was stopped while it said what it had found, and
            # evaluate runs again as a whole.
            outbox.remove()
            return
        explain = partial(reason, name=store.shown)
        courier = Courier(outbox, MlflowRun(store, record, outbox.remember, live=False), explain)
        try:
            courier.probe()
            yield from courier.pieces(last=True)
        finally:
            report(record, courier.delivery)
            outbox.close()
        if courier.complete and home_place and not courier.gave_up:
            outbox.remove()


def _whole(outbox: Outbox) -> bool:
    """Whether all was said that there is to say."""
    end = outbox.ending()
    return end is not None and end[0] != "KILLED"


def deliver_others(home: Path, store: Store, only: str | None = None) -> Generator[None]:
    """Deliver, piece by piece, what runs of the same store have yet to tell, while a run has time for it.

    Args:
        home: The main checkout.
        store: That answers.
        only: The uid of the one that is wanted; None for all.
    """

    def report(record: RunRecord, delivery: Delivery) -> None:
        if delivery:
            logger.info("MLflow: made up for %s, %s to %s", record.shown, delivery, store.shown)

    found = [(outbox, record) for outbox, record in waiting(home) if record.tracking_uri == store.shown]
    for outbox, record in found:
        if only in (None, record.uid) and not must_wait(record, found):
            yield from deliver(outbox, record, store, report)
