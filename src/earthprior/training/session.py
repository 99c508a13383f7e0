"""One training from params to outs: by the stage `pretrain`, and by each trial of a study.

Until it is done everything is in its work folder, where the same call finds it again after a kill. Then it leaves what
`training.outs` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from earthprior import build, identity, made_of, outbox
from earthprior.chips.batch import Batch
from earthprior.chips.loader import RawBatch, load_batches
from earthprior.chips.normalize import Normalizer
from earthprior.chips.read import ChipSpec
from earthprior.chips.selection import Selection, select, validation_batches
from earthprior.diffusion.gain import missing_levels, noise_levels
from earthprior.errors import EarthPriorError, Interrupted, Pruned
from earthprior.journal import Journal
from earthprior.params import active
from earthprior.pictures import Pictures
from earthprior.tasks.diffusion import DiffusionTask
from earthprior.tracking import Tracker
from earthprior.training import outs
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.demands import check_batch_size, check_memory
from earthprior.training.distributed import World, unwrap
from earthprior.training.linear_denoiser import linear_of_run
from earthprior.training.loop import Outcome, Trainer
from earthprior.training.order import TrainingChips
from earthprior.training.progress import Progress
from earthprior.training.run import Home, Run
from earthprior.training.stop import StopRequest
from earthprior.training.validate import Validation


@dataclass(frozen=True)
class Trained:
    """A training that is done, while its MLflow run is still open.

    Attributes:
        task: With the best averaged weights, in evaluation mode.
        outcome: Weights and history.
        selection: Its chips.
        normalizer: Of the run.
        device: Where the task is.
        tracker: For further numbers.
    """

    task: DiffusionTask
    outcome: Outcome
    selection: Selection
    normalizer: Normalizer
    device: torch.device
    tracker: Tracker


@dataclass(frozen=True)
class Hooks:
    """What a caller wants to do in between; all of it in the first process alone.

    Attributes:
        open_run: From tags and journal to the MLflow run.
        validated: Called with the history's row after each validation, those of an earlier process included; may raise
            Pruned.
        trained: Called when all is written, before the MLflow run is closed.
        done: Called at the very end: what becomes of the state. Not where it holds what MLflow has yet to hear of, and
            no copy of that could be kept: then it stays.
        logged: Called whenever metrics are logged, with what shows a person a line; never fails.
    """

    open_run: Callable[[Mapping[str, str], Journal], Tracker]
    validated: Callable[[Mapping[str, float], Tracker], None] = lambda row, tracker: None
    trained: Callable[[Trained], None] = lambda trained: None
    done: Callable[[CheckpointStore], None] = CheckpointStore.delete
    logged: Callable[[Callable[[str], None]], None] = lambda tell: None


def prepare_torch(threads: int) -> None:
    """What a run's bits depend on, beside its seed."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


