"""The mirror and its courier against a store that fails on command; test_tracking.py has the real one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

import pytest

from earthprior import mirror
from earthprior.courier import Delivery, Point, Rejected, metric_name
from earthprior.journal import Journal
from earthprior.mirror import Mirror
from earthprior.outbox import Outbox, RunRecord


class FakeRun:
    """A store in memory."""

    def __init__(self, held: Mapping[str, int] | None = None) -> None:
        self.held = dict(held or {})
        self.down = False
        self.rejects: Callable[[Point], bool] = lambda point: False
        self.hang = threading.Event()
        self.hang.set()
        self.points: list[Point] = []
        self.tags: dict[str, str] = {}
        self.files: list[tuple[str, str]] = []
        self.pictures: list[tuple[str, str, int]] = []
        self.bad_file = ""
        self.opened = 0
        self.watched = 0
        self.calls = 0
        self.status = ""

    def _answer(self) -> None:
        self.calls += 1
        self.hang.wait()
        if self.down:
            raise ConnectionError("no answer")

    def open(self) -> Mapping[str, int]:
        self._answer()
        self.opened += 1
        return self.held

    def probe(self) -> None:
        self._answer()

    def watch(self) -> None:
        self.watched += 1

    def log_points(self, points: Sequence[Point]) -> None:
        self._answer()
        if any(map(self.rejects, points)):
            raise Rejected("bad value")
        self.points += points

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._answer()
        self.tags |= tags

    def upload(self, path: Path, folder: str) -> None:
        self._answer()
        if path.name == self.bad_file:
            raise PermissionError("denied")
        if not path.exists():
            raise FileNotFoundError(path)
        self.files.append((path.name, folder))

    def upload_picture(self, path: Path, key: str, step: int) -> None:
        self._answer()
        if not path.exists():
            raise FileNotFoundError(path)
        self.pictures.append((path.name, key, step))

    def finish(self, status: str, time_ms: int | None) -> None:
        self._answer()
        self.status = status


RECORD = RunRecord("u" * 32, "here", "e", None, None, None, "r", "", {}, {}, 1, None, None)


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    made = Outbox(tmp_path / "outbox")
    made.begin(RECORD)
    return made


@pytest.fixture
def journal(outbox: Outbox) -> Journal:
    return outbox.journal


def close(follower: Mirror, outbox: Outbox, status: str = "FINISHED", seconds: float = 5) -> Delivery:
    outbox.end(status)
    return follower.close(seconds)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(mirror, "FIRST_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(mirror, "LAST_RETRY_SECONDS", 0.05)


def log(journal: Journal, steps: range, **metrics: float) -> None:
    for step in steps:
        journal.append({"step": step, "time_ms": 1000 + step, "metrics": metrics or {"loss": float(step)}})


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "did not happen within 5 s"
        time.sleep(0.005)


def test_everything_arrives_in_order(outbox: Outbox, journal: Journal, tmp_path: Path) -> None:
    log(journal, range(500))
    run = FakeRun()
    follower = Mirror(outbox, run)
    follower.start(5)
    log(journal, range(500, 700))
    (tmp_path / "a.txt").write_text("x")
    outbox.tag({"k": "v"})
    outbox.put(tmp_path / "a.txt", "folder")
    delivery = close(follower, outbox)
    assert [point.step for point in run.points] == list(range(700))
    assert run.points[3] == Point("loss", 3.0, 1003, 3)
    assert (run.tags, run.files, run.status, run.opened) == ({"k": "v"}, [("a.txt", "folder")], "FINISHED", 1)
    assert (delivery.delivered, delivery.total, bool(delivery)) == (700, 700, True)


def test_points_flow_before_the_end(outbox: Outbox, journal: Journal) -> None:
    run = FakeRun()
    follower = Mirror(outbox, run)
    follower.start(5)
    log(journal, range(3))
    eventually(lambda: len(run.points) == 3)
    close(follower, outbox)


def test_outage_loses_and_doubles_nothing(outbox: Outbox, journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    run = FakeRun()
    follower = Mirror(outbox, run)
    follower.start(5)
    log(journal, range(10))
    eventually(lambda: len(run.points) == 10)
    run.down = True
    log(journal, range(10, 400))
    eventually(lambda: "no answer" in caplog.text)
    calls = run.calls
    eventually(lambda: run.calls > calls + 2)
    assert caplog.text.count("no answer") == 1, "an outage is told once"
    run.down = False
    eventually(lambda: "answers again" in caplog.text)
    assert close(follower, outbox)
    assert [point.step for point in run.points] == list(range(400))


def test_store_that_is_down_from_start_to_end(outbox: Outbox, journal: Journal) -> None:
    run = FakeRun()
    run.down = True
    follower = Mirror(outbox, run)
    follower.start(5)
    log(journal, range(7))
    delivery = close(follower, outbox)
    assert (delivery.delivered, delivery.total, bool(delivery)) == (0, 7, False)
    assert str(delivery) == "0 of 7 points delivered"


def test_store_that_comes_up_for_the_end(outbox: Outbox, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "FIRST_RETRY_SECONDS", 1000.0)
    run = FakeRun()
    run.down = True
    follower = Mirror(outbox, run)
    follower.start(5)
    log(journal, range(7))
    run.down = False
    assert close(follower, outbox), "close must try although the next attempt was far off"
    assert len(run.points) == 7


def test_store_that_hangs_delays_neither_start_nor_close_for_long(outbox: Outbox, journal: Journal) -> None:
    run = FakeRun()
    run.hang.clear()
    follower = Mirror(outbox, run)
    begin = time.monotonic()
    follower.start(0.1)
    log(journal, range(7))
    delivery = close(follower, outbox, "FINISHED", 0.1)
    assert time.monotonic() - begin < 3
    assert not delivery
    # the outbox is another's from here on: what was in hand is not gone on with
    run.hang.set()
    follower._thread.join(5)
    assert (run.points, run.status) == ([], "")


def test_who_is_in_a_hurry_does_not_wait_for_a_store_that_hangs(outbox: Outbox, journal: Journal) -> None:
    """A second Ctrl-C, or SIGTERM at the very end."""
    run = FakeRun()
    follower = Mirror(outbox, run)
    follower.start(wait_seconds=5)
    run.hang.clear()
    log(journal, range(7))
    asked = time.monotonic() + 0.3
    began = time.monotonic()
    assert not follower.close(timeout_seconds=30, hurried=lambda: time.monotonic() > asked)
    assert 0.2 < time.monotonic() - began < 5
    run.hang.set()


def test_time_to_spare_goes_to_others_until_there_is_none(outbox: Outbox, journal: Journal) -> None:
    done: list[int] = []
    run = FakeRun()

    def others() -> Generator[None]:
        for number in range(1000):
            assert run.opened, "after its own run"
            done.append(number)
            time.sleep(0.001)
            yield

    follower = Mirror(outbox, run, others=others)
    follower.start(5)
    eventually(lambda: len(done) > 2)
    log(journal, range(5))
    eventually(lambda: len(run.points) == 5)
    assert len(done) < 1000, "its own points do not wait for all of theirs"
    assert close(follower, outbox)
    assert len(done) == 1000


def test_others_put_off_the_end_for_a_limited_time(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "SPARE_SECONDS", 0.2)
    ended = threading.Event()

    def others() -> Generator[None]:
        try:
            while True:
                time.sleep(0.01)
                yield
        finally:
            ended.set()

    run = FakeRun()
    follower = Mirror(outbox, run, others=others)
    follower.start(5)
    begin = time.monotonic()
    assert close(follower, outbox, seconds=30)
    assert time.monotonic() - begin < 8, "sooner than those SPARE_SECONDS that are usual, also on a busy machine"
    assert run.status == "FINISHED"
    assert ended.wait(5), "what was in hand is let go"


def test_others_that_fail_do_no_harm(outbox: Outbox, caplog: pytest.LogCaptureFixture) -> None:
    def others() -> Generator[None]:
        raise ConnectionError("too much")
        yield

    follower = Mirror(outbox, FakeRun(), others=others)
    follower.start(5)
    assert close(follower, outbox)
    assert "too much; what other runs have yet to tell waits" in caplog.text


def test_an_outbox_in_other_hands_is_waited_for(outbox: Outbox, journal: Journal) -> None:
    log(journal, range(3))
    run = FakeRun()
    other = Outbox(outbox.folder)
    with other.held() as mine:
        assert mine
        follower = Mirror(outbox, run)
        follower.start(5)
        time.sleep(0.1)
        assert not run.opened
    assert close(follower, outbox)
    assert len(run.points) == 3


def test_continued_run_gets_only_what_it_lacks(outbox: Outbox, journal: Journal) -> None:
    log(journal, range(10))
    log(journal, range(0, 10, 5), val=1.0)
    run = FakeRun(held={"loss": 6, "val": 0})
    follower = Mirror(outbox, run)
    follower.start(5)
    delivery = close(follower, outbox)
    assert [(point.name, point.step) for point in run.points] == [("loss", 7), ("loss", 8), ("loss", 9), ("val", 5)]
    assert (delivery.delivered, delivery.total) == (12, 12)


def test_a_rewritten_journal_is_counted_anew(outbox: Outbox, journal: Journal) -> None:
    log(journal, range(10))
    run = FakeRun(held={"loss": 9})
    follower = Mirror(outbox, run)
    follower.start(5)
    journal.truncate_after(4)
    log(journal, range(5, 12))
    delivery = close(follower, outbox)
    assert [point.step for point in run.points] == [10, 11]
    assert (delivery.delivered, delivery.total) == (12, 12)


def test_non_finite_values_stay_in_the_journal(outbox: Outbox, journal: Journal) -> None:
    log(journal, range(1), loss=float("nan"), grad=float("inf"), lr=0.1)
    run = FakeRun()
    follower = Mirror(outbox, run)
    follower.start(5)
    delivery = close(follower, outbox, "FAILED", 5)
    assert [point.name for point in run.points] == ["lr"]
    assert (delivery.total, run.status) == (1, "FAILED")


def test_refused_points_do_not_block_the_others(
    outbox: Outbox, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    """Only those are missing that are refused, of whichever portion, and one line tells how many."""
    bad = {0, 7, 8, 450}
    log(journal, range(500))
    run = FakeRun()
    run.rejects = lambda point: point.step in bad
    follower = Mirror(outbox, run)
    follower.start(5)
    log(journal, range(500, 502))
    delivery = close(follower, outbox)
    assert [point.step for point in run.points] == [step for step in range(502) if step not in bad]
    assert (delivery.delivered, delivery.total) == (498, 502)
    assert caplog.text.count("refuses") == caplog.text.count("refuses 4 points (bad value)") == 1
    assert run.calls < 100


def test_pictures_wait_for_a_store_and_each_is_stored_once(outbox: Outbox) -> None:
    run = FakeRun()
    run.down = True
    follower = Mirror(outbox, run)
    follower.start(5)
    for step in range(4):
        (outbox.folder / f"{step}.png").write_bytes(b"x")
        outbox.put_picture(outbox.folder / f"{step}.png", "denoising", step)
    (outbox.folder / "3.png").unlink()
    run.down = False
    eventually(lambda: len(run.pictures) == 3)
    assert close(follower, outbox)
    assert run.pictures == [(f"{step}.png", "denoising", step) for step in range(3)]


@pytest.mark.parametrize("bad", ["gone.txt", "denied.txt"])
def test_a_file_that_cannot_be_stored_does_not_keep_a_run_open(
    outbox: Outbox, tmp_path: Path, bad: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / bad).write_text("x")
    (tmp_path / "good.txt").write_text("x")
    outbox.put(tmp_path / bad, "")
    outbox.put(tmp_path / "good.txt", "")
    (outbox.folder / "artifacts/gone.txt").unlink(missing_ok=True)
    run = FakeRun()
    run.bad_file = "denied.txt"
    follower = Mirror(outbox, run)
    follower.start(5)
    delivery = close(follower, outbox)
    assert run.status == "FINISHED"
    assert bad in caplog.text
    assert run.files == [("good.txt", "")]
    # what was refused may be taken later, what is gone will not
    assert bool(delivery) == (bad == "gone.txt") == (not outbox.waits)


def test_a_file_is_kept_as_it_was_when_it_was_handed_over(outbox: Outbox, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("then")
    outbox.put(tmp_path / "params.yaml", "")
    (tmp_path / "params.yaml").write_text("now")
    run = FakeRun()
    Mirror(outbox, run).start(5)
    assert (outbox.folder / outbox.messages.read()[0]["file"]).read_text() == "then"


NAMES = [
    "loss@0.5%",
    "t=0-100",
    "a//b",
    "/a/",
    "./a",
    "../a",
    "a/../b",
    "a/.",
    "",
    "/",
    "é",
    "x" * 400,
    "a/" * 200,
    "naïve loss",
]


@pytest.mark.parametrize("name", [*NAMES, "loss", "val/gain_db/rho_0.5", "mse/nir: x-1"])
def test_metric_names_are_what_mlflow_takes(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    clean = metric_name(name)
    _validate_metric_name(clean)
    assert len(clean) <= 250
    assert metric_name(clean) == clean


@pytest.mark.parametrize("name", ["loss", "val/gain_db/rho_0.5", "mse/nir: x-1", "evaluate/psnr/red"])
def test_good_names_stay(name: str) -> None:
    assert metric_name(name) == name
