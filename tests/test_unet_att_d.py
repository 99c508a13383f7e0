"""`unet_att_d` holds the tutorial's keys, shapes and parameter counts, and does what its README promises."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import nn

from earthprior.errors import ParamsError
from earthprior.networks.unet_att_d import TimeLevels, UNetAttD

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
    found = {name: count(module) for name, module in on_meta().named_children()}
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


@pytest.mark.parametrize("levels", range(2, 8))
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("time_injection", ["none", "bottleneck", "all"])
def test_any_number_of_levels_on_any_size(levels: int, attention: bool, time_injection: Any) -> None:
    widths = tuple(4 + 2 * i for i in range(levels))
    network = tiny(filter_config=widths, block_num=(1,) * levels, use_skipAtt=attention, time_injection=time_injection)
    assert network.stride == 2 ** (levels - 1)
    for height, width in ((37, 53), (2 * network.stride, network.stride), (3, 1)):
        x, t = torch.randn(2, 4, height, width), torch.tensor([3, 4])
        network.train()
        pyramid = network.features(x, t)
        sizes = [(2, w, -(-height // 2**i), -(-width // 2**i)) for i, w in enumerate(widths)]
        assert [tuple(f.shape) for f in pyramid] == sizes
        network(x, t).square().mean().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
        network.eval()
        alone = network(x[:1], t[:1])
        assert alone.shape == (1, 4, height, width)
        torch.testing.assert_close(alone, network(x, t)[:1], atol=1e-5, rtol=1e-4)


def test_padding_mirrors_the_chip() -> None:
    network = tiny().eval()
    x, t = torch.randn(1, 4, 13, 16), torch.tensor([10])
    mirrored = torch.cat([x, x[..., [11, 10, 9], :]], dim=2)
    assert torch.equal(network(x, t), network(mirrored, t)[..., :13, :])


def test_the_head_reads_the_finest_features() -> None:
    network = tiny(out_channels=2).eval()
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([10, 20])
    torch.testing.assert_close(network(x, t), network.output_conv(network.features(x, t)[0]))
    assert network(x, t).shape == (2, 2, 16, 16)


def at_two_timesteps(network: UNetAttD) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and pyramid of the same chips at t = 50 and t = 950."""
    network.eval()
    x = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        early, late = ([network(x, t), *network.features(x, t)] for t in (torch.full((4,), 50), torch.full((4,), 950)))
    return early, late


def trained_to_scale(time_injection: Any) -> UNetAttD:
    """After 40 steps of learning (1 - t / 500) x: what t says decides even the sign."""
    network = tiny(dropout_rate=0.0, time_embedding_dim=32, time_injection=time_injection)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        x, t = torch.randn(8, 4, 16, 16, generator=generator), torch.randint(0, 1000, (8,), generator=generator)
        optimizer.zero_grad()
        (network(x, t) - (1 - t / 500).reshape(-1, 1, 1, 1) * x).square().mean().backward()
        optimizer.step()
    return network


def test_the_timestep_reaches_the_output() -> None:
    # The tutorial once added the embedding after the decoder had read the bottleneck; then this difference is 0.
    early, late = at_two_timesteps(tiny(dropout_rate=0.0))
    assert (early[0] - late[0]).abs().max() > 1e-4


def test_without_injection_the_timestep_does_nothing_and_its_weights_stay() -> None:
    network = trained_to_scale("none")
    early, late = at_two_timesteps(network)
    assert all(torch.equal(one, other) for one, other in zip(early, late, strict=True))
    untrained = tiny(time_embedding_dim=32).time_mlp.state_dict()
    assert all(torch.equal(value, untrained[name]) for name, value in network.time_mlp.state_dict().items())
    assert list(network.state_dict()) == list(tiny().state_dict())


def test_at_every_level_the_timestep_steers_each_level_and_the_output_more() -> None:
    moved = {}
    for time_injection in ("bottleneck", "all"):
        early, late = at_two_timesteps(trained_to_scale(time_injection))
        moved[time_injection] = [((a - b).std() / a.std()).item() for a, b in zip(early, late, strict=True)]
    output, *levels = moved["all"]
    assert output > 2 * moved["bottleneck"][0]
    assert min(levels) > 0.1


