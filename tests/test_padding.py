"""padding.py: mirrored edges where there is enough to mirror, and pyramids of the chip's own size."""

from __future__ import annotations

import pytest
import torch

from earthprior.networks.padding import crop_levels, pad_to_multiple


@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [
        (4, 4, [0, 1, 2, 3]),
        (5, 4, [0, 1, 2, 3, 4, 3, 2, 1]),
        (3, 4, [0, 1, 2, 1]),
        (3, 8, [0, 1, 2, 2, 2, 2, 2, 2]),
        (1, 4, [0, 0, 0, 0]),
    ],
)
def test_edges_are_mirrored_or_repeated_on_each_axis_alone(size: int, multiple: int, expected: list[int]) -> None:
    rows = torch.arange(size, dtype=torch.float32).reshape(1, 1, size, 1).expand(2, 3, size, multiple)
    wanted = torch.tensor(expected, dtype=torch.float32).reshape(1, 1, -1, 1).expand(2, 3, -1, multiple)
    assert torch.equal(pad_to_multiple(rows, multiple), wanted)
    assert torch.equal(pad_to_multiple(rows.mT, multiple), wanted.mT)


def test_a_size_that_divides_is_left_alone() -> None:
    x = torch.randn(1, 2, 8, 4)
    assert pad_to_multiple(x, 4) is x
    assert pad_to_multiple(x, 1) is x


def test_both_sides_grow_and_the_memory_layout_stays() -> None:
    x = torch.randn(2, 3, 5, 2).contiguous(memory_format=torch.channels_last)
    padded = pad_to_multiple(x, 4)
    assert padded.shape == (2, 3, 8, 4)
    assert padded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(padded[..., :5, :2], x)


def test_levels_keep_every_pixel_that_the_chip_touches() -> None:
    pyramid = [torch.randn(1, 2, 8 >> i, 16 >> i) for i in range(4)]
    cropped = crop_levels(pyramid, 5, 9)
    assert [tuple(level.shape[2:]) for level in cropped] == [(5, 9), (3, 5), (2, 3), (1, 2)]
    for part, whole in zip(cropped, pyramid, strict=True):
        assert torch.equal(part, whole[..., : part.shape[2], : part.shape[3]])
