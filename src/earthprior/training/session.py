"""One pretraining from params to outs: by the stage `pretrain`, and by each trial of a study.

When it is done it leaves what `training.outs` tells.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from earthprior import build, identity
from earthprior.chips.batch import Batch
from earthprior.chips.loader import RawBatch, load_batches
from earthprior.chips.normalize import Normalizer
from earthprior.chips.read import ChipSpec
from earthprior.chips.selection import Selection, select, validation_batches
from earthprior.diffusion.gain import missing_levels, noise_levels
from earthprior.params import active
from earthprior.pictures import Pictures
from earthprior.tasks.diffusion import DiffusionTask
from earthprior.tracking import Tracker
from earthprior.training import outs
from earthprior.training.course import Course, Hooks, Made, prepare_torch, weights_of
from earthprior.training.demands import check_batch_size, check_memory
from earthprior.training.distributed import World, unwrap
from earthprior.training.linear_denoiser import linear_of_run
from earthprior.training.loop import Outcome, Trainer
from earthprior.training.order import TrainingChips
from earthprior.training.run import Home, Run
from earthprior.training.validate import Validation

__all__ = ["Hooks", "Session", "Trained", "prepare_torch"]


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


class Session(Course):
    """One process's work on a pretraining.

    Args:
        run: What is trained.
        home: Where.
        hooks: What the caller does in between; that of `trained` is given a `Trained`.
        device: Of this process.
        place: This process among others.

    Raises:
        EarthPriorError: The catalog is not the one that the statistics are of, or batches cannot be filled.
    """

    def __init__(self, run: Run, home: Home, hooks: Hooks, device: torch.device, place: World) -> None:
        self.work, self.params = run, run.params
        self.selection = select(run.params, home.root, run.stats)
        check_batch_size(run.params, len(self.selection.train), place.size)
        check_memory(run.params, len(self.selection.train), place.size)
        self.normalizer = build.normalizer(run.params, run.stats)
        made = Made(run.fingerprint, active(run.params), run.foreign_files, run.stats)
        super().__init__(run.params, made, home, hooks, device, place, identity.code_hash())

    def trainer(self, rests_on: str | None) -> Trainer:
        """The trainer of this run at its first step; it rests on the linear denoiser."""
        linear = linear_of_run(rests_on, self.params, self.selection, self.normalizer, self.home, self.place)
        task = build.task(self.params, linear).to(self.device)
        validation = Validation(self._validation_batches, self.params.data.bands)
        chips = TrainingChips(self.selection.train, self._read, self.normalizer)
        return Trainer(self.params, task, chips, validation, self.device, self.place)

    def drawing(self, tracker: Tracker, epoch: int) -> Pictures:
        """The same noisy chips, denoised by one epoch's weights after another's."""
        folder = self.home.folder / "pictures"
        return Pictures(folder, self.params, self.selection, self.normalizer, self.device, tracker, epoch)

    def finish(self, trainer: Trainer, outcome: Outcome, tracker: Tracker) -> Trained:
        """The outs, see `training.outs`."""
        task = trainer.task
        assert isinstance(task, DiffusionTask)
        tracker.log_levels(outcome.history[outcome.best_epoch - 1], trainer.step)
        outs.write(outcome, task, self.environment, self.work, self.home, tracker)
        unwrap(task.network).load_state_dict(outcome.best)
        return Trained(task.eval(), outcome, self.selection, self.normalizer, self.device, tracker)

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

    def banner(self, trainer: Trainer) -> str:
        """See `Course.banner`."""
        begin = f"continuing at step {trainer.step:,} of" if trainer.step else "training"
        return (
            f"pretrain {self.work.fingerprint}: {begin} {trainer.total_steps:,} steps "
            f"({self.params.epochs} epochs of {trainer.steps_per_epoch}), {len(self.selection.train):,} train and "
            f"{len(self.selection.validate):,} validate chips, {self.params.data.train_px} px, {self.params.network} "
            f"with {weights_of(trainer.task):,} weights on {self.device} "
            f"({self.place.size} process{'es' * (self.place.size > 1)}, "
            f"{self.params.threads} threads), state in {self.home.shown(self.home.folder)}"
        )

    def tags(self, task: DiffusionTask) -> dict[str, str]:
        """Tells runs whose schedule does not reach all judged noise levels: compare those on common levels only."""
        missing = missing_levels(level.rho for level in noise_levels(task.schedule, float(task.linear.std)))
        return {"levels_missing": ", ".join(missing)} if missing else {}
