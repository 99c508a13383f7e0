"""Checkpoints of the tutorial: read without running code, understood from their tensors, checked key by key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from earthprior.errors import EarthPriorError
from earthprior.networks.tensor_file import TensorFileError, mismatches, read_tensors
from earthprior.networks.unet_att_d import UNetAttD
from earthprior.params.editing import plain

PREFIX = re.compile(r"^(?:(?:module|_orig_mod)\.)+")
"""What DataParallel and torch.compile put before every key."""

SHOWN_FAULTS = 20


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by the network's own keys: float32 (counts int64), each with its own memory.

    Raises:
        EarthPriorError: The file cannot be read as plain tensors, holds one twice, or some that are not finite.
    """
    if not path.is_file():
        raise EarthPriorError(f"{path.name} does not exist; give the path of the tutorial's best_model.pth")
    try:
        tensors = read_tensors(path)
    except OSError as error:
        raise EarthPriorError(f"{path.name} cannot be read ({error.strerror}); check its mode") from None
    except TensorFileError as error:
        raise EarthPriorError(
            f"{path.name} {error}; copy it again, or save plain weights there with torch.save(model.state_dict(), path)"
        ) from None
    if (count := sum(tensor.numel() for tensor in tensors.values())) > path.stat().st_size:
        # Views that repeat one value cost nothing in a file, and all that they say in memory.
        raise EarthPriorError(
            f"{path.name} names {count:,} values, more than it has bytes; save plain weights there with "
            "torch.save(model.state_dict(), path)"
        )
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = PREFIX.sub("", name)
        if key in weights:
            raise EarthPriorError(
                f"{path.name} holds {key} twice, with and without a prefix such as module.; save the weights of one "
                "network there"
            )
        values = tensor.long() if key.endswith("num_batches_tracked") else tensor.float()
        weights[key] = values.clone(memory_format=torch.contiguous_format)
    broken = [key for key, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 1} more tensors hold" if len(broken) > 1 else " holds"
        raise EarthPriorError(
            f"{path.name}: {broken[0]}{more} NaN or infinity, so its training had diverged; take an earlier checkpoint"
        )
    return weights


def architecture(weights: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """What the tensors tell of the network: the options of `unet_att_d` that change keys or shapes.

    Raises:
        EarthPriorError: They are not a `unet_att_d`'s.
    """
    widths: list[int] = []
    while (first := weights.get(f"encoder_{len(widths) + 1}.block.0.weight")) is not None and first.ndim == 4:
        widths.append(int(first.shape[0]))
    up = {key: tensor for key, tensor in weights.items() if key.startswith("decoder_1.block.")}
    time = weights.get("time_mlp.0.weight")
    if len(widths) < 2 or not up or time is None or time.ndim != 2:
        shown = ", ".join(list(weights)[:3])
        raise EarthPriorError(
            f"{name} is no unet_att_d with time conditioning: it lacks time_mlp.0.weight, encoder_1.block.0.weight or "
            f"decoder_1.block (its keys begin with {shown}); other networks cannot be imported"
        )
    return {
        "filter_config": widths,
        "block_num": [
            sum(key.startswith(f"encoder_{level}.block.") and tensor.ndim == 4 for key, tensor in weights.items())
            for level in range(1, len(widths) + 1)
        ],
        "upmode": _upmode(up),
        "use_skipAtt": any(key.startswith("Att1.") for key in weights),
        "time_embedding_dim": int(time.shape[1]),
    }


def _upmode(up: Mapping[str, Tensor]) -> str:
    if "decoder_1.block.2.weight" in up:
        return "fixed"
    if "decoder_1.block.1.weight" in up:
        return "DUC"
    kernel = up.get("decoder_1.block.0.weight")
    return "deconv_1" if kernel is not None and kernel.ndim == 4 and kernel.shape[-1] == 2 else "deconv_2"


def channels_of(weights: Mapping[str, Tensor]) -> int:
    """How many bands the network takes."""
    return int(weights["encoder_1.block.0.weight"].shape[1])


def check_keys(weights: Mapping[str, Tensor], found: Mapping[str, Any], name: str) -> None:
    """Compare every key and shape with those of the network that the tensors describe.

    Raises:
        EarthPriorError: With every fault, at most SHOWN_FAULTS of them.
    """
    with torch.device("meta"):
        wanted = UNetAttD(channels_of(weights), **found).state_dict()
    faults = [f"  {fault}" for fault in mismatches(wanted, weights)]
    if faults:
        more = [f"  and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
        options = ", ".join(f"{key} {plain(value)}" for key, value in found.items())
        raise EarthPriorError(
            "\n".join(
                [
                    f"{name} does not hold the weights of a unet_att_d with {options} ({len(faults)} fault(s)):",
                    *faults[:SHOWN_FAULTS],
                    *more,
                    "  the file is incomplete, or of another network; nothing was written",
                ]
            )
        )
