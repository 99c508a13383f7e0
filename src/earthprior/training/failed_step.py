"""What is told of a step whose numbers are sound and that failed all the same: for want of a chip, or of memory.

Where memory is short, with the settings that need less of it, those first that change nothing else. No science is
changed on the way: what a run computes is what params.yaml says, or it stops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from earthprior import memory
from earthprior.errors import DataError, DeviceMemoryError, StorageError
from earthprior.params import LearningParams

READING, PASSES = "reading of its chips", "forward and backward passes"
OPTIMIZER, VALIDATION = "optimizer", "validation"


@dataclass(frozen=True)
class FailedStep:
    """Where in the run it was.

    Attributes:
        done: Steps that are done.
        total_steps: Of the run.
        doing: What failed: READING, PASSES, OPTIMIZER or VALIDATION.
        kept: What there is to continue from, in words.
    """

    done: int
    total_steps: int
    doing: str
    kept: str


def unread(error: DataError | StorageError, failed: FailedStep) -> DataError | StorageError:
    """What a chip that cannot be read cost: nothing where it was read for a step, which had not begun."""
    kind = DataError if isinstance(error, DataError) else StorageError
    judging = failed.doing == VALIDATION
    at = f"in the validation after step {failed.done:,}" if judging else f"before step {failed.done + 1:,}"
    return kind(f"{error}. Stopped {at} of {failed.total_steps:,}; {failed.kept}")


def out_of_memory(
    error: Exception, failed: FailedStep, params: LearningParams, device: torch.device, processes: int
) -> DeviceMemoryError:
    """Which memory was short, in what, and what helps.

    Args:
        error: What was raised.
        failed: Where.
        params: Of the run.
        device: Where it trains.
        processes: How many share a batch.
    """
    judging = failed.doing == VALIDATION
    step = failed.done if judging else failed.done + 1
    helps = _in_validation(params) if judging else _in_training(params, processes)
    # In the machine's own memory the readers' chips stand, too.
    readers = f"; or lower operation.readers ({params.operation.readers} now)" * isinstance(error, MemoryError)
    return DeviceMemoryError(
        f"out of memory at step {step:,} in the {failed.doing} ({memory.where(device)}); {failed.kept}. End other "
        f"programs that use it; or {helps}{readers}"
    )


def _in_training(params: LearningParams, processes: int) -> str:
    """For the same effective batch."""
    share = params.batch_size // (processes * params.accumulation_steps)
    told = []
    if not params.operation.activation_checkpointing:
        told.append(
            "set operation.activation_checkpointing: true, which computes the same bits in more time, and this very "
            "run continues"
        )
    if parts := _next_parts(params, processes):
        told.append(
            f"set accumulation_steps: {parts} ({params.accumulation_steps} now), the same batch of {params.batch_size} "
            f"in parts of {params.batch_size // (processes * parts)} chips instead of {share}; its noise is drawn "
            "otherwise, so that begins a new run"
        )
    return "; or ".join(told or ["lower data.crop_px or choose a smaller network; that begins a new run"])


def _in_validation(params: LearningParams) -> str:
    if params.val_batch_size == 1:
        return "lower data.crop_px or choose a smaller network; that begins a new run"
    return (
        f"set val_batch_size: {params.val_batch_size // 2} ({params.val_batch_size} now), which begins a new run, for "
        "sums are rounded otherwise then"
    )


def _next_parts(params: LearningParams, processes: int) -> int | None:
    """The next number of parts that a process's batch can be cut into; None where each has one chip already."""
    own = params.batch_size // processes
    return next((parts for parts in range(params.accumulation_steps + 1, own + 1) if own % parts == 0), None)
