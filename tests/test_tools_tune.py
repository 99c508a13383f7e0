"""`earthprior tune` on a dozen tiny chips: what it finds, how it is stopped and continued, and what it leaves."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from optuna.trial import TrialState

from earthprior import cli, identity, outbox, tracking
from earthprior.errors import DataError, DivergedError, EarthPriorError, Interrupted, ParamsError, StorageError
from earthprior.identity import CodeHash
from earthprior.params import Params, load
from earthprior.stages import pretrain
from earthprior.tools import tune
from earthprior.training import session
from earthprior.training.distributed import World, only_writer
from earthprior.training.loop import Trainer
from earthprior.tuning import jobs, worker
from earthprior.tuning.study import Place, load_study
from earthprior.undelivered import waiting

SPACE = {"lr": {"low": 0.001, "high": 0.02, "log": True}, "loss_fn": {"choices": ["mse", "hybrid_light"]},
  "loss_weights.alpha": {"low": 0.5, "high": 1.0}}  # fmt: skip
STUDY: Mapping[str, Any] = {
    "tune__study": "mine", "tune__trials": 3, "tune__startup_trials": 2, "tune__pruner": "none", "tune__space": SPACE,
    "epochs": 2, "warmup_epochs": 0,
}  # fmt: skip
MakeProject = Callable[..., tuple[Path, Params]]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without MLflow, which has a test of its own, and without what a developer's shell may say."""
    # Trials set torch's threads, and other tests compare digits.
    before = torch.get_num_threads()
    monkeypatch.setattr(tracking, "import_mlflow", lambda: False)
    for name in ("DVC_STAGE", "DVC_EXP_NAME", "WORLD_SIZE", "EARTHPRIOR_TUNE_JOB", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def project(make_project: MakeProject) -> MakeProject:
    def make(*root: Path, **overrides: Any) -> tuple[Path, Params]:
        return make_project(*root, **{**STUDY, **overrides})

    return make


def search(params: Params, root: Path, trials: int | None = None, jobs: int = 1) -> optuna.Study:
    tune.run(params, root, trials, jobs, record_best=False)
    return study_of(params, root)


def study_of(params: Params, root: Path, name: str = "mine") -> optuna.Study:
    assert params.tune is not None
    return load_study(Place.of(root, params.tune, name))


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def best_gain(root: Path) -> float:
    return float(pd.read_csv(root / "results/pretrain/history.csv")["gain_db/mean"].max())


class StopAfter:
    """Stands for a request to stop, made after so many steps of all trials together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
        self.left = steps
        update = Trainer._update

        def counted(trainer: Trainer, *arguments: Any) -> Any:
            self.left -= 1
            return update(trainer, *arguments)

        monkeypatch.setattr(Trainer, "_update", counted)
        monkeypatch.setattr("earthprior.training.stop.StopRequest.signal_number", property(self.asked))

    def asked(self, request: Any) -> int | None:
        return signal.SIGTERM if self.left <= 0 else None


def test_a_study_finds_what_the_stage_then_repeats(project: MakeProject, capsys: pytest.CaptureFixture[str]) -> None:
    root, params = project()
    study = search(params, root)
    assert states(study) == ["COMPLETE"] * 3
    for trial in study.trials:
        assert set(trial.params) == {"lr", "loss_fn"} | (
            {"loss_weights.alpha"} if trial.params["loss_fn"] == "hybrid_light" else set()
        )
        assert trial.user_attrs["settings"] == {**trial.params, "threads": 1, "epochs": 2}
        assert len(trial.intermediate_values) == 2
        assert trial.value == max(trial.intermediate_values.values())
        assert trial.user_attrs["gain_db"].keys() == {
            f"rho_{rho}" for rho in ("0.05", "0.1", "0.2", "0.5", "1", "2", "5")
        }
    assert study.trials[0].params == {"loss_fn": "mse", "lr": 0.01}, "the values of params.yaml"
    folder = root / "work/tune/mine"
    assert "mine" in (folder / "report/report.html").read_text()
    table = pd.read_csv(folder / "report/trials.csv")
    assert table["number"].tolist() == [0, 1, 2]
    assert "best: trial" in capsys.readouterr().out

    text = (root / "params.yaml").read_text()
    tune.apply(params, root, None)
    applied = load(root / "params.yaml")
    assert applied.lr == study.best_trial.params["lr"]
    assert applied.model_dump(exclude={"lr", "loss_fn", "loss_weights"}) == params.model_dump(
        exclude={"lr", "loss_fn", "loss_weights"}
    )
    pretrain.run(applied, root)
    assert best_gain(root) == study.best_value
    # applying again changes nothing, and the study is the same one although lr is another now
    tune.apply(applied, root, None)
    assert "0 values changed" in capsys.readouterr().out
    assert text != (root / "params.yaml").read_text()


def test_the_printed_line_says_all_that_a_trial_had(project: MakeProject, capsys: pytest.CaptureFixture[str]) -> None:
    root, params = project(tune__trials=1, tune__epochs=1, warmup_epochs=0)
    study = search(params, root)
    capsys.readouterr()
    tune.apply(params, root, 0)
    line = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert line[:4] == ["dvc", "exp", "run", "-S"]
    values = dict(part.split("=", 1) for part in line[3:] if part != "-S")
    assert values["epochs"] == "1"
    assert float(values["lr"]) == study.trials[0].params["lr"]
    # params.yaml gets what was searched, not the short training
    assert load(root / "params.yaml").epochs == 2


def test_params_keep_their_comments(project: MakeProject, tmp_path: Path) -> None:
    root, params = project(tune__trials=1)
    search(params, root)
    committed = (Path(__file__).parents[1] / "params.yaml").read_text()
    (root / "params.yaml").write_text(committed)
    with pytest.raises(EarthPriorError, match=r"there is no study .*There are: mine; name one in tune\.study"):
        tune.apply(load(root / "params.yaml"), root, None)
    (root / "params.yaml").write_text(committed.replace("study: null ", "study: mine "))
    tune.apply(load(root / "params.yaml"), root, None)
    after = (root / "params.yaml").read_text()
    assert after.count("#") == committed.count("#")
    assert load(root / "params.yaml").lr != 0.001


@pytest.mark.soak
def test_stopped_and_continued_it_comes_to_the_same(
    project: MakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_root, params = project(tmp_path / "whole", tune__trials=2, tune__sampler="random")
    whole = search(params, whole_root)
    root, params = project(tmp_path / "pieces", tune__trials=2, tune__sampler="random")
    with monkeypatch.context() as patch:
        StopAfter(patch, 3)
        with pytest.raises(Interrupted, match=r"saved step 3 of 8$"):
            search(params, root)
    assert states(study_of(params, root)) == ["FAIL", "WAITING"]
    assert (root / "work/tune/mine/trial-000/state/ckpt-00000003.json").is_file()
    steps: list[int] = []
    update = Trainer._update
    monkeypatch.setattr(
        Trainer, "_update", lambda trainer, *rest: (steps.append(trainer.step), update(trainer, *rest))[1]
    )
    study = search(params, root)
    assert steps[:5] == [3, 4, 5, 6, 7]
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"]
    again = study.trials[1]
    assert again.user_attrs["continues"] == 0
    assert again.params == whole.trials[0].params
    assert again.values == whole.trials[0].values
    assert again.intermediate_values == whole.trials[0].intermediate_values


def test_a_killed_process_costs_nothing(project: MakeProject) -> None:
    root, params = project(epochs=12, tune__trials=1)
    first = start(root)
    checkpoints = root / "work/tune/mine/trial-000/state"
    wait_for(lambda: len(list(checkpoints.glob("ckpt-*.json"))) > 1, first)
    first.kill()
    first.communicate()
    done = start(root)
    said, _ = done.communicate(timeout=60)
    assert done.returncode == 0, said
    assert "trial 0 was left by a process that died; another goes on from its state" in said
    assert "continuing at step" in said
    assert states(study_of(params, root)) == ["FAIL", "COMPLETE"]
    assert not checkpoints.exists() or not list(checkpoints.glob("ckpt-*"))


@pytest.mark.soak
def test_several_processes_share_a_fresh_study(project: MakeProject) -> None:
    root, params = project(epochs=1, tune__trials=3, threads=2)
    done = start(root, "--jobs", "2")
    said, _ = done.communicate(timeout=60)
    assert done.returncode == 0, said
    study = study_of(params, root)
    assert states(study) == ["COMPLETE"] * 3
    assert [trial.user_attrs["settings"]["threads"] for trial in study.trials] == [1] * 3
    assert len({trial.params["lr"] for trial in study.trials}) == 3
    assert "[1] trial " in said
    assert "[2] trial " in said


def test_what_diverges_or_does_not_fit_has_its_reason_and_the_study_goes_on(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {"lr": {"choices": [0.001, 0.002, 0.003, 0.004]}}
    root, params = project(tune__trials=3, tune__space=space, tune__sampler_seed=1)
    ends = {
        0.001: DivergedError("training diverged at step 7"),
        0.002: ParamsError("the batch is too large"),
        0.003: RuntimeError("a bug"),
    }
    run = session.Session.run

    def fails(self: session.Session, *arguments: Any) -> bool:
        if self.params.lr in ends:
            raise ends[self.params.lr]
        return run(self, *arguments)

    monkeypatch.setattr(session.Session, "run", fails)
    study = search(params, root)
    reasons = {trial.params["lr"]: (trial.state.name, trial.user_attrs.get("reason")) for trial in study.trials}
    told = {
        0.001: ("PRUNED", "training diverged at step 7"),
        0.002: ("FAIL", "the batch is too large"),
        0.003: ("FAIL", "RuntimeError: a bug"),
        0.004: ("COMPLETE", None),
    }
    assert reasons == {lr: told[lr] for lr in reasons}
    assert {"PRUNED", "COMPLETE", "FAIL"} & set(states(study))
    assert sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in study.trials) == 3


@pytest.mark.parametrize("error", [DivergedError("diverged at step 3"), torch.OutOfMemoryError("too large")])
def test_a_trial_that_breaks_off_is_told_of_and_the_study_goes_on(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    root, params = project(tune__trials=2, lr=0.01)
    update = Trainer._update

    def breaks(self: Trainer, *arguments: Any) -> Any:
        if self.params.lr == 0.01 and self.step == 3:
            raise error
        return update(self, *arguments)

    monkeypatch.setattr(Trainer, "_update", breaks)
    study = search(params, root)
    assert "COMPLETE" in states(study)
    assert "RUNNING" not in states(study)
    broken = [trial for trial in study.trials if trial.params["lr"] == 0.01]
    assert broken
    for trial in broken:
        assert trial.state == (TrialState.PRUNED if isinstance(error, DivergedError) else TrialState.FAIL)
        assert not (root / f"work/tune/mine/trial-{trial.number:03d}").exists()
        (box,) = [box for box, record in waiting(root) if record.tags.get("optuna.trial") == str(trial.number)]
        end = box.ending()
        assert end is not None
        assert end[0] == "FAILED"
        assert [record["step"] for record in box.journal.read()], "its points are kept"


@pytest.mark.soak
def test_another_number_of_jobs_goes_on_with_the_same_bits(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, params = project(tune__trials=1, threads=2)
    with monkeypatch.context() as patch:
        StopAfter(patch, 3)
        with pytest.raises(Interrupted):
            search(params, root)
    (root / "params.yaml").write_text((root / "params.yaml").read_text().replace('"threads": 2', '"threads": 1'))
    study = search(load(root / "params.yaml"), root)
    assert states(study) == ["FAIL", "COMPLETE"]
    assert study.trials[1].user_attrs["settings"]["threads"] == 2


def test_changed_code_begins_a_stopped_trial_anew(project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    root, params = project(tune__trials=1)
    with monkeypatch.context() as patch:
        StopAfter(patch, 3)
        with pytest.raises(Interrupted):
            search(params, root)
    files = {**identity.code_hash().files, "losses.py": "changed"}
    monkeypatch.setattr(identity, "code_hash", lambda *_, **__: CodeHash(files, "changed"))
    steps: list[int] = []
    update = Trainer._update
    monkeypatch.setattr(Trainer, "_update", lambda self, *rest: (steps.append(self.step), update(self, *rest))[1])
    assert states(search(params, root)) == ["FAIL", "COMPLETE"]
    assert steps == list(range(8))


def test_a_trial_whose_outbox_finds_no_room_elsewhere_counts_and_keeps_it(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, kept: Path) -> None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(outbox, "_link", full)
    root, params = project(tune__trials=1)
    assert states(search(params, root)) == ["COMPLETE"]
    (state,) = [waits.folder for waits, record in waiting(root) if record.parent]
    assert state.is_relative_to(root / "work/tune/mine")
    assert (state / "metrics.jsonl").read_text().count("\n") > 2


def test_a_trial_that_another_process_holds_is_left_to_it(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, params = project(tune__trials=1)
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    folder = root / "work/tune/mine/trial-000/state"
    folder.mkdir(parents=True)
    (folder / "ckpt-00000001.pt").write_text("the owner's")
    with only_writer(folder, World()):
        study = search(params, root)
    assert all("is training this very run" in trial.user_attrs["reason"] for trial in study.trials[:-1])
    assert states(study)[-1] == "COMPLETE", "another trial"
    assert (folder / "ckpt-00000001.pt").read_text() == "the owner's"


def test_a_trial_that_others_took_does_not_end_the_search(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, params = project(tune__trials=2)
    run = session.Session.run
    taken: list[int] = []

    def stolen(self: session.Session, *arguments: Any) -> bool:
        if not taken:
            taken.append(0)
            study_of(params, root).tell(0, state=TrialState.FAIL)
        return run(self, *arguments)

    monkeypatch.setattr(session.Session, "run", stolen)
    assert states(search(params, root)) == ["FAIL", "COMPLETE", "COMPLETE"]


def test_a_report_that_fails_costs_nothing(project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    root, params = project(tune__trials=1)

    def fails(*arguments: Any) -> Path:
        raise OSError("no space")

    monkeypatch.setattr("earthprior.tuning.pages.write", fails)
    assert states(search(params, root)) == ["COMPLETE"]


@pytest.mark.soak
def test_a_study_of_failures_ends(project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    root, params = project(tune__trials=30)

    def fails(self: session.Session, *arguments: Any) -> bool:
        raise ParamsError("the batch is too large")

    monkeypatch.setattr(session.Session, "run", fails)
    with pytest.raises(EarthPriorError, match="5 trials failed and 0 did not: the batch is too large"):
        search(params, root)
    assert states(study_of(params, root)) == ["FAIL"] * worker.FEW
    # mended, it goes on
    monkeypatch.undo()
    monkeypatch.setattr(tracking, "import_mlflow", lambda: False)
    assert states(search(params, root, trials=1))[-1] == "COMPLETE"


@pytest.mark.parametrize(("error", "kept"), [(StorageError("disk full"), True), (DataError("a chip is gone"), False)])
def test_what_no_other_trial_would_mend_ends_the_search(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch, error: EarthPriorError, kept: bool
) -> None:
    root, params = project()

    def fails(self: session.Session, *arguments: Any) -> bool:
        raise error

    monkeypatch.setattr(session.Session, "run", fails)
    with pytest.raises(type(error), match=str(error)):
        search(params, root)
    assert states(study_of(params, root)) == ["FAIL", *(["WAITING"] if kept else [])]


def test_trials_that_others_outdo_are_pruned(project: MakeProject) -> None:
    space = {"lr": {"choices": [0.01, 1e-9]}}
    root, params = project(
        epochs=3, lr=1e-9, tune__trials=6, tune__space=space, tune__pruner="median", tune__startup_trials=1,
        tune__pruning_warmup_epochs=0, tune__sampler="random",
    )  # fmt: skip
    study = search(params, root)
    pruned = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    assert pruned
    assert all("pruned after epoch" in trial.user_attrs["reason"] for trial in pruned)
    assert not list((root / "work/tune/mine").glob("trial-*/state/ckpt-*"))
    # there is no MLflow here: what it has yet to hear of pruned trials is kept as that of finished ones is
    ended = {int(record.tags["optuna.trial"]): box.ending() for box, record in waiting(root) if record.parent}
    trained = {trial.number: trial.state.name for trial in study.trials if "same_as" not in trial.user_attrs}
    assert {number: end and end[0] for number, end in ended.items()} == {
        number: {"COMPLETE": "FINISHED", "PRUNED": "KILLED"}[state] for number, state in trained.items()
    }
    # equal settings give equal bits, so they are not trained twice
    twins = [trial for trial in study.trials if "same_as" in trial.user_attrs]
    assert all(trial.values == study.trials[trial.user_attrs["same_as"]].values for trial in twins)


def test_a_schedule_that_misses_a_level_does_not_compare(project: MakeProject) -> None:
    space = {"diffusion.beta_end": {"choices": [0.02, 0.00001]}}
    root, params = project(epochs=1, tune__space=space, tune__trials=2, tune__sampler="random")
    study = search(params, root)
    missed = [trial for trial in study.trials if trial.params["diffusion.beta_end"] < 0.02]
    assert missed
    for trial in missed:
        # pruned, not failed, so that the sampler keeps away from there
        assert trial.state == TrialState.PRUNED
        assert "does not reach rho" in trial.user_attrs["reason"]


@pytest.mark.soak
def test_probe_and_gain_make_a_front(project: MakeProject, capsys: pytest.CaptureFixture[str]) -> None:
    root, params = project(
        epochs=1, tune__metric="both", tune__trials=3, evaluate__probe_pixels=16, augmentation__flip=False
    )  # fmt: skip
    study = search(params, root)
    gain, probe = zip(*(trial.values for trial in study.trials), strict=True)
    assert all(0 < value <= 1 for value in probe)
    assert len(set(gain)) == 3
    out = capsys.readouterr().out
    if len(study.best_trials) > 1:
        with pytest.raises(EarthPriorError, match="Choose one with --trial"):
            tune.apply(params, root, None)
        assert "none of which is worse in everything" in out
    tune.apply(params, root, study.best_trials[0].number)
    assert load(root / "params.yaml").lr == study.best_trials[0].params["lr"]


def test_a_probe_without_labels_is_refused_before_any_training(project: MakeProject) -> None:
    root, params = project(tune__metric="probe", evaluate__label_column="lable")
    with pytest.raises(ParamsError, match=r"no train row of the catalog has one in column 'lable'"):
        search(params, root)


def test_a_search_needs_statistics_and_one_process(
    project: MakeProject, make_params: Callable[..., Params], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EarthPriorError, match="run: dvc repro stats"):
        search(make_params(), tmp_path)
    root, params = project()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EarthPriorError, match="start it without torchrun, with --jobs"):
        search(params, root)


def test_trials_too_short_for_params_are_refused_before_any(project: MakeProject) -> None:
    root, params = project(tune__epochs=1, warmup_epochs=1)
    with pytest.raises(ParamsError, match="warmup_epochs 1 leaves no epoch of 1 to train in"):
        search(params, root)
    assert not (root / "work").exists()


def test_the_verb_refuses_a_trial_without_apply() -> None:
    result = CliRunner().invoke(cli.main, ["tune", "--trial", "3"])
    assert result.exit_code == 2
    assert "add --apply" in result.stderr


@pytest.mark.parametrize(
    ("count", "gpus", "shares"),
    [
        (2, ["0", "1", "2", "3"], ["0,2", "1,3"]),
        (3, ["4", "6"], ["4", "6", "4"]),
        (2, ["GPU-ab", "GPU-cd"], ["GPU-ab", "GPU-cd"]),
    ],
)
def test_gpus_are_divided(count: int, gpus: list[str], shares: list[str]) -> None:
    environments = jobs.environments(count, gpus)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == shares
    assert [environment["EARTHPRIOR_TUNE_JOB"] for environment in environments] == [
        f"{number + 1}/{count}" for number in range(count)
    ]


def test_gpus_that_are_visible_are_the_ones_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert jobs.visible_gpus("auto") == ["3", "5"]
    assert jobs.visible_gpus("cpu") == []
    assert jobs.visible_gpus("cuda:1") == []


def test_threads_are_divided(make_params: Callable[..., Params]) -> None:
    assert [jobs.threads(make_params({"threads": 8}), count) for count in (1, 2, 3, 16)] == [8, 4, 2, 1]


@pytest.mark.soak
def test_the_study_is_the_parent_of_its_trials_in_mlflow(project: MakeProject) -> None:
    root, params = project(epochs=1, tune__trials=2)
    done = start(root, mlflow=True)
    said, _ = done.communicate(timeout=240)
    assert done.returncode == 0, said
    with sqlite3.connect(root / "mlflow.db") as database:
        runs = dict(database.execute("select name, run_uuid from runs where status = 'FINISHED'").fetchall())
        parents = database.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'").fetchall()
        rates = database.execute("select run_uuid, value from params where key = 'lr'").fetchall()
        best = database.execute("select value from metrics where key = 'study/best_gain'").fetchall()
        sorted_by = database.execute("select max(value) from metrics where key = 'val/gain_db/best'").fetchall()
    trials = [run_id for name, run_id in runs.items() if name.startswith("trial-00")]
    assert "trial-000: loss_fn=mse lr=0.01" in runs
    assert len(runs) == 3
    assert sorted(parents) == sorted((run_id, runs["study mine"]) for run_id in trials)
    study = study_of(params, root)
    assert sorted(float(value) for _, value in rates) == sorted(trial.params["lr"] for trial in study.trials)
    assert max(value for (value,) in best) == sorted_by[0][0] == study.best_value
    assert {trial.user_attrs["mlflow_run_id"] for trial in study.trials} == set(trials)
    kept = root / "mlruns"
    (parent,) = kept.rglob(f"{runs['study mine']}/artifacts")
    assert (parent / "study/report.html").is_file()
    assert (parent / "figures/history.png").is_file() or list((parent / "figures").glob("*.png"))
    (child,) = kept.rglob(f"{trials[0]}/artifacts")
    number = next(trial.number for trial in study.trials if trial.user_attrs["mlflow_run_id"] == trials[0])
    assert load(child / "params.yaml").lr == study.trials[number].params["lr"]


def start(root: Path, *arguments: str, mlflow: bool = False) -> subprocess.Popen[str]:
    """A real process of the verb."""
    script = "import sys\nfrom earthprior import tracking\nfrom earthprior.cli import main\n"
    script += "" if mlflow else "tracking.import_mlflow = lambda: False\n"
    script += "main(['tune', '--no-record', *sys.argv[2:]])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    if not mlflow:
        # also for the processes of --jobs, which are told by no script
        environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    return subprocess.Popen(
        [sys.executable, "-c", script, "tune", *arguments], cwd=root, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
