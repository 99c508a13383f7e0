from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from earthprior.errors import StorageError
from earthprior.training import checkpoint, keeping
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.keeping import Keeping
from earthprior.training.progress import Progress
from tiny_training import StopAt, Tiny, final_bits, judged, train

MakeTiny = Callable[..., Tiny]


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


def test_a_full_disk_when_asked_to_stop_is_not_called_saved(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("earthprior.training.checkpoint.write_atomic", full)
    trainer = tiny.trainer()
    with pytest.raises(StorageError, match="step 5 not written") as caught:
        train(trainer, tmp_path, stop=StopAt(trainer, 5))
    assert caught.value.exit_code == 4


def test_checkpoints_are_as_far_apart_as_asked(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny.trainer(), tmp_path)
    assert not list(tmp_path.glob("ckpt-*"))


def test_checkpoints_come_at_the_epochs_asked_for(make_tiny: MakeTiny, tmp_path: Path) -> None:
    trainer = judged(make_tiny(batch_size=8, epochs=6, operation__checkpoint_interval=2).trainer())
    train(trainer, tmp_path)
    assert CheckpointStore(tmp_path, "f" * 12, {}).steps() == [4, 8], "the end of the run is in its results"


def test_a_slow_disk_takes_no_more_than_a_tenth_of_the_time(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, now = make_tiny(operation__checkpoint_every_seconds=60).params, [0.0]
    monkeypatch.setattr(keeping, "time", SimpleNamespace(monotonic=lambda: now[0]))
    kept = Keeping(CheckpointStore(tmp_path, "f" * 12, {}), params, 4, Progress(12, 0, 3, enabled=False))

    def due_after(seconds: float) -> list[bool]:
        now[0] += seconds - 1
        before = kept.due(1)
        now[0] += 1
        return [before, kept.due(1)]

    def state(seconds: float) -> dict[str, Any]:
        now[0] += seconds
        return {"step": 1}

    assert due_after(60) == [False, True]
    kept.save(1, lambda: state(2), last_chance=False)
    assert due_after(60) == [False, True]
    kept.save(1, lambda: state(20), last_chance=False)
    assert due_after(200) == [False, True]
    # it was a bad hour of a network share
    kept.save(1, lambda: state(2), last_chance=False)
    assert due_after(60) == [False, True]


def test_a_folder_that_cannot_be_listed_does_not_hide_why_a_step_failed(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, "f" * 12, {})
    kept = Keeping(store, make_tiny().params, 4, Progress(12, 0, 3, enabled=False))

    def gone() -> list[int]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(store, "steps", gone)
    kept.save_as_it_was(1, dict)
