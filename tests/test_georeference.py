"""Overlaps and groups equal those found by comparing every pair."""

from __future__ import annotations

import sqlite3

import numpy as np
import pytest

from earthprior.chips.georeference import TOLERANCE, Ground, connected_groups, overlaps_between
from earthprior.errors import EarthPriorError


def boxes_of(count, seed, stretch=(1.0, 1.0)):
    noise = np.random.default_rng(seed)
    corner = noise.uniform(0, 30, (count, 2)) * np.array(stretch)
    return np.concatenate([corner, corner + noise.uniform(0.5, 4, (count, 2))], axis=1)


@pytest.mark.parametrize("stretch", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("origin", [0.0, 5_208_687.0])
def test_overlaps_equal_brute_force(stretch, origin):
    boxes = boxes_of(80, 0, stretch) + origin
    ranks = np.random.default_rng(1).integers(0, 3, 80).tolist()
    inner = boxes + TOLERANCE * (boxes[:, [2, 3, 0, 1]] - boxes)
    wanted = {
        (one, other)
        for one in range(80)
        for other in range(80)
        if ranks[one] > ranks[other]
        and (inner[one][:2] < inner[other][2:]).all()
        and (inner[other][:2] < inner[one][2:]).all()
    }
    found = overlaps_between(["a"] * 80, [tuple(box) for box in boxes.tolist()], ranks)
    assert found.pairs == len(wanted)
    assert found.partners == {
        one: (len(others), others[:3])
        for one in range(80)
        if (others := [other for other in range(80) if (one, other) in wanted])
    }
    assert 10 < len(wanted) < 3160


def test_groups_equal_brute_force():
    boxes = boxes_of(60, 2, (1.5, 1.5))
    outer = boxes - TOLERANCE * (boxes[:, [2, 3, 0, 1]] - boxes)
    wanted = list(range(60))
    for _ in range(60):
        for one in range(60):
            for other in range(60):
                meets = (outer[one][:2] < outer[other][2:]).all() and (outer[other][:2] < outer[one][2:]).all()
                if meets:
                    wanted[one] = wanted[other] = min(wanted[one], wanted[other])
    numbers = {chip: number for number, chip in enumerate(sorted(set(wanted)))}
    assert connected_groups(["a"] * 60, [tuple(box) for box in boxes.tolist()]) == [numbers[chip] for chip in wanted]
    assert 3 < len(numbers) < 50


def test_touching_is_grouping_but_no_overlap():
    # Coordinates as they come out of a geotransform, a rounding error apart.
    boxes = [(0.0, 0.0, 10.0, 10.0), (10.000001, 0.0, 20.0, 10.0), (30.0, 0.0, 40.0, 10.0)]
    crs = ["EPSG:32614"] * 3
    groups = connected_groups(crs, boxes)
    assert groups[0] == groups[1] != groups[2]
    assert overlaps_between(crs, boxes, [0, 1, 1]).pairs == 0


def test_groups_reach_over_others_and_keep_crs_apart():
    boxes = [
        (0.0, 0.0, 10.0, 10.0),
        (14.0, 0.0, 24.0, 10.0),
        (8.0, 0.0, 16.0, 10.0),
        (0.0, 0.0, 10.0, 10.0),
        None,
        None,
    ]
    groups = connected_groups(["a", "a", "a", "b", None, None], boxes)
    assert groups[0] == groups[1] == groups[2]
    assert len(set(groups)) == 4


def test_overlaps_count_every_pair_and_blame_the_later_split():
    same = (0.0, 0.0, 10.0, 10.0)
    shifted = (5.0, 5.0, 15.0, 15.0)
    # Two dates of one place in train, one in validate; a third place overlaps both, in test.
    found = overlaps_between(["a"] * 4, [same, same, same, shifted], [0, 0, 1, 2])
    assert found.pairs == 2 + 3
    assert found.partners[2] == (2, [0, 1])
    assert found.partners[3][0] == 3
    assert set(found.partners) == {2, 3}


def test_many_dates_of_one_place_are_one_box():
    same = (0.0, 0.0, 10.0, 10.0)
    found = overlaps_between(["a"] * 20_000, [same] * 20_000, [0] * 10_000 + [1] * 10_000)
    assert found.pairs == 10_000**2


def test_a_python_whose_sqlite_has_no_trees_is_told_apart_from_a_full_disk():
    class Treeless:
        def executescript(self, _):
            raise sqlite3.OperationalError("no such module: rtree")

    with pytest.raises(EarthPriorError, match=r"without R-trees.*use another Python") as caught:
        Ground(Treeless(), 0.0)
    assert caught.value.exit_code == 2
