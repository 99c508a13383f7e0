"""The keeping of a run that trains: a checkpoint when one is due; a disk that refuses it does not end the training."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from earthprior.errors import StorageError
from earthprior.params import LearningParams
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.progress import Progress


class Keeping:
    """When a training is saved, and what is told where that fails.

    Args:
        store: Takes the checkpoints.
        params: Of the run; its `operation` says how far apart they are.
        steps_per_epoch: Of the run.
        progress: What a person sees.
    """

    def __init__(
        self, store: CheckpointStore, params: LearningParams, steps_per_epoch: int, progress: Progress
    ) -> None:
        self._store = store
        self._progress = progress
        interval = params.operation.checkpoint_interval
        self._interval = None if interval is None else interval * steps_per_epoch
        self._wanted_pause = self._pause = params.operation.checkpoint_every_seconds
        self._saved_at = time.monotonic()
        self._refused: int | None = None

    def due(self, step: int) -> bool:
        """Whether the last checkpoint is long enough ago, or an epoch has just ended after which one is wanted."""
        at_interval = self._interval is not None and step % self._interval == 0
        return at_interval or time.monotonic() - self._saved_at >= self._pause

    def save(self, step: int, state: Callable[[], dict[str, Any]], last_chance: bool) -> None:
        """Save the state after a step.

        Args:
            step: Optimizer steps done.
            state: Makes the state.
            last_chance: Whether the training ends here.

        Raises:
            StorageError: It was not saved, and will not be tried again.
        """
        began = time.monotonic()
        try:
            self._store.save(step, state())
        except StorageError as error:
            if last_chance:
                raise
            # Training is worth more than one checkpoint; the earlier ones are untouched. Said once for each reason.
            reason = getattr(error.__cause__, "errno", None) or 0
            if reason != self._refused:
                self._progress.note(f"warning: {error}. Training goes on, and tries again at every checkpoint")
            self._refused = reason
        else:
            if self._refused is not None:
                self._progress.note(f"checkpoints are written again: step {step:,} is saved")
            self._refused = None
        self._saved_at = time.monotonic()
        # Huge states on slow disks: never more than a tenth of the time for checkpoints. One that was slow once is no
        # reason to lose more ever after.
        self._pause = max(self._wanted_pause, 10 * (self._saved_at - began)) if self._wanted_pause else 0

    def save_as_it_was(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Save the state from before a step that failed, if it can be, unless it is saved already."""
        with suppress(StorageError, OSError, MemoryError, RuntimeError):
            if step and self._store.steps()[-1:] != [step]:
                self._store.save(step, state())

    def kept(self) -> str:
        """What there is to continue from, in words."""
        return f"{last} is kept" if (last := self._store.newest()) else "there is no checkpoint yet"
