"""The modern denoiser `unet_film`: a residual U-Net that the timestep steers in every block. The one to choose.

GroupNorm instead of BatchNorm (no batch statistics, so chips and noise levels do not mix), SiLU, scale and shift from
the time embedding (FiLM) in every block, self-attention at the lowest resolution. The layout saves what a CPU is slow
at, passes over full-resolution tensors: one norm per block, skips added after a 1x1 convolution, not concatenated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earthprior.errors import ParamsError
from earthprior.networks.embedding import timestep_embedding
from earthprior.networks.padding import crop_levels, pad_to_multiple
from earthprior.networks.recompute import run_level
from earthprior.networks.sides import check_side

HEAD_CHANNELS = 32
MAX_GROUPS = 8


class _GroupNorm(nn.GroupNorm):
    """GroupNorm with the most groups, 8 at most, that divide the channels in powers of two."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__(math.gcd(channels, MAX_GROUPS), channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); where torch's module refuses, a group of a single value, that becomes 0."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def _zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    """A residual branch, or head, that starts at zero: the network starts as the identity, whatever its depth."""
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu((1 + scale) norm(x) + shift)))), scale and shift linear in the embedding.

    Source: Perez et al. 2018 (FiLM), https://arxiv.org/abs/1709.07871; Dhariwal and Nichol 2021,
    https://arxiv.org/abs/2105.05233, Section 3.1 (adaptive group normalization), here with one norm.
    """

    def __init__(self, channels: int, embedding_dim: int, dropout_rate: float) -> None:
        super().__init__()
        self.norm = _GroupNorm(channels, affine=False)
        self.film = nn.Linear(embedding_dim, 2 * channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout_rate) if dropout_rate > 0 else nn.Identity()
        self.conv2 = _zeroed(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Features (B, C, H, W) and embedding (B, D) -> features (B, C, H, W)."""
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm(x) * (1 + scale) + shift)
        h = self.dropout(F.silu(self.conv1(h)))
        out: Tensor = x + self.conv2(h)
        return out


