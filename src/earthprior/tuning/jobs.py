"""Several processes on one study, with the machine's GPUs and the run's threads divided among them."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from earthprior.errors import EarthPriorError, StorageError
from earthprior.params import Params
from earthprior.training.stop import TUNE_JOB, StopRequest

POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


def threads(params: Params, jobs: int) -> int:
    """One process's part of `threads`.

    They are part of a run's identity, so a trial is recorded with its own number of them and its bits can be had again.
    """
    return max(1, params.threads // jobs)


def visible_gpus(device: str) -> list[str]:
    """The GPUs to divide, as CUDA_VISIBLE_DEVICES names them; none where one is asked for by number, or the CPU."""
    if device not in ("auto", "cuda"):
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def environments(jobs: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """Each process's environment: its number, and its GPUs; more processes than GPUs share them in turn."""
    found = []
    for job in range(jobs):
        mine = gpus[job::jobs] if len(gpus) >= jobs else [gpus[job % len(gpus)]] if gpus else []
        chosen = {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {}
        found.append({**os.environ, TUNE_JOB: f"{job + 1}/{jobs}", **chosen})
    return found


def run_jobs(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    folder: Path,
    stop: StopRequest,
    tick: Callable[[], None],
) -> list[int]:
    """Start the processes, show what they say, hand on a request to stop, and wait for all.

    Args:
        command: The same for all.
        environments: One per process.
        folder: For what they say, job-1.log and so on.
        stop: Asked all the time.
        tick: Called all the time, for what the parent has to do meanwhile.

    Returns:
        Their exit codes.
    """
    jobs, readers = [], []
    for number, environment in enumerate(environments, 1):
        # A file and no pipe: they outlive a killed parent long enough to save, and must not fail at what they say.
        log = folder / f"job-{number}.log"
        with log.open("w") as handle:
            # A Ctrl-C is handed on below, once; the terminal would send it to them, too.
            job = subprocess.Popen(
                command, env=environment, stdout=handle, stderr=subprocess.STDOUT, start_new_session=True
            )
        jobs.append(job)
        readers.append(threading.Thread(target=_show, args=(log, job, number), daemon=True))
    for reader in readers:
        reader.start()
    told = False
    try:
        while any(job.poll() is None for job in jobs):
            if stop.signal_number and not told:
                told = True
                for job in jobs:
                    if job.poll() is None:
                        job.send_signal(signal.SIGTERM)
            tick()
            time.sleep(POLL_SECONDS)
    finally:
        for job in jobs:
            if job.poll() is None:
                job.send_signal(signal.SIGTERM)
        for job in jobs:
            job.wait()
    for reader in readers:
        reader.join()
    return [job.returncode for job in jobs]


def failure(codes: Sequence[int], ended: str) -> EarthPriorError:
    """What processes that ended early ended with, all told: the disk's fault where it was one's.

    Args:
        codes: Their exit codes.
        ended: Who ended how, the beginning of the sentence.
    """
    told = f"{ended} exit codes {list(codes)}; what they said stands above. The same command goes on"
    return StorageError(told) if StorageError.exit_code in codes else EarthPriorError(told)


class Reports:
    """A report that is written now and then, so that one is there in the morning even if the machine is not.

    Args:
        write: Writes it, and says where. No picture is worth the work that it tells of, so what it raises is told only.
        done: How much there is to report; a report of nothing new is not written.
        every_seconds: At least so much apart.
        last: When the last one was, by the monotonic clock.
    """

    def __init__(
        self, write: Callable[[], Path], done: Callable[[], int], every_seconds: float, last: float = 0.0
    ) -> None:
        self._write, self._done, self._every, self._last = write, done, every_seconds, last
        self._reported = -1

    def now_and_then(self) -> None:
        """Write it, if it is time."""
        if time.monotonic() - self._last > self._every:
            self._attempt(again=False)
            self._last = time.monotonic()

    def write(self) -> Path | None:
        """Write it; where it is, if that worked."""
        return self._attempt(again=True)

    def _attempt(self, again: bool) -> Path | None:
        """Write it, also of nothing new if asked to."""
        try:
            done = self._done()
            if done <= self._reported and not again:
                return None
            written = self._write()
        except Exception as error:  # noqa: BLE001 (see above)
            logger.warning("the report could not be written (%s: %s)", type(error).__name__, error)
            return None
        self._reported = done
        return written


def own_command(arguments: Sequence[str]) -> list[str]:
    """This program with other arguments."""
    return [sys.executable, "-m", "earthprior", *arguments]


def _show(log: Path, job: subprocess.Popen[bytes], number: int) -> None:
    """Hand on what a process says, line by line, until it is gone."""
    with log.open() as handle, suppress(OSError):
        while True:
            over = job.poll() is not None
            for line in handle:
                print(f"[{number}] {line.rstrip()}", file=sys.stderr, flush=True)
            if over:
                return
            time.sleep(POLL_SECONDS)
