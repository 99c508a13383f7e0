"""What a training reads, and in which order: a function of seed and epoch, so that it may begin at any step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from earthprior.chips.catalog import ChipRow
from earthprior.chips.loader import RawBatch
from earthprior.chips.normalize import Normalizing
from earthprior.params import LearningParams
from earthprior.randomness import numpy_generator
from earthprior.training.distributed import World


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
    normalizer: Normalizing


def share_numbers(params: LearningParams, world: World) -> range:
    """The numbers of this process's shares of a step's batch, among all processes' shares."""
    parts = params.accumulation_steps
    return range(world.rank * parts, (world.rank + 1) * parts)


def visits(params: LearningParams, chips: int, world: World, first_step: int) -> Iterator[list[int]]:
    """Chip indices of this process's shares of all steps from one on, a list per share."""
    length = params.batch_size // (world.size * params.accumulation_steps)
    steps = params.steps_in_epoch(chips)
    order: list[int] = []
    for step in range(first_step, params.epochs * steps):
        epoch, place = divmod(step, steps)
        if not order or place == 0:
            order = _permutation(params, chips, epoch)
        for number in share_numbers(params, world):
            first = place * params.batch_size + number * length
            yield order[first : first + length]


def batch_at(params: LearningParams, chips: int, step: int) -> list[int]:
    """Chip indices of a step's whole batch, of all processes; steps are counted from 0."""
    epoch, place = divmod(step, params.steps_in_epoch(chips))
    first = place * params.batch_size
    return _permutation(params, chips, epoch)[first : first + params.batch_size]


def _permutation(params: LearningParams, chips: int, epoch: int) -> list[int]:
    """Chip indices in the order of an epoch, counted from 0, of all processes."""
    numbers = numpy_generator(params.seed, "order", epoch).permutation(chips * params.visits_per_chip(chips))
    order: list[int] = (numbers % chips).tolist()
    return order
