"""One training from params to outs: by the stage `pretrain`, and by each trial of a study.

Until it is done everything is in its work folder, where the same call finds it again after a kill. Then it leaves
network.safetensors (the best averaged weights), config.json (all that rebuilds it), linear.safetensors, history.csv,
environment.json and mlflow_run.json.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save

from earthprior import build, identity, made_of, memory, outbox
from earthprior.chips.batch import Batch
from earthprior.chips.loader import RawBatch, load_batches
from earthprior.chips.normalize import Normalizer
from earthprior.chips.read import ChipSpec
from earthprior.chips.selection import Selection, linear_crops, read_stats, select, validation_batches
from earthprior.diffusion import linear
from earthprior.diffusion.gain import missing_levels, noise_levels
from earthprior.diffusion.linear import LinearDenoiser
from earthprior.errors import DataError, EarthPriorError, Interrupted, ParamsError, Pruned, StorageError, mended_by
from earthprior.files import sweep, write_atomic, write_csv, write_json
from earthprior.journal import Journal
from earthprior.params import Params, active
from earthprior.pictures import Pictures
from earthprior.tasks.diffusion import DiffusionTask
from earthprior.tracking import Tracker
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.distributed import World, unwrap
from earthprior.training.loop import Outcome, Trainer, TrainingChips
from earthprior.training.progress import Progress
from earthprior.training.stop import StopRequest
from earthprior.training.validate import Validation


@dataclass(frozen=True)
class Run:
    """What is trained, and who it is.

    Attributes:
        params: The whole of params.yaml.
        stats: The content of results/stats/stats.json.
        foreign_files: See `build.foreign_files`.
        fingerprint: What the weights are made of, see `identity.fingerprint`.
    """

    params: Params
    stats: Mapping[str, Any]
    foreign_files: Mapping[str, str]
    fingerprint: str

    @classmethod
    def of(cls, params: Params, root: Path) -> Run:
        """The run of these params on the statistics of this project.

        Raises:
            EarthPriorError: There are no statistics, the noise schedule is degenerate, or a file cannot be had.
        """
        stats, stats_sha256 = read_stats(root)
        build.schedule(params)  # its faults before any work
        foreign = build.foreign_files(params)
        return cls(params, stats, foreign, identity.fingerprint(active(params) | foreign, stats_sha256))


@dataclass(frozen=True)
class Home:
    """Where a training is at home.

    Attributes:
        root: The project's root, with the chips and their statistics.
        folder: Its state, until it is done.
        results: Its outs.
        params_path: Its params.yaml, kept with the MLflow run.
    """

    root: Path
    folder: Path
    results: Path
    params_path: Path


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
        done: Called at the very end: what becomes of the state.
    """

    open_run: Callable[[Mapping[str, str], Journal], Tracker]
    validated: Callable[[Mapping[str, float], Tracker], None] = lambda row, tracker: None
    trained: Callable[[Trained], None] = lambda trained: None
    done: Callable[[CheckpointStore], None] = CheckpointStore.delete


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
        self.params, self.stats, self.foreign_files, self.fingerprint = (
            run.params, run.stats, run.foreign_files, run.fingerprint,
        )  # fmt: skip
        self.home, self.hooks, self.device, self.place = home, hooks, device, place
        self.selection = select(run.params, home.root, run.stats)
        _check_batch_size(run.params, len(self.selection.train), place.size)
        _check_memory(run.params, len(self.selection.train), place.size)
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
        store = CheckpointStore(self.home.folder, self.fingerprint, self.code.files, accept_code, self._setting())
        journal = Journal(self.home.folder / "metrics.jsonl")
        # What stands without an epoch is a curve over something else than steps.
        reached = max((record["step"] for record in journal.read() if "epoch" in record), default=0)
        latest = store.load_latest(reached)
        task = build.task(self.params, self._linear(latest[1]["linear"] if latest else None)).to(self.device)
        validation = Validation(self._validation_batches, self.params.data.bands)
        chips = TrainingChips(self.selection.train, self._read, self.normalizer)
        trainer = Trainer(self.params, task, chips, validation, self.device, self.place)
        if self.place.is_first:
            store.sweep()
        if latest is not None:
            trainer.restore(latest[1])
        if self.place.is_first:
            journal.truncate_after(trainer.step)
        progress = Progress(trainer.total_steps, trainer.step, self.params.epochs, self.place.is_first)
        if reached and latest is None:
            progress.note(
                f"warning: {self._shown(self.home.folder)} holds no checkpoint, though step {reached:,} was reached: "
                "the run was ended before its first one, or they were deleted. It begins anew"
            )
        if self.place.is_first:
            made_of.write(self.home.folder, active(self.params), self.foreign_files, self.stats)
            if latest is None and (other := made_of.other_run(self.home.folder, self.home.root.resolve())):
                progress.note(f"note: {other}")
        progress.note(self._banner(trainer))
        if not self.place.is_first:
            trainer.run(store, lambda metrics, step, epoch: None, stop, progress)
            return
        tags = identity.identity_tags(self.home.root, self.fingerprint, self.code) | _level_tags(task)
        self._train(trainer, store, stop, progress, self.hooks.open_run(tags, journal))

    def _train(
        self, trainer: Trainer, store: CheckpointStore, stop: StopRequest, progress: Progress, tracker: Tracker
    ) -> None:
        folder, average, epoch = self.home.folder / "pictures", trainer.average.module, len(trainer.history)
        pictures = Pictures(folder, self.params, self.selection, self.normalizer, self.device, tracker, epoch)

        def validated(row: Mapping[str, float]) -> None:
            pictures.draw_if_due(trainer.task, average, int(row["epoch"]))
            self.hooks.validated(row, tracker)

        tracker.hurried = lambda: stop.signal_number is not None
        try:
            for row in list(trainer.history):
                self.hooks.validated(row, tracker)
            if trainer.step == 0:
                pictures.draw(trainer.task, average, 0)
            outcome = trainer.run(store, tracker.log, stop, progress, validated)
            pictures.draw(trainer.task, average, len(outcome.history))
            tracker.log_levels(outcome.history[outcome.best_epoch - 1], trainer.step)
            try:
                self._write_results(outcome, trainer.task, tracker)
            except OSError as error:
                raise StorageError(
                    f"{self._shown(self.home.results)}/ could not be written ({error.strerror or error}). To mend it: "
                    f"{mended_by(error) or 'look at that folder'}; the same command then continues from the last "
                    "checkpoint"
                ) from error
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
        outbox.set_aside(self.home.folder, identity.main_root(self.home.root))
        self.hooks.done(store)

    def _linear(self, wanted: str | None) -> LinearDenoiser:
        """The linear denoiser of this run.

        Args:
            wanted: Digest of the one that the run was begun with; without it, no filter that an earlier try left is
                trusted.

        Raises:
            EarthPriorError: The file of a run that continues is damaged, and cannot be made again.
        """
        path = self.home.folder / "linear.safetensors"
        if self.place.is_first and (wanted is None or wanted != _digest_in(path)):
            if wanted is not None:
                print(f"warning: {path.name} is damaged or missing; it is fitted again", file=sys.stderr)
            fit_linear(self.params, self.selection, self.normalizer).save(path)
        self.place.wait()
        found = LinearDenoiser.load(path)
        if wanted not in (None, found.digest()):
            raise EarthPriorError(
                f"{self._shown(path)} was damaged, and fitted again it is another one: chips, threads, torch or the "
                f"machine changed since. Bring the file back, or delete {self._shown(self.home.folder)} to start afresh"
            )
        return found

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

    def _write_results(self, outcome: Outcome, task: DiffusionTask, tracker: Tracker) -> None:
        """All outs under their final names, and copies of what a run should keep in MLflow."""
        folder, results = self.home.folder, self.home.results
        sweep(results)
        write_atomic(folder / "last.safetensors", save(outcome.last))
        write_atomic(results / "network.safetensors", save(outcome.best))
        # From memory: this is the one that was trained with, whatever became of the file.
        task.linear.save(results / "linear.safetensors")
        write_csv(results / "history.csv", pd.DataFrame(outcome.history))
        config = build.config(
            self.params, self.fingerprint, self.foreign_files, outcome.best_epoch, task.linear, self.stats
        )
        write_json(results / "config.json", config)
        write_json(results / "environment.json", self.environment)
        write_json(results / "mlflow_run.json", tracker.ref.to_json())
        for path in (folder / "last.safetensors", results / "network.safetensors", results / "linear.safetensors"):
            tracker.log_artifact(path, "weights")
        for path in (self.home.params_path, self.home.root / "results/stats/stats.json"):
            tracker.log_artifact(path)
        for name in ("config.json", "environment.json", "history.csv"):
            tracker.log_artifact(results / name)
        tracker.log_artifact(folder / "metrics.jsonl")

    def _banner(self, trainer: Trainer) -> str:
        """What is going to happen, before it does."""
        weights = sum(parameter.numel() for parameter in trainer.task.network.parameters())
        begin = f"continuing at step {trainer.step:,} of" if trainer.step else "training"
        return (
            f"pretrain {self.fingerprint}: {begin} {trainer.total_steps:,} steps "
            f"({self.params.epochs} epochs of {trainer.steps_per_epoch}), {len(self.selection.train):,} train and "
            f"{len(self.selection.validate):,} validate chips, {self.params.data.train_px} px, {self.params.network} "
            f"with {weights:,} weights on {self.device} ({self.place.size} process{'es' * (self.place.size > 1)}, "
            f"{self.params.threads} threads), state in {self._shown(self.home.folder)}"
        )

    def _shown(self, path: Path) -> str:
        return os.path.relpath(path, self.home.root)


