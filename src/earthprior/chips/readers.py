"""A few daemon threads that read chips, and a limit on how long a single read may take.

`concurrent.futures.ThreadPoolExecutor` would do, but for one thing: Python waits for its threads at exit, so a read
that hangs on a dead network disk would hang the program after it has already reported the error.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

import rasterio

from earthprior.chips.problems import some
from earthprior.errors import StorageError

Item = TypeVar("Item")
Result = TypeVar("Result")

LIMIT_SECONDS = 120.0
"""A read that takes longer hangs."""

END_SECONDS = 5.0
"""Long enough for chips that are half read, short enough for reads that hang."""


class Readers:
    """A pool of daemon threads; leaving its context drops what has not begun and stops them.

    Args:
        threads: How many.
        limit_seconds: How long one task may take; by default LIMIT_SECONDS.
    """

    def __init__(self, threads: int, limit_seconds: float | None = None) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], str, Callable[..., Any], tuple[Any, ...]] | None]
        self._tasks = queue.SimpleQueue()
        self._limit_seconds = LIMIT_SECONDS if limit_seconds is None else limit_seconds
        self._running: dict[int, str] = {}
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"chip-reader-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, name: str, task: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Queue a task; `name` is what an error calls it."""
        future: Future[Result] = Future()
        self._tasks.put((future, name, task, arguments))
        return future

    def result(self, future: Future[Result]) -> Result:
        """Wait for a task.

        Raises:
            StorageError: Nothing came within the limit; names what is being read.
        """
        try:
            return future.result(timeout=self._limit_seconds)
        except TimeoutError:
            if future.done():
                raise
            hanging = some(sorted(self._running.values()))
            raise StorageError(
                f"reading {hanging or 'a chip'} takes more than {self._limit_seconds:.0f} seconds. Check the disk or "
                "network share that the data lies on, then run the same command again"
            ) from None

    def __enter__(self) -> Readers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed = True
        for _ in self._threads:
            self._tasks.put(None)
        end = time.monotonic() + END_SECONDS
        for thread in self._threads:
            thread.join(timeout=max(0.0, end - time.monotonic()))

    def _work(self) -> None:
        # Held for the thread's life: without it rasterio makes and drops an environment for every file, a tenth of a
        # read. It sets no options, which are global and would race.
        with rasterio.Env():
            while (entry := self._tasks.get()) is not None:
                self._do(*entry)
                # Else this frame would keep the last chip alive while the thread waits.
                del entry

    def _do(self, future: Future[Any], name: str, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if self._closed:
            future.cancel()
        if not future.set_running_or_notify_cancel():
            return
        own = threading.get_ident()
        self._running[own] = name
        try:
            future.set_result(task(*arguments))
        except BaseException as error:  # noqa: BLE001
            # It is raised again where the result is asked for.
            future.set_exception(error)
        finally:
            self._running.pop(own, None)


def alone(name: str, task: Callable[..., Result], *arguments: Any) -> Result:
    """A task in a thread of its own, with nothing beside it: for the first read of a process.

    GDAL can deadlock where several threads are the first to use its drivers.

    Raises:
        StorageError: It hangs; any exception of the task is raised as it is.
    """
    with Readers(1) as reader:
        return reader.result(reader.submit(name, task, *arguments))


def ordered_map(
    task: Callable[[Item], Result], items: Iterable[Item], name: Callable[[Item], str], threads: int, ahead: int = 4
) -> Iterator[Result]:
    """task(item) for every item, computed by threads, yielded in the items' order.

    Args:
        task: Called in a thread.
        items: Taken from lazily.
        name: How an error calls an item.
        threads: How many.
        ahead: How many items per thread may be under way, which bounds the memory.

    Raises:
        StorageError: A task hangs; any exception of a task is raised as it is.
    """
    pending: deque[Future[Result]] = deque()
    with Readers(threads) as readers:
        for item in items:
            pending.append(readers.submit(name(item), task, item))
            if len(pending) > threads * ahead:
                yield readers.result(pending.popleft())
        while pending:
            yield readers.result(pending.popleft())
