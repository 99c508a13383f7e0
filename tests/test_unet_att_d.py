"""`unet_att_d` holds the tutorial's keys, shapes and parameter counts, and does what its README promises."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import nn

from earthprior.errors import ParamsError
from earthprior.networks.unet_att_d import UNetAttD

DEFAULT = (64, 256, 512, 1024, 2048, 4096)
KEY_HASH = "63f50561d7fec46a4ffbbf2c23b9b96f97a9b894ae5166d2b1f4f099f784b169"
PER_MODULE = {
    "time_mlp": 528_384,
    **dict(
        zip(
            [f"encoder_{i}" for i in range(1, 7)],
            [39_424, 738_304, 3_540_992, 14_159_872, 56_631_296, 226_508_800],
            strict=True,
        )
    ),
    **dict(
        zip(
            [f"decoder_{i}" for i in range(1, 6)],
            [134_219_776, 33_555_456, 8_389_120, 2_097_408, 262_208],
            strict=True,
        )
    ),
    **dict(
        zip([f"conv{i}" for i in range(1, 6)], [113_254_400, 28_315_648, 7_079_936, 1_770_496, 110_848], strict=True)
    ),
    **dict(zip([f"Att{i}" for i in range(1, 6)], [4_201_475, 1_052_163, 263_939, 33_219, 4_323], strict=True)),
    "output_conv": 260,
}


def on_meta(in_channels: int = 4, **kwargs: Any) -> UNetAttD:
    with torch.device("meta"):
        return UNetAttD(in_channels, **kwargs)


def tiny(**kwargs: Any) -> UNetAttD:
    torch.manual_seed(0)
    options: dict[str, Any] = {"filter_config": (4, 6, 8), "block_num": (2, 1, 2), "time_embedding_dim": 8}
    return UNetAttD(4, **(options | kwargs))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("kwargs", "parameters", "keys"),
    [
        ({}, 636_757_747, 251),
        ({"use_skipAtt": False}, 631_202_628, 146),
        ({"time_embedding_dim": 112}, 636_692_211, 251),
        ({"in_channels": 3}, 636_757_106, 251),
        ({"filter_config": (64, 128, 256, 512, 1024, 2048)}, 159_564_531, 251),
        ({"filter_config": (32, 64, 128, 256, 512, 1024)}, 39_966_083, 251),
        ({"filter_config": (8, 16, 32, 64, 128, 256)}, 2_525_999, 251),
    ],
)
def test_parameter_counts_of_the_tutorial(kwargs: dict[str, Any], parameters: int, keys: int) -> None:
    network = on_meta(**kwargs)
    assert count(network) == parameters
    assert len(network.state_dict()) == keys


def test_keys_shapes_and_their_order_are_the_tutorials() -> None:
    network = on_meta(filter_config=DEFAULT)
    lines = [f"{key} {tuple(value.shape)}" for key, value in network.state_dict().items()]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == KEY_HASH
    assert len(list(network.parameters())) == 140
    assert len(list(network.buffers())) == 111


def test_parameter_counts_per_module() -> None:
    found = {name: count(module) for name, module in on_meta().named_children() if name != "pool"}
    assert found == PER_MODULE


@pytest.mark.parametrize(
    ("upmode", "shapes"),
    [
        ("deconv_1", {"block.0.weight": (8, 6, 2, 2), "block.0.bias": (6,)}),
        ("deconv_2", {"block.0.weight": (8, 6, 4, 4), "block.0.bias": (6,)}),
        ("fixed", {"block.1.weight": (8,), "block.1.bias": (8,), "block.2.weight": (6, 8, 1, 1)}),
        (
            "DUC",
            {
                "block.0.weight": (24, 8, 3, 3),
                "block.0.bias": (24,),
                "block.1.weight": (24,),
                "block.1.bias": (24,),
            },
        ),
    ],
)
def test_upmodes(upmode: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    network = tiny(upmode=upmode)
    up = network.get_submodule("decoder_1")
    assert {name: tuple(p.shape) for name, p in up.named_parameters()} == shapes
    assert network(torch.randn(2, 4, 8, 16), torch.tensor([0, 999])).shape == (2, 4, 8, 16)


@pytest.mark.parametrize("levels", [2, 3, 5])
@pytest.mark.parametrize("attention", [True, False])
def test_any_number_of_levels(levels: int, attention: bool) -> None:
    widths = tuple(4 + 2 * i for i in range(levels))
    network = tiny(filter_config=widths, block_num=(1,) * levels, use_skipAtt=attention)
    px = 2 * network.stride
    assert network.stride == 2 ** (levels - 1)
    pyramid = network.features(torch.randn(2, 4, px, px), torch.tensor([3, 4]))
    assert [tuple(f.shape) for f in pyramid] == [(2, w, px >> i, px >> i) for i, w in enumerate(widths)]


def test_the_head_reads_the_finest_features() -> None:
    network = tiny(out_channels=2).eval()
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([10, 20])
    torch.testing.assert_close(network(x, t), network.output_conv(network.features(x, t)[0]))
    assert network(x, t).shape == (2, 2, 16, 16)


def test_the_timestep_reaches_the_output() -> None:
    # The tutorial once added the embedding after the decoder had read the bottleneck; then this difference is 0.
    network = tiny(dropout_rate=0.0)
    x = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        network.time_mlp[0].weight.mul_(10)
        early, late = (network(x, torch.full((2,), t)) for t in (1, 700))
    assert (early - late).abs().max() > 1e-4


def test_every_parameter_gets_a_finite_gradient() -> None:
    network = tiny()
    network(torch.randn(2, 4, 16, 16), torch.tensor([5, 500])).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    # Biases before BatchNorm are cancelled, up to rounding; everything else must move.
    cancelled = {f"Att{i}.{part}.0.bias" for i in (1, 2) for part in ("W_g", "W_x", "psi")}
    still = {name for name, p in network.named_parameters() if p.grad is not None and not p.grad.abs().max() > 0}
    assert still <= cancelled


@pytest.mark.parametrize(("dropout_type", "layer"), [("traditional", nn.Dropout), ("spatial", nn.Dropout2d)])
@pytest.mark.parametrize("block_num", [(1, 1, 1), (2, 2, 2), (3, 1, 2)])
def test_dropout_ends_every_block(dropout_type: Any, layer: type[nn.Module], block_num: tuple[int, ...]) -> None:
    network = tiny(block_num=block_num, dropout_type=dropout_type, dropout_rate=0.3)
    blocks = [m for name, m in network.named_children() if name.startswith(("encoder", "conv"))]
    assert [type(block.get_submodule("block")[-1]) for block in blocks] == [layer] * 5  # type: ignore[index]
    without = tiny(block_num=block_num, dropout_rate=0.0)
    assert list(network.state_dict()) == list(without.state_dict())
    assert not any(isinstance(m, nn.Dropout | nn.Dropout2d) for m in without.modules())


def test_dropout_acts_in_training_only() -> None:
    network = tiny(block_num=(1, 1, 1), dropout_rate=0.5)
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([1, 2])
    with torch.no_grad():
        assert not torch.equal(network(x, t), network(x, t))
        network.eval()
        torch.testing.assert_close(network(x, t), network(x, t), atol=0, rtol=0)


def test_a_size_that_does_not_divide_is_named() -> None:
    with pytest.raises(ParamsError, match=r"18 x 16 px.*divisible by 4.*data\.crop_px"):
        tiny()(torch.randn(1, 4, 18, 16), torch.tensor([0]))


def test_a_condition_is_refused() -> None:
    with pytest.raises(ParamsError, match="unet_film"):
        tiny()(torch.randn(1, 4, 16, 16), torch.tensor([0]), torch.randn(1, 3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"filter_config": (4,), "block_num": (1,)}, "at least 2"),
        ({"block_num": (1, 1)}, "2 entries for 3 levels"),
        ({"block_num": (1, 0, 1)}, "at least 1"),
        ({"dropout_type": "alpha"}, "'alpha'.*traditional or spatial"),
        ({"upmode": "bicubic"}, "'bicubic'.*fixed, deconv_1"),
    ],
)
def test_bad_settings_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        tiny(**kwargs)
