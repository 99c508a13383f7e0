"""Brings an outbox to its run in MLflow, piece by piece; what the run holds already is not sent again."""

from __future__ import annotations

import logging
import math
import os
import posixpath
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from earthprior.journal import Position
from earthprior.outbox import POINTS, Outbox, positions

logger = logging.getLogger(__name__)

RECORDS_AT_ONCE = 200
TRIES = 3
"""Deliveries in which a store may refuse a file before that is given up."""
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
    """What a courier needs of a tracking store. Every method may raise, and may be called again after that."""

    def open(self) -> Mapping[str, int]:
        """Create or continue the run; the last step that it already holds of each curve."""

    def probe(self) -> None:
        """Raise within a few seconds if the store does not answer."""

    def watch(self) -> None:
        """Begin to sample the machine, if that is wanted."""

    def log_points(self, points: Sequence[Point]) -> None:
        """Add points."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""

    def upload(self, path: Path, folder: str) -> None:
        """Store a file or a folder."""

    def upload_picture(self, path: Path, key: str, step: int) -> None:
        """Store a picture as one step of a series, once."""

    def finish(self, status: str, time_ms: int | None) -> None:
        """End the run."""


@dataclass(frozen=True)
class Delivery:
    """How much of an outbox its remote run holds.

    Attributes:
        delivered: Points that the remote run holds.
        total: Finite points in the journal.
        complete: Nothing is left to deliver: all points, tags and files are there and the run is ended. This is also
            its truth value.
    """

    delivered: int
    total: int
    complete: bool

    def __bool__(self) -> bool:
        return self.complete

    def __str__(self) -> str:
        return f"{self.delivered:,} of {self.total:,} points delivered"


class Courier:
    """Delivers one outbox; whoever uses it holds the outbox.

    Args:
        outbox: What to deliver.
        remote: Where to.
        reason_of: Turns an exception into a short text that is safe to print.
    """

    def __init__(self, outbox: Outbox, remote: RemoteRun, reason_of: Callable[[Exception], str] = str) -> None:
        self.complete = self.gave_up = False
        self._outbox = outbox
        self._remote = remote
        self._reason_of = reason_of
        self._position, self._said = Position(), Position()
        self._held: Mapping[str, int] | None = None
        self._delivered = self._lost = 0
        self._why_lost = ""
        self._again: list[dict[str, Any]] = []
        self._refused: list[dict[str, Any]] = []

    @property
    def opened(self) -> bool:
        """Whether the run is there."""
        return self._held is not None

    @property
    def delivery(self) -> Delivery:
        """How much is there by now."""
        total = sum(len(list(points(part))) for part, _ in positions(self._outbox.journal, Position(), RECORDS_AT_ONCE))
        return Delivery(self._delivered, total, self.complete)

    def probe(self) -> None:
        """Raise within a few seconds if the store does not answer."""
        self._remote.probe()

    def pieces(self, last: bool) -> Iterator[None]:
        """Deliver what is there by now, a piece between one yield and the next; after an error begin again.

        Args:
            last: Nothing more will come: end the run. A file that is refused must then not keep it from ending.
        """
        if self._held is None:
            self._held = self._remote.open()
            # Only now: it is forgotten where the run had to be made anew.
            offset, self._again = self._outbox.said_before()
            self._said = Position(self._said.generation, offset)
            yield
            self._remote.watch()
        yield from self._points()
        yield from self._messages(last)
        if last:
            if self._lost:
                logger.warning("MLflow: refuses %d points (%s); they are in %s", self._lost, self._why_lost, POINTS)
            status, time_ms = self._outbox.ending() or ("KILLED", self._outbox.last_time_ms())
            self._remote.finish(status, time_ms)
            self.complete = all(message["tries"] >= TRIES for message in self._refused)
            self.gave_up = self.complete and bool(self._refused)
            if self.complete:
                self._outbox.mark_told()
            else:
                self._outbox.mark_said(self._said.offset, self._refused)

    def _points(self) -> Iterator[None]:
        held = self._held or {}
        for records, position in positions(self._outbox.journal, self._position, RECORDS_AT_ONCE):
            if position.generation != self._position.generation:
                self._delivered = self._lost = 0
            some = list(points(records))
            fresh = [point for point in some if point.step > held.get(point.name, point.step - 1)]
            lost = (yield from self._send(fresh)) if fresh else 0
            self._delivered += len(some) - lost
            self._lost += lost
            self._position = position
            yield

    def _send(self, some: Sequence[Point]) -> Generator[None, None, int]:
        """Send points, half by half where they are refused: only those are lost that the store never takes; how many.

        What it took of a refused batch it gets a second time, which is harmless.
        """
        try:
            self._remote.log_points(some)
            return 0
        except Rejected as error:
            if len(some) == 1:
                self._why_lost = str(error)
                return 1
        yield
        middle = len(some) // 2
        lost = yield from self._send(some[:middle])
        return lost + (yield from self._send(some[middle:]))

    def _messages(self, last: bool) -> Iterator[None]:
        """Tags and files; at last those files, too, that an earlier delivery was refused."""
        for messages, position in positions(self._outbox.messages, self._said, 1):
            for message in messages:
                if "tags" in message:
                    self._remote.set_tags(message["tags"])
                elif "file" in message or "picture" in message:
                    self._store(message, last)
            self._said = position
            yield
        while last and self._again:
            self._store(self._again[0], last)
            del self._again[0]
            yield

    def _store(self, message: Mapping[str, Any], last: bool) -> None:
        tries = message.get("tries", 0) + 1
        if tries > TRIES:
            self._refused.append({**message})
            return
        path = self._outbox.folder / (message.get("file") or message["picture"])
        try:
            if "picture" in message:
                self._remote.upload_picture(path, message["key"], message["step"])
            else:
                self._remote.upload(path, message["folder"])
        except FileNotFoundError:
            logger.warning("MLflow: %s is gone, it could not be stored with the run", path.name)
        except Exception as error:
            if not last:
                raise
            self._remote.probe()
            self._refused.append({**message, "tries": tries})
            reason = self._reason_of(error)
            if tries < TRIES:
                logger.warning("MLflow: could not store %s (%s)", path.name, reason)
                return
            place = os.path.relpath(path)
            logger.warning(
                "MLflow: refused %s %d times (%s), gave it up; it lies in %s", path.name, tries, reason, place
            )


def metric_name(name: str) -> str:
    """The nearest name that MLflow takes: a clean path of [A-Za-z0-9_. :/-], at most 250 characters."""
    clean = re.sub(r"[^A-Za-z0-9_. :/-]", "_", name)
    parts = ["_" if part in (".", "..") else part for part in clean.split("/") if part]
    return posixpath.join(*parts)[:NAME_LENGTH].rstrip("/") if parts else "_"


def points(records: Sequence[Mapping[str, Any]]) -> Iterator[Point]:
    """The finite points of records, oldest first; a store has no place for the others."""
    for record in records:
        for name, value in (record.get("metrics") or {}).items():
            if math.isfinite(value) and "time_ms" in record and "step" in record:
                yield Point(metric_name(name), value, int(record.get("time_ms", 0)), int(record["step"]))
