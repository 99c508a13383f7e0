"""Being asked to stop: by a signal, or by the death of the process that started us."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from earthprior.files import remove_unfinished

# Ctrl-C under torchrun reaches a process twice, from the terminal and from torchrun: that is one request. A process of
# a search hears it from the batch system and from its parent, which may be drawing a report.
ONE_REQUEST_SECONDS, ONE_REQUEST_TO_A_JOB_SECONDS = 1.0, 30.0

# Who starts us and may die without telling; a shell may, too, but then (nohup) the run is meant to go on.
TUNE_JOB = "EARTHPRIOR_TUNE_JOB"
STARTERS = ("DVC_STAGE", "TORCHELASTIC_RUN_ID", TUNE_JOB)
LOOK_FOR_STARTER_SECONDS = 0.5


class StopRequest:
    """Asked at every step; `signal_number` is None until somebody wants the run to stop.

    Attributes:
        raises: Whether a request interrupts (see `interruptions`); to be switched off where everything is over already.
    """

    def __init__(self) -> None:
        self.raises = True
        self._signal: int | None = None
        self._asked_at = 0.0
        self._parent = _starter()

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._asked_at > 0

    @property
    def signal_number(self) -> int | None:
        """The signal received, or SIGTERM when dvc or torchrun has died and left this process an orphan."""
        if self._signal is None and self._parent is not None and os.getppid() != self._parent:
            self._signal = signal.SIGTERM
        return self._signal

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: the first request is noted, a second one ends the process at once."""
        window = ONE_REQUEST_TO_A_JOB_SECONDS if TUNE_JOB in os.environ else ONE_REQUEST_SECONDS
        if self._asked_at and time.monotonic() - self._asked_at > window:
            remove_unfinished()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._asked_at = self._asked_at or time.monotonic()
        self._signal = self._signal or number


def _starter() -> int | None:
    """The process whose death asks this one to stop; None where nobody's does, 0 where it is dead already."""
    starters = [name for name in STARTERS if name in os.environ]
    if not starters:
        return None
    parent = os.getppid()
    if starters != ["DVC_STAGE"]:
        return parent
    # Imports take seconds, in which dvc may die. It starts stages in its own session; who adopts orphans has another.
    try:
        return parent if os.getsid(parent) == os.getsid(0) else 0
    except OSError:
        return 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note SIGINT, SIGTERM and the end of the terminal inside the block, where there is state to save."""
    request = StopRequest()

    def hear(number: int, frame: FrameType | None) -> None:
        first = not request.asked
        request.receive(number, frame)
        if first:
            # Saving takes a moment, after a validation a long one, and nobody shall think that nobody heard.
            with suppress(OSError):
                os.write(2, b"\nasked to stop: the state is saved first; ask once more to leave without that\n")

    with _handled_by(hear):
        yield request


@contextmanager
def interruptions(lasting: bool = False) -> Iterator[StopRequest]:
    """Let the first of these signals raise KeyboardInterrupt inside the block, where there is nothing to save.

    The death of dvc does so, too.

    Args:
        lasting: The process ends with the block, and a first request that comes after it is not heard any more: what
            the process has done stands, and its exit code shall say so.
    """
    request, over = StopRequest(), threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        first = not request.asked
        request.receive(number, frame)
        if first and request.raises:
            raise KeyboardInterrupt

    def watch() -> None:
        while not over.wait(LOOK_FOR_STARTER_SECONDS):
            # Where there is state to save, another handler stands, and whoever set it looks for itself.
            if request.signal_number is not None and signal.getsignal(signal.SIGTERM) is interrupt:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch, name="starter", daemon=True)
    with _handled_by(interrupt, lasting):
        watcher.start()
        try:
            yield request
        finally:
            request.raises = request.raises and not lasting
            over.set()
            watcher.join()


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None], lasting: bool = False) -> Iterator[None]:
    numbers = [signal.SIGINT, signal.SIGTERM]
    # Under nohup the end of the terminal is ignored, and meant to be.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items() if not lasting else ():
            signal.signal(number, earlier)