def _digest_in(path: Path) -> str | None:
    try:
        return LinearDenoiser.load(path).digest()
    except (OSError, DataError):
        return None


def fit_linear(params: Params, selection: Selection, normalizer: Normalizer) -> LinearDenoiser:
    """The linear denoiser of the training chips, the same for every seed."""
    crops, average_d4 = linear_crops(params, selection, normalizer)
    return linear.fit(crops, average_d4)


def _check_batch_size(params: Params, chips: int, processes: int) -> None:
    """Before any work.

    Raises:
        ParamsError: Batches cannot be shared out evenly, or an epoch fills none.
    """
    shares = processes * params.accumulation_steps
    if params.batch_size % shares:
        parts = f" of accumulation_steps {params.accumulation_steps}" if params.accumulation_steps > 1 else ""
        raise ParamsError(
            f"batch_size {params.batch_size} cannot be shared out evenly to {processes} processes{parts}; "
            f"use a multiple of {shares}"
        )
    fault = params.epoch_fault(chips)
    if fault:
        raise ParamsError(fault)


def _check_memory(params: Params, chips: int, processes: int) -> None:
    """Before any work.

    Raises:
        ParamsError: This machine cannot hold a batch, the linear denoiser or an epoch's order.
    """
    data, bands, px = params.data, len(params.data.bands), params.data.train_px
    batch = -(-params.batch_size // processes)
    memory.require(
        {
            # Three buffers of whole chips in the loader; the views of them, noise, and what the network is told.
            f"batch_size {params.batch_size:,}": batch * bands * (3 * data.read_px**2 * 2 + 4 * px**2 * 4),
            # Its matrices, complex and double while they are fitted, and as many again on the way.
            f"data.crop_px {px:,} with {bands} data.bands": 3 * px * (px // 2 + 1) * bands**2 * 16,
            f"data.crops_per_chip {data.crops_per_chip:,}": 16 * chips * data.crops_per_chip,
        }
    )


def _level_tags(task: DiffusionTask) -> dict[str, str]:
    """Tells runs whose schedule does not reach all judged noise levels: compare those on common levels only."""
    missing = missing_levels(level.rho for level in noise_levels(task.schedule, float(task.linear.std)))
    return {"levels_missing": ", ".join(missing)} if missing else {}
