"""`earthprior tune`: searches params.yaml by an Optuna study of trainings, and applies what it found.

The study is declared in the section `tune` of params.yaml. Its trials are trainings of the stage `pretrain`, in this
process (or in `--jobs` of them), each with its own fingerprint, folder and MLflow run; the study's own run is their
parent. Killed and started again, it goes on; started several times or on several machines, it is one study.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earthprior import build
from earthprior.chips.selection import read_stats, select
from earthprior.diffusion.gain import missing_levels, noise_levels
from earthprior.errors import EarthPriorError, Interrupted, ParamsError
from earthprior.identity import code_hash, main_root
from earthprior.params import Params, TuneParams
from earthprior.params.editing import overlay, overlay_text, write
from earthprior.tracking import RunRef, Tracker, open_tracker
from earthprior.training.linear_denoiser import fit_linear
from earthprior.training.stop import TUNE_JOB, StopRequest, stop_requests
from earthprior.tuning import jobs as processes
from earthprior.tuning import space
from earthprior.tuning import study as studies
from earthprior.tuning.record import arguments, record
from earthprior.tuning.trial import Context
from earthprior.tuning.worker import Worker

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

REPORT_EVERY_SECONDS = 60.0


def run(params: Params, root: Path, trials: int | None, jobs: int, record_best: bool) -> None:
    """Search until the study has its trials.

    Args:
        params: The whole of params.yaml.
        root: The project's root, holding results/stats/.
        trials: How many the study shall have, instead of `tune.trials`.
        jobs: Number of processes.
        record_best: Run the best trial as a DVC experiment at the end.

    Raises:
        EarthPriorError: The study is not what params.yaml says, or most trials fail.
        Interrupted: Asked to stop; running trials are saved, and the same command continues.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EarthPriorError(
            "tune runs one process a trial; start it without torchrun, with --jobs for several trials"
        )
    tune = space.searched(params)
    wanted = trials or tune.trials
    search = _Search(params, tune, root)
    if job := os.environ.get(TUNE_JOB):
        with stop_requests() as stop, studies.working(search.place) as worker:
            search.work(worker, int(job.split("/")[1]), wanted, stop, lambda: None)
        return
    with stop_requests() as stop:
        search.coordinate(jobs, wanted, stop)
    if record_best:
        search.record()


