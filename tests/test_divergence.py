from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from earthprior.chips.batch import Batch
from earthprior.errors import DivergedError
from earthprior.files import read_json
from earthprior.tasks.diffusion import DiffusionTask
from earthprior.tasks.task import Loss
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.loop import Trainer
from tiny_training import Judge, Tiny, final_bits, resumed, train

MakeTiny = Callable[..., Tiny]


def poison_loss(loss: Loss, network: nn.Module) -> Loss:
    per_chip = loss.per_chip.clone()
    per_chip[2] = torch.nan
    return replace(loss, total=loss.total * torch.nan, per_chip=per_chip)


def poison_gradient(loss: Loss, network: nn.Module) -> Loss:
    """The loss stays finite; its gradient, of sqrt at 0, does not."""
    weight = next(network.parameters())
    per_chip = loss.per_chip.clone()
    per_chip[2] = 1e6
    return replace(loss, total=loss.total + (0 * weight.sum()).sqrt(), per_chip=per_chip)


@pytest.mark.parametrize("poison", [poison_loss, poison_gradient])
def test_divergence_names_the_chip_and_poisons_nothing(make_tiny: MakeTiny, poison: Any, tmp_path: Path) -> None:
    tiny = make_tiny(operation__checkpoint_every_seconds=0)
    trainer = tiny.trainer()
    chip = tiny.selection.train[tiny.order()[6][2]]

    def diverging(batch: Batch, generator: torch.Generator) -> Loss:
        loss = DiffusionTask.loss(trainer.task, batch, generator)
        return poison(loss, trainer.task.network) if trainer.step == 6 else loss

    trainer.task.loss = diverging  # type: ignore[method-assign]
    with pytest.raises(DivergedError) as caught:
        train(trainer, tmp_path)
    assert caught.value.exit_code == 3
    said = str(caught.value)
    for part in (
        "training diverged at step 7 of 12 (epoch 2): loss ", "lr 0.00",
        f"Worst of the 4 chips: {chip.images[0]} (catalog line {chip.line}) at timestep ",
        "the last good checkpoint is ckpt-00000006.pt", "lower lr (0.01 now), lower grad_clip (1 now), or look",
        "The same command continues from it and diverges at the same step again", "diverged.json",
    ):  # fmt: skip
        assert part in said, said
    assert len(said) < 1000
    record = read_json(tmp_path / "diverged.json")
    assert (record["step"], record["epoch"], record["last_checkpoint"]) == (7, 2, "ckpt-00000006.pt")
    assert "NaN" in (record["loss"], record["gradient_norm"])
    assert len(record["gradient_norms_before"]) == 6
    assert all(f"{norm:.3g}" in said for norm in record["gradient_norms_before"][1:])
    batch = [tiny.selection.train[index] for index in tiny.order()[6]]
    assert [(one["file"], one["catalog_line"]) for one in record["chips"]] == [(r.images[0], r.line) for r in batch]
    assert all(0 <= one["timestep"] < 1000 for one in record["chips"])
    assert [one["loss"] for one in record["chips"]].count("NaN") == (1 if poison is poison_loss else 0)
    latest = CheckpointStore(tmp_path, "f" * 12, {}).load_latest()
    assert latest is not None
    assert latest[0] == 6
    tensors = [*latest[1]["network"].values(), *latest[1]["average"].values()]
    assert all(tensor.isfinite().all() for tensor in tensors)
    # And not in memory either: a stage that goes on with the trainer finds step 6.
    assert all(parameter.isfinite().all() for parameter in trainer.task.network.parameters())


def test_divergence_in_a_part_of_a_batch_names_that_parts_chip(make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(accumulation_steps=2, grad_clip=None, precision="bfloat16")
    trainer = tiny.trainer()
    chip = tiny.selection.train[tiny.order()[2 * 5 + 1][1]]

    def diverging(batch: Batch, generator: torch.Generator) -> Loss:
        loss = DiffusionTask.loss(trainer.task, batch, generator)
        parts.append(trainer.step)
        if parts[-2:] != [5, 5]:
            return loss
        per_chip = loss.per_chip.clone()
        per_chip[1] = torch.inf
        return replace(loss, total=loss.total * torch.inf, per_chip=per_chip)

    parts: list[int] = []
    trainer.task.loss = diverging  # type: ignore[method-assign]
    with pytest.raises(
        DivergedError, match=r"at step 6 .* there is no checkpoint yet\. The same command begins"
    ) as caught:
        train(trainer, tmp_path)
    assert f"Worst of the 4 chips: {chip.images[0]} (catalog line {chip.line}) at" in str(caught.value)
    assert "set grad_clip (null now), set precision: float32 (bfloat16 now), or look" in str(caught.value)
    assert [one["loss"] for one in read_json(tmp_path / "diverged.json")["chips"]].count("Infinity") == 1


def test_a_diverged_run_goes_on_from_the_last_good_checkpoint_and_diverges_there_again(
    make_tiny: MakeTiny, tiny: Tiny, tmp_path: Path, whole_run: Any
) -> None:
    def poisoned(trainer: Trainer) -> Trainer:
        def loss(batch: Batch, generator: torch.Generator) -> Loss:
            loss = DiffusionTask.loss(trainer.task, batch, generator)
            return poison_loss(loss, trainer.task.network) if trainer.step == 6 else loss

        trainer.task.loss = loss  # type: ignore[method-assign]
        return trainer

    often = make_tiny(operation__checkpoint_every_seconds=0)
    messages = []
    for process in (often.trainer, lambda: resumed(often, tmp_path)):
        with pytest.raises(DivergedError) as caught:
            train(poisoned(process()), tmp_path)
        # A process knows only the norms of its own steps.
        messages.append(re.sub(r"\(before it.*?\)", "", str(caught.value)))
    assert messages[0] == messages[1]
    trainer = resumed(tiny, tmp_path)
    assert trainer.step == 6
    assert final_bits(trainer, train(trainer, tmp_path)) == whole_run


def test_an_average_that_cannot_be_judged_is_divergence(make_tiny: MakeTiny, tmp_path: Path) -> None:
    trainer = make_tiny(operation__checkpoint_every_seconds=0).trainer()
    trainer.validation = Judge(0.1, math.nan)  # type: ignore[assignment]
    with pytest.raises(DivergedError, match=r"after epoch 2 \(step 8\).* no finite number \(gain_db/mean\)") as caught:
        train(trainer, tmp_path)
    assert "the last good checkpoint is ckpt-00000007.pt" in str(caught.value)
    assert "lower lr (0.01 now)" in str(caught.value)
    assert CheckpointStore(tmp_path, "f" * 12, {}).steps() == [6, 7]
