"""Where a name from params.yaml becomes an object; nowhere else."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from earthprior import handover, memory
from earthprior.chips.normalize import Normalizer, kept_statistics
from earthprior.diffusion.linear import LinearDenoiser
from earthprior.diffusion.schedule import NOISE_SCHEDULES, NoiseSchedule, shifted, with_zero_terminal_snr
from earthprior.errors import DataError, EarthPriorError, ParamsError
from earthprior.identity import FORMAT_VERSION
from earthprior.networks import NETWORKS as NETWORKS
from earthprior.networks.tensor_file import listed, mismatches
from earthprior.networks.vgg16 import weights_sha256
from earthprior.params import LearningParams, Params, parse
from earthprior.randomness import seed_of
from earthprior.tasks.diffusion import DiffusionTask, input_channels

TASKS = {"diffusion": DiffusionTask}


def device(params: LearningParams) -> torch.device:
    """The device that `operation.device` means here.

    Raises:
        ParamsError: CUDA is asked for and torch sees none.
    """
    wanted = params.operation.device
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ParamsError(f"operation.device is {wanted}, but torch {torch.__version__} sees no GPU; use auto or cpu")
    return torch.device(wanted)


def autocast_dtype(params: LearningParams, where: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision, or None for plain float32."""
    if params.precision == "auto":
        return torch.bfloat16 if where.type == "cuda" else None
    return torch.bfloat16 if params.precision == "bfloat16" else None


def slow_precision(params: LearningParams, where: torch.device) -> str | None:
    """A warning where bfloat16 is emulated by the CPU, else None."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    emulated = where.type == "cpu" and x86 and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    if not emulated or autocast_dtype(params, where) is None:
        return None
    return (
        "precision: bfloat16 is emulated by this CPU, which lacks AVX512: steps took 15 times as long as with float32; "
        "set precision: float32"
    )


def normalizer(params: Params, stats: Mapping[str, Any]) -> Normalizer:
    """The normalization of params with the statistics of stats.json.

    Raises:
        EarthPriorError: The statistics were made for other bands.
    """
    if list(stats["bands"]) != list(params.data.bands):
        raise EarthPriorError(
            f"results/stats/stats.json was made for bands {stats['bands']}, params.yaml lists "
            f"{list(params.data.bands)}; run: dvc repro stats"
        )
    return Normalizer(params.normalization, stats)


def foreign_files(params: Params) -> dict[str, str]:
    """SHA-256 of the files outside the data that the weights depend on, by dotted key; part of a run's fingerprint.

    Raises:
        ParamsError: One cannot be had.
    """
    if params.loss_fn == "perceptual":
        return {"perceptual.weights.sha256": weights_sha256(str(params.perceptual.weights))}
    return {}


def schedule(params: Params) -> NoiseSchedule:
    """The forward process.

    Raises:
        ParamsError: It has timesteps of pure chips or pure noise; see `NoiseSchedule`.
    """
    section = params.diffusion
    betas = NOISE_SCHEDULES[section.noise_schedule](section)
    if section.shift_reference_px is not None:
        betas = shifted(betas, section.shift_reference_px, params.data.train_px)
    if section.zero_terminal_snr:
        betas = with_zero_terminal_snr(betas)
    return NoiseSchedule(betas, section.zero_terminal_snr)


def network(params: Params, in_channels: int, out_channels: int) -> nn.Module:
    """The network that params selects, its weights a function of `seed` alone.

    Raises:
        ParamsError: This machine cannot hold it.
    """
    section = getattr(params, params.network)
    with torch.device("meta"):
        outline = NETWORKS[params.network](in_channels, out_channels, **section.model_dump())
    count = sum(parameter.numel() for parameter in outline.parameters())
    memory.require({f"{params.network} with {count:,} weights": 4 * count})
    torch.manual_seed(seed_of(params.seed, "weights"))
    net = NETWORKS[params.network](in_channels, out_channels, **section.model_dump())
    net.activation_checkpointing = params.operation.activation_checkpointing
    return net


def task(params: Params, linear: LinearDenoiser) -> DiffusionTask:
    """The pretext task that params selects, with a freshly initialized network, on the CPU."""
    net = network(params, input_channels(params), len(params.data.bands))
    return TASKS[params.task](params, net, schedule(params), linear)


def config(
    params: Params,
    fingerprint: str,
    foreign: Mapping[str, str],
    best_epoch: int | None,
    linear: LinearDenoiser,
    stats: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of config.json, from which `pretrained_task` rebuilds a network, and evaluate knows whose it is.

    Args:
        params: The whole of params.yaml.
        fingerprint: Of the training.
        foreign: See `foreign_files`.
        best_epoch: That the weights are from; None where they were not trained here.
        linear: The linear denoiser.
        stats: The content of stats.json.
    """
    return {
        "format": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "params": params.model_dump(mode="json", exclude={"tune"}),
        "foreign_files": dict(foreign),
        "best_epoch": best_epoch,
        "bands": list(params.data.bands),
        "std": float(linear.std),
        "data": stats["data"],
        "statistics": kept_statistics(stats),
    }


def pretrained_task(folder: Path) -> tuple[DiffusionTask, Params]:
    """The task of a finished pretraining, with its weights, and the params that it was trained with.

    Args:
        folder: Holds network.safetensors, config.json and linear.safetensors.

    Raises:
        EarthPriorError: Files are missing, or the weights do not fit the configuration.
    """
    missing = [n for n in ("config.json", "linear.safetensors", "network.safetensors") if not (folder / n).is_file()]
    if missing:
        raise EarthPriorError(f"{folder.name}/ lacks {', '.join(missing)}; run: dvc repro pretrain")
    trained = parse(handover.read_config(folder / "config.json")["params"], "config.json")
    try:
        linear = LinearDenoiser.load(folder / "linear.safetensors")
        weights = load_file(folder / "network.safetensors")
    except (SafetensorError, OSError, DataError) as error:
        raise EarthPriorError(f"{folder.name}/ holds damaged weights ({error}); run: dvc repro -f pretrain") from None
    if (linear.bands, linear.height, linear.width) != (len(trained.data.bands), *[trained.data.train_px] * 2):
        raise EarthPriorError(
            f"{folder.name}/linear.safetensors does not fit config.json: it is for {linear.bands} bands of "
            f"{linear.height} x {linear.width} px; run: dvc repro -f pretrain"
        )
    built = task(trained, linear)
    if faults := mismatches(built.network.state_dict(), weights):
        raise EarthPriorError(
            f"{folder.name}/network.safetensors does not fit config.json ({listed(faults)}); run: dvc repro -f pretrain"
        )
    built.network.load_state_dict(weights, strict=True)
    return built, trained
