"""The tutorial's denoiser `unet_att_d`: a BatchNorm U-Net with additive attention gates on its skips.

Its state_dict has the tutorial's keys and shapes, so that weights trained there load here. In the tutorial time enters
at the bottleneck only, which barely conditions the network; `time_injection: all` mends that. For new work choose
`unet_film`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earthprior.errors import ParamsError
from earthprior.networks.embedding import timestep_embedding
from earthprior.networks.padding import crop_levels, pad_to_multiple
from earthprior.networks.recompute import run_level
from earthprior.networks.sides import check_side

UpMode = Literal["fixed", "deconv_1", "deconv_2", "DUC"]
DropoutType = Literal["traditional", "spatial"]
TimeInjection = Literal["none", "bottleneck", "all"]


class ConvBlock(nn.Module):
    """`convolutions` times (3x3 convolution, BatchNorm, ReLU), then dropout.

    Dropout has no weights and stands last, so that convolution n keeps the key `block.{3n}` at every rate. The
    tutorial's code leaves dropout out of blocks of one convolution; its README promises it, and here it acts.
    """

    def __init__(
        self, in_channels: int, out_channels: int, convolutions: int, dropout_rate: float, dropout_type: DropoutType
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n in range(convolutions):
            # BatchNorm follows and would cancel a bias.
            layers += [
                nn.Conv2d(in_channels if n == 0 else out_channels, out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            ]
        if dropout_rate > 0:
            layers.append(nn.Dropout2d(dropout_rate) if dropout_type == "spatial" else nn.Dropout(dropout_rate))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        out: Tensor = self.block(x)
        return out


class UpBlock(nn.Module):
    """Doubles height and width: bilinear (`fixed`), transposed (`deconv_1`, `deconv_2` overlaps), or pixel shuffle."""

    def __init__(self, in_channels: int, out_channels: int, upmode: UpMode) -> None:
        super().__init__()
        self.block = nn.Sequential(*_up_layers(in_channels, out_channels, upmode))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, 2H, 2W)."""
        out: Tensor = self.block(x)
        return out


def _up_layers(in_channels: int, out_channels: int, upmode: UpMode) -> list[nn.Module]:
    if upmode == "fixed":
        return [
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
        ]
    if upmode == "deconv_1":
        return [nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)]
    if upmode == "deconv_2":
        return [nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)]
    if upmode == "DUC":
        return [
            nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1),
            nn.BatchNorm2d(4 * out_channels),
            nn.ReLU(inplace=True),
            nn.PixelShuffle(2),
        ]
    raise ParamsError(
        f"unet_att_d.upmode: {upmode!r} is not an upsampling mode - choose fixed, deconv_1, deconv_2 or DUC"
    )


