"""A few kills of real processes; `make soak` has a hundred, of `dvc repro` and `dvc exp run` as well."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import kills
from kills import COMMANDS, Bench, Kill

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, make_chips: Callable[..., Path]) -> Bench:
    return Bench(tmp_path_factory.mktemp("kills") / "bench", make_chips, "pretrain", tracked=False)


@pytest.mark.soak
def test_killed_three_times_and_with_a_second_writer_at_the_door_it_comes_to_the_same_bits(bench: Bench) -> None:
    asked = [
        Kill("pretrain", signal.SIGINT, "trainer", "save"),
        Kill("pretrain", signal.SIGTERM, "trainer", "judge"),
        Kill("pretrain", signal.SIGKILL, "trainer", "results"),
    ]
    chance = random.Random(os.urandom(8))
    course = kills.run(bench, "run", asked, chance, beside=lambda first: refused(bench, first))
    assert course.faults == []
    assert [hit.kill for hit in course.hits] == asked, "not all could be delivered"
    assert all(hit.identical for hit in course.hits)
    assert [(hit.then, hit.lost) for hit in course.hits] == [("continued", 0), ("continued", 0), ("continued", 1)]


def refused(bench: Bench, first: int) -> None:
    """A second process on the run of the first one, which stands still meanwhile."""
    folder, project = bench.folder / "second", bench.folder / "run/project"
    folder.mkdir()
    environment = {**bench.calm.project.environment, "KILLS_FOLDER": str(folder)}
    second = subprocess.run(
        COMMANDS["pretrain"], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert second.returncode == 2
    assert f"pid {first} on {socket.gethostname()}, since 2" in second.stderr
    assert "is training this very run in" in second.stderr
    notes = kills.Patient(bench.calm.project, folder).notes()
    began, left = (note for note in notes if note["what"] in ("patched", "exit"))
    # By its own clock, which a busy machine does not slow; and without waiting for the first, which stands still.
    assert left["cpu"] - began["cpu"] < 5
    assert left["time"] - began["time"] < 60


def test_the_soak_plans_every_kill_and_gives_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import soak_kills
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    planned = soak_kills.plan(100, seed=0)
    assert len(planned) == 100
    rows = {kill.row for kill in planned}
    assert len(rows) == 3 * (7 + 8 + 8)
    assert {kill.command for kill in planned} == COMMANDS.keys() - {"stats"}
    in_copies = soak_kills.plan(60, seed=0, wanted=["exp run --temp"])
    assert {kill.command for kill in in_copies} == {"exp run --temp"}
    assert {(kill.target, kill.moment) for kill in in_copies if kill.target == "trainer"} == {
        ("trainer", "stats"), ("trainer", "evaluate"),
    }  # fmt: skip
    assert len({kill.row for kill in in_copies}) == 3 * (2 + 8 + 8)
    again = [kill for run in soak_kills.runs(planned) for kill in run]
    assert sorted(map(str, again)) == sorted(map(str, planned))
    assert all(len({kill.command for kill in run}) == 1 for run in soak_kills.runs(planned))

    hit = kills.Hit(planned[0], "pretrain: step 3", 2.0, 1, "continued", identical=True)
    other = kills.Hit(planned[0], "pretrain: step 4", 4.0, 0, "continued", identical=False)
    soak_kills.print_tables([hit, other])
    name, target, moment = planned[0].row
    said = capsys.readouterr().out
    for row in (f"{name} | {target}", "all | ", moment):
        assert f"| {row} | 2 | 2 | 0 | 0 | 0 | 1 | 0.5 | 3 |" in said
