from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from earthprior.errors import EarthPriorError
from earthprior.params import Params, TuneParams
from earthprior.tuning import presence
from earthprior.tuning.presence import Presence, at_work
from earthprior.tuning.sampling import AddressedSampler, pruner
from earthprior.tuning.study import (
    ATTEMPTS,
    Place,
    best_trials,
    count,
    load_study,
    open_study,
    resubmit,
    take_up_stale,
    values_text,
    working,
)

COMMON = {"seed": 0}


@pytest.fixture
def tune(make_params: Callable[..., Params]) -> TuneParams:
    tune = make_params({"tune.startup_trials": 3}).tune
    assert tune is not None
    return tune


@pytest.fixture
def place(tmp_path: Path, tune: TuneParams) -> Place:
    return Place.of(tmp_path, tune, "mine")


def objective(trial: optuna.Trial) -> float:
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    kind = trial.suggest_categorical("kind", ["a", "b"])
    weight = trial.suggest_float("weight", 0, 1) if kind == "b" else 0.0
    return -abs(lr - 0.01) + weight


def draws(study: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_study_in_pieces_draws_what_one_in_a_piece_draws(tmp_path: Path, tune: TuneParams, sampler: str) -> None:
    tune = tune.model_copy(update={"sampler": sampler})
    whole = open_study(Place.of(tmp_path / "whole", tune, "s"), tune, COMMON, 3)
    whole.optimize(objective, n_trials=9)
    place = Place.of(tmp_path / "pieces", tune, "s")
    for _ in range(3):
        open_study(place, tune, COMMON, 3).optimize(objective, n_trials=3)
    pieces = draws(load_study(place))
    assert pieces == draws(whole)
    assert len({params["lr"] for params in pieces}) == 9
    other = open_study(
        Place.of(tmp_path / "other", tune, "s"), tune.model_copy(update={"sampler_seed": 1}), COMMON, 3
    )  # fmt: skip
    other.optimize(objective, n_trials=1)
    assert draws(other) != pieces[:1]


def test_other_settings_under_the_same_name_are_refused(place: Place, tune: TuneParams) -> None:
    open_study(place, tune, {"seed": 0, "lr_schedule": "cosine"}, 3)
    with pytest.raises(EarthPriorError) as caught:
        open_study(place, tune, {"seed": 0, "lr_schedule": "step", "epochs": 3}, 3)
    assert "  epochs: (absent) -> 3\n  lr_schedule: cosine -> step\n" in str(caught.value)


def test_a_study_that_is_not_there_is_not_made(place: Place) -> None:
    with pytest.raises(EarthPriorError, match="there is no study mine"):
        load_study(place)
    assert place.journal is not None
    assert not place.journal.exists()


@pytest.mark.parametrize(
    "storage", ["nonsense://x", "sqlite:////proc/none/s.db", "postgresql://me:secret@127.0.0.1:9/d"]
)
def test_a_storage_that_cannot_be_used_is_one_message(tmp_path: Path, tune: TuneParams, storage: str) -> None:
    tune = tune.model_copy(update={"storage": storage})
    with pytest.raises(EarthPriorError) as caught:
        open_study(Place.of(tmp_path, tune, "s"), tune, COMMON, 3)
    assert "secret" not in str(caught.value)


def test_relative_storage_is_the_main_checkouts(tmp_path: Path, tune: TuneParams) -> None:
    copy = tmp_path / ".dvc/tmp/exps/tmpabc"
    copy.mkdir(parents=True)

    def place(storage: str | None) -> Place:
        return Place.of(copy, tune.model_copy(update={"storage": storage}), "s")

    assert place(None).journal == tmp_path / "work/tune/s/journal.log"
    assert place("shared/j.log").journal == tmp_path / "shared/j.log"
    assert place("sqlite:///studies.db").storage == f"sqlite:///{tmp_path}/studies.db"
    assert place("sqlite:///studies.db").journal is None


def test_presence_is_seen_while_it_lasts(tmp_path: Path) -> None:
    with Presence(tmp_path) as here:
        assert at_work(tmp_path, here.name)
        assert (tmp_path / here.name).exists()
    assert not (tmp_path / here.name).exists()
    script = f"import sys; sys.path[:] = {sys.path!r}\nfrom pathlib import Path\n"
    script += f"from earthprior.tuning.presence import Presence\nprint(Presence(Path({str(tmp_path)!r})).name)"
    dead = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / dead).touch()
    assert not at_work(tmp_path, dead), "a process of this machine is asked for, not its file"


