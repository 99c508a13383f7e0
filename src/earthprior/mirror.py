"""Keeps a remote run equal to an outbox in the background, so that training neither waits nor stops for it.

The thread reads the outbox's files, hence there is no queue that could fill up: after an outage, a restart or a slow
hour it goes on where it was. When it is done with its own run it has time for what others left.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator

from earthprior.courier import Courier, Delivery, RemoteRun
from earthprior.outbox import Outbox

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
# After a failure the next attempt waits, twice as long after each further one.
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 5.0, 60.0
SPARE_SECONDS = 10.0
"""How long the end of a stage may be put off for what other runs have yet to tell."""

REST = 3.0
"""Between two pieces of theirs, in the time that the last one took: training wants the processor."""


def nothing() -> Generator[None]:
    """No piece of work."""
    yield from ()


HURRY_SECONDS = 0.2


class Mirror:
    """A background thread that keeps a remote run equal to an outbox.

    Args:
        outbox: What to mirror.
        remote: Where to.
        reason_of: Turns an exception into a short text that is safe to print.
        first: What must be delivered before the run is opened, piece by piece; may raise.
        others: What to do when there is time, piece by piece.
    """

    def __init__(
        self,
        outbox: Outbox,
        remote: RemoteRun,
        reason_of: Callable[[Exception], str] = str,
        first: Callable[[], Generator[None]] = nothing,
        others: Callable[[], Generator[None]] = nothing,
    ) -> None:
        self._outbox = outbox
        self._courier = Courier(outbox, remote, reason_of)
        self._reason_of = reason_of
        self._first, self._others = first, others
        self._spare: Generator[None] = nothing()
        self._retry_seconds = 0.0
        self._retry_at = 0.0
        self._first_attempt, self._stop, self._done = threading.Event(), threading.Event(), threading.Event()
        # Set when nobody waits for the thread any more. What it has in hand it must not go on with: the outbox may be
        # moved, and delivered by another.
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def start(self, wait_seconds: float) -> None:
        """Begin; returns when the run is open or has failed to open, after `wait_seconds` at the latest."""
        self._thread.start()
        self._first_attempt.wait(wait_seconds)

    def close(self, timeout_seconds: float, hurried: Callable[[], bool] = lambda: False) -> Delivery:
        """Send what is left, end the remote run, and stop; gives up after `timeout_seconds`, or when hurried.

        What others left may take SPARE_SECONDS more.
        """
        self._stop.set()
        if _until(self._done.wait, timeout_seconds, hurried):
            _until(self._ended, SPARE_SECONDS, hurried)
        self._given_up.set()
        return self._courier.delivery

    def _ended(self, wait_seconds: float) -> bool:
        self._thread.join(wait_seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        self._attempt()
        self._first_attempt.set()
        while not self._stop.wait(POLL_SECONDS):
            if time.monotonic() >= self._retry_at:
                self._attempt()
                self._use_spare_time(self._stop)
        self._attempt(last=True)
        self._done.set()
        self._use_spare_time(self._given_up)
        # Whichever outbox it had in hand is free again.
        self._spare.close()

    def _attempt(self, last: bool = False) -> None:
        """Bring the remote run up to date; a failure is told once and postpones the next attempt."""
        try:
            pieces = self._pieces(last)
            while not self._given_up.is_set():
                next(pieces)
        except StopIteration:
            if self._retry_seconds:
                logger.warning("MLflow: answers again")
            self._retry_seconds = 0.0
        except Exception as error:  # noqa: BLE001 (whatever a store does, training goes on)
            if not self._retry_seconds:
                reason = self._reason_of(error)
                name = self._outbox.journal.path.name
                logger.warning("MLflow: %s; the run goes on, its points wait in %s", reason, name)
            self._retry_seconds = min(2 * self._retry_seconds or FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS)
            self._retry_at = time.monotonic() + self._retry_seconds

    def _pieces(self, last: bool) -> Generator[None]:
        if not self._outbox.hold():
            raise RuntimeError("another process delivers what this run told before")
        opens = not self._courier.opened
        if last or opens or self._retry_seconds:
            self._courier.probe()
        if opens:
            yield from self._first()
        if opens or self._retry_seconds:
            # The store answers, or answers again: also to others.
            self._spare = self._others()
        yield from self._courier.pieces(last)

    def _use_spare_time(self, until: threading.Event) -> None:
        """Deliver what others left, with rests in between, as long as the own run needs nothing."""
        end = time.monotonic() + POLL_SECONDS
        while not self._retry_seconds and not until.is_set() and (self._stop.is_set() or time.monotonic() < end):
            began = time.monotonic()
            try:
                next(self._spare)
            except StopIteration:
                return
            except Exception as error:  # noqa: BLE001 (see above)
                logger.warning("MLflow: %s; what other runs have yet to tell waits", self._reason_of(error))
                self._spare = nothing()
                return
            if not self._stop.is_set():
                until.wait(REST * (time.monotonic() - began))


def _until(over: Callable[[float], bool], seconds: float, hurried: Callable[[], bool]) -> bool:
    """Wait for something, a while at a time; whether it came before time was up or somebody was in a hurry."""
    deadline = time.monotonic() + seconds
    while not over(max(0.0, min(HURRY_SECONDS, deadline - time.monotonic()))):
        if time.monotonic() >= deadline or hurried():
            return False
    return True