class Session:
    """One process's work on a training; a class only because its parts share what it is given.

    Args:
        run: What is trained.
        home: Where.
        hooks: What the caller does in between.
        device: Of this process.
        place: This process among others.

    Raises:
        EarthPriorError: The catalog is not the one that the statistics are of, or batches cannot be filled.
    """

    def __init__(self, run: Run, home: Home, hooks: Hooks, device: torch.device, place: World) -> None:
        self.work, self.params = run, run.params
        self.home, self.hooks, self.device, self.place = home, hooks, device, place
        self.selection = select(run.params, home.root, run.stats)
        check_batch_size(run.params, len(self.selection.train), place.size)
        check_memory(run.params, len(self.selection.train), place.size)
        self.normalizer = build.normalizer(run.params, run.stats)
        self.code = identity.code_hash()
        # Now, since files may be edited while a training is long.
        self.environment = identity.recorded_environment(self._setting())

    def run(self, stop: StopRequest, accept_code: bool = False) -> None:
        """Train, or continue where an earlier process was stopped.

        Raises:
            Interrupted: Asked to stop; the state is saved.
            Pruned: The caller gave it up.
            StorageError: The disk is full or failing.
            DivergedError: Loss or gradient became non-finite.
            DeviceMemoryError: There is too little memory.
        """
        store = CheckpointStore(self.home.folder, self.work.fingerprint, self.code.files, accept_code, self._setting())
        journal = Journal(self.home.folder / "metrics.jsonl")
        # What stands without an epoch is a curve over something else than steps.
        reached = max((record["step"] for record in journal.read() if "epoch" in record), default=0)
        latest = store.load_latest(reached)
        trainer = self._trainer(latest[1]["linear"] if latest else None)
        if self.place.is_first:
            store.sweep()
        if latest is not None:
            trainer.restore(latest[1])
        progress = Progress(trainer.total_steps, trainer.step, self.params.epochs, self.place.is_first)
        if self.place.is_first:
            journal.truncate_after(trainer.step)
            made_of.write(self.home.folder, active(self.params), self.work.foreign_files, self.work.stats)
            if latest is None:
                self._tell_what_is_there(reached, progress)
        progress.note(self._banner(trainer))
        if not self.place.is_first:
            trainer.run(store, lambda metrics, step, epoch: None, stop, progress)
            return
        tags = identity.identity_tags(self.home.root, self.work.fingerprint, self.code) | _level_tags(trainer.task)
        self._train(trainer, store, stop, progress, self.hooks.open_run(tags, journal))

    def _train(
        self, trainer: Trainer, store: CheckpointStore, stop: StopRequest, progress: Progress, tracker: Tracker
    ) -> None:
        folder, average, epoch = self.home.folder / "pictures", trainer.average.module, len(trainer.history)
        pictures = Pictures(folder, self.params, self.selection, self.normalizer, self.device, tracker, epoch)

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
            tracker.log_levels(outcome.history[outcome.best_epoch - 1], trainer.step)
            outs.write(outcome, trainer.task, self.environment, self.work, self.home, tracker)
            unwrap(trainer.task.network).load_state_dict(outcome.best)
            self.hooks.trained(
                Trained(trainer.task.eval(), outcome, self.selection, self.normalizer, self.device, tracker)
            )
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

    def _trainer(self, wanted: str | None) -> Trainer:
        """The trainer of this run at its first step.

        Args:
            wanted: See `linear_of_run`.
        """
        linear = linear_of_run(wanted, self.params, self.selection, self.normalizer, self.home, self.place)
        task = build.task(self.params, linear).to(self.device)
        validation = Validation(self._validation_batches, self.params.data.bands)
        chips = TrainingChips(self.selection.train, self._read, self.normalizer)
        return Trainer(self.params, task, chips, validation, self.device, self.place)

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

    def _read(self, order: Iterable[Sequence[int]]) -> Generator[RawBatch]:
        return load_batches(
            self.selection.folder,
            self.selection.train,
            order,
            ChipSpec.from_params(self.params.data),
            readers=self.params.operation.readers,
            pin=self.device.type == "cuda",
        )

    def _validation_batches(self) -> Iterator[tuple[Batch, list[str]]]:
        return validation_batches(self.params, self.selection, self.normalizer, self.device)

    def _setting(self) -> dict[str, str]:
        """What changes how numbers round, beside the threads."""
        dtype = build.autocast_dtype(self.params, self.device) or torch.float32
        return {"device": self.device.type, "precision": str(dtype), "processes": str(self.place.size)}

    def _banner(self, trainer: Trainer) -> str:
        """What is going to happen, before it does."""
        weights = sum(parameter.numel() for parameter in trainer.task.network.parameters())
        begin = f"continuing at step {trainer.step:,} of" if trainer.step else "training"
        return (
            f"pretrain {self.work.fingerprint}: {begin} {trainer.total_steps:,} steps "
            f"({self.params.epochs} epochs of {trainer.steps_per_epoch}), {len(self.selection.train):,} train and "
            f"{len(self.selection.validate):,} validate chips, {self.params.data.train_px} px, {self.params.network} "
            f"with {weights:,} weights on {self.device} ({self.place.size} process{'es' * (self.place.size > 1)}, "
            f"{self.params.threads} threads), state in {self.home.shown(self.home.folder)}"
        )


def _level_tags(task: DiffusionTask) -> dict[str, str]:
    """Tells runs whose schedule does not reach all judged noise levels: compare those on common levels only."""
    missing = missing_levels(level.rho for level in noise_levels(task.schedule, float(task.linear.std)))
    return {"levels_missing": ", ".join(missing)} if missing else {}
