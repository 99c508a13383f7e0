"""A training of seconds on a dozen tiny chips, for the tests of the loop and of several processes."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from earthprior import build
from earthprior.chips.batch import Batch
from earthprior.chips.catalog import load_catalog
from earthprior.chips.loader import RawBatch, load_batches
from earthprior.chips.normalize import Normalizer
from earthprior.chips.read import ChipSpec, read_chip
from earthprior.chips.selection import Selection, linear_crops, validation_batches
from earthprior.diffusion import linear
from earthprior.diffusion.linear import LinearDenoiser
from earthprior.params import DataParams, NormalizationParams, Params
from earthprior.tasks.diffusion import DiffusionTask
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.distributed import World
from earthprior.training.headline import GAIN
from earthprior.training.loop import Outcome, Trainer
from earthprior.training.order import TrainingChips, visits
from earthprior.training.progress import Progress
from earthprior.training.stop import StopRequest
from earthprior.training.validate import Validation
from support import stats_of

TINY: Mapping[str, Any] = {
    "epochs": 3, "batch_size": 4, "data.crops_per_chip": 2, "lr": 0.01, "warmup_epochs": 1, "ema_decay": 0.9,
    "unet_film.attention": False, "unet_film.time_embedding_dim": 16, "unet_att_d.filter_config": [4, 8],
    "unet_att_d.block_num": [1, 1], "unet_att_d.time_embedding_dim": 16, "operation.checkpoint_every_seconds": 1000,
    "operation.log_every_steps": 2, "evaluate.probe_rhos": [0.1], "evaluate.probe_pixels": 32,
}  # fmt: skip
"""On the 8 training chips of `make_chips`: 4 steps an epoch, 12 in all."""

CPU = torch.device("cpu")

FITTED: dict[tuple[Path, DataParams, NormalizationParams], LinearDenoiser] = {}
"""The linear denoisers of these chips; fitting one takes longer than training."""


class StopAt(StopRequest):
    """Asks to stop when a trainer has done a number of steps."""

    def __init__(self, trainer: Trainer, step: int, number: int = 15) -> None:
        super().__init__()
        self._trainer, self._step, self._number = trainer, step, number

    @property
    def signal_number(self) -> int | None:
        return self._number if self._trainer.step >= self._step else None


@dataclass
class Tiny:
    """Chips, and what was measured on them; makes trainers."""

    root: Path
    params: Params
    selection: Selection = field(init=False)
    normalizer: Normalizer = field(init=False)
    linear: LinearDenoiser = field(init=False)

    def __post_init__(self) -> None:
        catalog = load_catalog(self.params.data, self.root)
        self.selection = Selection(catalog.dir, *(catalog.split(usage) for usage in ("train", "validate", "test")))
        spec = ChipSpec.from_params(self.params.data)
        pixels = [read_chip(catalog.dir, row, spec)[0].astype("float32") for row in self.selection.train]
        chips = torch.stack([torch.from_numpy(chip) for chip in pixels])
        self.normalizer = build.normalizer(self.params, stats_of(chips, self.params.data.bands))
        key = (self.root, self.params.data, self.params.normalization)
        if key not in FITTED:
            FITTED[key] = linear.fit(*linear_crops(self.params, self.selection, self.normalizer))
        self.linear = FITTED[key]

    def read(self, order: Iterable[Sequence[int]]) -> Generator[RawBatch]:
        data = self.params.data
        return load_batches(
            self.selection.folder, self.selection.train, order, ChipSpec.from_params(data),
            readers=self.params.operation.readers,
        )  # fmt: skip

    def validation_batches(self) -> Iterator[tuple[Batch, list[str]]]:
        return validation_batches(self.params, self.selection, self.normalizer, CPU)

    def order(self, world: World | None = None, first_step: int = 0) -> list[list[int]]:
        """Indices of the chips that a process reads, a list per share."""
        return list(visits(self.params, len(self.selection.train), world or World(), first_step))

    def trainer(self, world: World | None = None) -> Trainer:
        task = build.task(self.params, self.linear)
        validation = Validation(self.validation_batches, self.params.data.bands)
        chips = TrainingChips(self.selection.train, self.read, self.normalizer)
        return Trainer(self.params, task, chips, validation, CPU, world or World())


class Judge:
    """Gives the epochs the gains it was told to, and keeps the weights it was shown."""

    headline = GAIN

    def __init__(self, *gains: float) -> None:
        self._gains = list(gains)
        self.shown: list[dict[str, Tensor]] = []

    def judge(self, task: DiffusionTask) -> dict[str, float]:
        assert not task.network.training
        self.shown.append({name: value.clone() for name, value in task.network.state_dict().items()})
        return {"loss": 1.0, "gain_db/mean": self._gains[len(self.shown) - 1]}


GAINS = (0.1, 0.5, 0.3, 0.4, 0.2, 0.9)


def judged(trainer: Trainer) -> Trainer:
    """With the GAINS of the epochs to come instead of a validation, which takes longer than these trainings."""
    trainer.validation = Judge(*GAINS[trainer.step // trainer.steps_per_epoch :])  # type: ignore[assignment]
    return trainer


@dataclass
class Log:
    """What a run reported."""

    points: list[tuple[int, int, dict[str, float]]] = field(default_factory=list)

    def __call__(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        self.points.append((step, epoch, dict(metrics)))


def train(
    trainer: Trainer, folder: Path, log: Log | None = None, stop: StopRequest | None = None, speak: bool = False
) -> Outcome:
    """`trainer.run`, with its checkpoints in a folder."""
    store = CheckpointStore(folder, "f" * 12, {})
    progress = Progress(trainer.total_steps, trainer.step, trainer.params.epochs, enabled=speak)
    return trainer.run(store, log or Log(), stop or StopRequest(), progress)


def resumed(tiny: Tiny, folder: Path) -> Trainer:
    """A new process's trainer, with the newest checkpoint of a folder."""
    trainer = tiny.trainer()
    latest = CheckpointStore(folder, "f" * 12, {}).load_latest()
    assert latest is not None
    trainer.restore(latest[1])
    return trainer


def bits(value: Any) -> Any:
    """Nested dicts and lists with every tensor as its bytes: equal if and only if bit-identical."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), str(value.dtype), value.detach().contiguous().numpy().tobytes())
    if isinstance(value, Mapping):
        return {key: bits(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [bits(inner) for inner in value]
    return value


def final_bits(trainer: Trainer, outcome: Outcome) -> Any:
    """All that a finished run leaves, bit by bit."""
    return bits([trainer.state(), outcome.best, outcome.last, outcome.best_epoch, outcome.history])
