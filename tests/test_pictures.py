"""Pictures of a training: drawn of the averaged weights, in their time, and without a trace in the training."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from earthprior import pictures
from earthprior.pictures import Pictures, percent
from earthprior.training.loop import Trainer
from tiny_training import CPU, Tiny, bits, final_bits, judged, train

MakeTiny = Callable[..., Tiny]
EPOCHS = 4


class Series:
    """Stands for the tracker."""

    def __init__(self, mirrors: bool = True) -> None:
        self.mirrors = mirrors
        self.logged: list[tuple[str, str, int]] = []

    def log_picture(self, path: Path, key: str, step: int) -> None:
        assert path.is_file()
        self.logged.append((path.name, key, step))

    @property
    def steps(self) -> list[int]:
        return [step for _, _, step in self.logged]


@pytest.fixture
def tiny(make_tiny: MakeTiny) -> Tiny:
    return make_tiny(epochs=EPOCHS, data__crops_per_chip=1)


def drawing(tiny: Tiny, folder: Path, series: Series) -> Pictures:
    return Pictures(folder, tiny.params, tiny.selection, tiny.normalizer, CPU, series, 0)  # type: ignore[arg-type]


def trained(tiny: Tiny, folder: Path, made: Pictures | None = None) -> Trainer:
    """A trainer at the end of its training, which was watched."""
    trainer = judged(tiny.trainer())
    if made:
        made.draw(trainer.task, trainer.average.module, 0)
        judge = trainer._end_epoch

        def end_epoch(epoch: int, *others: Any) -> None:
            judge(epoch, *others)
            made.draw_if_due(trainer.task, trainer.average.module, epoch)

        trainer._end_epoch = end_epoch  # type: ignore[method-assign]
    trainer.outcome = train(trainer, folder)  # type: ignore[attr-defined]
    return trainer


def test_there_is_one_before_the_training_and_one_after_each_epoch_in_percent(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "SHARE", 1e9)
    series = Series()
    trained(tiny, tmp_path, drawing(tiny, tmp_path / "pictures", series))
    assert series.steps == [0, 25, 50, 75, 100]
    assert {key for _, key, _ in series.logged} == {"denoising"}
    first, last = (tmp_path / "pictures" / series.logged[place][0] for place in (0, -1))
    assert imread(first).shape == imread(last).shape
    assert first.read_bytes() != last.read_bytes(), "the network has changed"


def test_training_comes_to_the_same_bits_with_and_without(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "SHARE", 1e9)
    plain = trained(tiny, tmp_path / "plain")
    watched = trained(tiny, tmp_path / "watched", drawing(tiny, tmp_path / "pictures", Series()))
    assert final_bits(watched, watched.outcome) == final_bits(plain, plain.outcome)  # type: ignore[attr-defined]


def test_drawing_leaves_task_and_generators_as_they_were(tiny: Tiny, tmp_path: Path) -> None:
    trainer = tiny.trainer()
    own = trainer.task.network
    before = bits(trainer.state())
    states = torch.get_rng_state(), random.getstate()
    drawing(tiny, tmp_path, Series()).draw(trainer.task, trainer.average.module, 1)
    assert trainer.task.network is own
    assert bits(trainer.state()) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


@pytest.mark.parametrize(
    ("epoch_seconds", "expected"),
    [
        # one second and 3 % of 1000 s are time for more than there may be
        (1.0, list(range(0, 101, 5))),
        # of 100 s for 13, so every 10 %, and of 10 s for four
        (0.1, list(range(0, 101, 10))),
        (0.01, [0, 25, 50, 75, 100]),
        (0.0, [0, 30, 60, 90]),
    ],
)
def test_they_are_spread_evenly_over_the_time_they_may_take(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch_seconds: float, expected: list[int]
) -> None:
    clock = [0.0]

    def draw(figure: Any, path: Path) -> None:
        clock[0] += 0.3
        path.write_bytes(b"x")

    monkeypatch.setattr(pictures, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(pictures, "save_png", draw)
    monkeypatch.setattr(pictures, "panels", lambda *_: ["panel"])
    monkeypatch.setattr(pictures, "denoising_figure", lambda *_: None)
    params = tiny.params.model_copy(update={"epochs": 1000})
    series = Series()
    made = Pictures(tmp_path, params, tiny.selection, tiny.normalizer, CPU, series, 0)  # type: ignore[arg-type]
    trainer = tiny.trainer()
    made.draw(trainer.task, trainer.average.module, 0)
    clock[0] = 0.0
    for epoch in range(1, 1001):
        clock[0] += epoch_seconds
        made.draw_if_due(trainer.task, trainer.average.module, epoch)
    assert series.steps == expected


def test_a_continued_run_hands_over_what_it_finds_and_draws_it_once(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, first = tiny.trainer(), Series()
    made = drawing(tiny, tmp_path, first)
    for epoch in (0, 2):
        made.draw(trainer.task, trainer.average.module, epoch)
    (tmp_path / ".percent-075.png.tmp").write_bytes(b"a kill's leaving")
    second = Series()
    again = drawing(tiny, tmp_path, second)
    assert second.logged == first.logged
    assert not list(tmp_path.glob(".*.tmp*"))
    monkeypatch.setattr(pictures, "save_png", lambda *_: pytest.fail("drawn twice"))
    again.draw(trainer.task, trainer.average.module, 2)


def test_what_goes_wrong_is_told_once_and_ends_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(pictures, "save_png", full)
    series = Series()
    trainer, made = tiny.trainer(), drawing(tiny, tmp_path, series)
    own = trainer.task.network
    for epoch in range(3):
        made.draw(trainer.task, trainer.average.module, epoch)
    assert caplog.text.count("no more pictures of this run (No space left on device); the training goes on") == 1
    assert series.logged == []
    assert trainer.task.network is own


def test_without_mlflow_none_is_drawn(tiny: Tiny, tmp_path: Path) -> None:
    trainer = tiny.trainer()
    drawing(tiny, tmp_path / "pictures", Series(mirrors=False)).draw(trainer.task, trainer.average.module, 0)
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (1, [0, 100]),
        (4, [0, 25, 50, 75, 100]),
        (8, [0, 10, 25, 35, 50, 60, 75, 85, 100]),
        (20, list(range(0, 101, 5))),
        (333, list(range(0, 101, 5))),
    ],
)
def test_runs_of_any_length_have_percents_in_common(epochs: int, expected: list[int]) -> None:
    assert sorted({percent(epoch, epochs) for epoch in range(epochs + 1)}) == expected
