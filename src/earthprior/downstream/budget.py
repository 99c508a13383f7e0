"""Which chips are labelled, where labels are few: whole chips, drawn from all kinds of chips, by a seed.

The draws are nested: for one seed the 16 chips hold the 4, so that a larger budget differs by what it adds alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from earthprior.chips.catalog import ChipRow
from earthprior.chips.selection import chip_key
from earthprior.randomness import numpy_generator, seed_of

QUANTILES = 4
"""Strata of what is a number; as many as the smallest budget that anyone should ask for."""


def choose(rows: Sequence[ChipRow], count: int | None, seed: int, strata: Sequence[Hashable]) -> list[ChipRow]:
    """The `count` chips that are labelled, in the catalog's order.

    Every stratum gives one chip before any gives a second, so that few chips still hold all classes; beyond that each
    gives as many as its share of all. Which chips these are depends on the seed and on the chips' paths, not on their
    order, and a smaller count is a subset of a larger one.

    Args:
        rows: The labelled chips to choose from.
        count: How many; None, or more than there are, means all.
        seed: Other seeds draw others.
        strata: Per row what kind of chip it is, see `strata_by_class`, `strata_by_number` and `strata_by_pixels`.

    Raises:
        ValueError: `count` is no positive number, or there is not one stratum per row.
    """
    if len(strata) != len(rows):
        raise ValueError(f"{len(rows)} rows, but {len(strata)} strata")
    if count is None or count >= len(rows):
        return list(rows)
    if count < 1:
        raise ValueError(f"{count} chips cannot be chosen; at least 1")
    members: dict[Hashable, list[int]] = {}
    for place in sorted(range(len(rows)), key=lambda place: seed_of("labels", seed, chip_key(rows[place]))):
        members.setdefault(strata[place], []).append(place)
    ranked: list[tuple[float, int, int]] = []
    for places in members.values():
        # The first of the stratum in the seed's order stands for it: its own draw says when the stratum's turn is.
        turn = float(numpy_generator("labels, turn", seed, chip_key(rows[places[0]])).uniform())
        ranked += [
            (-1.0 + turn if rank == 0 else (rank + turn) / len(places), rank, p) for rank, p in enumerate(places)
        ]
    return [rows[place] for place in sorted(place for _, _, place in sorted(ranked)[:count])]


def strata_by_class(classes: Sequence[Hashable]) -> list[Hashable]:
    """Strata of chips that have one class each: that class."""
    return list(classes)


def strata_by_number(values: Sequence[float]) -> list[Hashable]:
    """Strata of chips that have one number each: its quarter among all.

    Args:
        values: (N,), finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    limits = np.quantile(numbers, np.arange(1, QUANTILES) / QUANTILES)
    return [int(place) for place in np.searchsorted(limits, numbers, side="left")]


def strata_by_pixels(counts: NDArray[Any]) -> list[Hashable]:
    """Strata of chips with label rasters.

    Of two classes: the quarter of the positive one's share; of more: the class that a chip holds most of, compared
    with what chips hold on average.

    Args:
        counts: (N, K) labelled pixels of each class, the positive class last of two.
    """
    labelled = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, labelled, out=np.zeros(counts.shape), where=labelled > 0)
    if counts.shape[1] == 2:
        return strata_by_number(shares[:, 1])
    average = shares.mean(axis=0)
    excess = np.divide(shares, average, out=np.zeros(counts.shape), where=average > 0)
    return [int(place) for place in excess.argmax(axis=1)]
