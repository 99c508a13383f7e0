from __future__ import annotations

import errno
import math
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from earthprior.chips import loader
from earthprior.chips.batch import Batch
from earthprior.chips.catalog import ChipRow
from earthprior.chips.read import ChipSpec, read_chip
from earthprior.chips.readers import Readers
from earthprior.errors import DataError, DeviceMemoryError, DivergedError, EarthPriorError, Interrupted, StorageError
from earthprior.files import read_json
from earthprior.params import active
from earthprior.tasks.diffusion import DiffusionTask
from earthprior.tasks.task import Loss
from earthprior.training import checkpoint
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.distributed import World
from earthprior.training.loop import Trainer
from earthprior.training.validate import evaluating
from tiny_training import Judge, Log, StopAt, Tiny, bits, final_bits, resumed, train

STEPS = 12
MakeTiny = Callable[..., Tiny]


@pytest.fixture
def tiny(make_tiny: MakeTiny) -> Tiny:
    return make_tiny()


def test_every_chip_is_visited_as_often_as_asked_in_every_epoch(make_tiny: MakeTiny) -> None:
    trainer = make_tiny(data__crops_per_chip=3, batch_size=6).trainer()
    assert (trainer.steps_per_epoch, trainer.total_steps) == (4, STEPS)
    batches = list(trainer._order())
    assert len(batches) == STEPS
    assert {len(batch) for batch in batches} == {6}
    epochs = [sum(batches[first : first + 4], []) for first in range(0, STEPS, 4)]  # noqa: RUF017
    assert all(Counter(epoch) == dict.fromkeys(range(8), 3) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_what_does_not_fill_a_batch_is_left_out(make_tiny: MakeTiny) -> None:
    trainer = make_tiny(data__crops_per_chip=2, batch_size=5).trainer()
    assert trainer.steps_per_epoch == 3
    visits = Counter(index for batch in list(trainer._order())[:3] for index in batch)
    assert sum(visits.values()) == 15
    assert max(visits.values()) == 2


def test_the_order_depends_on_the_seed_and_is_the_same_from_any_step_on(make_tiny: MakeTiny) -> None:
    trainer = make_tiny().trainer()
    whole = list(trainer._order())
    for step in range(STEPS):
        trainer.step = step
        assert list(trainer._order()) == whole[step:]
    assert list(make_tiny(seed=1).trainer()._order()) != whole


def test_processes_share_out_what_one_would_read(tiny: Tiny) -> None:
    trainer = tiny.trainer()
    whole = list(trainer._order())
    parts = []
    for rank in range(2):
        trainer.world = World(rank, 2)
        parts.append(list(trainer._order()))
    assert [first + second for first, second in zip(*parts, strict=True)] == whole


def test_parts_of_a_step_are_read_as_processes_would_read_them(make_tiny: MakeTiny) -> None:
    trainer = make_tiny(batch_size=8, accumulation_steps=4).trainer()
    parts = list(trainer._order())
    assert {len(part) for part in parts} == {2}
    assert [sum(parts[first : first + 4], []) for first in range(0, len(parts), 4)] == list(  # noqa: RUF017
        make_tiny(batch_size=8).trainer()._order()
    )
    halved = make_tiny(batch_size=8, accumulation_steps=2).trainer()
    orders = []
    for rank in range(2):
        halved.world = World(rank, 2)
        orders.append(iter(list(halved._order())))
    assert [next(orders[number // 2 % 2]) for number in range(len(parts))] == parts


VARIANTS: dict[str, dict[str, Any]] = {
    "film": {},
    "dropout": {"unet_film__dropout_rate": 0.3},
    "batch_norm": {"network": "unet_att_d", "unet_att_d__dropout_rate": 0.2},
    "uniform_v": {
        "objective": "v", "diffusion__precondition": "none", "diffusion__timestep_sampling": "uniform",
        "diffusion__weighting": "uniform", "lr_schedule": "cosinewarm", "cosinewarm__t_0": 1, "grad_clip": None,
    },
    "bfloat16": {"precision": "bfloat16"},
    "sam_batch_norm": {
        "network": "unet_att_d", "unet_att_d__dropout_rate": 0.2, "optimizer": "sam", "accumulation_steps": 2,
    },
    "importance": {"diffusion__timestep_sampling": "importance", "diffusion__timesteps": 20, "evaluate__steps": 20,
                   "accumulation_steps": 2},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_after_every_step_ends_with_the_same_bits(
    make_tiny: MakeTiny, variant: str, tmp_path: Path
) -> None:
    tiny = make_tiny(epochs=2, **VARIANTS[variant])
    trainer = tiny.trainer()
    log = Log()
    expected = final_bits(trainer, train(trainer, tmp_path / "whole", log))

    parts = Log()
    trainer = tiny.trainer()
    for step in range(1, trainer.total_steps):
        with pytest.raises(Interrupted, match=rf"saved step {step} of 8") as stopped:
            train(trainer, tmp_path / "parts", parts, StopAt(trainer, step))
        assert stopped.value.exit_code == 143
        # Whatever a process leaves in torch's global generator must not matter to the next one.
        torch.manual_seed(step)
        trainer = resumed(tiny, tmp_path / "parts")
        assert trainer.step == step
    assert final_bits(trainer, train(trainer, tmp_path / "parts", parts)) == expected
    assert timeless(parts) == timeless(log), "every point is reported once, with the same value"


def timeless(log: Log) -> list[Any]:
    """The points, without what depends on the machine's speed."""
    return [(s, e, {k: v for k, v in metrics.items() if not k.startswith("time/")}) for s, e, metrics in log.points]


@pytest.mark.parametrize("step", [1, 4, 6, 11])
def test_a_run_stopped_once_ends_with_the_same_bits(tiny: Tiny, step: int, tmp_path: Path, whole_run: Any) -> None:
    trainer = tiny.trainer()
    with pytest.raises(Interrupted):
        train(trainer, tmp_path, stop=StopAt(trainer, step))
    trainer = resumed(tiny, tmp_path)
    assert final_bits(trainer, train(trainer, tmp_path)) == whole_run


@pytest.fixture(scope="module")
def whole_run_cache() -> dict[str, Any]:
    return {}


@pytest.fixture
def whole_run(tiny: Tiny, tmp_path: Path, whole_run_cache: dict[str, Any]) -> Any:
    """The bits of the run that nobody disturbed."""
    if not whole_run_cache:
        trainer = tiny.trainer()
        whole_run_cache["bits"] = final_bits(trainer, train(trainer, tmp_path / "whole"))
    return whole_run_cache["bits"]


def test_a_kill_loses_only_what_came_after_the_last_checkpoint(
    make_tiny: MakeTiny, tiny: Tiny, tmp_path: Path, whole_run: Any
) -> None:
    trainer = make_tiny(operation__checkpoint_every_seconds=0).trainer()

    def killed_later(batch: Batch, generator: torch.Generator) -> Loss:
        if trainer.step == 7:
            raise SystemExit
        return DiffusionTask.loss(trainer.task, batch, generator)

    trainer.task.loss = killed_later  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        train(trainer, tmp_path)
    assert CheckpointStore(tmp_path, "f" * 12, {}).steps() == [6, 7]
    trainer = resumed(tiny, tmp_path)
    assert final_bits(trainer, train(trainer, tmp_path)) == whole_run


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


def test_the_number_of_readers_changes_nothing(make_tiny: MakeTiny, tmp_path: Path) -> None:
    found = []
    for readers in (1, 4):
        trainer = make_tiny(operation__readers=readers).trainer()
        found.append(final_bits(trainer, train(trainer, tmp_path / str(readers))))
    assert found[0] == found[1]


def test_the_seed_changes_everything(make_tiny: MakeTiny, tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        tiny = make_tiny(seed=seed, epochs=2)
        found.append(train(tiny.trainer(), tmp_path / str(seed)).last)
    assert bits(found[0]) != bits(found[1])


def test_the_state_loads_without_pickles_and_holds_no_generator(tiny: Tiny, tmp_path: Path) -> None:
    trainer = tiny.trainer()
    with pytest.raises(Interrupted):
        train(trainer, tmp_path, stop=StopAt(trainer, 5))
    state = torch.load(tmp_path / "ckpt-00000005.pt", weights_only=True)
    assert set(state) == {
        "step", "network", "average", "optimizer", "lr_schedule", "task", "history", "best", "best_gain", "best_epoch",
        "epoch_loss", "linear",
    }  # fmt: skip


def test_training_lowers_the_loss(make_tiny: MakeTiny, tmp_path: Path) -> None:
    plain = {
        "diffusion__precondition": "none",
        "diffusion__weighting": "uniform",
        "diffusion__noise_schedule": "cosine",
    }
    outcome = train(make_tiny(epochs=6, diffusion__timestep_sampling="uniform", **plain).trainer(), tmp_path)
    assert outcome.history[-1]["train_loss"] < 0.7 * outcome.history[0]["train_loss"]
    assert outcome.history[-1]["loss"] < 0.7 * outcome.history[0]["loss"]
    assert outcome.best_epoch > 1


def test_history_and_log_tell_of_every_epoch(tiny: Tiny, tmp_path: Path) -> None:
    log = Log()
    outcome = train(tiny.trainer(), tmp_path, log)
    assert [(row["epoch"], row["step"]) for row in outcome.history] == [(1, 4), (2, 8), (3, 12)]
    steps = {step: metrics for step, _, metrics in log.points if "train/loss" in metrics}
    assert sorted(steps) == [2, 4, 6, 8, 10, 12], "every operation.log_every_steps"
    curves = {"train/loss", "train/lr", "train/grad_norm"}
    assert set(steps[2]) == curves | {"time/chips_seen", "time/epoch", "time/chips_per_second"}
    epochs = {step: (epoch, metrics) for step, epoch, metrics in log.points if "val/loss" in metrics}
    for row in outcome.history:
        epoch, metrics = epochs[int(row["step"])]
        assert epoch == row["epoch"]
        assert metrics["val/gain_db/mean"] == row["gain_db/mean"]
        assert metrics["train/loss_epoch"] == row["train_loss"]
    assert steps[2]["train/lr"] == pytest.approx(0.01 * 2 / 5), "the lr that step 2 was made with"


def test_the_epochs_training_loss_is_the_mean_over_its_steps(make_tiny: MakeTiny, tmp_path: Path) -> None:
    log = Log()
    outcome = train(make_tiny(operation__log_every_steps=1).trainer(), tmp_path, log)
    losses = [metrics["train/loss"] for _, _, metrics in log.points if "train/loss" in metrics]
    for epoch, row in enumerate(outcome.history):
        assert row["train_loss"] == pytest.approx(sum(losses[4 * epoch : 4 * epoch + 4]) / 4)


def test_every_curve_can_be_drawn_over_chips_seen_and_epochs(make_tiny: MakeTiny, tmp_path: Path) -> None:
    log = Log()
    trainer = make_tiny(operation__log_every_steps=3).trainer()
    train(trainer, tmp_path, log)
    # MLflow pairs a curve's points with those of the axis by their steps: each step once, and none missing.
    axis = [(step, metrics) for step, _, metrics in log.points if "time/epoch" in metrics]
    assert [step for step, _ in axis] == [3, 4, 6, 8, 9, 12]
    assert {step for step, _, metrics in log.points if "val/loss" in metrics} == {4, 8, 12}
    for step, metrics in axis:
        assert metrics["time/chips_seen"] == step * trainer.params.batch_size
        assert metrics["time/epoch"] == step / 4


def test_the_log_says_the_best_gain_so_far(tiny: Tiny, tmp_path: Path) -> None:
    trainer = tiny.trainer()
    trainer.validation = Judge(0.1, 0.5, 0.3)  # type: ignore[assignment]
    log = Log()
    train(trainer, tmp_path, log)
    assert [m["val/gain_db/best"] for _, _, m in log.points if "val/loss" in m] == [0.1, 0.5, 0.5]


@pytest.mark.parametrize(("gains", "best"), [((0.1, 0.5, 0.3), 2), ((-3.0, -2.0, -1.0), 3), ((0.2, 0.2, 0.1), 1)])
def test_the_best_weights_are_the_averaged_ones_of_the_epoch_with_the_highest_gain(
    tiny: Tiny, gains: tuple[float, ...], best: int, tmp_path: Path
) -> None:
    trainer = tiny.trainer()
    trainer.validation = judge = Judge(*gains)  # type: ignore[assignment]
    outcome = train(trainer, tmp_path)
    assert outcome.best_epoch == best
    assert bits(outcome.best) == bits(judge.shown[best - 1])
    assert bits(outcome.last) == bits(judge.shown[-1])
    assert bits(outcome.last) != bits(trainer.task.network.state_dict()), "averaged, not the newest"


def test_judging_uses_the_average_and_gives_the_network_back(tiny: Tiny) -> None:
    trainer = tiny.trainer()
    own = trainer.task.network
    with evaluating(trainer.task, trainer.average.module):
        assert trainer.task.network is trainer.average.module
        assert not any(module.training for module in trainer.task.modules())
    assert trainer.task.network is own


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
    chip = tiny.selection.train[list(trainer._order())[6][2]]

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
    batch = [tiny.selection.train[index] for index in next(trainer._order())]
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
    chip = tiny.selection.train[list(trainer._order())[2 * 5 + 1][1]]

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


def full(path: Path, content: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_does_not_stop_training(
    make_tiny: MakeTiny,
    tmp_path: Path,
    whole_run: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = make_tiny(operation__checkpoint_every_seconds=0)
    monkeypatch.setattr("earthprior.training.checkpoint.write_atomic", full)
    trainer = tiny.trainer()
    assert final_bits(trainer, train(trainer, tmp_path / "full", speak=True)) == whole_run
    said = capsys.readouterr().err
    assert said.count("warning: checkpoint of step ") == 1, "told once, not at every step"
    assert f"checkpoint of step 1 not written in {tmp_path / 'full'} (No space left on device): it needs" in said
    assert list((tmp_path / "full").iterdir()) == []


def test_a_disk_that_recovers_is_told_and_one_that_fails_otherwise_too(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_tiny(operation__checkpoint_every_seconds=0).trainer()
    faults = {1: errno.ENOSPC, 2: errno.ENOSPC, 3: errno.EIO, 6: errno.ENOSPC}
    write = checkpoint.write_atomic

    def sometimes(path: Path, content: Any) -> None:
        if number := faults.get(trainer.step):
            raise OSError(number, os.strerror(number))
        write(path, content)

    monkeypatch.setattr(checkpoint, "write_atomic", sometimes)
    train(trainer, tmp_path, speak=True)
    told = [line for line in capsys.readouterr().err.splitlines() if "checkpoint" in line]
    assert [line.split(" not written")[0] for line in told] == [
        "warning: checkpoint of step 1", "warning: checkpoint of step 3",
        "checkpoints are written again: step 4 is saved", "warning: checkpoint of step 6",
        "checkpoints are written again: step 7 is saved",
    ]  # fmt: skip
    assert CheckpointStore(tmp_path, "f" * 12, {}).steps() == [10, 11]


def test_a_log_that_cannot_be_written_does_not_stop_training(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_run: Any
) -> None:
    """2> log, on a full disk; or | tee log, and tee is gone."""
    trainer = make_tiny().trainer()

    class Full:
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self) -> None:
            pass

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stderr", Full())
    assert final_bits(trainer, train(trainer, tmp_path, speak=True)) == whole_run


def test_a_full_disk_when_asked_to_stop_is_not_called_saved(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("earthprior.training.checkpoint.write_atomic", full)
    trainer = tiny.trainer()
    with pytest.raises(StorageError, match="step 5 not written") as caught:
        train(trainer, tmp_path, stop=StopAt(trainer, 5))
    assert caught.value.exit_code == 4


def test_a_request_at_the_last_step_is_too_late(tiny: Tiny, tmp_path: Path, whole_run: Any) -> None:
    trainer = tiny.trainer()
    assert final_bits(trainer, train(trainer, tmp_path, stop=StopAt(trainer, STEPS))) == whole_run


def test_checkpoints_are_as_far_apart_as_asked(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny.trainer(), tmp_path)
    assert not list(tmp_path.glob("ckpt-*"))


def test_bfloat16_computes_otherwise_and_still_keeps_float32_weights(make_tiny: MakeTiny, tmp_path: Path) -> None:
    runs = [train(make_tiny(precision=name).trainer(), tmp_path / name) for name in ("float32", "bfloat16")]
    assert bits(runs[0].last) != bits(runs[1].last)
    assert {value.dtype for value in runs[1].last.values()} == {torch.float32}
    assert all(math.isfinite(value) for row in runs[1].history for value in row.values())
    # The linear filter is not computed in bfloat16, so the gains stay comparable.
    assert runs[1].history[0]["gain_db/mean"] == pytest.approx(runs[0].history[0]["gain_db/mean"], abs=0.1)


def test_gradients_are_clipped_to_the_norm_asked_for(make_tiny: MakeTiny, tmp_path: Path) -> None:
    trainer = make_tiny(grad_clip=1e-3).trainer()
    log = Log()
    norms = []

    def watching(*_: Any) -> None:
        gradients = [parameter.grad.norm() for parameter in trainer.task.network.parameters()]
        norms.append(float(torch.stack(gradients).norm()))

    trainer.optimizer.register_step_pre_hook(watching)
    train(trainer, tmp_path, log)
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)
    assert max(m["train/grad_norm"] for _, _, m in log.points if "train/grad_norm" in m) > 1e-2, "before clipping"


def test_a_checkpoint_of_another_network_is_refused_in_words(make_tiny: MakeTiny, tmp_path: Path) -> None:
    trainer = make_tiny().trainer()
    with pytest.raises(Interrupted):
        train(trainer, tmp_path, stop=StopAt(trainer, 2))
    with pytest.raises(EarthPriorError, match="does not fit the network") as caught:
        resumed(make_tiny(unet_film__channels=[8, 24]), tmp_path)
    said = str(caught.value)
    assert "(16,), not (24,)" in said
    assert re.search(r"; and \d+ more\)\. Restore the code", said)
    assert said.count(", not (") == 5
    assert "\n" not in said
    assert len(said) < 600


def test_nothing_is_read_ahead_after_the_end(tiny: Tiny, tmp_path: Path) -> None:
    """The threads that read chips are gone when training is over, however it ended."""
    before = threading.active_count()
    trainer = tiny.trainer()
    with pytest.raises(Interrupted):
        train(trainer, tmp_path, stop=StopAt(trainer, 3))
    assert threading.active_count() == before