def test_every_projection_of_the_timestep_reaches_its_level() -> None:
    network = tiny(dropout_rate=0.0, time_injection="all")
    assert isinstance(network.time_levels, TimeLevels)
    (_, *plain), _ = at_two_timesteps(network)
    for side, level, reached in (
        (network.time_levels.encoder, 0, [0, 1, 2]),
        (network.time_levels.encoder, 1, [0, 1, 2]),
        (network.time_levels.decoder, 0, [0]),
        (network.time_levels.decoder, 1, [0, 1]),
    ):
        weight = side.get_parameter(f"{level}.weight")
        nn.init.normal_(weight)
        (_, *moved), _ = at_two_timesteps(network)
        nn.init.zeros_(weight)
        far = [(a - b).std() / a.std() for a, b in zip(plain, moved, strict=True)]
        assert [i for i, distance in enumerate(far) if distance > 0] == reached
        assert far[level] > 0.1


def test_the_tutorials_weights_load_where_time_enters_everywhere() -> None:
    before, after = tiny(dropout_rate=0.0), tiny(dropout_rate=0.0, time_injection="all")
    added = list(after.state_dict())[len(before.state_dict()) :]
    assert list(after.state_dict()) == [*before.state_dict(), *added]
    assert {name.split(".")[0] for name in added} == {"time_levels"}
    # The modules that come last change no other weight's initialization.
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
    with torch.no_grad():
        before.get_parameter("encoder_1.block.0.weight").mul_(2)
    found = after.load_state_dict(before.state_dict(), strict=False)
    assert found.missing_keys == added
    assert found.unexpected_keys == []
    for one, other in zip(at_two_timesteps(before)[0], at_two_timesteps(after)[0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("time_injection", ["bottleneck", "all"])
def test_every_parameter_gets_a_finite_gradient(time_injection: Any) -> None:
    network = tiny(time_injection=time_injection)
    for layer in network.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.abs().max() > 0:
            nn.init.normal_(layer.weight)
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


@pytest.mark.parametrize(("dropout_type", "whole"), [("traditional", False), ("spatial", True)])
def test_spatial_dropout_drops_whole_channels(dropout_type: Any, whole: bool) -> None:
    block = tiny(block_num=(1, 1, 1), dropout_type=dropout_type, dropout_rate=0.5).get_submodule("encoder_3.block")
    assert isinstance(block, nn.Sequential)
    dropped = block[-1](torch.ones(4, 8, 6, 6)) == 0
    assert 0.2 < dropped.float().mean() < 0.8
    assert (dropped == dropped[..., :1, :1]).all() == whole


def test_every_option_changes_the_output() -> None:
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([10, 700])
    outputs = []
    for kwargs in (
        {},
        {"block_num": (1, 1, 2)},
        {"filter_config": (4, 8, 8)},
        {"dropout_rate": 0.0},
        {"dropout_rate": 0.4},
        {"dropout_type": "spatial"},
        {"upmode": "fixed"},
        {"upmode": "deconv_1"},
        {"upmode": "DUC"},
        {"use_skipAtt": False},
        {"time_embedding_dim": 12},
        {"time_injection": "none"},
    ):
        network = tiny(**kwargs)
        torch.manual_seed(1)
        outputs.append(network(x, t))
    assert not any(torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_one_pixel_of_one_chip_is_too_little_for_batchnorm() -> None:
    x, t = torch.randn(2, 4, 3, 4), torch.tensor([0, 5])
    with pytest.raises(ParamsError, match=r"up to 4 x 4 px.*batch_size or data\.crop_px"):
        tiny()(x[:1], t[:1])
    assert tiny()(x, t).shape == x.shape
    assert tiny()(torch.randn(1, 4, 4, 5), t[:1]).shape == (1, 4, 4, 5)
    assert tiny().eval()(x[:1], t[:1]).shape == (1, 4, 3, 4)


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
        ({"time_injection": "top"}, "'top'.*none, bottleneck or all"),
        ({"upmode": "bicubic"}, "'bicubic'.*fixed, deconv_1"),
    ],
)
def test_bad_settings_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        tiny(**kwargs)
