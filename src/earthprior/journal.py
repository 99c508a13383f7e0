"""The journal of a run, metrics.jsonl: one JSON object a line, and the source of truth for every curve.

MLflow is a mirror of it (mirror.py): what a server missed is read from here and sent again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from earthprior.files import write_atomic

logger = logging.getLogger(__name__)

# JSON has no word for these; as text they survive a round trip through any JSON reader.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

WAITING = 100_000
"""Lines that a full disk may make wait, at most: some tens of megabytes."""


class Position(NamedTuple):
    """Where a reader of the journal has come to. A rewrite of the file starts a new generation."""

    generation: int = 0
    offset: int = 0


class Journal:
    """Append-only records in a file; safe to use from several threads of one process.

    A record is a mapping with `step`; `metrics` in it maps names to floats, non-finite ones included. A line counts
    once its newline is written, so a process killed inside `append` leaves at most a torn line, which is ignored and
    removed by the next `append`.

    Args:
        path: The file; made, with its folder, by the first `append`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._generation = 0
        self._waiting: deque[bytes] = deque(maxlen=WAITING)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; it is with the operating system when this returns.

        Raises:
            OSError: The disk is full or failing. The journal stays readable; the record waits, and is written with the
                next one that can be.
        """
        line = (json.dumps(_encoded(record), allow_nan=False, separators=(",", ":")) + "\n").encode()
        with self._lock:
            self._waiting.append(line)
            self._write_waiting()

    def read(self) -> list[dict[str, Any]]:
        """All complete records, oldest first; none if there is no file."""
        return self.read_from(Position(self._generation), limit=None)[0]

    def read_from(self, position: Position, limit: int | None) -> tuple[list[dict[str, Any]], Position]:
        """At most `limit` records after `position`, and the position behind them.

        A position from before a rewrite starts over at the file's beginning.
        """
        with self._lock:
            generation = self._generation
            offset = position.offset if position.generation == generation else 0
            lines: list[bytes] = []
            try:
                with self.path.open("rb") as handle:
                    handle.seek(offset)
                    for line in handle:
                        if not line.endswith(b"\n") or (limit is not None and len(lines) >= limit):
                            break
                        lines.append(line)
            except (FileNotFoundError, NotADirectoryError):
                pass
        return _decoded(lines, self.path), Position(generation, offset + sum(map(len, lines)))

    def truncate_after(self, step: int) -> None:
        """Drop what was written after a step (atomic rewrite): a resumed run will write it again, with equal values.

        A record's `at` says when it was written, where its own step is no step of the training.
        """
        kept = [record for record in self.read() if record.get("at", record.get("step", step)) <= step]
        with self._lock:
            self._waiting.clear()
            self._close()
            if self.path.exists():
                lines = [json.dumps(_encoded(record), allow_nan=False, separators=(",", ":")) for record in kept]
                write_atomic(self.path, "".join(f"{line}\n" for line in lines))
            self._generation += 1

    def close(self) -> None:
        """Release the file; a later `append` opens it again."""
        with self._lock:
            with suppress(OSError):
                self._write_waiting()
            self._close()

    def _write_waiting(self) -> None:
        """Write what is not in the file yet, oldest first."""
        if self._descriptor is not None and os.fstat(self._descriptor).st_nlink == 0:
            # Deleted under the running training: what follows is kept in a new one, which readers begin anew.
            self._close()
            self._generation += 1
        while self._waiting:
            if self._descriptor is None:
                self._descriptor = self._open()
            line = self._waiting[0]
            try:
                written = os.write(self._descriptor, line)
                if written < len(line):
                    raise OSError(f"only {written} of {len(line)} bytes were written; free disk space")
            except OSError:
                # Opening again removes the torn line.
                self._close()
                raise
            self._waiting.popleft()

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(descriptor, _complete_bytes(descriptor))
        return descriptor

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _complete_bytes(descriptor: int, block: int = 1 << 16) -> int:
    """The file's size up to its last newline."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - block)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _encoded(record: Mapping[str, Any]) -> dict[str, Any]:
    encoded = dict(record)
    if "metrics" in encoded:
        encoded["metrics"] = {name: spelled(float(value)) for name, value in encoded["metrics"].items()}
    return encoded


def spelled(value: float) -> float | str:
    """A number as JSON can hold it: what is not finite by its name."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _value(stored: float | str) -> float:
    return NON_FINITE[stored] if isinstance(stored, str) else float(stored)


def _decoded(lines: Iterable[bytes], path: Path) -> list[dict[str, Any]]:
    records = []
    damaged = 0
    for line in lines:
        try:
            record = json.loads(line)
            if "metrics" in record:
                record["metrics"] = {name: _value(value) for name, value in record["metrics"].items()}
            numbers = [record.get("step", 0), record.get("time_ms", 0)]
            if any(type(number) is not int for number in numbers) or ("metrics" in record) > ("step" in record):
                raise ValueError("no whole number")
            # What stands beside the metrics must go through JSON again.
            json.dumps({name: value for name, value in record.items() if name != "metrics"}, allow_nan=False)
        except (ValueError, AttributeError, KeyError, TypeError, OverflowError, RecursionError):
            damaged += 1
        else:
            records.append(record)
    if damaged:
        logger.warning("%s: %d damaged lines skipped; the other records are unharmed", path.name, damaged)
    return records
