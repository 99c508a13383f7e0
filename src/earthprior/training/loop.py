"""The training loop: from chips to weights, one optimizer step after another.

Everything random is addressed by (seed, epoch) or (seed, step, share), so the loop may be left at any step and entered
again there with the saved state, and ends with the same bits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from earthprior.chips.loader import RawBatch
from earthprior.errors import DataError, DivergedError, Interrupted, StorageError
from earthprior.memory import is_out_of_memory
from earthprior.params import LearningParams, Params
from earthprior.tasks.task import Task
from earthprior.training import divergence
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.distributed import OtherEndsError, World, unwrap
from earthprior.training.failed_step import OPTIMIZER, PASSES, READING, VALIDATION, FailedStep, out_of_memory, unread
from earthprior.training.keeping import Keeping
from earthprior.training.optim import OPTIMIZERS, averaged
from earthprior.training.order import TrainingChips, batch_at, share_numbers, visits
from earthprior.training.progress import Progress
from earthprior.training.rates import LRSchedule
from earthprior.training.shares import Share, autocast, backward, joined, make_share, share_weights, tell_unread
from earthprior.training.sharpness import ascended
from earthprior.training.state import learned, put_back
from earthprior.training.stop import StopRequest
from earthprior.training.validate import Judge, evaluating

Log = Callable[[Mapping[str, float], int, int], None]
"""log(metrics, step, epoch); never fails and never waits."""

Validated = Callable[[Mapping[str, float]], None]
"""validated(row of the history); what it raises ends the training."""


@dataclass(frozen=True)
class Outcome:
    """What training leaves behind.

    Attributes:
        best: The averaged weights with the best headline on validation chips, a plain state_dict; the last ones where
            nothing was judged.
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
        params: Of the training.
        task: With its network, on `device`.
        chips: What is trained on.
        validation: Judges after each epoch; None judges nothing.
        device: Of this process.
        world: This process among others.
    """

    def __init__(
        self,
        params: LearningParams,
        task: Task,
        chips: TrainingChips,
        validation: Judge | None,
        device: torch.device,
        world: World,
    ) -> None:
        self.params = params
        self.task = task
        self.chips = chips
        self.validation = validation
        self.device = device
        self.world = world
        self.steps_per_epoch = params.steps_in_epoch(len(chips.rows))
        self.total_steps = params.epochs * self.steps_per_epoch
        network = task.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = averaged(network, params.ema_decay)
        self.optimizer = OPTIMIZERS[params.optimizer](task.weights(params.lr), params)
        self.lr_schedule = LRSchedule(self.optimizer, params, self.steps_per_epoch)
        task.network = world.wrap(network, device)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_gain = -math.inf
        self.best_epoch = 0
        self._epoch_loss = 0.0
        self._rests_on = task.rests_on()
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
        keeping = Keeping(store, self.params, self.steps_per_epoch, progress)
        order = visits(self.params, len(self.chips.rows), self.world, self.step)
        with closing(self.chips.read(order)) as raws:
            while not self.finished:
                try:
                    self._one_step(raws, log, progress, validated, store)
                except divergence.NonFinite as fault:
                    raise self._diverged(fault, store) from None
                except (DataError, StorageError, OtherEndsError) as error:
                    # All processes know of a share that was not read, and none has begun the step.
                    failed = self._failed(keeping, together=self._doing == READING)
                    if isinstance(error, OtherEndsError):
                        raise
                    raise unread(error, failed) from error
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    failed = self._failed(keeping)
                    raise out_of_memory(error, failed, self.params, self.device, self.world.size) from error
                asked = self.world.largest(stop.signal_number or 0, self.device)
                if self.world.is_first and (asked or keeping.due(self.step)) and not self.finished:
                    keeping.save(self.step, self.state, last_chance=bool(asked))
                if asked and not self.finished:
                    raise Interrupted(f"saved step {self.step:,} of {self.total_steps:,}", asked)
        if self.step < self.total_steps and self.validation is not None:
            noun = self.validation.headline.noun
            progress.note(
                f"stopped early after epoch {self.step // self.steps_per_epoch} of {self.params.epochs}: the {noun} of "
                f"epoch {self.best_epoch} was not bettered in {self.params.early_stopping_epochs} epochs"
            )
        last = _plain(self.average.module)
        return Outcome(self.best or last, last, self.best_epoch, self.history)

    def state(self) -> dict[str, Any]:
        """All that a continued run needs, in plain types; the random draws need nothing."""
        return {
            "step": self.step,
            **learned(self.task, self.average, self.optimizer, self.lr_schedule),
            "history": self.history,
            "best": self.best,
            "best_gain": self.best_gain,
            "best_epoch": self.best_epoch,
            "epoch_loss": self._epoch_loss,
            "linear": self._rests_on,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`.

        Raises:
            EarthPriorError: The state is another network's, which --accept-code lets through.
        """
        put_back(state, self.task, self.average, self.optimizer, self.lr_schedule)
        self.step = state["step"]
        self.history = state["history"]
        self.best = state["best"]
        self.best_gain = state["best_gain"]
        self.best_epoch = state["best_epoch"]
        self._epoch_loss = state["epoch_loss"]

    def _one_step(
        self, raws: Iterator[RawBatch], log: Log, progress: Progress, validated: Validated, store: CheckpointStore
    ) -> None:
        epoch = self.step // self.steps_per_epoch + 1
        shares = self._shares(raws)
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

    def _shares(self, raws: Iterator[RawBatch]) -> list[Share]:
        self._doing = READING
        numbers = share_numbers(self.params, self.world)
        try:
            return [
                make_share(next(raws), number, self.step, self.params, self.chips.normalizer, self.device)
                for number in numbers
            ]
        except (DataError, StorageError):
            tell_unread(len(numbers), self.world, self.device)
            raise

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
            OtherEndsError: Another process could not read its chips; nothing has changed.
        """
        weights = share_weights(shares, self.world)
        self._doing = PASSES
        self.task.train()
        network = unwrap(self.task.network)
        losses = backward(self.task, shares, weights, self.params)
        if self.params.optimizer == "sam":
            sam = cast(Params, self.params).sam
            with ascended(network, sam.rho, sam.adaptive):
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
        # Every process knows the whole batch, since the order is a function of the seed.
        rows = [self.chips.rows[index] for index in batch_at(self.params, len(self.chips.rows), self.step)]
        epoch, lr = self.step // self.steps_per_epoch + 1, self.lr_schedule.lr
        moment = divergence.Moment(self.step + 1, self.total_steps, epoch, lr, tuple(self._norms))
        return divergence.of_step(fault, moment, rows, self.params, self.device, store, self.world.is_first)

    def _failed(self, keeping: Keeping, together: bool = False) -> FailedStep:
        """Where a step failed; its state from before is saved where it has changed nothing yet.

        Args:
            keeping: Of the run.
            together: Whether all processes come here: then each knows what the first one has saved.
        """
        # Batch norm's statistics move with the passes.
        moved = any(getattr(module, "track_running_stats", False) for module in self.task.network.modules())
        if self.world.is_first and (self._doing == READING or (self._doing == PASSES and not moved)):
            keeping.save_as_it_was(self.step, self.state)
        if together:
            self.world.wait()
        return FailedStep(self.step, self.total_steps, self._doing, keeping.kept())

    def _end_epoch(
        self, epoch: int, lr: float, log: Log, progress: Progress, validated: Validated, store: CheckpointStore
    ) -> None:
        """Judge the averaged weights on the validation chips, and keep them if they are the best."""
        row = {"epoch": epoch, "step": self.step, "train_loss": self._epoch_loss / self.steps_per_epoch, "lr": lr}
        self._epoch_loss = 0.0
        if self.validation is None:
            self.best_epoch = epoch
            self.history.append(row)
            return
        headline, gain = self.validation.headline, math.nan
        if self.world.is_first:
            with evaluating(self.task, self.average.module), autocast(self.params, self.device):
                judged = self.validation.judge(self.task)
            gain = judged[headline.name]
            self.history.append({**row, **judged})
            best = {f"val/{headline.best}": max(self.best_gain, gain)}
            metrics = {"train/loss_epoch": row["train_loss"], **{f"val/{name}": v for name, v in judged.items()}}
            log({**metrics, **best}, self.step, epoch)
            progress.epoch(epoch, row["train_loss"], judged, headline)
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


def _plain(network: nn.Module) -> dict[str, Tensor]:
    """A copy of a state_dict on the CPU, contiguous."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