class AttentionGate(nn.Module):
    """Scales a skip by a map in (0, 1) computed from the skip and from the decoder at the same resolution.

    Source: Oktay et al. 2018, https://arxiv.org/abs/1804.03999, Equations 1 and 2 (here without resampling).
    """

    def __init__(self, channels: int, inner_channels: int) -> None:
        super().__init__()
        self.W_g = nn.Sequential(nn.Conv2d(channels, inner_channels, 1), nn.BatchNorm2d(inner_channels))
        self.W_x = nn.Sequential(nn.Conv2d(channels, inner_channels, 1), nn.BatchNorm2d(inner_channels))
        self.psi = nn.Sequential(nn.Conv2d(inner_channels, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, gate: Tensor, skip: Tensor) -> Tensor:
        """Decoder (B, C, H, W) and skip (B, C, H, W) -> gated skip (B, C, H, W)."""
        weight: Tensor = self.psi(torch.relu(self.W_g(gate) + self.W_x(skip)))
        return skip * weight


class TimeLevels(nn.Module):
    """A vector per encoder and decoder level, linear in a hidden layer over the sinusoids of t.

    They start at zero: a network whose other weights come from the tutorial starts as the tutorial's.
    """

    def __init__(self, embedding_dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(embedding_dim, embedding_dim), nn.SiLU())
        self.encoder = nn.ModuleList(nn.Linear(embedding_dim, width) for width in widths)
        self.decoder = nn.ModuleList(nn.Linear(embedding_dim, width) for width in widths)
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, sinusoids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(B, embedding_dim) -> for the encoder and for the decoder, one (B, width, 1, 1) per level, finest first."""
        hidden = self.mlp(sinusoids)
        encoder, decoder = (
            [layer(hidden)[:, :, None, None] for layer in side] for side in (self.encoder, self.decoder)
        )
        return encoder, decoder


class UNetAttD(nn.Module):
    """U-Net with attention gates on the skips and the timestep added at the bottleneck, or at every level.

    Level i = 0 .. L-1 has `filter_config[i]` channels at 1 / 2**i of the resolution. Modules are numbered as in the
    tutorial: `encoder_1..L` from fine to coarse, `decoder_i`, `conv{i}`, `Att{i}` for i = 1..L-1 from coarse to fine.

    Chips may have any size; they are padded to a multiple of `stride` inside. With `activation_checkpointing` set, the
    backward pass computes each level's activations again: the same bits from less memory.

    Args:
        in_channels: Channels of x.
        out_channels: Channels of the output; None means in_channels.
        filter_config: Channels per level, at least two levels.
        block_num: Convolutions per level, as many as levels; the decoder uses its level's number too.
        dropout_rate: Probability in [0, 1), at the end of every block.
        dropout_type: traditional (single values) or spatial (whole channels).
        upmode: fixed, deconv_1, deconv_2 or DUC.
        use_skipAtt: Attention gates on the skips.
        time_embedding_dim: Length of the sinusoidal embedding of t.
        time_injection: none (the weights are there and stay as they are: for checkpoints from before the tutorial's
            embedding had an effect), bottleneck, or all: at the end of each level's block as well, behind its last
            BatchNorm. The next level's BatchNorm takes away what a batch has in common, so that chips of a batch
            should differ in t.
    Raises:
        ParamsError: If the lists do not fit each other or a choice is unknown.
    """

    STEM = "encoder_1.block.0.weight"
    """The weights that see the input's channels."""

    READ_OUT = ("output_conv",)
    """The modules that have no part in features."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        filter_config: Sequence[int] = (64, 256, 512, 1024, 2048, 4096),
        block_num: Sequence[int] = (2, 2, 2, 2, 2, 2),
        dropout_rate: float = 0.1,
        dropout_type: DropoutType = "traditional",
        upmode: UpMode = "deconv_2",
        use_skipAtt: bool = True,
        time_embedding_dim: int = 128,
        time_injection: TimeInjection = "bottleneck",
    ) -> None:
        super().__init__()
        widths, blocks = list(filter_config), list(block_num)
        _check_levels(widths, blocks, dropout_type)
        if time_injection not in ("none", "bottleneck", "all"):
            raise ParamsError(
                f"unet_att_d.time_injection: {time_injection!r} is unknown - choose none, bottleneck or all"
            )
        self.levels = len(widths)
        self.widths = tuple(widths)
        self.stride = 2 ** (self.levels - 1)
        self.time_embedding_dim = time_embedding_dim
        self.use_skipAtt = use_skipAtt
        self.time_injection = time_injection
        self.activation_checkpointing = False

        # The order of these assignments is the order of the state_dict's keys.
        self.time_mlp = nn.Sequential(nn.Linear(time_embedding_dim, widths[-1]), nn.ReLU())
        # Several processes wait for the gradient of every parameter that asks for one.
        self.time_mlp.requires_grad_(time_injection != "none")
        for level, (width, number) in enumerate(zip(widths, blocks, strict=True)):
            before = in_channels if level == 0 else widths[level - 1]
            self.add_module(f"encoder_{level + 1}", ConvBlock(before, width, number, dropout_rate, dropout_type))
        for i in range(1, self.levels):
            level = self.levels - 1 - i
            width = widths[level]
            self.add_module(f"decoder_{i}", UpBlock(widths[level + 1], width, upmode))
            self.add_module(f"conv{i}", ConvBlock(2 * width, width, blocks[level], dropout_rate, dropout_type))
        for i in range(1, self.levels if use_skipAtt else 1):
            level = self.levels - 1 - i
            inner = widths[level - 1] if level > 0 else max(widths[0] // 2, 1)
            self.add_module(f"Att{i}", AttentionGate(widths[level], inner))
        self.output_conv = nn.Conv2d(widths[0], in_channels if out_channels is None else out_channels, 1)
        self.time_levels = TimeLevels(time_embedding_dim, widths[:-1]) if time_injection == "all" else None

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """What the task trains it to predict, for example the noise.

        Args:
            x: Noisy chips (B, in_channels, H, W).
            t: Timesteps (B,), int64.
            cond: Must be None: this architecture has no place for a condition.
        Returns:
            Prediction (B, out_channels, H, W).
        Raises:
            ParamsError: If cond is given, or the batch leaves BatchNorm a single value per channel to train on.
        """
        out: Tensor = self.output_conv(self.features(x, t, cond)[0])
        return out

    def features(self, x: Tensor, t: Tensor, cond: Tensor | None = None, side: str = "decoder") -> list[Tensor]:
        """The features of one side of the U, one per level, finest first.

        The last one is the bottleneck's after time was added, on both sides.

        Args and Raises: as `forward`, and
            side: decoder, or encoder: what the skips carry, before any gate; the way up is then not computed.
        Returns:
            L tensors (B, widths[i], ceil(H / 2**i), ceil(W / 2**i)).
        """
        check_side(side)
        if cond is not None:
            raise ParamsError("network: unet_att_d takes no condition - choose network: unet_film for this task")
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, self.stride)
        self._check_batch(x)
        recompute = self.activation_checkpointing and self.training
        down, up = self._shifts(t)
        skips: list[Tensor] = []
        for level, shift in enumerate(down):
            block = self.get_submodule(f"encoder_{level + 1}")
            x = run_level(_encode, block, x, shift, level > 0, recompute=recompute)
            skips.append(x)
        if side == "encoder":
            return crop_levels(skips, height, width)
        pyramid = [skips.pop()]
        for i in range(1, self.levels):
            modules = [self.get_submodule(name) for name in (f"decoder_{i}", f"conv{i}")]
            gate = self.get_submodule(f"Att{i}") if self.use_skipAtt else None
            inputs = pyramid[-1], skips[-i], up[-i]
            pyramid.append(run_level(_decode, *modules, gate, *inputs, recompute=recompute))
        return crop_levels(pyramid[::-1], height, width)

    def _shifts(self, t: Tensor) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """What t adds at the end of the encoder's L and the decoder's L - 1 blocks, finest first; None for nothing."""
        sinusoids = timestep_embedding(t, self.time_embedding_dim).to(self.output_conv.weight.dtype)
        bottom = None if self.time_injection == "none" else self.time_mlp(sinusoids)[:, :, None, None]
        if self.time_levels is None:
            nothing = [None] * (self.levels - 1)
            return [*nothing, bottom], nothing
        down, up = self.time_levels(sinusoids)
        return [*down, bottom], up

    def _check_batch(self, x: Tensor) -> None:
        if self.training and x.shape == (1, x.shape[1], self.stride, self.stride):
            raise ParamsError(
                f"unet_att_d got one chip of up to {self.stride} x {self.stride} px to train on, but the coarsest of "
                f"{self.levels} levels then holds one pixel, of which BatchNorm can take no statistics - raise "
                "batch_size or data.crop_px, lower accumulation_steps, or use fewer levels in unet_att_d.filter_config"
            )


def _encode(block: nn.Module, x: Tensor, shift: Tensor | None, halve: bool) -> Tensor:
    out: Tensor = block(F.max_pool2d(x, 2) if halve else x)
    return out if shift is None else out + shift


def _decode(
    up: nn.Module, block: nn.Module, gate: nn.Module | None, x: Tensor, skip: Tensor, shift: Tensor | None
) -> Tensor:
    x = up(x)
    if gate is not None:
        skip = gate(x, skip)
    out: Tensor = block(torch.cat([skip, x], dim=1))
    return out if shift is None else out + shift


def _check_levels(widths: list[int], blocks: list[int], dropout_type: str) -> None:
    if len(widths) < 2:
        raise ParamsError(f"unet_att_d.filter_config: {widths} has {len(widths)} level(s) - give at least 2")
    if len(blocks) != len(widths):
        raise ParamsError(
            f"unet_att_d.block_num: {blocks} has {len(blocks)} entries for {len(widths)} levels of "
            "unet_att_d.filter_config - give one number per level"
        )
    if min(widths) < 1 or min(blocks) < 1:
        raise ParamsError(f"unet_att_d: filter_config {widths} and block_num {blocks} must be at least 1 everywhere")
    if dropout_type not in ("traditional", "spatial"):
        raise ParamsError(f"unet_att_d.dropout_type: {dropout_type!r} is unknown - choose traditional or spatial")
