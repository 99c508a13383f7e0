"""Which processes work on a study right now: each keeps a small file young beside the study's journal.

A journal has no heartbeat of its own. The file's age is judged by the clock of the file system that holds it, so that
machines need not agree on the time, and no lock is asked of it, which network file systems keep badly.
"""

from __future__ import annotations

import hashlib
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


def own_name() -> str:
    """By which other processes know this one."""
    return f"{_machine()}+{os.getpid()}+{psutil.Process().create_time():.0f}"


def _machine() -> str:
    """This machine, or this container: where a process number means the same process."""
    try:
        space = f"{Path('/proc/sys/kernel/random/boot_id').read_text()}{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()
    return f"{socket.gethostname()}-{hashlib.sha256(space.encode()).hexdigest()[:8]}"


class Presence:
    """Tells others that this process is at work, for as long as the block lasts.

    Args:
        folder: For the files of all processes; made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = own_name()
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
    machine, pid, started = name.split("+")
    if machine == _machine():
        return process_alive({"earthprior.pid": pid, "earthprior.process_start": started})
    try:
        seen = (folder / name).stat().st_mtime
    except FileNotFoundError:
        return False
    now = folder / f".now-{own_name()}-{threading.get_ident()}"
    now.touch()
    try:
        return now.stat().st_mtime - seen < PATIENCE_SECONDS
    finally:
        now.unlink(missing_ok=True)


def here(name: str) -> bool:
    """Whether a process of this name is, or was, one of this machine."""
    return name.split("+")[0] == _machine()
