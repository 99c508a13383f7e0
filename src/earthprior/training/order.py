"""What a training reads, and in which order: a function of seed and epoch, so that it may begin at any step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from earthprior.chips.catalog import ChipRow
from earthprior.chips.loader import RawBatch
from earthprior.chips.normalize import Normalizer
from earthprior.params import Params
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
    normalizer: Normalizer


def steps_in_epoch(params: Params, chips: int) -> int:
    """How many batches so many chips fill; what fills none is left out."""
    return chips * params.data.crops_per_chip // params.batch_size


def share_numbers(params: Params, world: World) -> range:
    """The numbers of this process's shares of a step's batch, among all processes' shares."""
    parts = params.accumulation_steps
    return range(world.rank * parts, (world.rank + 1) * parts)


def visits(params: Params, chips: int, world: World, first_step: int) -> Iterator[list[int]]:
    """Chip indices of this process's shares of all steps from one on, a list per share."""
    length = params.batch_size // (world.size * params.accumulation_steps)
    steps = steps_in_epoch(params, chips)
    order: list[int] = []
    for step in range(first_step, params.epochs * steps):
        epoch, place = divmod(step, steps)
        if not order or place == 0:
            order = _permutation(params, chips, epoch)
        for number in share_numbers(params, world):
            first = place * params.batch_size + number * length
            yield order[first : first + length]


def batch_at(params: Params, chips: int, step: int) -> list[int]:
    """Chip indices of a step's whole batch, of all processes; steps are counted from 0."""
    epoch, place = divmod(step, steps_in_epoch(params, chips))
    first = place * params.batch_size
    return _permutation(params, chips, epoch)[first : first + params.batch_size]


def _permutation(params: Params, chips: int, epoch: int) -> list[int]:
    """Chip indices in the order of an epoch, counted from 0, of all processes."""
    numbers = numpy_generator(params.seed, "order", epoch).permutation(chips * params.data.crops_per_chip)
    order: list[int] = (numbers % chips).tolist()
    return order
