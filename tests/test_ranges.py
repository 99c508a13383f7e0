"""prediction/ranges.py: images in another unit are told of, others are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from earthprior.prediction.chips import WholeChips
from earthprior.prediction.ranges import Ranges


def ranges(said: list[str], **normalization: Any) -> Ranges:
    known = {"red": {"min": 10.0, "max": 90.0}, "nir": {"min": 0.0, "max": 200.0}}
    section = {"apply_normalization": True, "stat_procedure": "gpb", "statistics": {"per_band": known}, **normalization}
    backbone: Any = SimpleNamespace(bands=("red", "nir"), description={"normalization": section})
    return Ranges(backbone, said.append)


def chips(*values: float, dtype: torch.dtype = torch.float32) -> WholeChips:
    pixels = torch.tensor(values).to(dtype).view(-1, 1, 1, 1).expand(-1, 2, 16, 16).clone()
    images: Any = [SimpleNamespace(files=(f"chip_{index}.tif",)) for index in range(len(values))]
    return WholeChips(images, pixels, torch.ones(len(values), 16, 16, dtype=torch.bool))


def test_the_first_strange_chip_is_named_and_all_are_counted() -> None:
    said: list[str] = []
    with ranges(said) as looking:
        looking.look(chips(50.0, 300.0, dtype=torch.uint16))
        looking.look(chips(60.0, 400.0, 500.0, dtype=torch.uint16))
    assert len(said) == 2
    assert said[0].startswith("chip_1.tif: 100% of its values lie outside what the pretraining's chips had")
    assert "(red 10 to 90, nir 0 to 200)" in said[0]
    assert said[1] == "3 of 5 images hold mostly values outside the pretraining's range"


def test_half_of_the_values_may_lie_outside_and_pixels_without_data_count_nothing() -> None:
    said: list[str] = []
    with ranges(said) as looking:
        # below red's range, in that of nir
        looking.look(chips(5.0))
        some = chips(50.0)
        some.pixels[..., 8:] = float("nan")
        some.valid[..., 8:] = False
        looking.look(some)
        nothing = chips(1000.0)
        nothing.valid[:] = False
        looking.look(nothing)
    assert said == []
    with ranges(said) as looking:
        some.pixels[..., :8] = -1.0
        looking.look(some)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"stat_procedure": "lpb", "statistics": {}}, False),
        ({"stat_procedure": "lpb", "apply_normalization": False}, True),
    ],
)
def test_nothing_is_strange_where_chips_are_normalized_by_their_own_statistics(
    section: dict[str, Any], told: bool
) -> None:
    said: list[str] = []
    with ranges(said, **section) as looking:
        looking.look(chips(1e6))
    assert bool(said) == told


def test_reflectances_are_strange_to_a_network_that_knows_counts_from_0() -> None:
    said: list[str] = []
    known = {band: {"min": 0.0, "max": 10_000.0} for band in ("red", "nir")}
    with ranges(said, statistics={"per_band": known}) as looking:
        looking.look(chips(0.02, 0.3, 0.99))
        looking.look(chips(40.0))
    assert said[-1].startswith("3 of 4 images")
