"""The stage `pretrain`: from chips and their statistics to a network that denoises them.

Writes results/pretrain/: network.safetensors (the best averaged weights), config.json (all that rebuilds it),
linear.safetensors, history.csv and mlflow_run.json. Until then everything is in `work/pretrain/<fingerprint>/`, where
the same command finds it again after a kill.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from earthprior import build, identity
from earthprior.chips.batch import Batch
from earthprior.chips.loader import RawBatch, load_batches
from earthprior.chips.read import ChipSpec
from earthprior.chips.selection import linear_crops, read_stats, select, validation_batches
from earthprior.diffusion import linear
from earthprior.diffusion.gain import missing_levels, noise_levels
from earthprior.diffusion.linear import LinearDenoiser
from earthprior.errors import Interrupted, ParamsError, StorageError
from earthprior.files import replacing, write_csv, write_json
from earthprior.journal import Journal
from earthprior.params import Params, active
from earthprior.tasks.diffusion import DiffusionTask
from earthprior.tracking import Tracker, open_tracker
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.distributed import World, only_writer, world
from earthprior.training.loop import Outcome, Trainer, TrainingChips
from earthprior.training.progress import Progress
from earthprior.training.stop import StopRequest, continue_command, stop_requests
from earthprior.training.validate import Validation


def run(params: Params, root: Path, accept_code: bool = False) -> None:
    """Pretrain, or continue where an earlier process of the same run was stopped.

    Args:
        params: The whole of params.yaml.
        root: The project's root, holding results/stats/stats.json.
        accept_code: Continue although the code changed since the last checkpoint.

    Raises:
        EarthPriorError: Statistics are missing or stale, or another process trains this run.
        Interrupted: Asked to stop; the state is saved.
        StorageError: The disk is full or failing.
        DivergedError: Loss or gradient became non-finite.
    """
    torch.set_num_threads(params.threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    stats, stats_sha256 = read_stats(root)
    build.schedule(params)  # its faults before any work
    foreign = build.foreign_files(params)
    fingerprint = identity.fingerprint(active(params) | foreign, stats_sha256)
    folder = identity.main_root(root) / "work/pretrain" / fingerprint
    with world(build.device(params)) as (place, device), stop_requests() as stop, only_writer(folder, place):
        session = _Session(params, root, stats, fingerprint, foreign, folder, device, place)
        session.run(stop, accept_code)


class _Session:
    """One process's work on a run; a class only because its parts share nine things."""

    def __init__(
        self,
        params: Params,
        root: Path,
        stats: dict[str, Any],
        fingerprint: str,
        foreign_files: dict[str, str],
        folder: Path,
        device: torch.device,
        place: World,
    ) -> None:
        self.params, self.root, self.fingerprint, self.folder = params, root, fingerprint, folder
        self.stats, self.foreign_files = stats, foreign_files
        self.device, self.place = device, place
        self.selection = select(params, root, stats)
        _check_batch_size(params, len(self.selection.train), place.size)
        self.normalizer = build.normalizer(params, stats)

    def run(self, stop: StopRequest, accept_code: bool) -> None:
        code = identity.code_hash()
        dtype = build.autocast_dtype(self.params, self.device) or torch.float32
        setting = {"device": self.device.type, "precision": str(dtype), "processes": str(self.place.size)}
        store = CheckpointStore(self.folder, self.fingerprint, code.files, accept_code, setting)
        latest = store.load_latest()
        task = build.task(self.params, self._linear(refit=latest is None)).to(self.device)
        validation = Validation(self._validation_batches, self.params.data.bands)
        chips = TrainingChips(len(self.selection.train), self._read, self.normalizer)
        trainer = Trainer(self.params, task, chips, validation, self.device, self.place)
        if self.place.is_first:
            store.sweep()
        if latest is not None:
            trainer.restore(latest[1])
        journal = Journal(self.folder / "metrics.jsonl")
        if self.place.is_first:
            journal.truncate_after(trainer.step)
        progress = Progress(trainer.total_steps, trainer.step, self.params.epochs, self.place.is_first)
        progress.note(self._banner(trainer, task))
        if not self.place.is_first:
            trainer.run(store, lambda metrics, step, epoch: None, stop, progress)
            return
        tags = identity.identity_tags(self.root, self.fingerprint, code) | _level_tags(task)
        name = f"{self.params.network}-{self.params.diffusion.precondition}-{self.fingerprint[:6]}"
        tracker = open_tracker(self.root, name, active(self.params), tags, journal)
        self._train(trainer, store, stop, progress, tracker)

    def _train(
        self, trainer: Trainer, store: CheckpointStore, stop: StopRequest, progress: Progress, tracker: Tracker
    ) -> None:
        try:
            outcome = trainer.run(store, tracker.log, stop, progress)
            try:
                self._write_results(outcome, trainer.task, tracker)
            except (OSError, SafetensorError) as error:
                raise StorageError(
                    f"results/pretrain/ could not be written ({error}); mend this, and the same command continues from "
                    "the last checkpoint"
                ) from error
        except Interrupted as interruption:
            tracker.close("KILLED")
            message = f"{interruption}; continue with: {continue_command(self.place.size)}"
            raise Interrupted(message, interruption.exit_code - 128) from None
        except BaseException:
            tracker.close("FAILED")
            raise
        finally:
            progress.close()
        # The run stays open for evaluate, but this process has said all it had to say.
        if not tracker.close("FINISHED"):
            self._keep_journal()
        store.delete()

    def _keep_journal(self) -> None:
        """Move the journal out of the work folder: a finished run leaves none, but MLflow has yet to hear of it."""
        kept = self.folder.parents[1] / "undelivered" / f"{self.fingerprint}-{os.getpid()}"
        kept.mkdir(parents=True)
        for name in ("metrics.jsonl", "run.json", "last.safetensors"):
            if (self.folder / name).exists():
                os.replace(self.folder / name, kept / name)

    def _linear(self, refit: bool) -> LinearDenoiser:
        """The linear denoiser of this run; a run without a checkpoint trusts no filter that an earlier try left."""
        path = self.folder / "linear.safetensors"
        if self.place.is_first and (refit or not path.is_file()):
            crops, average_d4 = linear_crops(self.params, self.selection, self.normalizer)
            linear.fit(crops, average_d4).save(path)
        self.place.wait()
        return LinearDenoiser.load(path)

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

    def _write_results(self, outcome: Outcome, task: DiffusionTask, tracker: Tracker) -> None:
        """All outs under their final names, and copies of what a run should keep in MLflow."""
        results = self.root / "results/pretrain"
        for name, weights in (("network", outcome.best), ("last", outcome.last)):
            with replacing(self.folder / f"{name}.safetensors") as temporary:
                save_file(weights, temporary)
        for name in ("network.safetensors", "linear.safetensors"):
            with replacing(results / name) as temporary:
                shutil.copyfile(self.folder / name, temporary)
        write_csv(results / "history.csv", pd.DataFrame(outcome.history))
        config = build.config(
            self.params, self.fingerprint, self.foreign_files, outcome.best_epoch, task.linear, self.stats
        )
        write_json(results / "config.json", config)
        write_json(results / "mlflow_run.json", tracker.ref.to_json())
        for path in (results / "network.safetensors", self.folder / "last.safetensors"):
            tracker.log_artifact(path, "weights")
        for path in (results / "config.json", self.root / "params.yaml", self.root / "results/stats/stats.json"):
            tracker.log_artifact(path)
        tracker.log_artifact(results / "history.csv")
        tracker.log_artifact(self.folder / "metrics.jsonl")

    def _banner(self, trainer: Trainer, task: DiffusionTask) -> str:
        """What is going to happen, before it does."""
        weights = sum(parameter.numel() for parameter in task.network.parameters())
        begin = f"continuing at step {trainer.step:,} of" if trainer.step else "training"
        return (
            f"pretrain {self.fingerprint}: {begin} {trainer.total_steps:,} steps "
            f"({self.params.epochs} epochs of {trainer.steps_per_epoch}), {len(self.selection.train):,} train and "
            f"{len(self.selection.validate):,} validate chips, {self.params.data.train_px} px, {self.params.network} "
            f"with {weights:,} weights on {self.device} ({self.place.size} process{'es' * (self.place.size > 1)}, "
            f"{self.params.threads} threads), state in {os.path.relpath(self.folder, self.root)}"
        )


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
    visits = chips * params.data.crops_per_chip
    if visits < params.batch_size:
        raise ParamsError(
            f"batch_size {params.batch_size} is more than an epoch has: {chips} train chips x data.crops_per_chip "
            f"{params.data.crops_per_chip} are {visits}; lower batch_size"
        )


def _level_tags(task: DiffusionTask) -> dict[str, str]:
    """Tells runs whose schedule does not reach all judged noise levels: compare those on common levels only."""
    missing = missing_levels(level.rho for level in noise_levels(task.schedule, float(task.linear.std)))
    return {"levels_missing": ", ".join(missing)} if missing else {}
