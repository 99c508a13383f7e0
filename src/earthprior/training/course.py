"""The course of one training, whatever is trained: begin or continue, train, record, and leave all in order.

Until it is done everything is in its work folder, where the same call finds it again after a kill.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from earthprior import build, identity, made_of, outbox
from earthprior.errors import EarthPriorError, Interrupted, Pruned
from earthprior.journal import Journal
from earthprior.params import LearningParams
from earthprior.tasks.task import Task
from earthprior.tracking import Tracker
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.distributed import World
from earthprior.training.loop import Outcome, Trainer
from earthprior.training.progress import Progress
from earthprior.training.run import Home
from earthprior.training.stop import StopRequest


@dataclass(frozen=True)
class Hooks:
    """What a caller wants to do in between; all of it in the first process alone.

    Attributes:
        open_run: From tags and journal to the MLflow run.
        validated: Called with the history's row after each validation, those of an earlier process included; may raise
            Pruned.
        trained: Called when all is written, before the MLflow run is closed, with what the kind of training has to say.
        done: Called at the very end: what becomes of the state. Not where it holds what MLflow has yet to hear of, and
            no copy of that could be kept: then it stays.
        logged: Called whenever metrics are logged, with what shows a person a line; never fails.
    """

    open_run: Callable[[Mapping[str, str], Journal], Tracker]
    validated: Callable[[Mapping[str, float], Tracker], None] = lambda row, tracker: None
    trained: Callable[[Any], None] = lambda trained: None
    done: Callable[[CheckpointStore], None] = CheckpointStore.delete
    logged: Callable[[Callable[[str], None]], None] = lambda tell: None


@dataclass(frozen=True)
class Made:
    """What the weights of a run are made of.

    Attributes:
        fingerprint: Of all of it, see `identity.fingerprint`.
        values: The params that act, by dotted key.
        foreign_files: SHA-256 of the files outside the data, by dotted key.
        facts: What is recorded of the data.
    """

    fingerprint: str
    values: Mapping[str, Any]
    foreign_files: Mapping[str, str]
    facts: Mapping[str, Any]


class Drawing(Protocol):
    """Pictures of a training under way."""

    def draw_if_due(self, task: Any, network: nn.Module, epoch: int) -> None:
        """After each epoch."""
        ...

    def draw(self, task: Any, network: nn.Module, epoch: int) -> None:
        """Before the first epoch, and after the last."""
        ...


class NoDrawing:
    """Of a training without pictures."""

    def draw_if_due(self, task: Any, network: nn.Module, epoch: int) -> None:
        """See `Drawing`."""

    def draw(self, task: Any, network: nn.Module, epoch: int) -> None:
        """See `Drawing`."""


def prepare_torch(threads: int) -> None:
    """What a run's bits depend on, beside its seed."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


