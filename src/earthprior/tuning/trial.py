"""One trial: settings drawn from the space, the training of the stage, and its worth."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from earthprior import build, identity, naming, outbox
from earthprior.chips.selection import JUDGED_CHIPS, spread
from earthprior.errors import CodeChangedError, ParamsError, Pruned
from earthprior.evaluation import probing
from earthprior.evaluation.labelled import Material
from earthprior.files import write_atomic
from earthprior.journal import Journal
from earthprior.params import Params, TuneParams, active, load
from earthprior.params.editing import overlay_text, plain
from earthprior.tracking import RunRef, Tracker, open_tracker
from earthprior.training.checkpoint import ACCEPT_CODE
from earthprior.training.distributed import World, only_writer
from earthprior.training.run import Home, Run
from earthprior.training.session import Hooks, Session, Trained, prepare_torch
from earthprior.training.stop import StopRequest
from earthprior.tuning.space import held_values, suggest
from earthprior.tuning.study import folder_name

LEVEL = "gain_db/"


@dataclass(frozen=True)
class Context:
    """What all trials of this process have in common.

    Attributes:
        root: The project's root.
        folder: The study's.
        study: Its name.
        params: Of params.yaml.
        params_text: The params.yaml that trials differ from, as it was when the search began.
        tune: Its section `tune`.
        settings: What trials have beside what is searched, by dotted key: all that their bits depend on here.
        missing_levels: Noise levels that params.yaml's own schedule does not reach.
        worker: The name of this process.
    """

    root: Path
    folder: Path
    study: str
    params: Params
    params_text: str
    tune: TuneParams
    settings: Mapping[str, Any]
    missing_levels: frozenset[str]
    worker: str


def run_trial(trial: optuna.Trial, context: Context, stop: StopRequest) -> tuple[float, ...]:
    """Train with settings of the trial's, and say what they are worth, one number per objective.

    Raises:
        Pruned: Others do better.
        Interrupted: Asked to stop; the state is saved.
        EarthPriorError: The settings do not go together, the training diverged, or the data are at fault.
    """
    began = time.monotonic()
    trial.set_user_attr("worker", context.worker)
    drawn = suggest(trial, context.params, context.tune)
    held = held_values(context.params, context.tune, drawn)
    # One that goes on from another has that one's settings, its threads among them.
    settings = trial.user_attrs.get("settings") or {**context.settings, **held, **drawn}
    trial.set_user_attr("settings", settings)
    folder = context.folder / str(trial.user_attrs.get("folder", folder_name(trial.number)))
    folder.mkdir(parents=True, exist_ok=True)
    text, _ = overlay_text(context.params_text, settings, "params.yaml with this trial")
    write_atomic(folder / "params.yaml", text)
    params = load(folder / "params.yaml")
    told = ", ".join(f"{key} {plain(value)}" for key, value in settings.items())
    print(f"trial {trial.number}: {told}", file=sys.stderr, flush=True)
    prepare_torch(params.threads)
    run = Run.of(params, context.root)
    trial.set_user_attr("fingerprint", run.fingerprint)
    code = identity.code_hash().digest[:12]
    trial.set_user_attr("code", code)
    if (twin := _twin(trial, run.fingerprint, code)) is not None:
        shutil.rmtree(folder, ignore_errors=True)
        return twin
    attempt = _Attempt(trial, context, params)
    home = Home(context.root, folder / "state", folder / "results", folder / "params.yaml")
    hooks = Hooks(attempt.open_run, attempt.validated, attempt.trained)
    device, accepted = build.device(params), bool(os.environ.get(ACCEPT_CODE))
    with only_writer(home.folder, World()):
        try:
            Session(run, home, hooks, device, World()).run(stop, accepted)
        except CodeChangedError as error:
            print(f"trial {trial.number} begins anew: {error}", file=sys.stderr, flush=True)
            if not outbox.set_aside(home.folder, identity.main_root(context.root)):
                raise
            for path in set(home.folder.iterdir()) - {home.folder / "lock", home.folder / "owner"}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            Session(run, home, hooks, device, World()).run(stop)
    trial.set_user_attr("seconds", round(time.monotonic() - began, 1))
    # MLflow has all of it, or its outbox has; a study of hundreds of trials would otherwise keep every network twice.
    if not outbox.Outbox(home.folder).waits:
        shutil.rmtree(folder, ignore_errors=True)
    return attempt.values


def _twin(trial: optuna.Trial, fingerprint: str, code: str) -> tuple[float, ...] | None:
    """The values of a finished trial of the same fingerprint and code: the same bits would come out again."""
    for other in trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        attributes = other.user_attrs
        if (attributes.get("fingerprint"), attributes.get("code")) == (fingerprint, code):
            trial.set_user_attr("same_as", other.number)
            for name in ("gain_db", "best_epoch", "mlflow_run_id"):
                if name in attributes:
                    trial.set_user_attr(name, attributes[name])
            return tuple(other.values)
    return None


class _Attempt:
    """What a trial does around its training; a class because its steps share the trial."""

    def __init__(self, trial: optuna.Trial, context: Context, params: Params) -> None:
        self.trial, self.context, self.params = trial, context, params
        self.values: tuple[float, ...] = ()

    def open_run(self, tags: Mapping[str, str], journal: Journal) -> Tracker:
        """The trial's MLflow run, nested in the study's.

        Raises:
            Pruned: The noise schedule does not reach the levels that the study compares at; as a failure the sampler
                would learn nothing of it.
        """
        missing = set(filter(None, tags.get("levels_missing", "").split(", "))) - self.context.missing_levels
        if missing and self.context.tune.metric != "probe":
            raise Pruned(
                f"the noise schedule does not reach rho {', '.join(sorted(missing))}, so the mean gain would compare "
                "with no other trial's"
            )
        own = {"optuna.study": self.context.study, "optuna.trial": str(self.trial.number)}
        # Of a study that was never told of there is no run to be nested in; nor is MLFLOW_RUN_ID a trial's to join.
        parent = RunRef.from_json(self.trial.study.user_attrs.get("mlflow_run") or {}).uid or "none"
        settings = self.trial.user_attrs["settings"]
        searched = {key: settings[key] for key in settings if key in self.context.tune.space}
        name = naming.titled(folder_name(self.trial.number), naming.differences(searched, {}))
        return open_tracker(self.context.root, name, active(self.params), {**tags, **own}, journal, parent=parent)

    def validated(self, row: Mapping[str, float], tracker: Tracker) -> None:
        """Report the gain after an epoch, and give the trial up where others do better.

        Raises:
            Pruned: They do.
        """
        epoch = int(row["epoch"])
        self.trial.set_user_attr("epoch", epoch)
        if self.context.tune.metric != "gain":
            return
        self.trial.report(self._gain(row), epoch)
        if epoch < self.params.epochs and self.trial.should_prune():
            tracker.set_tags({"optuna.state": "PRUNED"})
            raise Pruned(f"pruned after epoch {epoch} of {self.params.epochs}")

    def trained(self, trained: Trained) -> None:
        """The worth of the training, in the study and in its MLflow run.

        Raises:
            EarthPriorError: The probe cannot be judged.
        """
        best = trained.outcome.history[trained.outcome.best_epoch - 1]
        gain = self._gain(best) if self.context.tune.metric != "probe" else math.nan
        self.trial.set_user_attr("best_epoch", trained.outcome.best_epoch)
        levels = {name.removeprefix(LEVEL): value for name, value in best.items() if name.startswith(f"{LEVEL}rho_")}
        self.trial.set_user_attr("gain_db", levels)
        if run_id := trained.tracker.ref.run_id:
            self.trial.set_user_attr("mlflow_run_id", run_id)
        probe = self._probe(trained) if self.context.tune.metric != "gain" else math.nan
        self.values = {"gain": (gain,), "probe": (probe,), "both": (gain, probe)}[self.context.tune.metric]
        trained.tracker.set_tags({"optuna.state": "COMPLETE"})

    def _gain(self, row: Mapping[str, float]) -> float:
        """The mean gain over the levels that all trials of the study reach."""
        left_out = {f"{LEVEL}rho_{rho}" for rho in self.context.missing_levels} | {f"{LEVEL}mean"}
        found = [value for name, value in row.items() if name.startswith(LEVEL) and name not in left_out]
        return sum(found) / len(found)

    def _probe(self, trained: Trained) -> float:
        """The probe's first score on validation chips, never on the test chips, which a search must not see."""
        rows = spread(trained.selection.validate, JUDGED_CHIPS)
        material = Material(self.params, trained.selection, trained.normalizer, trained.device)
        scores = probing.linear_scores(material, trained.task, rows)
        if isinstance(scores, str):
            raise ParamsError(f"tune.metric {self.context.tune.metric} needs a probe: {scores}")
        trained.tracker.log({f"evaluate/probe/linear/network/{kind}": value for kind, value in scores.items()}, 0)
        return float(next(iter(scores.values())))
