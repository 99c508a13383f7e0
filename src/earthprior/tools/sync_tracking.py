"""`earthprior sync-tracking`: delivers to MLflow what it missed in an outage, once each."""

from __future__ import annotations

import os
from pathlib import Path

from earthprior.courier import Delivery
from earthprior.errors import EarthPriorError
from earthprior.identity import main_root
from earthprior.mlflow_run import import_mlflow
from earthprior.outbox import Outbox, RunRecord
from earthprior.tracking_store import Store, locate, reason
from earthprior.undelivered import deliver, must_wait, waiting


def run(root: Path) -> None:
    """Deliver everything that waits, each run to the store that it was meant for.

    Args:
        root: The project's root.

    Raises:
        EarthPriorError: Something still waits; the message says what, and why.
    """
    home = main_root(root)
    found = waiting(home)
    if not found:
        print("MLflow has heard of everything: nothing waits")
        return
    if not import_mlflow():
        raise EarthPriorError(f"MLflow cannot be imported, {len(found)} runs wait; pip install -r requirements.txt")
    left: list[str] = []
    silent: dict[str, str] = {}
    for outbox, record in found:
        place = os.path.relpath(outbox.folder, home)
        try:
            store = _store(root, record)
            if why := silent.get(store.shown):
                left.append(f"{record.shown} in {place}: {why}")
                continue
            if must_wait(record, found):
                left.append(f"{record.shown} in {place}: goes after another run, which waits itself")
                continue
            _probe(store, silent)
            _deliver(outbox, record, store, place)
        except EarthPriorError as error:
            left.append(f"{record.shown} in {place}: {error}")
    if left:
        listed = "\n".join(f"  {line}" for line in left)
        raise EarthPriorError(
            f"{len(left)} of {len(found)} runs wait for MLflow; nothing is lost, the same command goes on:\n{listed}"
        )


def _store(root: Path, record: RunRecord) -> Store:
    """The store that a run was meant for.

    Raises:
        EarthPriorError: It takes a password, which is not kept.
    """
    store = locate(root)
    if store.shown == record.tracking_uri:
        return store
    if "***" in record.tracking_uri:
        raise EarthPriorError(
            f"is meant for {record.tracking_uri}; give that, with its password, as MLFLOW_TRACKING_URI"
        )
    return locate(root, record.tracking_uri)


def _probe(store: Store, silent: dict[str, str]) -> None:
    """Ask whether the store answers, once for all its runs.

    Raises:
        EarthPriorError: It does not.
    """
    try:
        store.probe()
    except OSError as error:
        silent[store.shown] = reason(error, store.shown)
        raise EarthPriorError(silent[store.shown]) from None


def _deliver(outbox: Outbox, record: RunRecord, store: Store, place: str) -> None:
    """Deliver one run and say how much of it is there.

    Raises:
        EarthPriorError: Something of it waits.
    """
    ended: list[Delivery] = []

    def report(run: RunRecord, delivery: Delivery) -> None:
        ended.append(delivery)
        print(f"{run.shown} ({place}): {delivery} to {store.shown}", flush=True)

    try:
        for _ in deliver(outbox, record, store, report):
            pass
    except Exception as error:
        raise EarthPriorError(reason(error, store.shown)) from error
    if not ended and outbox.waits:
        print(f"{record.shown} ({place}): a process has it in hand, and delivers it itself", flush=True)
    if ended and not ended[0]:
        raise EarthPriorError("not all of its files were taken, see above")
