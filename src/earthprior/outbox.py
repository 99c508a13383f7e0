"""What a run has to tell MLflow, complete in a folder before any of it is sent.

So no outage and no kill loses any of it, and whatever process comes later can deliver it:

    run.json        who the run is, and where it is in MLflow
    metrics.jsonl   its points, see journal.py
    messages.jsonl  its tags, files and end, in their order
    artifacts/      the files as they were when they were handed over
    delivery.lock   held by whoever delivers
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from earthprior.files import read_json, replacing, write_json
from earthprior.journal import Journal, Position

logger = logging.getLogger(__name__)

POINTS, MESSAGES, RECORD, ARTIFACTS, LOCK = (
    "metrics.jsonl", "messages.jsonl", "run.json", "artifacts", "delivery.lock",
)  # fmt: skip
UNDELIVERED = "work/undelivered"
"""Under the main checkout: the outboxes of runs whose own folder is gone."""


@dataclass(frozen=True)
class Training:
    """What an evaluation knows of the training it judges.

    Attributes:
        uid: Of its record; None where that is not known.
        run_id: Of its run, likewise.
        params: Used where its run cannot be read.
        metrics: Likewise.
    """

    uid: str | None
    run_id: str | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """Who a run is: all that it takes to open it, in any process, at any later time.

    Attributes:
        uid: Our own name of it, since MLflow gives one only when it answers.
        tracking_uri: Of its store, without secrets.
        experiment: Name of the experiment.
        experiment_id: Used instead where given.
        run_id: None as long as no store has answered.
        joined: The run that `mlflow run` made for it.
        name: Of a new run.
        differs: Stands behind the name, see `naming.differences`.
        params: As MLflow shows them.
        tags: Likewise.
        began_ms: When it began.
        parent: The uid of the study that it is a trial of.
        training: Of an evaluation: what it judges.
    """

    uid: str
    tracking_uri: str
    experiment: str
    experiment_id: str | None
    run_id: str | None
    joined: str | None
    name: str | None
    differs: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    began_ms: int
    parent: str | None
    training: Training | None

    @property
    def shown(self) -> str:
        """For the eye."""
        return f"{'evaluation of ' if self.training else ''}{self.name or self.uid[:8]}"

    @property
    def awaits(self) -> str | None:
        """The uid of the run that must be in the store before this one: a trial's study, an evaluation's training."""
        return self.training.uid if self.training else self.parent

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunRecord:
        """The inverse of `dataclasses.asdict`; what else is in the mapping does not matter.

        Raises:
            LookupError, TypeError: Something is missing: it is no record, or one of an earlier version.
        """
        own = {name: content[name] for name in cls.__dataclass_fields__}
        training = own.pop("training")
        return cls(**own, training=Training(**training) if training else None)


class Outbox:
    """One run's outbox. What is written here is with the operating system when the method returns.

    Args:
        folder: Its own, or the work folder of a training, which holds other files beside it.
        journal: Its metrics.jsonl, where somebody writes there already.
    """

    def __init__(self, folder: Path, journal: Journal | None = None) -> None:
        self.folder = folder
        self.journal = journal or Journal(folder / POINTS)
        self.messages = Journal(folder / MESSAGES)
        self._record: RunRecord | None = None
        self._lock = FileLock(folder / LOCK, thread_local=False)

    def begin(self, record: RunRecord) -> None:
        """Say who the run is. Tags and files that an earlier process left will be said again, if they are still true.

        Raises:
            OSError: The disk is full or failing.
        """
        self._record = record
        self.messages.path.unlink(missing_ok=True)
        shutil.rmtree(self.folder / ARTIFACTS, ignore_errors=True)
        write_json(self.folder / RECORD, asdict(record))

    def record(self) -> RunRecord | None:
        """Who the run is; None where nobody has said so."""
        try:
            return RunRecord.from_json(read_json(self.folder / RECORD))
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def remember(self, run_id: str) -> None:
        """Note where in MLflow the run is."""
        found = self.record()
        record = found or self._record
        # Not where the folder is gone: its run is done, or another's.
        if record is not None and self.folder.is_dir():
            # Another run than before has yet to hear of everything.
            said = {"said": self._noted("said")} if found and found.run_id == run_id else {}
            write_json(self.folder / RECORD, {**asdict(replace(record, run_id=run_id)), **said})

    def tag(self, tags: Mapping[str, str]) -> None:
        """Tags for the run."""
        self.messages.append({"tags": dict(tags)})

    def put(self, path: Path, folder: str) -> None:
        """A file (or folder) for the run's artifacts, as it is now; one that lies in the outbox stays as it is.

        Raises:
            OSError: It cannot be read or kept.
        """
        self.messages.append({"file": self._kept(path, Path(folder) / path.name), "folder": folder})

    def put_picture(self, path: Path, key: str, step: int) -> None:
        """A picture, likewise, as one step of a series."""
        self.messages.append(
            {"picture": self._kept(path, Path("images") / f"{key}-{step}.png"), "key": key, "step": step}
        )

    def end(self, status: str) -> None:
        """How the run ended: FINISHED, FAILED or KILLED."""
        self.messages.append({"end": status, "time_ms": time.time_ns() // 1_000_000})

    def ending(self) -> tuple[str, int] | None:
        """Status and time (ms) of the end; None of a run that is under way, or whose process was killed."""
        ends = [(str(message["end"]), int(message["time_ms"])) for message in self.messages.read() if "end" in message]
        return ends[-1] if ends else None

    def last_time_ms(self) -> int | None:
        """When the last point was recorded."""
        return max((int(record.get("time_ms", 0)) for record in self.journal.read()), default=None)

    @property
    def waits(self) -> bool:
        """Whether there is anything that MLflow has not heard."""
        try:
            return bool(self._noted("told") != self._extent())
        except (OSError, ValueError, AttributeError):
            return False

    def mark_told(self) -> None:
        """Note that MLflow has heard all that is here now."""
        record = self.record()
        if record is not None:
            write_json(self.folder / RECORD, {**asdict(record), "told": self._extent()})

    def mark_said(self, offset: int, refused: Sequence[Mapping[str, Any]]) -> None:
        """Note that MLflow has heard all messages up to an offset but some, whose files it refused `tries` times."""
        record = self.record()
        if record is not None:
            write_json(self.folder / RECORD, {**asdict(record), "said": {"offset": offset, "refused": list(refused)}})

    def said_before(self) -> tuple[int, list[dict[str, Any]]]:
        """What an earlier delivery has noted with `mark_said`; nothing where none has."""
        try:
            said = self._noted("said")
            return int(said["offset"]), [dict(message) for message in said["refused"]]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return 0, []

    def hold(self) -> bool:
        """Become, or be, the one who delivers; False if another process, or another part of this one, is at it."""
        try:
            if not self._lock.is_locked:
                self._lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        """Let others deliver."""
        self._lock.release(force=True)

    @contextmanager
    def held(self) -> Iterator[bool]:
        """`hold` for a block; whether that was possible."""
        mine = self.hold()
        try:
            yield mine
        finally:
            if mine:
                self.release()

    def remove(self) -> None:
        """Delete the folder: MLflow has everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Release the files."""
        self.journal.close()
        self.messages.close()

    def _noted(self, what: str) -> Any:
        return read_json(self.folder / RECORD).get(what)

    def _kept(self, path: Path, name: Path) -> str:
        """A file's name in the outbox."""
        if not path.is_relative_to(self.folder):
            kept = self.folder / ARTIFACTS / name
            _copy(path, kept)
            path = kept
        return path.relative_to(self.folder).as_posix()

    def _extent(self) -> list[int]:
        files = (self.folder / POINTS, self.folder / MESSAGES)
        return [path.stat().st_size if path.is_file() else 0 for path in files]


