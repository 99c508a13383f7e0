"""`earthprior bench`: how few labels are enough, with the pretrained network and without it.

What is compared is declared in the section `bench` of downstream/params.yaml. Every fit is a row of bench.csv; killed
and started again, a bench does what is left. The table, the report and its picture are in work/bench/.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from earthprior.bench import pages
from earthprior.bench.setting import Setting, prepare
from earthprior.errors import Interrupted
from earthprior.files import write_json
from earthprior.identity import identity_tags
from earthprior.params import DownstreamParams
from earthprior.report import count
from earthprior.tracking import RunRef, Tracker, open_tracker
from earthprior.training.stop import TUNE_JOB, StopRequest, stop_requests
from earthprior.tuning import jobs as processes

REPORT_EVERY_SECONDS = 120.0


def run(params: DownstreamParams, root: Path, jobs: int) -> None:
    """Do the fits that are left, and write the report.

    Args:
        params: The whole of downstream/params.yaml.
        root: The project's root.
        jobs: Number of processes.

    Raises:
        EarthPriorError: There is nothing to compare, or too few chips have labels.
        Interrupted: Asked to stop; what was done is kept, and the same command continues.
    """
    setting = prepare(params, root, _jobs() or jobs)
    if _jobs():
        setting.work(lambda: None)
    else:
        _Bench(setting, root).coordinate(jobs)


def _jobs() -> int:
    """How many processes this one is of; 0 where it is no such process."""
    return int(os.environ.get(TUNE_JOB, "0/0").split("/")[1])


class _Bench:
    """What the first process does beside the fits: MLflow and the report."""

    def __init__(self, setting: Setting, root: Path) -> None:
        self.setting, self.root = setting, root
        self.folder = setting.table.path.parent
        self._reports = processes.Reports(self._report, self._rows, REPORT_EVERY_SECONDS, time.monotonic())

    def coordinate(self, jobs: int) -> None:
        """Work, here or in several processes, with the bench's run in MLflow open, and its report at the end."""
        self._say()
        tracker = self._open_run()
        try:
            if jobs == 1:
                self.setting.work(self._reports.now_and_then)
            else:
                with stop_requests() as stop:
                    self._spawn(jobs, stop)
        except (Interrupted, KeyboardInterrupt):
            self._finish(tracker, "KILLED")
            raise
        except BaseException:
            self._finish(tracker, "FAILED")
            raise
        self._finish(tracker, "FINISHED")
        print(pages.verdict_of(self.setting.table.rows(), self.setting.fits, self.setting.about))

    def _spawn(self, jobs: int, stop: StopRequest) -> None:
        command = processes.own_command(["bench"])
        environments = processes.environments(jobs, processes.visible_gpus(self.setting.params.operation.device))
        codes = processes.run_jobs(command, environments, self.folder, stop, self._reports.now_and_then)
        if stop.signal_number:
            raise Interrupted("every fit that was done is kept", stop.signal_number)
        if any(codes):
            raise processes.failure(codes, "processes ended with")

    def _say(self) -> None:
        setting = self.setting
        done = len({row.fit for row in setting.table.rows()} & set(setting.fits))
        before = f", {done} done before" if done else ""
        print(
            f"bench {setting.name}: {count(len(setting.fits), 'fit')}{before}; budgets are drawn from "
            f"{count(setting.about.available, 'labelled train chip')}, settings chosen on {setting.about.holdout} "
            f"others, and all is judged on {setting.about.judged}\nrows: {os.path.relpath(setting.table.path)}",
            file=sys.stderr,
            flush=True,
        )

    def _open_run(self) -> Tracker:
        setting, known = self.setting, self.folder / "run.json"
        tags, resume = identity_tags(self.root, setting.name), RunRef.read(known)
        name = f"bench-{setting.name[:6]}"
        tracker = open_tracker(self.root, name, setting.told, tags, resume=resume, log_system_metrics=False)
        write_json(known, tracker.ref.to_json())
        return tracker

    def _rows(self) -> int:
        return len(self.setting.table.rows())

    def _report(self) -> Path:
        setting = self.setting
        rows, bench = setting.table.rows(), setting.fitter.bench
        return pages.write(self.folder / "report", rows, setting.fits, bench, setting.about)

    def _finish(self, tracker: Tracker, status: str) -> None:
        """The report, and the bench's row in MLflow."""
        report = self._reports.write()
        rows = self.setting.table.rows()
        for name, (labels, value) in pages.metrics(rows, self.setting.fits, self.setting.about):
            tracker.log({name: value}, labels)
        if self.setting.table.path.is_file():
            tracker.log_artifact(self.setting.table.path, "bench")
        for path in sorted(report.parent.iterdir()) if report else []:
            tracker.log_artifact(path, "" if path.is_dir() else "bench")
        with suppress(OSError):
            write_json(self.folder / "run.json", tracker.ref.to_json())
        tracker.close(status)
        if report:
            print(f"report: {os.path.relpath(report, Path.cwd())}", file=sys.stderr)
