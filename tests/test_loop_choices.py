"""The loop with each of the ways to take a step, to change the rate and to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from earthprior.errors import Interrupted
from earthprior.tasks.task import Loss
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.optim import OPTIMIZERS
from earthprior.training.rates import LR_SCHEDULES
from tiny_training import Judge, Log, StopAt, Tiny, bits, final_bits, judged, resumed, train

MakeTiny = Callable[..., Tiny]


SHORT: dict[str, Any] = {
    "batch_size": 8, "epochs": 3, "warmup_epochs": 1, "diffusion__timesteps": 50, "evaluate__steps": 20,
    "cosinewarm__t_0": 1, "step__step_size": 2, "multistep__milestones": [2], "cosine__t_max": 1,
}  # fmt: skip
"""Two steps an epoch, six in all; every LR schedule moves in them."""


@pytest.mark.parametrize(
    ("key", "word"),
    [("optimizer", name) for name in OPTIMIZERS] + [("lr_schedule", name) for name in LR_SCHEDULES],
)
def test_every_optimizer_and_schedule_goes_on_exactly(make_tiny: MakeTiny, key: str, word: str, tmp_path: Path) -> None:
    tiny = make_tiny(**{**SHORT, "plateau__patience": 0, key: word})
    trainer = judged(tiny.trainer())
    expected = final_bits(trainer, train(trainer, tmp_path / "whole"))
    trainer = judged(tiny.trainer())
    for step in (3, 4):
        with pytest.raises(Interrupted):
            train(trainer, tmp_path / "parts", stop=StopAt(trainer, step))
        trainer = judged(resumed(tiny, tmp_path / "parts"))
    assert final_bits(trainer, train(trainer, tmp_path / "parts")) == expected


@pytest.mark.parametrize("network", ["unet_film", "unet_att_d"])
def test_sam_with_a_vanishing_radius_is_its_base(make_tiny: MakeTiny, network: str, tmp_path: Path) -> None:
    """So both passes see the same noise and dropout, and batch norm, history and average move once a step."""
    dials = {
        **SHORT, "network": network, "unet_film__dropout_rate": 0.3, "unet_att_d__dropout_rate": 0.3, "epochs": 2,
        "diffusion__timestep_sampling": "importance", "accumulation_steps": 2, "sam__rho": 1e-30,
    }  # fmt: skip
    found = []
    for optimizer in ("adamw", "sam"):
        trainer = judged(make_tiny(**dials, optimizer=optimizer).trainer())
        found.append(final_bits(trainer, train(trainer, tmp_path / optimizer)))
    assert found[0] == found[1]


@pytest.mark.parametrize("dial", [{"sam__rho": 0.2}, {"sam__adaptive": True}, {"sam__base_optimizer": "sgd"}])
def test_every_dial_of_sam_acts(make_tiny: MakeTiny, dial: dict[str, Any], tmp_path: Path) -> None:
    runs = []
    for dials in ({}, dial):
        trainer = judged(make_tiny(**{**SHORT, "epochs": 2, "optimizer": "sam", **dials}).trainer())
        runs.append(train(trainer, tmp_path).last)
    assert bits(runs[0]) != bits(runs[1])


def test_the_task_is_told_of_every_chip_once_a_step(make_tiny: MakeTiny, tmp_path: Path) -> None:
    trainer = judged(make_tiny(**SHORT, optimizer="sam", accumulation_steps=4).trainer())
    told: list[Loss] = []
    trainer.task.after_step = told.append  # type: ignore[method-assign]
    log = Log()
    train(trainer, tmp_path, log)
    assert len(told) == trainer.total_steps
    assert all(loss.t is not None and len(loss.t) == len(loss.per_chip) == 8 for loss in told)
    losses = {step: metrics["train/loss"] for step, _, metrics in log.points if "train/loss" in metrics}
    assert losses[4] == float(told[3].total) == pytest.approx(float(told[3].per_chip.mean()))


PATIENT: dict[str, Any] = {"batch_size": 8, "epochs": 6, "early_stopping_epochs": 2}


def test_a_run_without_a_better_gain_stops_early_and_well(
    make_tiny: MakeTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = judged(make_tiny(**PATIENT, operation__checkpoint_every_seconds=0).trainer())
    # A request that comes with the last step is too late here, too.
    outcome = train(trainer, tmp_path, stop=StopAt(trainer, 8), speak=True)
    assert (trainer.step, trainer.total_steps) == (8, 12)
    assert (len(outcome.history), outcome.best_epoch) == (4, 2)
    assert "stopped early after epoch 4 of 6: the gain of epoch 2 was not bettered in 2" in capsys.readouterr().err
    assert CheckpointStore(tmp_path, "f" * 12, {}).steps() == [6, 7], "as with any last step"


def test_the_state_of_a_run_that_stopped_early_has_nothing_left_to_do(make_tiny: MakeTiny, tmp_path: Path) -> None:
    tiny = make_tiny(**PATIENT)
    trainer = judged(tiny.trainer())
    expected = final_bits(trainer, train(trainer, tmp_path))
    again = tiny.trainer()
    again.restore(trainer.state())
    assert final_bits(again, train(again, tmp_path)) == expected


@pytest.mark.parametrize("step", [3, 4, 7])
def test_early_stopping_ends_a_continued_run_where_it_ends_a_whole_one(
    make_tiny: MakeTiny, step: int, tmp_path: Path
) -> None:
    tiny = make_tiny(**PATIENT)
    trainer = judged(tiny.trainer())
    expected = final_bits(trainer, train(trainer, tmp_path / "whole"))
    trainer = judged(tiny.trainer())
    with pytest.raises(Interrupted):
        train(trainer, tmp_path / "parts", stop=StopAt(trainer, step))
    trainer = judged(resumed(tiny, tmp_path / "parts"))
    assert final_bits(trainer, train(trainer, tmp_path / "parts")) == expected


def test_a_rising_gain_stops_nothing(make_tiny: MakeTiny, tmp_path: Path) -> None:
    trainer = make_tiny(batch_size=8, early_stopping_epochs=1).trainer()
    trainer.validation = Judge(-3.0, -2.0, -1.0)  # type: ignore[assignment]
    assert len(train(trainer, tmp_path).history) == 3
