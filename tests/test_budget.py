"""The chips that are labelled: nested, stratified, and the same on every machine."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from earthprior.chips.catalog import ChipRow
from earthprior.downstream.budget import choose, strata_by_class, strata_by_number, strata_by_pixels


def _rows(count: int) -> list[ChipRow]:
    return [ChipRow(number + 2, "train", (f"chips/{number}.tif",), {}) for number in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_a_smaller_budget_is_part_of_every_larger_one(seed: int) -> None:
    rows = _rows(60)
    strata = strata_by_class(["water" if number < 6 else "wood" for number in range(60)])
    drawn = [{row.line for row in choose(rows, count, seed, strata)} for count in (1, 2, 4, 16, 59, 60)]
    assert [len(lines) for lines in drawn] == [1, 2, 4, 16, 59, 60]
    assert all(small < large for small, large in pairwise(drawn))


def test_every_stratum_gives_one_chip_before_a_second_and_then_its_share() -> None:
    rows = _rows(100)
    classes = ["rare" if number < 5 else "common" if number < 25 else "most" for number in range(100)]
    names = {row.line: name for row, name in zip(rows, classes, strict=True)}
    for seed in range(10):
        few = [names[row.line] for row in choose(rows, 3, seed, classes)]
        assert sorted(few) == ["common", "most", "rare"]
        many = [names[row.line] for row in choose(rows, 40, seed, classes)]
        assert abs(many.count("rare") - 2) <= 1
        assert abs(many.count("common") - 8) <= 1
        assert abs(many.count("most") - 30) <= 2


def test_the_draw_is_the_seeds_and_not_the_orders() -> None:
    rows = _rows(50)
    strata = strata_by_number([float(number) for number in range(50)])
    shuffled = list(zip(rows, strata, strict=True))
    random.Random(3).shuffle(shuffled)
    again = choose([row for row, _ in shuffled], 12, 0, [stratum for _, stratum in shuffled])
    assert {row.line for row in again} == {row.line for row in choose(rows, 12, 0, strata)}
    assert {row.line for row in choose(rows, 12, 1, strata)} != {row.line for row in again}


def test_rows_keep_the_catalogs_order_and_none_or_too_many_means_all() -> None:
    rows = _rows(20)
    drawn = [row.line for row in choose(rows, 9, 4, [0] * 20)]
    assert drawn == sorted(drawn)
    assert choose(rows, None, 0, [0] * 20) == rows == choose(rows, 21, 0, [0] * 20)


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        choose(_rows(3), 0, 0, [0, 0, 0])
    with pytest.raises(ValueError, match="3 rows, but 2 strata"):
        choose(_rows(3), 1, 0, [0, 0])


def test_numbers_fall_into_quarters_and_equal_numbers_into_one() -> None:
    strata = strata_by_number([float(number) for number in range(40)])
    assert [strata.count(quarter) for quarter in range(4)] == [10, 10, 10, 10]
    assert len(set(strata_by_number([7.0] * 9))) == 1


def test_masks_are_told_apart_by_how_much_they_hold_of_what() -> None:
    binary = np.array([[100 - share, share] for share in (0, 1, 2, 10, 11, 40, 41, 60)])
    assert strata_by_pixels(binary) == [0, 0, 1, 1, 2, 2, 3, 3]
    # Class 0 is everywhere; what a chip has more of than others do is what it stands for. An empty chip is no error.
    cover = np.array([[90, 10, 0], [80, 0, 20], [100, 0, 0], [0, 0, 0]])
    assert strata_by_pixels(cover)[:3] == [1, 2, 0]
