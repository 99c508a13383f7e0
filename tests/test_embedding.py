"""Golden values of the tutorial's timestep embedding."""

from __future__ import annotations

import pytest
import torch

from earthprior.networks.embedding import timestep_embedding


@pytest.mark.parametrize(
    ("t", "dim", "expected"),
    [
        (1, 4, [0.841471, 0.0099998, 0.5403023, 0.99995]),
        (10, 5, [-0.5440211, 0.0998334, -0.8390715, 0.9950042, 0.0]),
        (
            999,
            8,
            [-0.0264608, -0.5899291, -0.5356032, 0.8409302, 0.9996498, 0.8074551, -0.8444698, 0.5411435],
        ),
    ],
)
def test_golden_values(t: int, dim: int, expected: list[float]) -> None:
    torch.testing.assert_close(timestep_embedding(torch.tensor([t]), dim), torch.tensor([expected]), atol=2e-6, rtol=0)


def test_golden_values_at_full_length() -> None:
    embedding = timestep_embedding(torch.tensor([500]), 128)[0]
    torch.testing.assert_close(embedding[:3], torch.tensor([-0.4677718, -0.5291843, -0.8901104]), atol=2e-6, rtol=0)
    assert embedding.sum().item() == pytest.approx(26.607992, abs=1e-4)
    assert embedding.norm().item() == pytest.approx(8.0, abs=1e-5)


def test_each_row_depends_on_its_own_t_only() -> None:
    t = torch.tensor([0, 7, 999])
    together = timestep_embedding(t, 16)
    for row, one in zip(together, t, strict=True):
        torch.testing.assert_close(row, timestep_embedding(one[None], 16)[0], atol=0, rtol=0)
    assert together.dtype == torch.float32
    assert together.unique(dim=0).shape[0] == 3


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="dim is 1"):
        timestep_embedding(torch.tensor([1]), 1)
    with pytest.raises(ValueError, match="shape"):
        timestep_embedding(torch.tensor(1), 8)
