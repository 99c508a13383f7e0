"""Which processes work on a study right now: each keeps a small file young beside the study's journal.

A journal has no heartbeat of its own. The file's age is judged by the clock of the file system that holds it, so that
machines need not agree on the time, and no lock is asked of it, which network file systems keep badly.
"""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from earthprior.identity import process_alive

BEAT_SECONDS = 20.0
PATIENCE_SECONDS = 180.0
"""A process that was silent for so long is dead, or as good as."""


class Presence:
    """Tells others that this process is at work, for as long as the block lasts.

    Args:
        folder: For the files of all processes; made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        started = f"{psutil.Process().create_time():.0f}"
        self.name = f"{socket.gethostname()}+{os.getpid()}+{started}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="presence", daemon=True)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / self.name).touch()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        (self._folder / self.name).unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                (self._folder / self.name).touch()
            except OSError:
                # A file system that is away for a moment; the others are patient for longer than one beat.
                continue


def at_work(folder: Path, name: str) -> bool:
    """Whether the process of this name still works: asked of this machine's processes, or told by its file's age."""
    host, pid, started = name.split("+")
    if host == socket.gethostname():
        return process_alive({"earthprior.pid": pid, "earthprior.process_start": started})
    now = folder / f".now-{os.getpid()}"
    try:
        now.touch()
        return now.stat().st_mtime - (folder / name).stat().st_mtime < PATIENCE_SECONDS
    except FileNotFoundError:
        return False
    finally:
        now.unlink(missing_ok=True)