def test_a_process_elsewhere_is_judged_by_its_files_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "elsewhere+12+34"
    assert not at_work(tmp_path, name)
    (tmp_path / name).touch()
    assert at_work(tmp_path, name)
    old = time.time() - presence.PATIENCE_SECONDS - 5
    os.utime(tmp_path / name, (old, old))
    assert not at_work(tmp_path, name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    monkeypatch.setattr(presence, "BEAT_SECONDS", 0.01)
    with Presence(tmp_path) as here:
        os.utime(tmp_path / here.name, (old, old))
        end = time.monotonic() + 5
        while (tmp_path / here.name).stat().st_mtime == old and time.monotonic() < end:
            time.sleep(0.01)
        assert (tmp_path / here.name).stat().st_mtime > old


def left_behind(study: optuna.Study, worker: str) -> int:
    """A trial that its process died in."""
    trial = study.ask()
    trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    trial.set_user_attr("worker", worker)
    return trial.number


def test_a_trial_whose_process_died_is_gone_on_with(place: Place, tune: TuneParams) -> None:
    study = open_study(place, tune, COMMON, 3)
    with working(place) as here:
        mine = left_behind(study, here)
        lost = left_behind(study, "elsewhere+12+34")
        assert take_up_stale(place, study) == [lost]
        assert take_up_stale(place, study) == []
        trials = study.trials
        assert [trial.state for trial in trials] == [TrialState.RUNNING, TrialState.FAIL, TrialState.WAITING]
        follower = {"continues": lost, "folder": "trial-001", "attempt": 2, "epochs_before": 0}
        assert trials[2].user_attrs == follower
        again = study.ask()
        assert again.number == 2
        assert again.suggest_float("lr", 1e-4, 1e-1, log=True) == trials[lost].params["lr"]
    assert (count(study).done, count(study).running, count(study).failed) == (0, 2, 0)
    assert mine == 0


def test_a_trial_that_kills_its_process_each_time_is_given_up(place: Place, tune: TuneParams) -> None:
    study = open_study(place, tune, COMMON, 3)
    left_behind(study, "elsewhere+12+34")
    for _ in range(ATTEMPTS - 1):
        take_up_stale(place, study)
        study.ask().set_user_attr("worker", "elsewhere+12+34")
    take_up_stale(place, study)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * ATTEMPTS
    assert {trial.user_attrs.get("folder", "trial-000") for trial in study.trials} == {"trial-000"}
    assert count(study).failed == 1


def test_progress_and_requests_to_stop_do_not_use_up_attempts(place: Place, tune: TuneParams) -> None:
    study = open_study(place, tune, COMMON, 3)
    left_behind(study, "elsewhere+12+34")
    for epoch in range(1, 3 * ATTEMPTS):
        trial = study.trials[-1]
        study.tell(trial.number, state=TrialState.FAIL)
        if epoch % 2:
            resubmit(study, trial, died=False)
        else:
            trial.user_attrs["epoch"] = epoch
            resubmit(study, trial)
        study.ask().set_user_attr("settings", {"threads": 1})
    assert study.trials[-1].user_attrs["attempt"] == 1
    last = study.trials[-1]
    resubmit(study, last)
    resubmit(study, last)
    assert count(study).running == 1
    assert len([trial for trial in study.trials if trial.state == TrialState.WAITING]) == 1, "one follower, not two"
    assert study.trials[-1].user_attrs["settings"] == {"threads": 1}


def test_a_torn_line_does_not_cost_the_study(place: Place, tune: TuneParams) -> None:
    open_study(place, tune, COMMON, 3).optimize(objective, n_trials=2)
    assert place.journal is not None
    with place.journal.open("a") as handle:
        handle.write('{"op_code": 5, "worker_i')
    study = open_study(place, tune, COMMON, 3)
    study.optimize(objective, n_trials=1)
    assert [trial.state for trial in load_study(place).trials] == [TrialState.COMPLETE] * 3


def test_of_equal_trials_the_first_is_best(place: Place, tune: TuneParams) -> None:
    study = open_study(place, tune, COMMON, 3)
    for value in (0.1, 0.5, 0.5):
        study.tell(study.ask(), value)
    assert [trial.number for trial in best_trials(study)] == [1]


def test_a_database_finds_its_stale_trials_by_heartbeat(tmp_path: Path, tune: TuneParams) -> None:
    tune = tune.model_copy(update={"storage": f"sqlite:///{tmp_path}/studies.db"})
    place = Place.of(tmp_path, tune, "s")
    study = open_study(place, tune, COMMON, 3)
    trial = study.ask()
    trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    storage: Any = study._storage
    backend = getattr(storage, "_backend", storage)
    assert backend.heartbeat_interval == 60
    backend.record_heartbeat(trial._trial_id)
    backend.grace_period = 1
    time.sleep(2.1)
    # asked for by name, not only when a trial begins: the last ones wanted may all be stale
    assert take_up_stale(place, study) == [0]
    study.optimize(lambda trial: trial.suggest_float("lr", 1e-4, 1e-1, log=True), n_trials=1)
    first, second = study.trials
    assert first.state == TrialState.FAIL
    assert (second.state, second.params) == (TrialState.COMPLETE, first.params)
    assert second.user_attrs["continues"] == 0


FIRST = """
import sys
sys.path[:] = {path!r}
from pathlib import Path
from earthprior.params import TuneParams
from earthprior.tuning.study import Place, open_study
root, tune = Path({root!r}), TuneParams.model_validate_json({tune!r})
for storage in (None, "sqlite:///studies.db"):
    place = Place.of(root, tune.model_copy(update=dict(storage=storage)), "s")
    study = open_study(place, tune, dict(seed=0), 3)
    study.optimize(lambda trial: trial.suggest_float("lr", 1e-4, 1e-1, log=True), n_trials=2)
"""


def test_four_processes_may_use_new_storages_at_once(tmp_path: Path, tune: TuneParams) -> None:
    script = FIRST.format(path=sys.path, root=str(tmp_path), tune=tune.model_dump_json())
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]  # fmt: skip
    said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    for storage in (None, "sqlite:///studies.db"):
        study = load_study(Place.of(tmp_path, tune.model_copy(update={"storage": storage}), "s"))
        assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 8


