"""The training loop: from chips to weights, one optimizer step after another.

Everything random is addressed by (seed, epoch) or (seed, step, rank), so the loop may be left at any step and entered
again there with the saved state, and ends with the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from earthprior import build
from earthprior.chips.augment import augment
from earthprior.chips.batch import Batch, prepare
from earthprior.chips.loader import RawBatch
from earthprior.chips.normalize import Normalizer
from earthprior.errors import DivergedError, EarthPriorError, Interrupted, StorageError
from earthprior.params import Params
from earthprior.randomness import numpy_generator, seed_of, torch_generator
from earthprior.tasks.diffusion import DiffusionTask
from earthprior.tasks.task import Loss
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.distributed import World, unwrap
from earthprior.training.optim import OPTIMIZERS, averaged, lr_schedule
from earthprior.training.progress import Progress
from earthprior.training.stop import StopRequest
from earthprior.training.validate import Validation

Log = Callable[[Mapping[str, float], int, int], None]
"""log(metrics, step, epoch); never fails and never waits."""


@dataclass(frozen=True)
class TrainingChips:
    """What the loop reads.

    Attributes:
        count: Number of training chips.
        read: Yields the raw batches for lists of chip indices, in their order.
        normalizer: Of the run.
    """

    count: int
    read: Callable[[Iterable[Sequence[int]]], Generator[RawBatch]]
    normalizer: Normalizer


@dataclass(frozen=True)
class Outcome:
    """What training leaves behind.

    Attributes:
        best: The averaged weights with the best mean gain on validation chips, a plain state_dict.
        last: The averaged weights after the last step.
        best_epoch: Where `best` is from, counted from 1.
        history: One row of metrics per epoch.
    """

    best: dict[str, Tensor]
    last: dict[str, Tensor]
    best_epoch: int
    history: list[dict[str, float]]


class Trainer:
    """One run's state and its steps. `run` is the loop; the rest is what one step is made of.

    Args:
        params: The whole of params.yaml.
        task: With its network, on `device`.
        chips: What is trained on.
        validation: What is judged on.
        device: Of this process.
        world: This process among others.
    """

    def __init__(
        self,
        params: Params,
        task: DiffusionTask,
        chips: TrainingChips,
        validation: Validation,
        device: torch.device,
        world: World,
    ) -> None:
        self.params = params
        self.task = task
        self.chips = chips
        self.validation = validation
        self.device = device
        self.world = world
        self.steps_per_epoch = chips.count * params.data.crops_per_chip // params.batch_size
        self.total_steps = params.epochs * self.steps_per_epoch
        network = task.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = averaged(network, params.ema_decay)
        self.optimizer = OPTIMIZERS[params.optimizer](network.parameters(), params)
        self.lr_schedule = lr_schedule(self.optimizer, params, self.steps_per_epoch)
        task.network = world.wrap(network, device)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_gain = -math.inf
        self.best_epoch = 0
        self._epoch_loss = 0.0

    def run(self, store: CheckpointStore, log: Log, stop: StopRequest, progress: Progress) -> Outcome:
        """Train to the end of the last epoch.

        Raises:
            Interrupted: Asked to stop; the state is saved.
            StorageError: Asked to stop, and the state could not be saved.
            DivergedError: Loss or gradient became non-finite.
        """
        saved_at, pause = time.monotonic(), self.params.operation.checkpoint_every_seconds
        with closing(self.chips.read(self._order())) as batches:
            for raw in batches:
                self._one_step(raw, log, progress)
                asked = self.world.largest(stop.signal_number or 0, self.device)
                due = time.monotonic() - saved_at >= pause
                if self.world.is_first and (asked or due) and self.step < self.total_steps:
                    began = time.monotonic()
                    self._save(store, progress, last_chance=bool(asked))
                    # Huge states on slow disks: never more than a tenth of the time for checkpoints.
                    pause = max(pause, 10 * (time.monotonic() - began)) if pause else 0
                    saved_at = time.monotonic()
                if asked and self.step < self.total_steps:
                    raise Interrupted(f"saved step {self.step:,} of {self.total_steps:,}", asked)
        return Outcome(self.best, _plain(self.average.module), self.best_epoch, self.history)

    def state(self) -> dict[str, Any]:
        """All that a continued run needs, in plain types; the random draws need nothing."""
        return {
            "step": self.step,
            "network": unwrap(self.task.network).state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_schedule": self.lr_schedule.state_dict(),
            "task": {name: value for name, value in self.task.state_dict().items() if not name.startswith("network.")},
            "history": self.history,
            "best": self.best,
            "best_gain": self.best_gain,
            "best_epoch": self.best_epoch,
            "epoch_loss": self._epoch_loss,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`.

        Raises:
            EarthPriorError: The state is another network's, which --accept-code lets through.
        """
        try:
            unwrap(self.task.network).load_state_dict(state["network"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_schedule.load_state_dict(state["lr_schedule"])
            self.task.load_state_dict(state["task"], strict=False)
        except (RuntimeError, KeyError, ValueError) as error:
            raise EarthPriorError(
                f"the checkpoint does not fit the network and optimizer of this code: {error}. Restore the code that "
                "wrote it, or start afresh"
            ) from None
        self.step = state["step"]
        self.history = state["history"]
        self.best = state["best"]
        self.best_gain = state["best_gain"]
        self.best_epoch = state["best_epoch"]
        self._epoch_loss = state["epoch_loss"]

    def _order(self) -> Iterator[list[int]]:
        """Chip indices of this process for every step that is left; the epoch's permutation is f(seed, epoch)."""
        share = self.params.batch_size // self.world.size
        order = None
        for step in range(self.step, self.total_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if order is None or place == 0:
                visits = self.chips.count * self.params.data.crops_per_chip
                order = numpy_generator(self.params.seed, "order", epoch).permutation(visits) % self.chips.count
            first = place * self.params.batch_size + self.world.rank * share
            yield order[first : first + share].tolist()

    def _one_step(self, raw: RawBatch, log: Log, progress: Progress) -> None:
        epoch = self.step // self.steps_per_epoch + 1
        address = (self.params.seed, "step", self.step, self.world.rank)
        generator = torch_generator(*address, device=self.device)
        batch = prepare(raw, self.chips.normalizer, self.device)
        batch = augment(batch, self.params.augmentation, self.params.data.crop_px, generator)
        lr = self.optimizer.param_groups[0]["lr"]
        loss, norm = self._update(batch, generator, seed_of(*address, "dropout"), raw, lr)
        self.step += 1
        self._epoch_loss += loss
        progress.step(self.step, epoch, len(batch) * self.world.size, {"loss": loss, "lr": lr, "grad": norm})
        if self.step % self.params.operation.log_every_steps == 0:
            metrics = {"train/loss": loss, "train/lr": lr, "train/grad_norm": norm}
            log({**metrics, "time/chips_per_second": progress.chips_per_second}, self.step, epoch)
        if self.step % self.steps_per_epoch == 0:
            self._end_epoch(epoch, lr, log, progress)

    def _update(
        self, batch: Batch, generator: torch.Generator, dropout_seed: int, raw: RawBatch, lr: float
    ) -> tuple[float, float]:
        """Forward, backward, optimizer and average; the loss and the gradient's norm before clipping."""
        self.task.train()
        # Dropout draws from the global generators, so they are addressed too.
        torch.manual_seed(dropout_seed)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.params, self.device):
            loss = self.task.loss(batch, generator)
        loss.total.backward()  # type: ignore[no-untyped-call]
        parameters = unwrap(self.task.network).parameters()
        norm = nn.utils.clip_grad_norm_(parameters, self.params.grad_clip or math.inf)
        total, length = torch.stack([loss.total.detach().float(), norm.detach().float()]).tolist()
        # Before the optimizer moves: a non-finite update would poison weights, average and every later checkpoint.
        if not (math.isfinite(total) and math.isfinite(length)):
            raise self._diverged(loss, total, length, raw, lr)
        self.optimizer.step()
        self.lr_schedule.step()
        self.average.update_parameters(unwrap(self.task.network))
        self.task.after_step(loss)
        return total, length

    def _end_epoch(self, epoch: int, lr: float, log: Log, progress: Progress) -> None:
        """Judge the averaged weights on the validation chips, and keep them if they are the best."""
        row = {"epoch": epoch, "step": self.step, "train_loss": self._epoch_loss / self.steps_per_epoch, "lr": lr}
        self._epoch_loss = 0.0
        if self.world.is_first:
            with evaluating(self.task, self.average.module), autocast(self.params, self.device):
                judged = self.validation.judge(self.task)
            self.history.append({**row, **judged})
            metrics = {"train/loss_epoch": row["train_loss"], **{f"val/{name}": v for name, v in judged.items()}}
            log(metrics, self.step, epoch)
            progress.epoch(epoch, row["train_loss"], judged)
            if judged["gain_db/mean"] > self.best_gain:
                self.best_gain, self.best_epoch = judged["gain_db/mean"], epoch
                self.best = _plain(self.average.module)
        self.world.wait()

    def _save(self, store: CheckpointStore, progress: Progress, last_chance: bool) -> None:
        try:
            store.save(self.step, self.state())
        except StorageError as error:
            if last_chance:
                raise
            # Training is worth more than one checkpoint; the earlier ones are untouched.
            progress.note(f"warning: {error}")

    def _diverged(self, loss: Loss, total: float, norm: float, raw: RawBatch, lr: float) -> DivergedError:
        per_chip = loss.per_chip.flatten().tolist()
        worst = max(range(len(per_chip)), key=lambda i: per_chip[i] if math.isfinite(per_chip[i]) else math.inf)
        t = "" if loss.t is None else f" at timestep {int(loss.t[worst])}"
        row = raw.rows[worst]
        return DivergedError(
            f"training diverged at step {self.step + 1:,}: loss {total:g}, gradient norm {norm:g}, lr {lr:g}; worst "
            f"chip {row.images[0]} (catalog line {row.line}){t}. Nothing after the last checkpoint was kept. Lower lr, "
            "set grad_clip, or look at that chip"
        )


class evaluating(AbstractContextManager[None]):
    """Inside, the task runs `network` (the averaged weights) in evaluation mode; its own network comes back after."""

    def __init__(self, task: DiffusionTask, network: nn.Module) -> None:
        self._task, self._network, self._own = task, network, task.network

    def __enter__(self) -> None:
        self._task.network = self._network
        self._task.eval()

    def __exit__(self, *exception: object) -> None:
        self._task.network = self._own


def autocast(params: Params, device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision as params ask."""
    dtype = build.autocast_dtype(params, device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _plain(network: nn.Module) -> dict[str, Tensor]:
    """A copy of a state_dict on the CPU, contiguous."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
