from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from earthprior.chips.catalog import ChipRow
from earthprior.params import Params
from earthprior.tasks.task import Loss
from earthprior.training.distributed import World
from earthprior.training.shares import Share, backward, joined, share_weights
from support import make_batch

MakeParams = Callable[..., Params]


class Toy(nn.Module):
    """A task whose loss needs the generator, dropout and the mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Dropout(0.3), nn.Conv2d(2, 2, 1))

    def per_chip(self, share: Share, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        t = torch.randint(0, 9, (len(share.batch),), generator=generator)
        eps = torch.randn(share.batch.x0.shape, generator=generator)
        error = (self.network(share.batch.x0 + eps) - eps).square().mean(1, keepdim=True)
        valid = share.batch.valid
        return (error * valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1), t

    def loss(self, batch: object, generator: torch.Generator) -> Loss:
        share = Share(batch, [], generator, 0)  # type: ignore[arg-type]
        per_chip, t = self.per_chip(share, generator)
        total = per_chip.sum() / share.batch.valid.flatten(1).any(1).sum().clamp(min=1)
        return Loss(total, per_chip.detach(), t, {"twice": 2 * total.detach()})


def make_shares(*valid: str) -> list[Share]:
    """One share per text, with one chip per letter: v valid, h half valid, - not valid."""
    shares = []
    for number, letters in enumerate(valid):
        generator = torch.Generator().manual_seed(number)
        mask = torch.ones(len(letters), 1, 4, 4, dtype=torch.bool)
        for chip, letter in enumerate(letters):
            mask[chip, :, {"v": 4, "h": 2, "-": 0}[letter] :] = False
        x0 = torch.randn(len(letters), 2, 4, 4, generator=generator)
        images = [(f"chip_{number}_{chip}.tif",) for chip in range(len(letters))]
        rows = [ChipRow(10 * number + chip, "train", image, {}) for chip, image in enumerate(images)]
        shares.append(Share(make_batch(x0, mask), rows, generator, dropout_seed=number))
    return shares


def whole_batch(task: Toy, shares: list[Share]) -> tuple[Tensor, list[Tensor]]:
    """The mean over all valid chips at once, and its gradients."""
    parts = []
    for share in shares:
        torch.manual_seed(share.dropout_seed)
        parts.append(task.per_chip(share, share.generator.clone_state())[0])
    counted = torch.cat([share.batch.valid.flatten(1).any(1) for share in shares])
    loss = torch.cat(parts).sum() / counted.sum()
    return loss, list(torch.autograd.grad(loss, list(task.network.parameters())))


@pytest.mark.parametrize("valid", [["vv"], ["vv", "vh"], ["v-", "vv", "--", "hv"], ["-v"]])
def test_the_gradient_is_that_of_the_whole_batch(make_params: MakeParams, valid: list[str]) -> None:
    task, shares = Toy(), make_shares(*valid)
    weights = share_weights(shares, World())
    losses = backward(task, shares, weights, make_params())  # type: ignore[arg-type]
    total, gradients = whole_batch(task, shares)
    for parameter, expected in zip(task.network.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected)
    loss = joined(losses, weights, World())
    torch.testing.assert_close(loss.total, total.detach())
    torch.testing.assert_close(loss.terms["twice"], 2 * total.detach())
    assert len(loss.per_chip) == len("".join(valid))
    assert not loss.total.requires_grad


def test_the_second_pass_sees_what_the_first_saw(make_params: MakeParams) -> None:
    task, shares, params = Toy(), make_shares("vv", "vh"), make_params()
    weights = share_weights(shares, World())
    found = []
    for _ in range(2):
        losses = backward(task, shares, weights, params)  # type: ignore[arg-type]
        found.append([*joined(losses, weights, World()).per_chip, *(p.grad for p in task.network.parameters())])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_a_batch_without_a_valid_pixel_moves_nothing(make_params: MakeParams) -> None:
    task, shares = Toy(), make_shares("--", "--")
    backward(task, shares, share_weights(shares, World()), make_params())  # type: ignore[arg-type]
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in task.network.parameters() if p.grad is not None)


@pytest.mark.parametrize("valid", [["vvv"], ["v-v"], ["vv", "vv"]])
def test_equal_shares_weigh_exactly_alike(valid: list[str]) -> None:
    """To the bit, so that one share computes what no sharing would."""
    assert share_weights(make_shares(*valid), World()).tolist() == [1 / len(valid)] * len(valid)


def test_the_joined_loss_keeps_the_chips_order() -> None:
    losses = [Loss(torch.tensor(float(n)), torch.tensor([n, n + 0.5]), torch.tensor([n, n])) for n in (1, 2)]
    loss = joined(losses, torch.tensor([0.25, 0.75]), World())
    assert loss.total == 1.75
    assert loss.per_chip.tolist() == [1, 1.5, 2, 2.5]
    assert loss.t is not None
    assert loss.t.tolist() == [1, 1, 2, 2]
