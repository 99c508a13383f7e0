"""What has been learned so far, to plain types and back where it fits the networks of this code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from earthprior.errors import EarthPriorError
from earthprior.networks.tensor_file import listed, mismatches
from earthprior.tasks.task import Task
from earthprior.training.distributed import unwrap
from earthprior.training.rates import LRSchedule


def learned(task: Task, average: AveragedModel, optimizer: Optimizer, lr_schedule: LRSchedule) -> dict[str, Any]:
    """The state of what has one of its own: networks, optimizer, learning rate and task."""
    return {
        "network": unwrap(task.network).state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_schedule": lr_schedule.state_dict(),
        "task": {name: value for name, value in task.state_dict().items() if not name.startswith("network.")},
    }


def put_back(
    state: Mapping[str, Any], task: Task, average: AveragedModel, optimizer: Optimizer, lr_schedule: LRSchedule
) -> None:
    """The inverse of `learned`.

    Raises:
        EarthPriorError: The state is another network's, which --accept-code lets through.
    """
    network = unwrap(task.network)
    parts: Mapping[str, nn.Module] = {"network": network, "average": average}
    faults = [
        f"{name}: {fault}" for name, part in parts.items() for fault in mismatches(part.state_dict(), state[name])
    ]
    if faults:
        raise EarthPriorError(
            f"the checkpoint does not fit the network of this code ({listed(faults)}). Restore the code that wrote "
            "it, or start afresh"
        )
    try:
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        lr_schedule.load_state_dict(state["lr_schedule"])
        task.load_state_dict(state["task"], strict=False)
    except (RuntimeError, KeyError, ValueError) as error:
        raise EarthPriorError(
            f"the checkpoint does not fit the optimizer of this code: {error}. Restore the code that wrote it, or "
            "start afresh"
        ) from None