class _Search:
    """A study and what its trials share; a class because a coordinator and its workers do different things with it."""

    def __init__(self, params: Params, tune: TuneParams, root: Path) -> None:
        self.params, self.tune, self.root = params, tune, root
        self.epochs = tune.epochs or params.epochs
        self.stats, stats_sha256 = read_stats(root)
        # Trials differ from the file as it is now, whatever is edited during the night.
        self.text = (root / "params.yaml").read_text(encoding="utf-8")
        # Checks only: trials too short for the rest of params.yaml would all fail.
        overlay_text(
            self.text, {} if "epochs" in tune.space else {"epochs": self.epochs}, "params.yaml with tune.epochs"
        )
        _check_labels(params, tune, root, self.stats)
        common = space.shared(params, tune, stats_sha256)
        self.place = studies.Place.of(root, tune, space.study_name(tune, common))
        self.study = studies.open_study(self.place, tune, common, self.epochs, space.own_values(params, tune))
        self.common = common
        self.tracker: Tracker | None = None
        self._reports = processes.Reports(self._report, lambda: studies.count(self.study).done, REPORT_EVERY_SECONDS)

    def coordinate(self, jobs: int, wanted: int, stop: StopRequest) -> None:
        """Search in this process, or in several, with the study's own run in MLflow open, and its report at the end."""
        if "missing_levels" not in self.study.user_attrs:
            self.study.set_user_attr("missing_levels", self._missing_levels())
        self._say(wanted)
        self.tracker = tracker = self._open_run()
        self._remember_run()
        try:
            if jobs == 1:
                with studies.working(self.place) as worker:
                    self.work(worker, 1, wanted, stop, self._report_now_and_then)
            else:
                self._spawn(jobs, wanted, stop)
        except Interrupted:
            self._finish(tracker, "KILLED")
            raise
        except BaseException:
            self._finish(tracker, "FAILED")
            raise
        self._finish(tracker, "FINISHED")

    def work(self, worker: str, jobs: int, wanted: int, stop: StopRequest, after: Any) -> None:
        """Run trials in this process, with its share of threads."""
        settings = self._settings(jobs)
        context = Context(
            root=self.root,
            folder=self.place.folder,
            study=self.place.name,
            params=self.params,
            params_text=self.text,
            tune=self.tune,
            settings=settings,
            missing_levels=frozenset(self.study.user_attrs["missing_levels"]),
            worker=worker,
        )
        Worker(self.study, self.place, context, stop, after).run(wanted)

    def _settings(self, jobs: int) -> dict[str, Any]:
        """What a trial's bits depend on here that is neither searched nor sure to stay in params.yaml."""
        settings = {"threads": processes.threads(self.params, jobs), "epochs": self.epochs}
        return {key: value for key, value in settings.items() if key not in self.tune.space}

    def _remember_run(self) -> None:
        """So that trials find their parent; MLflow may be slow to say its id."""
        if self.tracker and self.study.user_attrs.get("mlflow_run") != (ref := self.tracker.ref.to_json()):
            self.study.set_user_attr("mlflow_run", ref)

    def record(self) -> None:
        """Run the best trial as a DVC experiment, which must come to the same gain."""
        best = studies.best_trials(self.study)
        if len(best) == 1:
            record(self.root, self.place.name, best[0])

    def _spawn(self, jobs: int, wanted: int, stop: StopRequest) -> None:
        command = processes.own_command(["tune", "--trials", str(wanted)])
        gpus = processes.visible_gpus(self.params.operation.device)
        environments = processes.environments(jobs, gpus)
        codes = processes.run_jobs(command, environments, self.place.folder, stop, self._report_now_and_then)
        if stop.signal_number:
            raise Interrupted(f"all {jobs} processes saved their trials", stop.signal_number)
        if studies.count(self.study).done < wanted:
            raise processes.failure(codes, "processes ended early, with")

    def _missing_levels(self) -> list[str]:
        """The judged noise levels that params.yaml's own schedule does not reach."""
        normalizer = build.normalizer(self.params, self.stats)
        std = float(fit_linear(self.params, select(self.params, self.root, self.stats), normalizer).std)
        return missing_levels(level.rho for level in noise_levels(build.schedule(self.params), std))

    def _say(self, wanted: int) -> None:
        now = studies.count(self.study)
        metrics = " and ".join(self.study.user_attrs["metrics"])
        begun = f", {now.done} done before" if now.done else ""
        if now.done >= wanted:
            begun += ": nothing is left to train (--trials is how many there shall be in all)"
        print(
            f"study {self.place.name}: {wanted} trials of {self.epochs} epochs{begun}, for the best {metrics}\n"
            f"searched: {', '.join(self.tune.space)}\n"
            f"watch it: optuna-dashboard {self.place.shown}",
            file=sys.stderr,
            flush=True,
        )

    def _open_run(self) -> Tracker:
        ref = self.study.user_attrs.get("mlflow_run")
        declared = {
            f"tune.{key}": value for key, value in self.tune.model_dump(mode="json").items() if key != "storage"
        }
        told = {key: value for key, value in self.common.items() if not key.startswith(("tune.", "results/"))}
        spaces = {f"tune.space.{key}": value for key, value in declared.pop("tune.space").items()}
        return open_tracker(
            self.root,
            f"study {self.place.name}",
            {**declared, **spaces, **told},
            {"optuna.study": self.place.name, "optuna.storage": self.place.shown_from(main_root(self.root))},
            resume=RunRef.from_json(ref) if ref else None,
            log_system_metrics=False,
        )

    def _report_now_and_then(self) -> None:
        self._remember_run()
        self._reports.now_and_then()

    def _report(self) -> Path:
        from earthprior.tuning import pages

        commands = {trial.number: command(self.place.name, trial) for trial in self.study.get_trials(deepcopy=False)}
        return pages.write(
            self.study, self.place.folder / "report", self.place.name, commands, self.place.shown, self.tune
        )

    def _finish(self, tracker: Tracker, status: str) -> None:
        """The report, and the study's row in MLflow."""
        report = self._reports.write()
        best = -float("inf")
        for trial in self.study.get_trials(deepcopy=False, states=studies.DONE[:1]):
            best = max(best, trial.values[0])
            name = self.tune.metric.replace("both", "gain")
            # The table of runs is sorted by the second.
            sorted_by = {} if name == "probe" else {"val/gain_db/best": best}
            tracker.log({f"study/best_{name}": best, **sorted_by}, trial.number)
        for path in sorted(report.parent.iterdir()) if report else []:
            tracker.log_artifact(path, "" if path.is_dir() else "study")
        tracker.close(status)
        if report:
            print(f"report: {os.path.relpath(report, Path.cwd())}", file=sys.stderr)
        found = studies.best_trials(self.study)
        if len(found) == 1:
            print(f"best: trial {found[0].number}, {studies.values_text(self.study, found[0].values)}")
            print("  earthprior tune --apply")
        elif found:
            print("best, none of which is worse in everything than another; apply one with --trial:")
            for trial in found:
                print(f"  trial {trial.number}: {studies.values_text(self.study, trial.values)}")


