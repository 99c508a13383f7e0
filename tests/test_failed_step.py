from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from earthprior.chips import loader
from earthprior.chips.catalog import ChipRow
from earthprior.chips.read import ChipSpec, read_chip
from earthprior.chips.readers import Readers
from earthprior.errors import DataError, DeviceMemoryError, StorageError
from earthprior.params import active
from earthprior.tasks.diffusion import DiffusionTask
from earthprior.training.loop import Trainer
from tiny_training import Tiny, final_bits, resumed, train

MakeTiny = Callable[..., Tiny]


def test_a_chip_that_goes_bad_meanwhile_costs_no_step(
    tiny: Tiny, tmp_path: Path, whole_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny.trainer()

    def unplugged(folder: Path, row: ChipRow, spec: ChipSpec) -> Any:
        # Batches are read ahead, so that some steps more are made of what is there already.
        return read_chip(tmp_path / "no disk" if trainer.step >= 5 else folder, row, spec)

    with monkeypatch.context() as patch:
        patch.setattr(loader, "read_chip", unplugged)
        with pytest.raises(DataError) as caught:
            train(trainer, tmp_path)
    assert caught.value.exit_code == 2
    said = re.fullmatch(
        r"chips/chip_\d+\.tif \(catalog line \d+\): not found\. It was sound when results/stats/ was made: restore .*"
        r"data\.on_bad_chip: skip, then dvc repro\. Stopped before step (\d+) of 12; ckpt-(\d+)\.pt is kept",
        str(caught.value),
    )
    assert said, str(caught.value)
    assert int(said[1]) - 1 == int(said[2]) == trainer.step >= 5
    trainer = resumed(tiny, tmp_path)
    assert final_bits(trainer, train(trainer, tmp_path)) == whole_run


def test_a_read_that_hangs_ends_the_training_and_costs_no_step(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With batch norm, too: its statistics have not moved when chips are read."""
    tiny = make_tiny(network="unet_att_d", epochs=2)
    trainer = tiny.trainer()
    whole = final_bits(trainer, train(trainer, tmp_path / "whole"))
    trainer, answers = tiny.trainer(), threading.Event()

    def unanswered(folder: Path, row: ChipRow, spec: ChipSpec) -> Any:
        if trainer.step >= 5:
            answers.wait(20)
        return read_chip(folder, row, spec)

    with monkeypatch.context() as patch:
        patch.setattr(loader, "read_chip", unanswered)
        patch.setattr(loader, "Readers", partial(Readers, limit_seconds=1))
        with pytest.raises(StorageError, match=r"reading chips/chip_\d+\.tif.* takes more than 1 sec") as caught:
            train(trainer, tmp_path)
    answers.set()
    assert caught.value.exit_code == 4
    assert str(caught.value).endswith("Stopped before step 8 of 8; ckpt-00000007.pt is kept")
    trainer = resumed(tiny, tmp_path)
    assert final_bits(trainer, train(trainer, tmp_path)) == whole


def test_a_chip_that_cannot_be_read_for_the_validation_says_when(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(task: DiffusionTask) -> None:
        raise DataError("chips/a.tif (catalog line 3): truncated")

    trainer = tiny.trainer()
    monkeypatch.setattr(trainer.validation, "judge", unread)
    with pytest.raises(DataError, match=r"truncated\. Stopped in the validation after step 4 of 12; there is no check"):
        train(trainer, tmp_path)


class Short:
    """Runs out of memory when a trainer comes to a step, in the n-th call."""

    def __init__(self, trainer: Trainer, step: int, call: Callable[..., Any], error: Callable[[], Any]) -> None:
        self.trainer, self.step, self.call, self.error = trainer, step, call, error

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        done = self.call(*arguments, **named)
        if self.trainer.step == self.step:
            self.error()
        return done


def out_of_device_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def out_of_machine_memory() -> None:
    torch.empty(1 << 50)


def out_of_reader_memory() -> None:
    raise MemoryError("Unable to allocate 12.0 GiB")


@pytest.mark.parametrize("error", [out_of_device_memory, out_of_machine_memory, out_of_reader_memory])
def test_out_of_memory_in_the_passes_saves_the_step_and_goes_on_with_recomputed_activations(
    make_tiny: MakeTiny, tmp_path: Path, whole_run: Any, error: Callable[[], Any]
) -> None:
    trainer = make_tiny().trainer()
    trainer.task.loss = Short(trainer, 5, trainer.task.loss, error)  # type: ignore[method-assign]
    with pytest.raises(DeviceMemoryError) as caught:
        train(trainer, tmp_path)
    assert caught.value.exit_code == 2
    said = str(caught.value)
    assert said.startswith("out of memory at step 6 in the forward and backward passes (this machine's memory); ")
    for part in (
        "ckpt-00000005.pt is kept", "operation.activation_checkpointing: true", "this very run continues",
        "set accumulation_steps: 2 (1 now), the same batch of 4 in parts of 2 chips instead of 4",
    ):  # fmt: skip
        assert part in said, said
    assert ("operation.readers (2 now)" in said) == (error is out_of_reader_memory)

    mended = make_tiny(operation__activation_checkpointing=True)
    assert active(mended.params) == active(make_tiny().params), "or it would be another run"
    trainer = resumed(mended, tmp_path)
    assert trainer.step == 5
    assert final_bits(trainer, train(trainer, tmp_path)) == whole_run


def test_out_of_memory_elsewhere_saves_nothing_that_is_half_done(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_tiny(operation__activation_checkpointing=True, accumulation_steps=4).trainer()
    trainer.optimizer.step = Short(trainer, 5, trainer.optimizer.step, out_of_device_memory)
    with pytest.raises(DeviceMemoryError, match=r"step 6 in the optimizer .*; there is no checkpoint yet") as caught:
        train(trainer, tmp_path / "optimizer")
    assert "lower data.crop_px or choose a smaller network" in str(caught.value), "each part is one chip already"

    trainer = make_tiny().trainer()
    monkeypatch.setattr(trainer.validation, "judge", lambda task: out_of_device_memory())
    with pytest.raises(DeviceMemoryError, match=r"step 4 in the validation .* set val_batch_size: 2 \(4 now\)"):
        train(trainer, tmp_path / "validation")

    # Batch norm has counted the batch by then, so the state is none that a run ever has between two steps.
    trainer = make_tiny(network="unet_att_d").trainer()
    trainer.task.loss = Short(trainer, 3, trainer.task.loss, out_of_device_memory)  # type: ignore[method-assign]
    with pytest.raises(DeviceMemoryError, match="there is no checkpoint yet"):
        train(trainer, tmp_path / "batch_norm")
    assert not list(tmp_path.rglob("ckpt-*"))