def folder_of(home: Path, record: RunRecord) -> Path:
    """Where an outbox lies that has no training's folder around it."""
    label = record.tags.get("earthprior.fingerprint", "study")
    return home / UNDELIVERED / f"{label}-{'evaluate-' if record.training else ''}{record.uid[:8]}"


def set_aside(folder: Path, home: Path) -> bool:
    """Keep a training's outbox, if MLflow has yet to hear of it, before its folder is deleted.

    The copy comes under its final name complete or not at all, and what it is made of stays.

    Args:
        folder: Of the training.
        home: The main checkout.

    Returns:
        Whether the folder may go. Where the disk is full or failing it must stay, which a warning tells.
    """
    outbox = Outbox(folder)
    record = outbox.record()
    if record is None:
        return True
    kept = folder_of(home, record)
    try:
        _set_aside(outbox, kept)
    except OSError as error:
        shutil.rmtree(_building(kept), ignore_errors=True)
        place = os.path.relpath(folder, home)
        logger.warning("%s stays: MLflow has yet to hear of it, and no copy can be kept (%s)", place, error)
        return False
    return True


def _building(kept: Path) -> Path:
    return kept.with_name(f".{kept.name}.tmp")


def _set_aside(outbox: Outbox, kept: Path) -> None:
    folder, building = outbox.folder, _building(kept)
    # Of a try that was killed; also where MLflow has heard of everything since.
    shutil.rmtree(building, ignore_errors=True)
    if not outbox.waits:
        return
    files = [message.get("file") or message.get("picture") for message in outbox.messages.read()]
    for name in dict.fromkeys([RECORD, POINTS, MESSAGES, *filter(None, files)]):
        if (folder / name).exists():
            _link(folder / name, building / name)
    shutil.rmtree(kept, ignore_errors=True)
    building.rename(kept)
    # Killed before this line, both are delivered, to the one run of this uid, which takes nothing twice.
    outbox.mark_told()


def positions(journal: Journal, position: Position, at_once: int) -> Iterator[tuple[list[dict[str, Any]], Position]]:
    """The records behind a position in portions, each with the position behind it."""
    while True:
        records, following = journal.read_from(position, at_once)
        if following == position:
            return
        yield records, following
        position = following


def _copy(path: Path, kept: Path) -> None:
    if path.is_dir():
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(path, kept)
        return
    with replacing(kept) as temporary:
        shutil.copyfile(path, temporary)


def _link(path: Path, kept: Path) -> None:
    """A second name for a file that nobody will write into any more; a copy where the disk has none."""
    if path.is_dir():
        shutil.copytree(path, kept)
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        os.link(path, kept)
        return
    shutil.copyfile(path, kept)
