from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from earthprior.training import stop
from earthprior.training.stop import StopRequest, interruptions, stop_requests

# Says "ready", gets signals, and tells whether it lived long enough to say goodbye.
LISTENER = """
import signal, sys, time
from earthprior.training import stop
stop.ONE_REQUEST_SECONDS = float(sys.argv[1])
with stop.stop_requests() as request:
    print("ready", flush=True)
    while request.signal_number is None:
        time.sleep(0.005)
    print("asked", flush=True)
    time.sleep(float(sys.argv[2]))
print("goodbye", request.signal_number, flush=True)
"""


@pytest.fixture(autouse=True)
def from_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*stop.STARTERS, "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    # These tests may themselves have been started in a session of their own.
    monkeypatch.setattr(os, "getsid", lambda process: 7)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_process_goes_on(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as request:
        assert request.signal_number is None
        os.kill(os.getpid(), number)
        assert request.signal_number == number
    assert signal.getsignal(number) == before


def test_who_asks_is_told_at_once_that_it_was_heard(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_requests():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert (
        capfd.readouterr().err.strip() == "asked to stop: the state is saved first; ask once more to leave without that"
    )


def test_a_request_after_all_is_done_changes_nothing() -> None:
    """It would make dvc throw away what the stage has finished."""
    late = (
        "import os, signal; from earthprior.training.stop import interruptions\n"
        "with interruptions(lasting=True): pass\n"
        "os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGTERM)"
    )
    done = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="inside"), stop_requests():
        raise ValueError("inside")
    assert signal.getsignal(signal.SIGINT) == before


def test_the_first_signal_is_the_one_that_counts() -> None:
    with stop_requests() as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal_number == signal.SIGINT


def listen(one_request_seconds: float, work_seconds: float, signals: list[signal.Signals]) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", LISTENER, str(one_request_seconds), str(work_seconds)],
        stdout=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signals[0])
        assert process.stdout.readline() == "asked\n"
        time.sleep(0.05)
        for number in signals[1:]:
            process.send_signal(number)
        said = process.stdout.read()
    return process.returncode, said


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_request_ends_the_process_at_once(second: signal.Signals) -> None:
    began = time.monotonic()
    assert listen(0.01, 30.0, [signal.SIGINT, second]) == (-second, "")
    assert time.monotonic() - began < 10


def test_the_same_request_by_two_ways_is_one_request() -> None:
    """Ctrl-C under torchrun: the terminal signals all processes, and torchrun signals its workers again."""
    assert listen(60.0, 0.2, [signal.SIGINT, signal.SIGINT, signal.SIGTERM]) == (0, "goodbye 2\n")


@pytest.mark.parametrize("starter", stop.STARTERS)
def test_an_orphan_of_dvc_or_torchrun_stops(starter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(starter, "x")
    request = StopRequest()
    assert request.signal_number is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert request.signal_number == signal.SIGTERM


def test_an_orphan_of_a_shell_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """nohup python -m earthprior pretrain &, and the shell is left."""
    request = StopRequest()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert request.signal_number is None


def gone(process: int) -> int:
    if process:
        raise ProcessLookupError
    return 7


@pytest.mark.parametrize("sid", [lambda process: process, gone], ids=["adopted", "dying"])
def test_who_lost_dvc_before_it_could_look_stops(sid: Callable[[int], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getsid", sid)
    assert StopRequest().signal_number is None, "nobody's stage"
    monkeypatch.setenv("DVC_STAGE", "pretrain")
    assert StopRequest().signal_number == signal.SIGTERM
    # torchrun starts its processes in sessions of their own
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert StopRequest().signal_number is None


def test_a_stage_with_nothing_to_save_leaves_when_dvc_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "LOOK_FOR_STARTER_SECONDS", 0.02)
    monkeypatch.setenv("DVC_STAGE", "evaluate")
    with interruptions() as request:
        with stop_requests() as own, monkeypatch.context() as patch:
            patch.setattr(os, "getppid", lambda: 1)
            time.sleep(0.1)
            assert not own.asked, "left to whoever saves"
        with pytest.raises(KeyboardInterrupt):
            time.sleep(10)
        assert request.signal_number == signal.SIGTERM


def test_an_orphan_that_is_then_signalled_still_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "pretrain")
    with stop_requests() as request:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert request.signal_number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal_number == signal.SIGTERM


def test_a_terminal_that_is_closed_asks_to_stop_unless_nohup_has_it_ignored() -> None:
    with stop_requests() as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.signal_number == signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal_number is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_has_nothing_to_save_is_interrupted_once(number: signal.Signals) -> None:
    with interruptions() as request:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        # The same request by another way must not disturb the cleaning up.
        os.kill(os.getpid(), number)
        assert request.signal_number == number


def test_an_orphan_without_state_is_still_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "stats")
    with interruptions():
        monkeypatch.setattr(os, "getppid", lambda: 1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


# Is interrupted while it writes a file, takes its time to tidy up, and is interrupted again.
WRITER = """
import time
from pathlib import Path
from earthprior.files import replacing
from earthprior.training import stop
stop.ONE_REQUEST_SECONDS = 0.01
with stop.interruptions():
    with replacing(Path("results/stats.json")) as temporary:
        temporary.write_text("half")
        try:
            print("ready", flush=True)
            time.sleep(30)
        finally:
            print("tidying up", flush=True)
            time.sleep(30)
"""


def test_a_second_request_leaves_no_half_written_file(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER], stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "tidying up\n"
        assert len(list((tmp_path / "results").iterdir())) == 1
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    assert process.returncode == -signal.SIGINT
    assert not list((tmp_path / "results").iterdir())
