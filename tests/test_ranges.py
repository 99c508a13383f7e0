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
    assert said[0].startswith(
        "chip_1.tif: 100% of its values are none that the pretraining's chips had (red 10 to 90, nir"
    )
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


@pytest.mark.parametrize("section", [{"stat_procedure": "lpb"}, {"apply_normalization": False}])
def test_where_no_statistics_of_the_pretraining_act_nothing_is_strange(section: dict[str, Any]) -> None:
    said: list[str] = []
    with ranges(said, **section) as looking:
        looking.look(chips(1e6))
    assert said == []
