"""One process or many: the few calls that differ, so that the loop reads the same under torchrun."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from earthprior.errors import DivergedError, EarthPriorError, HeldError, Interrupted
from earthprior.files import write_atomic

PATIENCE = timedelta(hours=4)
"""How long processes wait while the first one judges all validation chips; dead ones are torchrun's to notice."""

LOOK_SECONDS = 0.5
"""Another run may be looking whether a folder is held, and holds it itself for that moment."""

TOGETHER = (Interrupted, DivergedError)
"""What all processes come to at the same step."""

FATE = "earthprior/fate"


class OtherEndsError(RuntimeError):
    """Another process has told that it ends; why, it is about to say."""


@dataclass(frozen=True)
class World:
    """This process's place among `size` processes; rank 0 validates, writes and logs."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network with its gradients averaged over processes."""
        if self.size == 1:
            return network
        return DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)

    def largest(self, value: int, device: torch.device) -> int:
        """The largest of the processes' values, known to all: how they agree to stop at the same step."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=device)
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
        return int(tensor)

    def from_first(self, value: float, device: torch.device) -> float:
        """The first process's value, known to all."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=device)
        distributed.broadcast(tensor, src=0)
        return float(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """The processes' tensors (N, ...), all of one shape, one after another (size * N, ...), known to all."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(parts, tensor)
        return torch.cat(parts)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            distributed.barrier()


def adding_up(network: nn.Module) -> AbstractContextManager[None]:
    """Inside, backward adds to the gradients without averaging them over processes: there is more to come."""
    waiting: AbstractContextManager[None] = (
        network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()
    )
    return waiting


def unwrap(network: nn.Module) -> nn.Module:
    """The network itself, without the wrapper that averages gradients."""
    inner: nn.Module = network.module if isinstance(network, DistributedDataParallel) else network
    return inner


@contextmanager
def world(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """The processes that torchrun started, or just this one; and the device of this process.

    They leave together, also when asked to stop: torchrun ends all when one has left with an exit code other than 0,
    and the first may still be saving.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        try:
            with _one_fate(store):
                yield World(rank, size), device
        except TOGETHER:
            distributed.barrier()
            raise
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


@contextmanager
def _one_fate(store: Store) -> Iterator[None]:
    """What ends one process ends the others with its words and its exit code: they wait for it in vain.

    Args:
        store: That all processes read.
    """
    try:
        yield
    except TOGETHER:
        raise
    except EarthPriorError as error:
        store.set(FATE, json.dumps([error.exit_code, str(error)]))
        raise
    except RuntimeError as error:
        # Torch's own words of a process that has left say nothing of why. One that has told so is waited for.
        if not isinstance(error, OtherEndsError) and not store.check([FATE]):
            raise
        code, text = json.loads(store.get(FATE))
        fault = EarthPriorError(f"another process ended: {text}")
        fault.exit_code = code
        raise fault from None


@contextmanager
def only_writer(folder: Path, place: World) -> Iterator[None]:
    """Hold the run's folder; a second process on the same run is refused at once, naming the first.

    Raises:
        HeldError: Another process holds it.
    """
    if not place.is_first:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / "owner"
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=LOOK_SECONDS)
    except Timeout:
        who = owner.read_text() if owner.is_file() else "another process"
        raise HeldError(f"{who} is training this very run in {folder}; wait for it, or stop it first") from None
    try:
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        write_atomic(owner, f"pid {os.getpid()} on {socket.gethostname()}, since {since},")
        yield
    finally:
        lock.release()