class SelfAttention(nn.Module):
    """x + attention over all pixels, with heads of about 32 channels.

    Its time grows with the square of the pixels: on a CPU, 64 x 64 are about as many as one waits for. Give large chips
    more levels, or no attention.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, Section 3.2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = next(n for n in range(max(1, channels // HEAD_CHANNELS), 0, -1) if channels % n == 0)
        self.norm = _GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        b, c, height, width = x.shape
        tokens = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)
        q, k, v = tokens.unflatten(2, (3, self.heads, c // self.heads)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, height, width, c)
        out: Tensor = x + self.out(mixed.permute(0, 3, 1, 2))
        return out


class _Level(nn.Module):
    """The blocks of one resolution on one side of the U, with attention behind them where asked."""

    def __init__(self, channels: int, blocks: int, embedding_dim: int, dropout_rate: float, attention: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(channels, embedding_dim, dropout_rate) for _ in range(blocks))
        self.attention = SelfAttention(channels) if attention else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, embedding)
        return x if self.attention is None else self.attention(x)


def _upsample(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """Learned doubling that starts as nearest neighbour, so that it starts without a checkerboard."""
    up = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
    with torch.no_grad():
        # Every output pixel has one input pixel: the fan in is in_channels, the weight's first dimension.
        pixel = nn.init.kaiming_uniform_(torch.empty_like(up.weight[:, :, :1, :1]), a=math.sqrt(5), mode="fan_out")
        up.weight.copy_(pixel.expand_as(up.weight))
    return up


class UNetFiLM(nn.Module):
    """Residual U-Net with FiLM time conditioning.

    Level i = 0 .. L-1 has `channels[i]` channels at 1 / 2**i of the resolution. Going down, a 3x3 convolution of
    stride 2 leads to the next level; going up, a 2x2 transposed convolution, and the skip is added after a 1x1 one.

    Chips may have any size; they are padded to a multiple of `stride` inside. With `activation_checkpointing` set, the
    backward pass computes each level's activations again: the same bits from less memory.

    Args:
        in_channels: Channels of x.
        out_channels: Channels of the output; None means in_channels.
        channels: Channels per level.
        blocks: Residual blocks per level on the way up and at the lowest level; on the way down one less, at least 1.
        attention: Self-attention at the lowest level.
        dropout_rate: Probability in [0, 1), inside every block.
        time_embedding_dim: Length of the sinusoidal embedding of t and of what steers the blocks.
        cond_dim: Length D of the condition embedding, or None for a network without condition.
    Raises:
        ParamsError: If channels is empty or a number is below 1.
    """

    STEM = "stem.weight"
    """The weights that see the input's channels."""

    READ_OUT = ("head_norm", "head")
    """The modules that have no part in features."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        channels: Sequence[int] = (32, 48, 64, 96),
        blocks: int = 2,
        attention: bool = True,
        dropout_rate: float = 0.0,
        time_embedding_dim: int = 128,
        cond_dim: int | None = None,
    ) -> None:
        super().__init__()
        widths, dim = list(channels), time_embedding_dim
        if not widths or min(widths) < 1 or blocks < 1:
            raise ParamsError(
                f"unet_film: channels {widths} and blocks {blocks} - give at least one level, and numbers from 1 up"
            )
        self.levels = len(widths)
        self.widths = tuple(widths)
        self.stride = 2 ** (self.levels - 1)
        self.time_embedding_dim = dim
        self.cond_dim = cond_dim
        self.activation_checkpointing = False
        self.time_mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.cond_proj = None if cond_dim is None else nn.Linear(cond_dim, dim)
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        coarser = list(itertools.pairwise(widths))
        # The way up sees both the skip and the context, so that a block is worth more there.
        less = max(1, blocks - 1)
        self.encoder = nn.ModuleList(_Level(w, less, dim, dropout_rate, attention=False) for w in widths[:-1])
        self.down = nn.ModuleList(nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in coarser)
        self.bottom = _Level(widths[-1], blocks, dim, dropout_rate, attention)
        self.up = nn.ModuleList(_upsample(coarse, fine) for fine, coarse in coarser)
        self.skip = nn.ModuleList(nn.Conv2d(w, w, 1, bias=False) for w in widths[:-1])
        self.decoder = nn.ModuleList(_Level(w, blocks, dim, dropout_rate, attention=False) for w in widths[:-1])
        self.head_norm = _GroupNorm(widths[0])
        self.head = _zeroed(nn.Conv2d(widths[0], in_channels if out_channels is None else out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """What the task trains it to predict; zero before training.

        Args:
            x: Noisy chips (B, in_channels, H, W).
            t: Timesteps (B,), int64.
            cond: Condition embedding (B, cond_dim), if the network was built with cond_dim; None stands for zeros.
        Returns:
            Prediction (B, out_channels, H, W).
        Raises:
            ParamsError: If cond does not fit cond_dim.
        """
        finest = self.features(x, t, cond)[0]
        return run_level(self._read_out, finest, recompute=self.activation_checkpointing and self.training)

    def features(self, x: Tensor, t: Tensor, cond: Tensor | None = None, side: str = "decoder") -> list[Tensor]:
        """The features of one side of the U, one per level, finest first; the last one is the bottom level's on both.

        Args and Raises: as `forward`, and
            side: decoder, or encoder: what the skips carry, for which the way up is not computed.
        Returns:
            L tensors (B, widths[i], ceil(H / 2**i), ceil(W / 2**i)).
        """
        check_side(side)
        self._check_condition(cond)
        recompute = self.activation_checkpointing and self.training
        embedding = self._embed(t, cond)
        height, width = x.shape[-2:]
        x = self.stem(pad_to_multiple(x, self.stride))
        skips: list[Tensor] = []
        for level in range(self.levels):
            x = run_level(self._encode, level, x, embedding, recompute=recompute)
            skips.append(x)
        if side == "encoder":
            return crop_levels(skips, height, width)
        pyramid = [skips.pop()]
        for level in reversed(range(self.levels - 1)):
            pyramid.append(run_level(self._decode, level, pyramid[-1], skips[level], embedding, recompute=recompute))
        return crop_levels(pyramid[::-1], height, width)

    def _encode(self, level: int, x: Tensor, embedding: Tensor) -> Tensor:
        if level > 0:
            x = self.down[level - 1](x)
        out: Tensor = (self.encoder[level] if level < self.levels - 1 else self.bottom)(x, embedding)
        return out

    def _decode(self, level: int, x: Tensor, skip: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.decoder[level](self.up[level](x) + self.skip[level](skip), embedding)
        return out

    def _read_out(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.silu(self.head_norm(x)))
        return out

    def _embed(self, t: Tensor, cond: Tensor | None) -> Tensor:
        sinusoids = timestep_embedding(t, self.time_embedding_dim).to(self.stem.weight.dtype)
        embedding: Tensor = self.time_mlp(sinusoids)
        if self.cond_proj is not None and cond is not None:
            embedding = embedding + self.cond_proj(cond)
        return F.silu(embedding)

    def _check_condition(self, cond: Tensor | None) -> None:
        if cond is not None and (self.cond_dim is None or cond.shape[1:] != (self.cond_dim,)):
            raise ParamsError(
                f"unet_film got a condition of shape {tuple(cond.shape)}, but was built for cond_dim {self.cond_dim} - "
                "the task and the network must agree"
            )