def test_what_was_reached_is_told_with_its_unit(place: Place, tune: TuneParams) -> None:
    study = open_study(place, tune.model_copy(update={"metric": "both", "pruner": "none"}), COMMON, 3)
    assert best_trials(study) == []
    study.tell(study.ask(), [0.5, 0.3])
    (best,) = best_trials(study)
    assert values_text(study, best.values) == "gain +0.5000 dB, probe 0.3000"
    assert values_text(study, None) == "unfinished"


@pytest.mark.parametrize("name", ["median", "hyperband", "none"])
def test_pruners_judge_by_epoch(tune: TuneParams, name: str) -> None:
    tune = tune.model_copy(update={"pruner": name, "startup_trials": 2, "pruning_warmup_epochs": 2})
    study = optuna.create_study(
        direction="maximize", sampler=AddressedSampler(tune), pruner=pruner(tune, 9), study_name="p"
    )  # fmt: skip

    def gain(trial: optuna.Trial) -> float:
        level = trial.suggest_float("x", 0, 1)
        for epoch in range(1, 10):
            trial.report(-1.0 if trial.number > 3 else level, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return level

    study.optimize(gain, n_trials=12)
    pruned = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    ended = {max(trial.intermediate_values) for trial in pruned if trial.number in (4, 5)}
    if name == "median":
        assert ended == {2}, "two epochs are every trial's"
    else:
        assert bool(ended) == (name == "hyperband")
        assert min(ended, default=1) < 9
