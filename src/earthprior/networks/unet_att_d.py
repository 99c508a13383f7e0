"""The tutorial's denoiser `unet_att_d`: a BatchNorm U-Net with additive attention gates on its skips.

Its state_dict has the tutorial's keys and shapes, so that weights trained there load here. Time enters at the
bottleneck only, as in the tutorial; for new work choose `unet_film`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from earthprior.errors import ParamsError
from earthprior.networks.embedding import timestep_embedding

UpMode = Literal["fixed", "deconv_1", "deconv_2", "DUC"]
DropoutType = Literal["traditional", "spatial"]


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


class UNetAttD(nn.Module):
    """U-Net with attention gates on the skips and the timestep added at the bottleneck.

    Level i = 0 .. L-1 has `filter_config[i]` channels at 1 / 2**i of the resolution. Modules are numbered as in the
    tutorial: `encoder_1..L` from fine to coarse, `decoder_i`, `conv{i}`, `Att{i}` for i = 1..L-1 from coarse to fine.

    BatchNorm needs more than one value per channel in training: a batch of 1 needs chips larger than `stride`.

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
    Raises:
        ParamsError: If the lists do not fit each other or a choice is unknown.
    """

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
    ) -> None:
        super().__init__()
        widths, blocks = list(filter_config), list(block_num)
        _check_levels(widths, blocks, dropout_type)
        self.levels = len(widths)
        self.stride = 2 ** (self.levels - 1)
        self.time_embedding_dim = time_embedding_dim
        self.use_skipAtt = use_skipAtt

        # The order of these assignments is the order of the state_dict's keys.
        self.time_mlp = nn.Sequential(nn.Linear(time_embedding_dim, widths[-1]), nn.ReLU())
        for level, (width, number) in enumerate(zip(widths, blocks, strict=True)):
            before = in_channels if level == 0 else widths[level - 1]
            self.add_module(f"encoder_{level + 1}", ConvBlock(before, width, number, dropout_rate, dropout_type))
        self.pool = nn.MaxPool2d(2)
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

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """What the task trains it to predict, for example the noise.

        Args:
            x: Noisy chips (B, in_channels, H, W); H and W divisible by `stride`.
            t: Timesteps (B,), int64.
            cond: Must be None: this architecture has no place for a condition.
        Returns:
            Prediction (B, out_channels, H, W).
        Raises:
            ParamsError: If H or W is not divisible by `stride`, or cond is given.
        """
        out: Tensor = self.output_conv(self.features(x, t, cond)[0])
        return out

    def features(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> list[Tensor]:
        """Decoder features, one per level, finest first; the last one is the bottleneck after time was added.

        Args and Raises: as `forward`.
        Returns:
            L tensors (B, filter_config[i], H / 2**i, W / 2**i).
        """
        self._check_input(x, cond)
        skips: list[Tensor] = []
        for level in range(1, self.levels + 1):
            x = self.get_submodule(f"encoder_{level}")(x)
            if level < self.levels:
                skips.append(x)
                x = self.pool(x)
        sinusoids = timestep_embedding(t, self.time_embedding_dim).to(self.output_conv.weight.dtype)
        x = x + self.time_mlp(sinusoids)[:, :, None, None]
        pyramid = [x]
        for i in range(1, self.levels):
            skip = skips[-i]
            x = self.get_submodule(f"decoder_{i}")(x)
            if self.use_skipAtt:
                skip = self.get_submodule(f"Att{i}")(x, skip)
            x = self.get_submodule(f"conv{i}")(torch.cat([skip, x], dim=1))
            pyramid.append(x)
        return pyramid[::-1]

    def _check_input(self, x: Tensor, cond: Tensor | None) -> None:
        if cond is not None:
            raise ParamsError("network: unet_att_d takes no condition - choose network: unet_film for this task")
        height, width = x.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ParamsError(
                f"unet_att_d got {height} x {width} px, but with {self.levels} levels height and width must be "
                f"divisible by {self.stride} - change data.crop_px (or data.chip_size), or use fewer levels in "
                "unet_att_d.filter_config"
            )


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
