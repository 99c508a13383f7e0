"""recompute.py: activation checkpointing changes the memory, and not one bit of anything else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from earthprior import build
from earthprior.networks.recompute import run_level
from earthprior.networks.unet_att_d import UNetAttD
from earthprior.networks.unet_film import UNetFiLM
from earthprior.params import Params

NETWORKS: dict[str, Callable[[], UNetAttD | UNetFiLM]] = {
    **{
        f"unet_att_d-{time}-{upmode}": lambda time=time, upmode=upmode: UNetAttD(  # type: ignore[misc]
            4, filter_config=(6, 8, 10), block_num=(2, 1, 2), dropout_rate=0.3, upmode=upmode, time_injection=time
        )
        for time, upmode in (("all", "deconv_2"), ("none", "DUC"), ("bottleneck", "fixed"))
    },
    "unet_film": lambda: UNetFiLM(4, channels=(8, 12, 16), dropout_rate=0.3),
}


def pair(name: str) -> tuple[UNetAttD | UNetFiLM, UNetAttD | UNetFiLM]:
    """The same network without and with activation checkpointing, nothing at zero."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    for parameter in network.parameters():
        if not parameter.abs().max() > 0:
            nn.init.normal_(parameter, std=0.1)
    saving = copy.deepcopy(network)
    saving.activation_checkpointing = True
    return network, saving


def after_two_steps(network: nn.Module, autocast: bool = False) -> list[Tensor]:
    """Outputs, gradients, weights, buffers and the generator's place after two steps of training."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    torch.manual_seed(1)
    seen: list[Tensor] = []
    for _ in range(2):
        x, t = torch.randn(2, 4, 13, 16), torch.randint(0, 1000, (2,))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = network(x, t)
        optimizer.zero_grad()
        out.float().square().mean().backward()
        optimizer.step()
        seen += [out, *(p.grad.clone() for p in network.parameters() if p.grad is not None)]
    return [*seen, *network.state_dict().values(), torch.rand(1)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_bits_are_the_same(name: str, autocast: bool) -> None:
    plain, saving = (after_two_steps(network, autocast) for network in pair(name))
    assert len(plain) == len(saving)
    assert all(torch.equal(one, other) for one, other in zip(plain, saving, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_it_keeps_less_than_half(name: str) -> None:
    x, t = torch.randn(2, 4, 64, 64), torch.tensor([1, 900])
    kept = []
    for network in pair(name):
        storages: dict[int, Tensor] = {}

        def note(tensor: Tensor, storages: dict[int, Tensor] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network(x, t)
        weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
        kept.append(sum(s.untyped_storage().nbytes() for at, s in storages.items() if at not in weights))
    assert kept[1] < 0.4 * kept[0]


def test_a_graph_may_be_walked_twice() -> None:
    norm = nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    out = run_level(lambda norm, x: norm(x) ** 3, norm, x, recompute=True).sum()
    moved = {name: value.clone() for name, value in norm.state_dict().items()}
    assert int(moved["num_batches_tracked"]) == 1
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(value, moved[name]) for name, value in norm.state_dict().items())


def test_without_gradients_nothing_is_computed_twice() -> None:
    _, saving = pair("unet_film")
    calls: list[nn.Module] = []
    saving.get_submodule("bottom").register_forward_pre_hook(lambda module, _: calls.append(module))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([1])
    for training, with_grad, expected in ((False, True, 1), (True, False, 1), (True, True, 2)):
        calls.clear()
        with torch.set_grad_enabled(with_grad):
            out = saving.train(training)(x, t).sum()
        if with_grad:
            out.backward()
        assert len(calls) == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_it_works_under_ddp(name: str, tmp_path: Path) -> None:
    # DDP fails in the second step if a parameter that asks for a gradient got none in the first.
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, saving = pair(name)
        wrapped = after_two_steps(DistributedDataParallel(saving))
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(one, other) for one, other in zip(after_two_steps(plain), wrapped, strict=True))


@pytest.mark.parametrize("network", build.NETWORKS)
@pytest.mark.parametrize("asked", [True, False])
def test_params_decide(network: str, asked: bool, make_params: Callable[..., Params]) -> None:
    overrides: dict[str, Any] = {"network": network, "operation.activation_checkpointing": asked}
    assert build.network(make_params(overrides), 4, 4).activation_checkpointing == asked
