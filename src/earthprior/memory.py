"""Memory that is short: how it is known, refused beforehand where that is hopeless, and told in an evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil
import torch

from earthprior.errors import DeviceMemoryError, ParamsError
from earthprior.params import Params

# What torch calls a RuntimeError. The driver's own words come where another program holds the device's memory.
ALLOCATORS = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
    r"|CUDA error: out of memory|Cuda failure \d+ 'out of memory'"
)


def require(parts: Mapping[str, int]) -> None:
    """Refuse what this machine's whole memory could not hold, before it is filled.

    Only what is hopeless: whether the rest fits shows when it is used.

    Args:
        parts: Bytes by what needs them, named with its key in params.yaml.

    Raises:
        ParamsError: Together they need more than the machine has; names the largest.
    """
    total, needed = psutil.virtual_memory().total, sum(parts.values())
    if needed > total:
        largest = max(parts, key=lambda name: parts[name])
        raise ParamsError(
            f"{largest} needs about {parts[largest] / 1e9:,.1f} GB of memory, and this machine has {total / 1e9:,.1f} "
            "GB; lower it"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, on a GPU or on this machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and ALLOCATORS.search(str(error)) is not None


def where(device: torch.device) -> str:
    """Which memory, and how much of it there is."""
    if device.type != "cuda":
        return "this machine's memory"
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.max_memory_allocated(device)
    return f"{device}, {total / 1e9:.1f} GB, of which this process held {own / 1e9:.1f} and {free / 1e9:.1f} are free"


@contextmanager
def told_in_evaluation(params: Params, device: torch.device) -> Iterator[None]:
    """Say what helps where an evaluation runs out of memory.

    Raises:
        DeviceMemoryError: It did.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        elsewhere = "set operation.device: cpu, which takes longer; or " if device.type == "cuda" else ""
        raise DeviceMemoryError(
            f"out of memory while evaluating ({where(device)}). End other programs that use it; or {elsewhere}lower "
            f"evaluate.samples ({params.evaluate.samples} now) or evaluate.probe_pixels "
            f"({params.evaluate.probe_pixels} now). The training stays as it is"
        ) from error