def apply(params: Params, root: Path, number: int | None) -> None:
    """Write the best trial's settings (or another's) into params.yaml, and print how to repeat it to the bit.

    Args:
        params: The whole of params.yaml.
        root: The project's root.
        number: Of the trial; None means the best one.

    Raises:
        EarthPriorError: There is no such study or trial, or several are best.
    """
    tune = space.searched(params)
    _, stats_sha256 = read_stats(root)
    common = space.shared(params, tune, stats_sha256)
    place = studies.Place.of(root, tune, space.study_name(tune, common))
    try:
        study = studies.load_study(place)
    except EarthPriorError as error:
        known = sorted(path.parent.name for path in (main_root(root) / "work/tune").glob("*/lock"))
        hint = f". There are: {', '.join(known)}; name one in tune.study" if known else ""
        raise EarthPriorError(f"{error}{hint}") from None
    trial = _chosen(study, number)
    settings: Mapping[str, Any] = trial.user_attrs["settings"]
    source = root / "params.yaml"
    searched = {key: value for key, value in settings.items() if key in tune.space}
    text, changes = overlay(source, searched, f"params.yaml with trial {trial.number}")
    write(text, source)
    reached = studies.values_text(study, trial.values)
    print(f"trial {trial.number} ({reached}) written to params.yaml, {len(changes)} values changed")
    for change in changes:
        print(f"  {change}")
    code = trial.user_attrs.get("code")
    if code is not None and code != code_hash().digest[:12]:
        print("the code is another than the trial's, so the gain may be another")
    if changed := space.differences(study.user_attrs["base"], common):
        print(f"params.yaml is otherwise not that of the study, so the gain will be another: {'; '.join(changed)}")
    print(f"the same, to the bit:\n  {command(place.name, trial)}")


def command(study: str, trial: FrozenTrial) -> str:
    """The line that repeats a trial as a DVC experiment."""
    # Without its name: the trial may be recorded under it already.
    return shlex.join(["dvc", "exp", "run", *arguments(study, trial)[2:]])


def _chosen(study: Study, number: int | None) -> FrozenTrial:
    if number is not None:
        found = [
            t for t in study.trials if t.number == number and t.state in studies.DONE[:1] and "settings" in t.user_attrs
        ]
        if not found:
            raise EarthPriorError(f"study {study.study_name} has no finished trial {number}")
        return found[0]
    best = studies.best_trials(study)
    if not best:
        raise EarthPriorError(f"no trial of study {study.study_name} has finished yet")
    if len(best) > 1:
        front = "; ".join(f"{trial.number} ({studies.values_text(study, trial.values)})" for trial in best)
        raise EarthPriorError(f"several trials are best, each at something: {front}. Choose one with --trial")
    return best[0]


def _check_labels(params: Params, tune: TuneParams, root: Path, stats: Mapping[str, Any]) -> None:
    """A probe without labels would be found out after the first training."""
    if tune.metric == "gain":
        return
    selection, column = select(params, root, stats), params.evaluate.label_column
    for usage, rows in (("train", selection.train), ("validate", selection.validate)):
        if not any(row.values.get(column) for row in rows):
            raise ParamsError(
                f"tune.metric {tune.metric} needs labels, and no {usage} row of the catalog has one in column "
                f"{column!r} (evaluate.label_column); use metric gain"
            )
