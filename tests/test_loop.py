from __future__ import annotations

import errno
import math
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from earthprior.chips.batch import Batch
from earthprior.errors import Interrupted
from earthprior.tasks.diffusion import DiffusionTask
from earthprior.tasks.task import Loss
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.validate import evaluating
from tiny_training import Judge, Log, StopAt, Tiny, bits, final_bits, resumed, train

STEPS = 12
MakeTiny = Callable[..., Tiny]


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


def test_a_request_at_the_last_step_is_too_late(tiny: Tiny, tmp_path: Path, whole_run: Any) -> None:
    trainer = tiny.trainer()
    assert final_bits(trainer, train(trainer, tmp_path, stop=StopAt(trainer, STEPS))) == whole_run


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


def test_nothing_is_read_ahead_after_the_end(tiny: Tiny, tmp_path: Path) -> None:
    """The threads that read chips are gone when training is over, however it ended."""
    before = threading.active_count()
    trainer = tiny.trainer()
    with pytest.raises(Interrupted):
        train(trainer, tmp_path, stop=StopAt(trainer, 3))
    assert threading.active_count() == before
