"""Brings a journal to a remote run in the background, so that training neither waits nor stops for it.

The thread reads the journal's file, hence there is no queue that could fill up: after an outage, a restart or a slow
hour it goes on where it was. What the remote run holds already is asked from the run itself, so nothing is sent twice.
"""

from __future__ import annotations

import logging
import math
import posixpath
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from earthprior.journal import Journal, Position

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
# After a failure the next attempt waits, twice as long after each further one.
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 5.0, 60.0
RECORDS_AT_ONCE = 200
NAME_LENGTH = 250


class Point(NamedTuple):
    """One value of one curve; sending the same point twice is harmless, because its time is the recorded one."""

    name: str
    value: float
    time_ms: int
    step: int


class Rejected(Exception):
    """The store answered, and will never take this batch of points."""


class RemoteRun(Protocol):
    """What a mirror needs of a tracking store. Every method may raise, and may be called again after that."""

    def open(self) -> Mapping[str, int]:
        """Create or continue the run; the last step that it already holds of each curve."""

    def probe(self) -> None:
        """Raise within a few seconds if the store does not answer."""

    def log_points(self, points: Sequence[Point]) -> None:
        """Add points."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""

    def upload(self, path: Path, folder: str) -> None:
        """Store a file or a folder."""

    def upload_picture(self, path: Path, key: str, step: int) -> None:
        """Store a picture as one step of a series, once."""

    def finish(self, status: str) -> None:
        """End the run."""


@dataclass(frozen=True)
class Delivery:
    """How much of a journal its remote run holds.

    Attributes:
        delivered: Points that the remote run holds.
        total: Finite points in the journal.
        complete: Nothing is left to deliver: all points, tags and files are there and the run is ended. This is also
            its truth value; without a remote run the journal is all there is, and it is False.
    """

    delivered: int
    total: int
    complete: bool

    def __bool__(self) -> bool:
        return self.complete

    def __str__(self) -> str:
        return f"{self.delivered:,} of {self.total:,} points delivered"


class Mirror:
    """A background thread that keeps a remote run equal to a journal.

    Args:
        journal: What to mirror.
        remote: Where to.
        reason_of: Turns an exception into a short text that is safe to print.
    """

    def __init__(self, journal: Journal, remote: RemoteRun, reason_of: Callable[[Exception], str] = str) -> None:
        self._journal = journal
        self._remote = remote
        self._reason_of = reason_of
        self._position = Position()
        self._held: Mapping[str, int] | None = None
        self._delivered = 0
        self._tags: deque[Mapping[str, str]] = deque()
        self._files: deque[tuple[Path, Callable[[], None]]] = deque()
        self._retry_seconds = 0.0
        self._retry_at = 0.0
        self._status = "FINISHED"
        self._complete = False
        self._first_attempt = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def start(self, wait_seconds: float) -> None:
        """Begin; returns when the run is open or has failed to open, after `wait_seconds` at the latest."""
        self._thread.start()
        self._first_attempt.wait(wait_seconds)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the remote run, soon."""
        self._tags.append(dict(tags))

    def upload(self, path: Path, folder: str) -> None:
        """Store a file or folder in the remote run, soon; it must stay where it is until `close`."""
        self._files.append((path, partial(self._remote.upload, path, folder)))

    def upload_picture(self, path: Path, key: str, step: int) -> None:
        """Store a picture as one step of a series, soon; it must stay where it is until `close`."""
        self._files.append((path, partial(self._remote.upload_picture, path, key, step)))

    def close(self, status: str, timeout_seconds: float) -> Delivery:
        """Send what is left, end the remote run, and stop; gives up after `timeout_seconds`."""
        self._status = status
        self._stop.set()
        self._thread.join(timeout_seconds)
        return Delivery(self._delivered, sum(1 for _ in _all_points(self._journal)), self._complete)

    def _work(self) -> None:
        self._attempt()
        self._first_attempt.set()
        while not self._stop.wait(POLL_SECONDS):
            if time.monotonic() >= self._retry_at:
                self._attempt()
        self._attempt(last=True)

    def _attempt(self, last: bool = False) -> None:
        """Bring the remote run up to date; a failure is told once and postpones the next attempt."""
        try:
            if last or self._held is None or self._retry_seconds:
                self._remote.probe()
            if self._held is None:
                self._held = self._remote.open()
            self._deliver()
            stored = self._upload_files(last)
            if last:
                self._remote.finish(self._status)
                self._complete = stored
        except Exception as error:  # noqa: BLE001 (whatever a store does, training goes on)
            if not self._retry_seconds:
                reason = self._reason_of(error)
                logger.warning("MLflow: %s; the run goes on, its points wait in %s", reason, self._journal.path.name)
            self._retry_seconds = min(2 * self._retry_seconds or FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS)
            self._retry_at = time.monotonic() + self._retry_seconds
        else:
            if self._retry_seconds:
                logger.warning("MLflow: answers again")
            self._retry_seconds = 0.0

    def _deliver(self) -> None:
        while True:
            records, position = self._journal.read_from(self._position, RECORDS_AT_ONCE)
            if position == self._position:
                break
            if position.generation != self._position.generation:
                self._delivered = 0
            self._send(list(_points(records)))
            self._position = position
        while self._tags:
            self._remote.set_tags(self._tags[0])
            self._tags.popleft()

    def _upload_files(self, last: bool) -> bool:
        """Store the waiting files; on the last attempt a failure must not keep the run from ending."""
        while self._files:
            path, upload = self._files[0]
            try:
                upload()
            except FileNotFoundError:
                logger.warning("MLflow: %s is gone, it could not be stored with the run", path.name)
            except Exception as error:
                if not last:
                    raise
                names = ", ".join(path.name for path, _ in self._files)
                logger.warning("MLflow: could not store %s (%s)", names, self._reason_of(error))
                return False
            self._files.popleft()
        return True

    def _send(self, points: Sequence[Point]) -> None:
        held = self._held or {}
        fresh = [point for point in points if point.step > held.get(point.name, point.step - 1)]
        try:
            if fresh:
                self._remote.log_points(fresh)
        except Rejected as error:
            logger.warning("MLflow: refuses %d points (%s); they are in %s", len(fresh), error, self._journal.path.name)
            self._delivered -= len(fresh)
        self._delivered += len(points)


def metric_name(name: str) -> str:
    """The nearest name that MLflow takes: a clean path of [A-Za-z0-9_. :/-], at most 250 characters."""
    clean = re.sub(r"[^A-Za-z0-9_. :/-]", "_", name)
    parts = ["_" if part in (".", "..") else part for part in clean.split("/") if part]
    return posixpath.join(*parts)[:NAME_LENGTH].rstrip("/") if parts else "_"


def _points(records: Sequence[Mapping[str, Any]]) -> Iterator[Point]:
    """The finite points of records, oldest first; a store has no place for the others."""
    for record in records:
        for name, value in record.get("metrics", {}).items():
            if math.isfinite(value):
                yield Point(metric_name(name), value, int(record["time_ms"]), int(record["step"]))


def _all_points(journal: Journal) -> Iterator[Point]:
    position = Position()
    while True:
        records, following = journal.read_from(position, RECORDS_AT_ONCE)
        if following == position:
            return
        yield from _points(records)
        position = following
