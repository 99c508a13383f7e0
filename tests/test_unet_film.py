"""`unet_film`: shapes, conditioning, gradients, and the identity that it starts as."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from earthprior.errors import ParamsError
from earthprior.networks.unet_film import ResidualBlock, SelfAttention, UNetFiLM


def tiny(perturbed: bool = True, **kwargs: Any) -> UNetFiLM:
    """A three-level network; `perturbed` moves the layers that start at zero."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"channels": (8, 12, 16), "blocks": 2, "time_embedding_dim": 16}
    network = UNetFiLM(4, **(options | kwargs))
    if perturbed:
        for parameter in network.parameters():
            if not parameter.abs().max() > 0:
                nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize("channels", [(8,), (8, 12), (6, 10, 18, 35)])
@pytest.mark.parametrize("attention", [True, False])
def test_shapes_of_output_and_pyramid(channels: tuple[int, ...], attention: bool) -> None:
    network = tiny(channels=channels, attention=attention, out_channels=3, blocks=1)
    stride = 2 ** (len(channels) - 1)
    assert network.stride == stride
    height, width = 3 * stride, 2 * stride
    x, t = torch.randn(2, 4, height, width), torch.tensor([0, 999])
    assert network(x, t).shape == (2, 3, height, width)
    pyramid = network.features(x, t)
    assert [tuple(f.shape) for f in pyramid] == [(2, c, height >> i, width >> i) for i, c in enumerate(channels)]


def test_untrained_output_is_zero() -> None:
    network = tiny(perturbed=False)
    assert torch.equal(network(torch.randn(1, 4, 8, 8), torch.tensor([3])), torch.zeros(1, 4, 8, 8))


def test_untrained_blocks_are_the_identity() -> None:
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(ResidualBlock(8, 16, 0.0)(x, torch.randn(2, 16)), x)
    torch.testing.assert_close(SelfAttention(8)(x), x)


@pytest.mark.parametrize("cond_dim", [None, 5])
def test_every_parameter_gets_a_finite_gradient(cond_dim: int | None) -> None:
    network = tiny(cond_dim=cond_dim)
    cond = None if cond_dim is None else torch.randn(2, cond_dim)
    network(torch.randn(2, 4, 16, 16), torch.tensor([5, 500]), cond).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_the_timestep_steers_every_block() -> None:
    network = tiny()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in network.named_modules():
        if isinstance(module, ResidualBlock):
            module.film.register_forward_hook(lambda _m, _i, out, name=name: seen.setdefault(name, []).append(out))
    x = torch.randn(1, 4, 8, 8)
    out = [network(x, torch.tensor([t])) for t in (1, 700)]
    # Two levels of 1 block down and 2 up, and 2 at the bottom.
    assert len(seen) == 8
    assert all((first - second).abs().max() > 1e-3 for first, second in seen.values())
    assert (out[0] - out[1]).abs().max() > 1e-3


