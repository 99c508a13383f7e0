"""The training loop: from chips to weights, one optimizer step after another.

Everything random is addressed by (seed, epoch) or (seed, step, share), so the loop may be left at any step and entered
again there with the saved state, and ends with the same bits.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from earthprior import memory
from earthprior.chips.catalog import ChipRow
from earthprior.chips.loader import RawBatch
from earthprior.chips.normalize import Normalizer
from earthprior.errors import DataError, DeviceMemoryError, DivergedError, EarthPriorError, Interrupted, StorageError
from earthprior.networks.tensor_file import listed, mismatches
from earthprior.params import Params
from earthprior.randomness import numpy_generator
from earthprior.tasks.diffusion import DiffusionTask
from earthprior.training import divergence
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.distributed import World, unwrap
from earthprior.training.optim import OPTIMIZERS, averaged
from earthprior.training.progress import Progress
from earthprior.training.rates import LRSchedule
from earthprior.training.shares import Share, autocast, backward, joined, make_share, share_weights
from earthprior.training.sharpness import ascended
from earthprior.training.stop import StopRequest
from earthprior.training.validate import Validation, evaluating

READING, PASSES = "reading of its chips", "forward and backward passes"
OPTIMIZER, VALIDATION = "optimizer", "validation"

Log = Callable[[Mapping[str, float], int, int], None]
"""log(metrics, step, epoch); never fails and never waits."""

Validated = Callable[[Mapping[str, float]], None]
"""validated(row of the history); what it raises ends the training."""


@dataclass(frozen=True)
class TrainingChips:
    """What the loop reads.

    Attributes:
        rows: The training chips.
        read: Yields the raw batches for lists of indices into `rows`, in their order.
        normalizer: Of the run.
    """

    rows: Sequence[ChipRow]
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
        self.steps_per_epoch = len(chips.rows) * params.data.crops_per_chip // params.batch_size
        self.total_steps = params.epochs * self.steps_per_epoch
        network = task.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = averaged(network, params.ema_decay)
        self.optimizer = OPTIMIZERS[params.optimizer](network.parameters(), params)
        self.lr_schedule = LRSchedule(self.optimizer, params, self.steps_per_epoch)
        task.network = world.wrap(network, device)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_gain = -math.inf
        self.best_epoch = 0
        self._epoch_loss = 0.0
        self._linear = task.linear.digest()
        self._unsaved: int | None = None
        self._norms: deque[float] = deque(maxlen=divergence.NORMS)
        self._doing = ""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: all steps are done, or early stopping has waited long enough."""
        epoch, begun = divmod(self.step, self.steps_per_epoch)
        patience = self.params.early_stopping_epochs
        given_up = patience is not None and not begun and epoch - self.best_epoch >= patience
        return given_up or self.step >= self.total_steps

    def run(
        self,
        store: CheckpointStore,
        log: Log,
        stop: StopRequest,
        progress: Progress,
        validated: Validated = lambda row: None,
    ) -> Outcome:
        """Train to the end of the last epoch, or to where early stopping ends it.

        Args:
            store: Keeps the state.
            log: Takes the metrics.
            stop: Asked after every step.
            progress: What a person sees.
            validated: Called after each validation, in the first process.

        Raises:
            Interrupted: Asked to stop; the state is saved.
            StorageError: Asked to stop, and the state could not be saved; or reading hangs.
            DataError: A chip can no longer be read; the state is saved.
            DivergedError: Loss or gradient became non-finite.
            DeviceMemoryError: There is too little memory; the state is saved where it is sound.
        """
        saved_at, pause = time.monotonic(), self.params.operation.checkpoint_every_seconds
        with closing(self.chips.read(self._order())) as raws:
            while not self.finished:
                try:
                    self._one_step(raws, log, progress, validated, store)
                except divergence.NonFinite as fault:
                    raise self._diverged(fault, store) from None
                except (DataError, StorageError) as error:
                    raise self._unread(error, store) from error
                except Exception as error:
                    if not memory.is_out_of_memory(error):
                        raise
                    raise self._out_of_memory(error, store) from error
                asked = self.world.largest(stop.signal_number or 0, self.device)
                due = time.monotonic() - saved_at >= pause or self._at_checkpoint()
                if self.world.is_first and (asked or due) and not self.finished:
                    began = time.monotonic()
                    self._save(store, progress, last_chance=bool(asked))
                    # Huge states on slow disks: never more than a tenth of the time for checkpoints.
                    pause = max(pause, 10 * (time.monotonic() - began)) if pause else 0
                    saved_at = time.monotonic()
                if asked and not self.finished:
                    raise Interrupted(f"saved step {self.step:,} of {self.total_steps:,}", asked)
        if self.step < self.total_steps:
            progress.note(
                f"stopped early after epoch {self.step // self.steps_per_epoch} of {self.params.epochs}: the gain of "
                f"epoch {self.best_epoch} was not bettered in {self.params.early_stopping_epochs} epochs"
            )
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
            "linear": self._linear,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`.

        Raises:
            EarthPriorError: The state is another network's, which --accept-code lets through.
        """
        wanted = self.state()
        faults = [
            f"{part}: {fault}" for part in ("network", "average") for fault in mismatches(wanted[part], state[part])
        ]
        if faults:
            raise EarthPriorError(
                f"the checkpoint does not fit the network of this code ({listed(faults)}). Restore the code that wrote "
                "it, or start afresh"
            )
        try:
            unwrap(self.task.network).load_state_dict(state["network"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_schedule.load_state_dict(state["lr_schedule"])
            self.task.load_state_dict(state["task"], strict=False)
        except (RuntimeError, KeyError, ValueError) as error:
            raise EarthPriorError(
                f"the checkpoint does not fit the optimizer of this code: {error}. Restore the code that wrote it, or "
                "start afresh"
            ) from None
        self.step = state["step"]
        self.history = state["history"]
        self.best = state["best"]
        self.best_gain = state["best_gain"]
        self.best_epoch = state["best_epoch"]
        self._epoch_loss = state["epoch_loss"]

    def _at_checkpoint(self) -> bool:
        """Whether an epoch has just ended after which a checkpoint is wanted."""
        interval = self.params.operation.checkpoint_interval
        return interval is not None and self.step % (interval * self.steps_per_epoch) == 0

    def _shares(self) -> range:
        """The numbers of this process's shares of a step's batch, among all processes' shares."""
        parts = self.params.accumulation_steps
        return range(self.world.rank * parts, (self.world.rank + 1) * parts)

    def _order(self) -> Iterator[list[int]]:
        """Chip indices of this process's shares of all steps left; the epoch's permutation is f(seed, epoch)."""
        length = self.params.batch_size // (self.world.size * self.params.accumulation_steps)
        order: list[int] = []
        for step in range(self.step, self.total_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if not order or place == 0:
                order = self._permutation(epoch)
            for number in self._shares():
                first = place * self.params.batch_size + number * length
                yield order[first : first + length]

    def _permutation(self, epoch: int) -> list[int]:
        """Chip indices in the order of an epoch, counted from 0, of all processes."""
        chips = len(self.chips.rows)
        visits = numpy_generator(self.params.seed, "order", epoch).permutation(chips * self.params.data.crops_per_chip)
        order: list[int] = (visits % chips).tolist()
        return order

    def _one_step(
        self, raws: Iterator[RawBatch], log: Log, progress: Progress, validated: Validated, store: CheckpointStore
    ) -> None:
        self._doing = READING
        epoch = self.step // self.steps_per_epoch + 1
        shares = [
            make_share(next(raws), number, self.step, self.params, self.chips.normalizer, self.device)
            for number in self._shares()
        ]
        lr = self.lr_schedule.lr
        loss, norm = self._update(shares)
        self._norms.append(norm)
        self.step += 1
        self._epoch_loss += loss
        progress.step(self.step, epoch, self.params.batch_size, {"loss": loss, "lr": lr, "grad": norm})
        ends = self.step % self.steps_per_epoch == 0
        if ends or self.step % self.params.operation.log_every_steps == 0:
            metrics = {"train/loss": loss, "train/lr": lr, "train/grad_norm": norm, **self._time(progress)}
            log(metrics, self.step, epoch)
        if ends:
            self._doing = VALIDATION
            self._end_epoch(epoch, lr, log, progress, validated, store)

    def _time(self, progress: Progress) -> dict[str, float]:
        """Where the run is; what every curve can be drawn over, so it is logged at each of their steps, and once."""
        return {
            "time/chips_seen": self.step * self.params.batch_size,
            "time/epoch": self.step / self.steps_per_epoch,
            "time/chips_per_second": progress.chips_per_second,
        }

    def _update(self, shares: list[Share]) -> tuple[float, float]:
        """Forward, backward, optimizer and average; the loss and the gradient's norm before clipping.

        Raises:
            NonFinite: One of these two is.
        """
        self._doing = PASSES
        self.task.train()
        network = unwrap(self.task.network)
        weights = share_weights(shares, self.world)
        losses = backward(self.task, shares, weights, self.params)
        if self.params.optimizer == "sam":
            with ascended(network, self.params.sam.rho, self.params.sam.adaptive):
                backward(self.task, shares, weights, self.params)
        norm = nn.utils.clip_grad_norm_(network.parameters(), self.params.grad_clip or math.inf)
        loss = joined(losses, weights, self.world)
        total, length = torch.stack([loss.total.float(), norm.float()]).tolist()
        # Before the optimizer moves: a non-finite update would poison weights, average and every later checkpoint.
        if not (math.isfinite(total) and math.isfinite(length)):
            raise divergence.NonFinite(total, length, loss)
        self._doing = OPTIMIZER
        self.optimizer.step()
        self.lr_schedule.step()
        self.average.update_parameters(network)
        self.task.after_step(loss)
        return total, length

    def _diverged(self, fault: divergence.NonFinite, store: CheckpointStore) -> DivergedError:
        epoch, place = divmod(self.step, self.steps_per_epoch)
        first = place * self.params.batch_size
        # Every process knows the whole batch, since the order is a function of the seed.
        rows = [self.chips.rows[index] for index in self._permutation(epoch)[first : first + self.params.batch_size]]
        moment = divergence.Moment(self.step + 1, self.total_steps, epoch + 1, self.lr_schedule.lr, tuple(self._norms))
        return divergence.of_step(fault, moment, rows, self.params, self.device, store, self.world.is_first)

    def _unread(self, error: DataError | StorageError, store: CheckpointStore) -> DataError | StorageError:
        """What a chip that failed cost: nothing where it was read for a step, which had not begun."""
        kind = DataError if isinstance(error, DataError) else StorageError
        at = (
            f"in the validation after step {self.step:,}"
            if self._doing == VALIDATION
            else f"before step {self.step + 1:,}"
        )
        return kind(f"{error}. Stopped {at} of {self.total_steps:,}; {self._kept(store)}")

    def _kept(self, store: CheckpointStore) -> str:
        """Save the state where a step failed that has changed nothing yet; what there is to continue from."""
        # Batch norm's statistics move with the passes.
        moved = any(getattr(module, "track_running_stats", False) for module in self.task.network.modules())
        if self._doing == READING or (self._doing == PASSES and not moved):
            self._save_as_it_was(store)
        return f"{last} is kept" if (last := store.newest()) else "there is no checkpoint yet"

    def _out_of_memory(self, error: Exception, store: CheckpointStore) -> DeviceMemoryError:
        kept = self._kept(store)
        step = self.step if self._doing == VALIDATION else self.step + 1
        helps = memory.what_helps(error, self.params, self.world.size, self._doing == VALIDATION)
        return DeviceMemoryError(
            f"out of memory at step {step:,} in the {self._doing} ({memory.where(self.device)}); {kept}. End other "
            f"programs that use it; or {helps}"
        )

    def _save_as_it_was(self, store: CheckpointStore) -> None:
        """Save the state from before a step that failed, unless it is saved already."""
        if self.world.is_first and self.step and store.steps()[-1:] != [self.step]:
            with suppress(StorageError, MemoryError, RuntimeError):
                store.save(self.step, self.state())

    def _end_epoch(
        self, epoch: int, lr: float, log: Log, progress: Progress, validated: Validated, store: CheckpointStore
    ) -> None:
        """Judge the averaged weights on the validation chips, and keep them if they are the best."""
        row = {"epoch": epoch, "step": self.step, "train_loss": self._epoch_loss / self.steps_per_epoch, "lr": lr}
        self._epoch_loss = 0.0
        gain = math.nan
        if self.world.is_first:
            with evaluating(self.task, self.average.module), autocast(self.params, self.device):
                judged = self.validation.judge(self.task)
            gain = judged["gain_db/mean"]
            self.history.append({**row, **judged})
            best = {"val/gain_db/best": max(self.best_gain, gain)}
            metrics = {"train/loss_epoch": row["train_loss"], **{f"val/{name}": v for name, v in judged.items()}}
            log({**metrics, **best}, self.step, epoch)
            progress.epoch(epoch, row["train_loss"], judged)
        # All must know it: the learning rate and the end of the run may depend on it.
        gain = self.world.from_first(gain, self.device)
        if not math.isfinite(gain):
            judged = self.history[-1] if self.world.is_first else {}
            raise divergence.of_average(epoch, self.step, judged, self.params, self.device, store)
        self.lr_schedule.end_epoch(epoch, gain)
        if gain > self.best_gain:
            self.best_gain, self.best_epoch = gain, epoch
            if self.world.is_first:
                self.best = _plain(self.average.module)
        if self.world.is_first:
            validated(self.history[-1])

    def _save(self, store: CheckpointStore, progress: Progress, last_chance: bool) -> None:
        try:
            store.save(self.step, self.state())
        except StorageError as error:
            if last_chance:
                raise
            # Training is worth more than one checkpoint; the earlier ones are untouched. Said once for each reason.
            reason = getattr(error.__cause__, "errno", None) or 0
            if reason != self._unsaved:
                progress.note(f"warning: {error}. Training goes on, and tries again at every checkpoint")
            self._unsaved = reason
        else:
            if self._unsaved is not None:
                progress.note(f"checkpoints are written again: step {self.step:,} is saved")
            self._unsaved = None


def _plain(network: nn.Module) -> dict[str, Tensor]:
    """A copy of a state_dict on the CPU, contiguous."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
