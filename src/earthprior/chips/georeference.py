"""Where chips lie on the ground: which of them overlap, and which belong together.

Footprints are compared within one CRS only; neighbours on both sides of a UTM zone's border are not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bounds = tuple[float, float, float, float]

TOLERANCE = 0.001
"""Share of a chip's side that coordinates may be off without touching becoming overlapping, or the reverse."""


@dataclass(frozen=True)
class Overlaps:
    """Chips of different splits that share ground.

    Attributes:
        pairs: How many pairs of chips.
        partners: For each chip (its position) of the later split, how many chips of earlier splits it overlaps, and the
            positions of the first three.
    """

    pairs: int
    partners: dict[int, tuple[int, list[int]]]


def box_pairs(boxes: NDArray[np.float64], reach: float) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Pairs of rectangles that intersect, by a sweep over the axis along which they lie more apart.

    Args:
        boxes: (N, 4) left, bottom, right, top; all different.
        reach: How much every rectangle is grown on each side, as a share of its own side; negative to shrink.

    Yields:
        A position and the positions of those it intersects; each pair once, never itself.
    """
    side = boxes[:, 2:] - boxes[:, :2]
    grown = np.concatenate([boxes[:, :2] - reach * side, boxes[:, 2:] + reach * side], axis=1)
    spread = (boxes[:, 2:].max(axis=0) - boxes[:, :2].min(axis=0)) / np.median(side, axis=0)
    sweep, other = (0, 1) if spread[0] >= spread[1] else (1, 0)
    order = np.argsort(grown[:, sweep], kind="stable")
    grown = grown[order]
    low, high = grown[:, other], grown[:, other + 2]
    ends = np.searchsorted(grown[:, sweep], grown[:, sweep + 2], side="left")
    for position, end in enumerate(ends):
        near = slice(position + 1, int(end))
        hits = np.flatnonzero((low[near] < high[position]) & (high[near] > low[position]))
        if hits.size:
            yield int(order[position]), order[position + 1 + hits]


def overlaps_between(crs: Sequence[str | None], bounds: Sequence[Bounds | None], ranks: Sequence[int]) -> Overlaps:
    """Chips of different splits that share ground (more than `TOLERANCE` of a side).

    Args:
        crs: Per chip, None where it has no place.
        bounds: Per chip, in units of its CRS.
        ranks: Per chip, the split as a number; of a pair, the higher one is blamed.
    """
    pairs = 0
    partners: dict[int, tuple[int, list[int]]] = {}
    for boxes, members in _places(crs, bounds):
        # Many dates of one place are one box, so that the sweep sees each place once.
        by_rank = [_by_rank(chips, ranks) for chips in members]
        if len({rank for found in by_rank for rank in found}) < 2:
            continue
        meetings = [(place, place) for place in range(len(boxes))]
        for place, near in box_pairs(boxes, -TOLERANCE):
            meetings += [pair for other in near.tolist() for pair in ((place, other), (other, place))]
        for here, there in meetings:
            for rank, chips in by_rank[here].items():
                earlier = [chip for low, found in by_rank[there].items() if low < rank for chip in found]
                pairs += len(chips) * len(earlier)
                for chip in chips if earlier else []:
                    count, known = partners.get(chip, (0, []))
                    partners[chip] = (count + len(earlier), (known + earlier)[:3])
    return Overlaps(pairs, partners)


def connected_groups(crs: Sequence[str | None], bounds: Sequence[Bounds | None]) -> list[int]:
    """A group number per chip: chips that overlap or touch share it, also over others between them.

    Chips without a place are groups of their own.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    groups = [-1] * len(bounds)
    used = 0
    for boxes, members in _places(crs, bounds):
        links = [(place, other) for place, near in box_pairs(boxes, TOLERANCE) for other in near.tolist()]
        ends = np.array(links, dtype=np.intp).reshape(-1, 2)
        graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(boxes), len(boxes)))
        count, labels = connected_components(graph, directed=False)
        for label, chips in zip(labels.tolist(), members, strict=True):
            for chip in chips:
                groups[chip] = used + label
        used += count
    for chip, group in enumerate(groups):
        if group < 0:
            groups[chip] = used
            used += 1
    return groups


def _places(
    crs: Sequence[str | None], bounds: Sequence[Bounds | None]
) -> Iterator[tuple[NDArray[np.float64], list[list[int]]]]:
    """Per CRS: the different rectangles (N, 4), and the chips that lie in each."""
    by_crs: dict[str, dict[Bounds, list[int]]] = {}
    for chip, (system, box) in enumerate(zip(crs, bounds, strict=True)):
        if system is not None and box is not None:
            by_crs.setdefault(system, {}).setdefault(box, []).append(chip)
    for system in sorted(by_crs):
        places = by_crs[system]
        yield np.array(list(places), dtype=np.float64), list(places.values())


def _by_rank(chips: Sequence[int], ranks: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for chip in chips:
        found.setdefault(ranks[chip], []).append(chip)
    return found
