from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from earthprior.prediction.tiling import Blend, default_overlap, mirrored, place, predict_chip


def some_chips(count: int, height: int, width: int, bands: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, bands, height, width, generator=torch.Generator().manual_seed(seed))


def per_pixel(x: Tensor) -> Tensor:
    """A network without context."""
    return torch.cat([x, x.square().sum(dim=1, keepdim=True)], dim=1).softmax(dim=1)


def convolution(reach_px: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Conv2d(3, 2, 2 * reach_px + 1, padding=reach_px).requires_grad_(False)


@pytest.mark.parametrize("overlap", [0, 1, 5, 8, 15])
@pytest.mark.parametrize("size", [1, 7, 16, 17, 31, 100])
def test_weights_add_up_to_one_everywhere(size: int, overlap: int) -> None:
    placed = place(size, 16, overlap)
    total = torch.zeros(max(size, 16))
    for tile in placed:
        assert tile.weights.min() > 0
        total[tile.origin : tile.origin + 16] += tile.weights
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("overlap", [16, -1])
def test_an_overlap_that_is_none_is_refused(overlap: int) -> None:
    with pytest.raises(ValueError, match="cannot overlap"):
        place(100, 16, overlap)


def test_neighbours_fade_into_one_another_without_a_step() -> None:
    # the largest change of a tile's weight from pixel to pixel, its ends at the neighbours' middle included
    for tile in place(400, 64, 32)[1:-1]:
        padded = torch.cat([torch.zeros(1), tile.weights, torch.zeros(1)])
        assert padded.diff().abs().max() < 0.1


@pytest.mark.parametrize("overlap", [0, 3, None])
@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (16, 16), (33, 57), (64, 20)])
def test_a_network_without_context_is_reproduced(shape: tuple[int, int], overlap: int | None) -> None:
    x0 = some_chips(2, *shape)
    torch.testing.assert_close(predict_chip(per_pixel, x0, 16, overlap), per_pixel(x0))


def test_a_constant_is_reproduced() -> None:
    found = predict_chip(lambda tiles: torch.full((len(tiles), 2, 16, 16), 0.3), some_chips(1, 50, 61), 16)
    torch.testing.assert_close(found, torch.full((1, 2, 50, 61), 0.3))


def test_where_the_tiles_lie_changes_nothing_for_a_network_that_looks_a_quarter_of_the_overlap_far() -> None:
    network = convolution(reach_px=4)
    x0 = some_chips(1, 90, 110)
    whole = network(x0)
    found = predict_chip(network, x0, 32)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    shifted = predict_chip(network, x0[..., 5:, 3:], 32)
    torch.testing.assert_close(shifted[..., 8:, 8:], found[..., 13:, 11:], atol=1e-5, rtol=1e-5)


def test_a_network_that_looks_further_than_the_overlap_leaves_no_seam() -> None:
    # What a tile's own place adds must come in gradually: the map of the place within the tile is the worst case.
    def place_in_tile(tiles: Tensor) -> Tensor:
        ramp = torch.linspace(0, 1, tiles.shape[-1]).expand(tiles.shape[-2], -1)
        return ramp.expand(len(tiles), 1, -1, -1)

    found = predict_chip(place_in_tile, some_chips(1, 64, 400), 64)
    without = predict_chip(place_in_tile, some_chips(1, 64, 384), 64, 0)
    assert found.diff(dim=-1).abs().max() < 0.07
    assert without.diff(dim=-1).abs().max() > 0.9  # a seam


def test_chips_of_a_batch_do_not_touch_one_another() -> None:
    network, x0 = convolution(2), some_chips(3, 40, 40)
    together = predict_chip(network, x0, 16)
    for index in range(3):
        torch.testing.assert_close(together[index : index + 1], predict_chip(network, x0[index : index + 1], 16))


def test_tiles_come_in_the_size_asked_for_and_a_few_at_a_time() -> None:
    seen: list[tuple[int, ...]] = []

    def network(tiles: Tensor) -> Tensor:
        seen.append(tuple(tiles.shape))
        return tiles

    predict_chip(network, some_chips(2, 7, 90), 16)
    assert {shape[1:] for shape in seen} == {(3, 16, 16)}
    assert max(shape[0] for shape in seen) <= 16


def test_half_precision_is_blended_in_full() -> None:
    found = predict_chip(lambda tiles: per_pixel(tiles).bfloat16(), some_chips(1, 40, 40), 16)
    assert found.dtype == torch.float32


def test_small_chips_are_mirrored_as_often_as_needed() -> None:
    row = torch.tensor([[1.0, 2.0, 3.0]])
    assert mirrored(row, 8)[0].tolist() == [1, 2, 3, 2, 1, 2, 3, 2]
    assert mirrored(row, 8).shape == (8, 8)
    assert mirrored(torch.ones(1, 1), 4).tolist() == torch.ones(4, 4).tolist()
    assert mirrored(row, 1) is row


def test_parts_of_a_map_are_those_of_the_whole_and_rows_without_tiles_are_none() -> None:
    rows, columns = place(40, 16, 8), place(70, 16, 8)
    tiles = torch.rand(len(columns), 1, 2, 16, 16)

    def blended(start: int, stop: int) -> Tensor:
        blend, parts = Blend(40, rows, start, stop), []
        assert blend.advance() == (rows[1].origin, None)
        for _ in rows[1:]:
            served = [i for i, column in enumerate(columns) if column.origin < stop and column.origin + 16 > start]
            blend.add(tiles[served], [columns[i] for i in served])
            parts.append(blend.advance()[1])
        return torch.cat([part for part in parts if part is not None], dim=-2)

    whole = blended(0, 70)
    assert whole.shape == (1, 2, 40 - rows[1].origin, 70)
    torch.testing.assert_close(torch.cat([blended(0, 30), blended(30, 70)], dim=-1), whole)


def test_half_a_tile_is_the_overlap() -> None:
    assert default_overlap(96) == 48