def test_film_scales_and_shifts_the_normalized_features() -> None:
    block = ResidualBlock(4, 2, 0.0)
    scale, shift = torch.tensor([0.5, -0.5, 0.0, 1.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    nn.init.zeros_(block.film.weight)
    block.film.bias.data = torch.cat([scale, shift])
    seen: list[torch.Tensor] = []
    block.conv1.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    x = torch.randn(1, 4, 5, 5)
    block(x, torch.zeros(1, 2))
    normalized = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    expected = nn.functional.silu(normalized * (1 + scale.view(1, 4, 1, 1)) + shift.view(1, 4, 1, 1))
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)


def test_attention_sees_the_whole_chip() -> None:
    x = torch.randn(1, 4, 64, 64)
    moved = x.clone()
    moved[..., 0, 0] += 10
    far = {}
    for attention in (True, False):
        attend = SelfAttention(8) if attention else nn.Conv2d(8, 8, 3, padding=1)
        if isinstance(attend, SelfAttention):
            nn.init.normal_(attend.out.weight)
            attend.norm = nn.Identity()  # type: ignore[assignment]  # its statistics alone would carry the change
        with torch.no_grad():
            lift = torch.cat([x, x], 1), torch.cat([moved, moved], 1)
            far[attention] = (attend(lift[0]) - attend(lift[1]))[..., -1, -1].abs().max().item()
    assert far[True] > 1e-5
    assert far[False] == 0


def test_attention_matches_the_formula() -> None:
    torch.manual_seed(1)
    attend = SelfAttention(64)
    assert attend.heads == 2
    nn.init.normal_(attend.out.weight, std=0.1)
    x = torch.randn(2, 64, 3, 5)
    q, k, v = attend.qkv(attend.norm(x)).flatten(2).reshape(2, 3, 2, 32, 15).unbind(1)
    weights = torch.softmax(torch.einsum("bhcn,bhcm->bhnm", q, k) / 32**0.5, dim=-1)
    mixed = torch.einsum("bhnm,bhcm->bhcn", weights, v).reshape(2, 64, 3, 5)
    torch.testing.assert_close(attend(x), x + attend.out(mixed), atol=1e-5, rtol=1e-5)


def test_chips_of_a_batch_do_not_mix() -> None:
    network = tiny()
    x, t = torch.randn(3, 4, 16, 16), torch.tensor([1, 300, 900])
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(network(x, t), alone, atol=1e-5, rtol=1e-4)


def test_memory_layout_and_autocast_change_rounding_only() -> None:
    network = tiny().eval()
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([1, 300])
    plain = network(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        half = network(x, t)
    network.to(memory_format=torch.channels_last)
    last = network(x.contiguous(memory_format=torch.channels_last), t)
    torch.testing.assert_close(last, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(half.float(), plain, atol=0.05 * plain.abs().max().item(), rtol=0)


def test_the_upsampling_starts_without_a_checkerboard() -> None:
    up = tiny(perturbed=False).up[0]
    out = up(torch.randn(1, 12, 3, 3))
    torch.testing.assert_close(out, out[..., ::2, ::2].repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_the_condition_reaches_the_output() -> None:
    network = tiny(cond_dim=5)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([9])
    given = network(x, t, torch.ones(1, 5))
    assert (given - network(x, t, -torch.ones(1, 5))).abs().max() > 1e-4


@pytest.mark.parametrize(("cond_dim", "width"), [(None, 5), (5, 4)])
def test_a_condition_that_does_not_fit_is_named(cond_dim: int | None, width: int) -> None:
    with pytest.raises(ParamsError, match=f"{width}.*cond_dim {cond_dim}"):
        tiny(cond_dim=cond_dim)(torch.randn(1, 4, 8, 8), torch.tensor([9]), torch.ones(1, width))


def test_dropout_acts_in_training_only() -> None:
    network = tiny(dropout_rate=0.5)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([9])
    assert not torch.equal(network(x, t), network(x, t))
    network.eval()
    torch.testing.assert_close(network(x, t), network(x, t), atol=0, rtol=0)


@pytest.mark.parametrize("levels", range(1, 8))
@pytest.mark.parametrize(("height", "width"), [(37, 53), (3, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_size(levels: int, height: int, width: int, batch: int) -> None:
    channels = (8, 12, 8, 12, 8, 16, 8)[:levels]
    network = tiny(channels=channels, blocks=1, attention=levels > 3)
    x, t = torch.randn(batch, 4, height, width), torch.randint(0, 1000, (batch,))
    out = network(x, t)
    assert out.shape == x.shape
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    sizes = [(batch, c, -(-height // 2**i), -(-width // 2**i)) for i, c in enumerate(channels)]
    assert [tuple(f.shape) for f in network.features(x, t)] == sizes


def test_padding_mirrors_the_chip() -> None:
    network, t = tiny(), torch.tensor([10])
    x = torch.randn(1, 4, 16, 13)
    mirrored = torch.cat([x, x[..., [11, 10, 9]]], dim=3)
    for part, whole in zip(network.features(x, t), network.features(mirrored, t), strict=True):
        assert torch.equal(part, whole[..., : part.shape[3]])


def test_a_norm_is_torchs() -> None:
    norm = tiny().head_norm
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(norm(x), nn.functional.group_norm(x, 8, norm.weight, norm.bias))
    torch.testing.assert_close(norm(x[:1, :, :1, :1]), norm.bias.reshape(1, 8, 1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kwargs", [{"channels": ()}, {"channels": (8, 0)}, {"blocks": 0}])
def test_bad_settings_are_named(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ParamsError, match="unet_film: channels"):
        tiny(**kwargs)


def test_a_few_steps_learn_to_denoise() -> None:
    """On flat chips of random level, the noise is what varies: eps-MSE falls from 1 well below 0.5 in 40 steps."""
    network = tiny(perturbed=False, channels=(16, 16), blocks=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        eps = torch.randn(8, 4, 16, 16)
        loss = (network(torch.randn(8, 4, 1, 1) + eps, torch.full((8,), 400)) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.0, abs=0.1)
    assert losses[-1] < 0.5