class Course:
    """One process's work on a training; each kind of training says in its own class what it trains and leaves.

    Args:
        params: Of the training.
        made: What its weights are made of.
        home: Where it is at home.
        hooks: What the caller does in between.
        device: Of this process.
        place: This process among others.
        code: What can change its weights.
    """

    def __init__(
        self,
        params: LearningParams,
        made: Made,
        home: Home,
        hooks: Hooks,
        device: torch.device,
        place: World,
        code: identity.CodeHash,
    ) -> None:
        self._params, self.made, self.home, self.hooks = params, made, home, hooks
        self.device, self.place, self.code = device, place, code
        # Now, since files may be edited while a training is long.
        self.environment = identity.recorded_environment(self._setting(), code)

    def trainer(self, rests_on: str | None) -> Trainer:
        """The trainer at its first step.

        Args:
            rests_on: What a run that continues says of this, see `Task.rests_on`; None of one that begins.
        """
        raise NotImplementedError

    def banner(self, trainer: Trainer) -> str:
        """What is going to happen, before it does."""
        raise NotImplementedError

    def tags(self, task: Any) -> dict[str, str]:
        """Of the MLflow run, beside those of its identity."""
        return {}

    def drawing(self, tracker: Tracker, epoch: int) -> Drawing:
        """The pictures of a run of which so many epochs are done."""
        return NoDrawing()

    def finish(self, trainer: Trainer, outcome: Outcome, tracker: Tracker) -> Any:
        """Write all that the training leaves; what to tell the caller's hook."""
        raise NotImplementedError

    def run(self, stop: StopRequest, accept_code: bool = False) -> None:
        """Train, or continue where an earlier process was stopped.

        Raises:
            Interrupted: Asked to stop; the state is saved.
            Pruned: The caller gave it up.
            StorageError: The disk is full or failing.
            DivergedError: Loss or gradient became non-finite.
            DeviceMemoryError: There is too little memory.
        """
        made = self.made
        store = CheckpointStore(self.home.folder, made.fingerprint, self.code.files, accept_code, self._setting())
        journal = Journal(self.home.folder / "metrics.jsonl")
        # What stands without an epoch is a curve over something else than steps.
        reached = max((record["step"] for record in journal.read() if "epoch" in record), default=0)
        latest = store.load_latest(reached)
        trainer = self.trainer(latest[1]["linear"] if latest else None)
        if self.place.is_first:
            store.sweep()
        if latest is not None:
            trainer.restore(latest[1])
        progress = Progress(trainer.total_steps, trainer.step, self._params.epochs, self.place.is_first)
        if self.place.is_first:
            journal.truncate_after(trainer.step)
            made_of.write(self.home.folder, made.values, made.foreign_files, made.facts)
            if latest is None:
                self._tell_what_is_there(reached, progress)
        progress.note(self.banner(trainer))
        if slow := build.slow_precision(self._params, self.device):
            progress.note(slow)
        if not self.place.is_first:
            trainer.run(store, lambda metrics, step, epoch: None, stop, progress)
            return
        tags = identity.identity_tags(self.home.root, made.fingerprint, self.code) | self.tags(trainer.task)
        self._train(trainer, store, stop, progress, self.hooks.open_run(tags, journal))

    def _train(
        self, trainer: Trainer, store: CheckpointStore, stop: StopRequest, progress: Progress, tracker: Tracker
    ) -> None:
        average = trainer.average.module
        pictures = self.drawing(tracker, len(trainer.history))

        def log(metrics: Mapping[str, float], step: int, epoch: int) -> None:
            tracker.log(metrics, step, epoch)
            self.hooks.logged(progress.note)

        def validated(row: Mapping[str, float]) -> None:
            pictures.draw_if_due(trainer.task, average, int(row["epoch"]))
            self.hooks.validated(row, tracker)

        tracker.hurried = lambda: stop.signal_number is not None
        try:
            for row in list(trainer.history):
                self.hooks.validated(row, tracker)
            if trainer.step == 0:
                pictures.draw(trainer.task, average, 0)
            outcome = trainer.run(store, log, stop, progress, validated)
            pictures.draw(trainer.task, average, len(outcome.history))
            self.hooks.trained(self.finish(trainer, outcome, tracker))
        except (Interrupted, Pruned) as end:
            if isinstance(end, Pruned):
                tracker.log_levels(trainer.history[trainer.best_epoch - 1], trainer.step)
            tracker.close("KILLED")
            raise
        except BaseException as error:
            if isinstance(error, EarthPriorError):
                tracker.set_tags({"earthprior.reason": str(error)})
            tracker.close("FAILED")
            raise
        finally:
            progress.close()
        # Of the stage the run stays open for evaluate, but this process has said all it had to say.
        tracker.close("FINISHED")
        # A finished run leaves no folder, or not for long, but MLflow may have yet to hear of it.
        if outbox.set_aside(self.home.folder, identity.main_root(self.home.root)):
            self.hooks.done(store)

    def _tell_what_is_there(self, reached: int, progress: Progress) -> None:
        """Where a run begins at its first step: an earlier try that left no checkpoint, and unfinished other runs."""
        folder = self.home.folder
        if reached:
            progress.note(
                f"warning: {self.home.shown(folder)} holds no checkpoint, though step {reached:,} was reached: the run "
                "was ended before its first one, or they were deleted. It begins anew"
            )
        if other := made_of.other_run(folder, self.home.root.resolve()):
            progress.note(f"note: {other}")

    def _setting(self) -> dict[str, str]:
        """What changes how numbers round, beside the threads."""
        dtype = build.autocast_dtype(self._params, self.device) or torch.float32
        return {"device": self.device.type, "precision": str(dtype), "processes": str(self.place.size)}


def weights_of(task: Task) -> int:
    """How many weights its network has."""
    return sum(parameter.numel() for parameter in task.network.parameters())
