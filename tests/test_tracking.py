"""Tracking against real MLflow stores in sqlite, and against servers that are dead or hang."""

from __future__ import annotations

import os
import pickle
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from earthprior import mirror, mlflow_find, mlflow_read, mlflow_run, tracking, tracking_store, tracking_view
from earthprior.errors import Interrupted
from earthprior.files import write_json
from earthprior.journal import Journal
from earthprior.tools import sync_tracking
from earthprior.tracking import RunRef, continue_or_open
from earthprior.tracking_store import locate, reason, redacted
from mlflow_store import PARAMS, TRAINED, client, evaluate, history, open_plain, pretrained, runs

pytestmark = pytest.mark.usefixtures("own_store_only")


@pytest.fixture
def root(tracked_root: Path) -> Path:
    return tracked_root


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """Takes connections, as a stopped process does, and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_run_has_everything(root: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "work/metrics.jsonl")
    (tmp_path / "stats.json").write_text("{}")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/a.png").write_text("x")
    tags = {"earthprior.fingerprint": "abc", "dvc.data_md5": "0123456789abcdef0123456789abcdef.dir"}
    with open_plain(root, journal, tags=tags) as tracker:
        tracker.log({"loss": 0.5, "mse@0.5%": 1.0, "bad": float("nan")}, step=3, epoch=0, seconds=1.5)
        tracker.log({"loss": 0.25}, step=4)
        tracker.set_tags({"levels_missing": "0.05"})
        tracker.log_artifact(tmp_path / "stats.json")
        tracker.log_artifact(tmp_path / "figures", "evaluation")
    delivery = tracker.close()
    assert (delivery.delivered, delivery.total, bool(delivery)) == (3, 3, True)
    (run,) = runs(root)
    uid = run.data.tags[mlflow_find.UID]
    assert tracker.ref == RunRef("sqlite:///mlflow.db", "earthprior", run.info.run_id, uid)
    assert RunRef.read(tmp_path / "work/run.json") == tracker.ref
    assert (run.info.status, run.info.run_name) == ("FINISHED", "r")
    assert run.data.params == {
        "lr": "1e-05",
        "data.bands": '["red", "nir"]',
        "unet_film.attention": "true",
        "grad_clip": "null",
        "task": "diffusion",
    }
    assert run.data.metrics == {"loss": 0.25, "mse_0.5_": 1.0}
    assert history(root, run.info.run_id, "loss") == [(3, 0.5), (4, 0.25)]
    assert run.data.tags.items() >= {**tags, "levels_missing": "0.05", "earthprior.pid": str(os.getpid())}.items()
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == tags["dvc.data_md5"]
    files = {
        file.path
        for folder in ("", "evaluation/figures")
        for file in client(root).list_artifacts(run.info.run_id, folder)
    }
    assert files >= {"stats.json", "evaluation/figures/a.png"}
    assert (root / "mlruns" / run.info.run_id / "artifacts/stats.json").is_file()
    first = journal.read()[0]
    assert {key: first[key] for key in ("step", "epoch", "seconds")} == {"step": 3, "epoch": 0, "seconds": 1.5}
    # under their own names, and with what a store has no place for
    assert first["metrics"].keys() == {"loss", "mse@0.5%", "bad"}


def test_times_are_those_of_the_journal(root: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append({"step": 1, "time_ms": 1_600_000_000_000, "metrics": {"loss": 1.0}})
    with open_plain(root, journal) as tracker:
        pass
    (metric,) = client(root).get_metric_history(tracker.ref.run_id, "loss")
    assert metric.timestamp == 1_600_000_000_000


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
@pytest.mark.parametrize("points", [0, 2])
def test_at_the_end_it_says_what_there_is_to_say(
    root: Path, status: str, points: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        tracker = open_plain(root)
        for step in range(points):
            tracker.log({"loss": 1.0}, step)
        assert tracker.close(status)
    assert ("2 of 2 points delivered" in caplog.text) == (points == 2)
    assert "0 of 0" not in caplog.text
    assert ("compare runs with" in caplog.text) == (status == "FINISHED")


@pytest.mark.parametrize(
    ("points", "told"), [(1, "1 of 1 points delivered to sqlite:///mlflow.db"), (0, "not all of the run is in sqlite")]
)
def test_where_only_files_wait_it_speaks_of_them(
    root: Path, points: int, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: mlflow_run.MlflowRun, path: Path, folder: str) -> None:
        raise ConnectionError("no room for files")

    monkeypatch.setattr(mlflow_run.MlflowRun, "upload", refuse)
    (root / "page.html").write_text("a page")
    tracker = open_plain(root)
    for step in range(points):
        tracker.log({"loss": 1.0}, step)
    tracker.log_artifact(root / "page.html")
    assert not tracker.close(timeout_seconds=3)
    assert told in caplog.text
    assert "its files, tags or end wait in work/, deliver it with: earthprior sync-tracking" in caplog.text
    assert "the rest waits" not in caplog.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError, "FAILED"),
        (KeyboardInterrupt, "KILLED"),
        (Interrupted, "KILLED"),
        (SystemExit, "FAILED"),
    ],
)
def test_status_tells_how_it_ended(root: Path, error: type[BaseException] | None, status: str) -> None:
    def work() -> None:
        with open_plain(root):
            if error is Interrupted:
                raise Interrupted("saved", signal.SIGTERM)
            if error:
                raise error

    if error:
        with pytest.raises(error):
            work()
    else:
        work()
    assert [run.info.status for run in runs(root)] == [status]


def test_a_run_says_what_it_has_otherwise(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_plain(root, run_name=None, differs="lr=0.1").close()
    open_plain(root, run_name="trial-003", differs="lr=0.1").close()
    monkeypatch.setenv("DVC_EXP_NAME", "wise-owl")
    open_plain(root, differs="lr=0.1").close()
    assert [run.info.run_name for run in runs(root)] == ["lr=0.1", "trial-003: lr=0.1", "wise-owl: lr=0.1"]


def test_a_joined_run_keeps_its_name_in_front(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_plain(root).close()
    (experiment,) = {run.info.experiment_id for run in runs(root)}
    made = client(root).create_run(experiment, run_name="bemused-hen").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    for _ in range(2):
        tracker = open_plain(root, differs="lr=0.1")
        tracker.close()
        assert tracker.ref.run_id == made
    assert client(root).get_run(made).info.run_name == "bemused-hen: lr=0.1"


def test_the_gain_is_a_curve_over_noise_levels(root: Path) -> None:
    row = {"epoch": 3.0, "loss": 1.0, "gain_db/rho_0.05": 0.25, "gain_db/rho_5": 0.5, "gain_db/mean": 0.375}
    with open_plain(root) as tracker:
        tracker.log_levels(row)
    ref = tracker.ref
    tracker = continue_or_open(root, ref, "evaluation", {}, {}, TRAINED)
    tracker.log_levels({"rho_0.1": 1.0, "mean": 1.0})
    tracker.close()
    assert history(root, str(ref.run_id), "val/gain_db_by_rho_percent") == [(5, 0.25), (500, 0.5)]
    assert history(root, str(ref.run_id), "evaluate/gain_db_by_rho_percent") == [(10, 1.0)]


def test_a_new_evaluation_takes_no_single_level_for_the_curve(root: Path) -> None:
    with open_plain(root) as tracker:
        tracker.log({"val/gain_db/mean": 0.75}, 20)
        tracker.log_levels({"rho_0.1": 0.5, "rho_5": 1.0})
    evaluate(root, tracker.ref)
    later = evaluate(root, tracker.ref)
    assert client(root).get_run(later.run_id).data.metrics == {"val/gain_db/mean": 0.75, "evaluate/gain_db/mean": 2.0}


def test_pictures_are_stored_once_also_by_a_continued_run(root: Path, tmp_path: Path) -> None:
    from matplotlib.image import imsave

    for step in (0, 25, 50):
        imsave(tmp_path / f"{step}.png", [[[0.0, 0.5, 1.0]] * 8] * 8)
    tracker = open_plain(root)
    for step in (0, 25):
        tracker.log_picture(tmp_path / f"{step}.png", "denoising", step)
    tracker.close("KILLED")
    tracker = open_plain(root, resume=tracker.ref)
    for step in (0, 25, 50):
        tracker.log_picture(tmp_path / f"{step}.png", "denoising", step)
    assert tracker.close()
    (run,) = runs(root)
    names = [file.path for file in client(root).list_artifacts(run.info.run_id, "images")]
    steps = [int(re.search(r"images/denoising\+step\+(\d+)\+", name)[1]) for name in names if name.endswith(".png")]
    assert sorted(steps) == [0, 25, 50]
    # by this MLflow's page finds them
    assert run.data.tags["mlflow.loggedImages"] == "True"


def test_the_experiment_offers_a_view_and_what_a_person_wrote_stays(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        open_plain(root).close()
        experiment = client(root).get_experiment_by_name("earthprior")
        assert experiment.tags == tracking_view.tags(experiment.experiment_id)
        address = f"http://127.0.0.1:5000{tracking_view.page(experiment.experiment_id)}"
        assert f"compare runs with: mlflow ui, then {address}" in caplog.text
        caplog.clear()
        client(root).set_experiment_tag(experiment.experiment_id, "mlflow.note.content", "mine")
        open_plain(root, parent="the study").close()
        assert "compare runs with" not in caplog.text, "of a study's trials"
    assert client(root).get_experiment(experiment.experiment_id).tags["mlflow.note.content"] == "mine"


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("http://me:secret@there:80/mlflow/", "http://***@there:80/mlflow"),
        ("sqlite:///mlflow.db", "http://127.0.0.1:5000"),
        ("postgresql://there/mlflow", None),
    ],
)
def test_where_the_pages_are(root: Path, monkeypatch: pytest.MonkeyPatch, uri: str, address: str | None) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert locate(root).address == address


def test_run_and_experiment_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "wise-owl")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    open_plain(root).close()
    assert [run.info.run_name for run in runs(root, "other")] == ["wise-owl"]
    assert runs(root) == []


def test_copy_of_an_experiment_uses_the_main_store(root: Path) -> None:
    copy = root / ".dvc/tmp/exps/standalone/tmpabc"
    copy.mkdir(parents=True)
    open_plain(copy).close()
    assert len(runs(root)) == 1
    assert list(copy.iterdir()) == []


def test_environment_chooses_the_store(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.move(root / "mlflow.db", tmp_path / "else where.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/else where.db")
    tracker = open_plain(root)
    assert tracker.close()
    assert not (root / "mlflow.db").exists()
    assert tracker.ref.run_id
    # a relative path is taken from the project, wherever a stage runs
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///sub/x.db?timeout=5")
    store = locate(root / ".dvc/tmp/exps/tmpabc")
    assert store.uri == f"sqlite:///{root}/sub/x.db?timeout=5"
    assert store.database == root / "sub/x.db"


def test_resume_continues_the_run_and_doubles_nothing(root: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    tracker = open_plain(root, journal)
    for step in range(10):
        tracker.log({"loss": step / 8}, step)
    tracker.log({"val": 1.0}, 5)
    tracker.close("KILLED")
    # the checkpoint was at step 6: later steps are run, and logged, again
    again = Journal(journal.path)
    again.truncate_after(6)
    tracker = open_plain(root, again, params=PARAMS | {"threads": 2, "lr": 0.00001, "task": "masking"})
    for step in range(7, 12):
        tracker.log({"loss": step / 8}, step)
    tracker.log({"val": 2.0}, 10)
    delivery = tracker.close()
    (run,) = runs(root)
    assert run.info.status == "FINISHED"
    assert history(root, run.info.run_id, "loss") == [(step, step / 8) for step in range(12)]
    assert history(root, run.info.run_id, "val") == [(5, 1.0), (10, 2.0)]
    assert (delivery.delivered, delivery.total) == (14, 14)
    assert run.data.params["threads"] == "2"
    assert run.data.params["task"] == "diffusion"
    assert {name: tag for name, tag in run.data.tags.items() if name.startswith("changed.")} == {
        "changed.task": "masking"
    }


def test_delivery_can_be_made_up_for_later(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracker = open_plain(root, journal)
    tracker.log({"loss": 1.0}, 1)
    assert not tracker.close()
    assert tracker.ref.run_id is None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracker = open_plain(root, Journal(journal.path))
    assert tracker.close()
    assert history(root, str(tracker.ref.run_id), "loss") == [(1, 1.0)]


def test_dead_server_stops_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:9")
    begin = time.monotonic()
    tracker = open_plain(root, Journal(root / "metrics.jsonl"))
    tracker.log({"loss": 1.0}, 1)
    delivery = tracker.close()
    assert time.monotonic() - begin < 10
    assert (delivery.delivered, delivery.total, bool(delivery)) == (0, 1, False)
    assert len(Journal(root / "metrics.jsonl").read()) == 1
    assert "no answer from http://***@127.0.0.1:9" in caplog.text
    assert "0 of 1 points delivered" in caplog.text
    assert "hunter2" not in caplog.text + str(tracker.ref)


def test_hanging_server_does_not_slow_training(
    root: Path, hanging_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", hanging_server)
    begin = time.monotonic()
    tracker = open_plain(root, Journal(root / "metrics.jsonl"), wait_seconds=0.2)
    seconds = []
    for step in range(300):
        start = time.perf_counter()
        tracker.log({f"metric/{k}": 0.5 for k in range(12)}, step)
        seconds.append(time.perf_counter() - start)
    # Asked to stop, it waits for less than the time it has otherwise.
    monkeypatch.setattr(tracking, "STOPPED_SECONDS", 0.5)
    assert not tracker.close("KILLED", timeout_seconds=60)
    assert time.monotonic() - begin < 30
    assert sorted(seconds)[150] < 1e-3, "log must take less than a millisecond"


def test_locked_database_delays_and_loses_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "FIRST_RETRY_SECONDS", 0.1)
    tracker = open_plain(root)
    other = sqlite3.connect(root / "mlflow.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    start = time.perf_counter()
    tracker.log({"loss": 1.0}, 1)
    assert time.perf_counter() - start < 5, "LOCK_SECONDS are 120"
    time.sleep(0.5)
    other.execute("ROLLBACK")
    other.close()
    assert tracker.close()
    assert history(root, str(tracker.ref.run_id), "loss") == [(1, 1.0)]


def test_log_never_raises(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    tracker = open_plain(root, Journal(tmp_path / "file/metrics.jsonl"))
    tracker.log({"loss": 1.0}, 1)
    tracker.log({"loss": "high"}, 2)  # type: ignore[dict-item]
    tracker.close()
    assert caplog.text.count("metrics.jsonl: could not be written") == 1
    assert caplog.text.count("run.json: could not be written") == 1


def test_works_without_mlflow(root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    journal = Journal(root / "metrics.jsonl")
    with open_plain(root, journal) as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.log_artifact(root / "none")
        tracker.set_tags({"a": "b"})
    assert len(journal.read()) == 1
    assert tracker.ref.run_id is None
    assert not tracker.close(), "the journal is all there is, and must be kept"
    assert caplog.text.count("MLflow") == 1


def test_mlflow_run_is_joined(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = client(root).create_experiment("outer", (root / "mlruns").as_uri())
    outer = client(root).create_run(experiment)
    client(root).log_param(outer.info.run_id, "lr", "1e-5")
    monkeypatch.setenv("MLFLOW_RUN_ID", outer.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    ref = pretrained(root)
    assert evaluate(root, ref).run_id == ref.run_id == outer.info.run_id
    (run,) = runs(root, "outer")
    assert runs(root) == []
    assert run.data.params["lr"] == "1e-5"
    assert run.data.params["evaluate.steps"] == "20"
    assert not [tag for tag in run.data.tags if tag.startswith("changed.")]


@pytest.mark.parametrize("run_id", ["0" * 32, "no such run", "../x"])
def test_unknown_mlflow_run_is_told_and_not_used(
    root: Path, run_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    assert pretrained(root).run_id == runs(root)[0].info.run_id
    assert "MLFLOW_RUN_ID" in caplog.text


def test_evaluation_continues_the_training(root: Path) -> None:
    ref = pretrained(root, tags={"earthprior.fingerprint": "abc"})
    assert evaluate(root, ref).run_id == ref.run_id
    (run,) = runs(root)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"val/gain_db/mean": 0.75, "evaluate/gain_db/mean": 2.0}
    assert run.data.params.keys() == {*PARAMS, "evaluate.steps"}
    assert run.data.tags["earthprior.fingerprint"] == "abc"
    assert run.data.tags[mlflow_find.EVALUATED] == "true"
    assert "pretrain_run_id" not in run.data.tags


def test_unfinished_evaluation_is_continued(root: Path) -> None:
    ref = pretrained(root)
    assert evaluate(root, ref, gain=1.0, status="FAILED").run_id == ref.run_id
    assert evaluate(root, ref, gain=3.0).run_id == ref.run_id
    (run,) = runs(root)
    assert run.data.metrics["evaluate/gain_db/mean"] == 3.0
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(("gain", "curve"), [(1.0, [(20, 1.0)]), (3.0, [(20, 1.0), (20, 3.0)])])
def test_a_killed_evaluation_leaves_no_point_twice(root: Path, gain: float, curve: list[tuple[int, float]]) -> None:
    ref = pretrained(root)
    killed = continue_or_open(root, ref, "evaluation", {"evaluate.steps": 20}, {}, TRAINED)
    killed.log({"gain_db/mean": 1.0}, 20)
    killed.log_levels({"rho_0.1": 1.0, "rho_5": 0.5})
    # all of it delivered, and killed before the run could be marked as evaluated
    killed.close("RUNNING")
    again = continue_or_open(root, ref, "evaluation", {"evaluate.steps": 20}, {}, TRAINED)
    again.log({"gain_db/mean": gain}, 20)
    again.log_levels({"rho_0.1": 1.0, "rho_5": 0.5})
    assert again.close().complete
    (run,) = runs(root)
    assert (run.info.status, run.data.tags[mlflow_run.EVALUATED]) == ("FINISHED", "true")
    assert history(root, run.info.run_id, "evaluate/gain_db/mean") == curve
    assert history(root, run.info.run_id, "evaluate/gain_db_by_rho_percent") == [(10, 1.0), (500, 0.5)]
    assert run.data.metrics["evaluate/gain_db/mean"] == gain


def test_second_evaluation_opens_a_run_and_changes_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = pretrained(root)
    evaluate(root, ref)
    before = client(root).get_run(ref.run_id).to_dictionary()
    monkeypatch.setenv("DVC_EXP_NAME", "more-steps")
    later = evaluate(root, ref, gain=5.0)
    assert later.run_id != ref.run_id
    assert client(root).get_run(ref.run_id).to_dictionary() == before
    run = client(root).get_run(later.run_id)
    assert run.info.run_name == "more-steps"
    assert run.data.metrics == {"val/gain_db/mean": 0.75, "evaluate/gain_db/mean": 5.0}
    assert history(root, str(later.run_id), "val/gain_db/mean") == [(20, 0.75)]
    assert run.data.params["lr"] == "1e-05"
    assert run.data.params["evaluate.steps"] == "20"
    assert run.data.tags["pretrain_run_id"] == ref.run_id
    assert run.data.tags["earthprior.fingerprint"] == "fresh"
    third = evaluate(root, ref, gain=6.0)
    assert third.run_id not in (ref.run_id, later.run_id)


@pytest.mark.parametrize("lost", ["never", "unknown", "deleted"])
def test_evaluation_without_the_training_run_copies_what_it_knows(root: Path, lost: str) -> None:
    ref: RunRef | None = None
    if lost == "unknown":
        ref = RunRef("http://elsewhere", "earthprior", "0" * 32)
    elif lost == "deleted":
        ref = pretrained(root)
        client(root).delete_run(ref.run_id)
    run = client(root).get_run(evaluate(root, ref).run_id)
    assert run.data.metrics == {"val/gain_db/mean": 1.5, "evaluate/gain_db/mean": 2.0}
    assert run.data.params == {"lr": "0.5", "evaluate.steps": "20"}
    assert run.data.tags["pretrain_run_id"] == (ref.run_id if ref else "unknown")


def test_training_never_changes_an_evaluated_run(root: Path) -> None:
    ref = pretrained(root)
    evaluate(root, ref)
    assert pretrained(root, resume=ref).run_id != ref.run_id


KILLED = """
import os, signal, sys
from pathlib import Path
from earthprior.journal import Journal
from earthprior.tracking import open_tracker
root = Path(sys.argv[1])
tracker = open_tracker(root, "r", {}, {}, Journal(root / "work/metrics.jsonl"), log_system_metrics=False)
tracker.log({"loss": 1.0}, 1)
print(tracker.ref.run_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def run_script(script: str, root: Path) -> subprocess.Popen[str]:
    source = str(Path(tracking.__file__).parents[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "DVC_"))}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(root)],
        env=environment | {"PYTHONPATH": source},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_run_is_ended_by_the_next_and_continued_by_its_own(root: Path) -> None:
    process = run_script(KILLED, root)
    run_id = process.communicate(timeout=50)[0].strip()
    assert process.returncode == -signal.SIGKILL
    assert client(root).get_run(run_id).info.status == "RUNNING"
    with open_plain(root) as other:
        assert client(root).get_run(run_id).info.status == "KILLED"
        # that of a living process is left alone
        open_plain(root).close()
        assert client(root).get_run(other.ref.run_id).info.status == "RUNNING"
    journal = Journal(root / "work/metrics.jsonl")
    tracker = open_plain(root, journal)
    assert tracker.ref.run_id == run_id
    assert client(root).get_run(run_id).info.status == "RUNNING"
    tracker.log({"loss": 2.0}, 2)
    tracker.close()
    assert history(root, run_id, "loss") == [(1, 1.0), (2, 2.0)]
    assert client(root).get_run(run_id).info.status == "FINISHED"


FIRST = """
import sys
from pathlib import Path
from earthprior.tracking import open_tracker
with open_tracker(Path(sys.argv[1]), "r", {"a": 1}, {}, log_system_metrics=False, wait_seconds=60) as tracker:
    tracker.log({"loss": 1.0}, 1)
sys.exit(not tracker.close())
"""


@pytest.mark.soak
def test_three_processes_may_use_a_new_store_at_once(tmp_path: Path) -> None:
    processes = [run_script(FIRST, tmp_path) for _ in range(3)]
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert outputs == [("", "")] * 3, "third parties must be quiet"
    assert [run.info.status for run in runs(tmp_path)] == ["FINISHED"] * 3


def test_system_metrics(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    with open_plain(root, log_system_metrics=True) as tracker:
        time.sleep(0.6)
    metrics = client(root).get_run(tracker.ref.run_id).data.metrics
    assert "system/cpu_utilization_percentage" in metrics
    assert evaluate(root, tracker.ref).run_id == tracker.ref.run_id
    copy = client(root).get_run(evaluate(root, tracker.ref).run_id)
    assert not [name for name in copy.data.metrics if name.startswith("system/")]


def test_more_parameters_than_fit_in_one_call(root: Path) -> None:
    params = {f"section.key_{k}": k for k in range(230)} | {"long": "x" * 7000}
    tracker = open_plain(root, params=params)
    assert tracker.close()
    (run,) = runs(root)
    assert len(run.data.params) == 231


def test_deleted_experiment_is_explained(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    client(root).delete_experiment(client(root).create_experiment("earthprior"))
    assert not open_plain(root).close()
    assert "experiment 'earthprior' is deleted" in caplog.text


def no_database(path: Path) -> None:
    path.write_bytes(b"no database" * 500)


def half_upgraded(path: Path) -> None:
    query(path, "create table _alembic_tmp_metrics (a)", "update alembic_version set version_num = '451aebb31d03'")


def interrupted_at_first_use(path: Path) -> None:
    path.unlink()
    query(path, "create table _alembic_tmp_metrics (a)")


def newer(path: Path) -> None:
    query(path, "update alembic_version set version_num = 'ffffffffffff'")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def query(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        for statement in statements:
            database.execute(statement)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (no_database, "is damaged, or no SQLite database; move it away"),
        (half_upgraded, "was left half-upgraded by an interrupted first use; move it away"),
        (interrupted_at_first_use, "was left half-upgraded by an interrupted first use; move it away"),
        (newer, "was made by another version of MLflow"),
        (a_folder, "is no file that can be written"),
    ],
)
def test_a_database_that_cannot_be_used_is_explained_and_costs_nothing(
    root: Path, prepared_database: Path, spoil: Callable[[Path], None], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path = root / "mlflow.db"
    spoil(path)
    tracker = open_plain(root)
    tracker.log({"loss": 1.0}, 1)
    assert not tracker.close()
    assert f"sqlite:///mlflow.db {told}" in caplog.text
    assert "Traceback" not in caplog.text
    # as it says; and in a process of its own, since MLflow keeps a file open that is moved away
    path.rename(root / "away")
    shutil.copy(prepared_database, path)
    SqlAlchemyStore._engine_map.clear()
    sync_tracking.run(root)
    (run,) = runs(root)
    assert history(root, run.info.run_id, "loss") == [(1, 1.0)]


def test_a_database_that_stays_locked_delays_start_and_end_for_seconds(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking_store, "PROBE_SECONDS", 0.2)
    with closing(sqlite3.connect(root / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        begin = time.monotonic()
        tracker = open_plain(root)
        tracker.log({"loss": 1.0}, 1)
        assert not tracker.close()
        assert time.monotonic() - begin < 20, "LOCK_SECONDS are 120"
        assert "sqlite:///mlflow.db is locked by another process" in caplog.text
    sync_tracking.run(root)
    assert [run.info.status for run in runs(root)] == ["FINISHED"]


def test_a_full_disk_under_the_database_loses_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "FIRST_RETRY_SECONDS", 0.1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((root / "mlflow.db").stat().st_size, before[1]))
    try:
        tracker = open_plain(root)
        for step in range(1500):
            tracker.log({"loss": 0.5, "lr": 0.1}, step)
        first = tracker.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (bool(first), first.total) == (False, 3000)
    sync_tracking.run(root)
    (run,) = runs(root)
    assert run.info.status == "FINISHED"
    for name in ("loss", "lr"):
        assert [step for step, _ in history(root, run.info.run_id, name)] == list(range(1500))


def test_broken_request_is_told_in_short() -> None:
    text = "API request to http://u:p@h:1/x/api/2.0/mlflow/runs/log-batch failed with exception HTTPConnectionPool(...)"
    assert reason(RuntimeError(text)) == "no answer from http://***@h:1/x"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("http://user:pass@host:5000/x", "http://***@host:5000/x"),
        ("postgresql://u:p%40ss@h/db", "postgresql://***@h/db"),
        ("mysql://u:p@ss@h/db failed", "mysql://***@h/db failed"),
        ("https://h/?token=abc&x=1", "https://h/?token=***&x=1"),
        ("mail a@b.c", "mail a@b.c"),
        ("sqlite:////home/a/mlflow.db", "sqlite:////home/a/mlflow.db"),
    ],
)
def test_secrets_are_not_printed(text: str, hidden: str) -> None:
    assert redacted(text) == hidden


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "{}"])
def test_run_reference_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    ref = RunRef.read(tmp_path / "run.json")
    assert ref is None or ref.run_id is None
    assert RunRef.read(tmp_path / "none.json") is None


def test_run_reference_round_trip(tmp_path: Path) -> None:
    ref = RunRef("sqlite:///mlflow.db", "earthprior", "abc")
    write_json(tmp_path / "run.json", ref.to_json())
    assert RunRef.read(tmp_path / "run.json") == ref


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("1e-4", "0.0001", True), ("true", "true", True), ("a", "b", False), ("1", "2", False), ("a", "1", False),
        # as MLflow logs what `mlflow run -P` is given: quoted for the shell
        ("True", "true", True), ("False", "true", False), ("~", "null", True), ("it's", "it", False),
        ("'[32,48]'", "[32, 48]", True), ("'[32,48]'", "[48, 32]", False), ("'[red, nir]'", '["red", "nir"]', True),
    ],
)  # fmt: skip
def test_same_param(first: str, second: str, same: bool) -> None:
    assert mlflow_run.same_param(first, second) is same


class Evil:
    """Runs a command where somebody unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickled_model_of_a_run_is_never_loaded(root: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    model = tmp_path / "model"
    model.mkdir()
    evil = pickle.dumps(Evil(marker))
    (model / "MLmodel").write_text("flavors:\n  python_function:\n    loader_module: mlflow.sklearn\n")
    (model / "model.pkl").write_bytes(evil)
    (tmp_path / "network.safetensors").write_bytes(evil)
    with open_plain(root) as tracker:
        tracker.log_artifact(model)
        tracker.log_artifact(tmp_path / "network.safetensors", "weights")
    assert tracker.ref.run_id
    into = tmp_path / "into"
    into.mkdir()
    assert mlflow_read.read(locate(root), tracker.ref.run_id, into) is not None
    assert [path.name for path in into.iterdir()] == ["network.safetensors"], "nothing of the model"
    with pytest.raises(SafetensorError):
        load_file(into / "network.safetensors")
    assert not marker.exists()
    # nor is there anything that could
    for path in Path(mlflow_read.__file__).parent.rglob("*.py"):
        assert not re.search(r"load_model|pyfunc|mlflow\.(pytorch|sklearn)|log_model", path.read_text()), path


def test_an_empty_run_is_explained_and_no_other(root: Path) -> None:
    used = pretrained(root)
    store, made = locate(root), client(root)
    assert used.run_id
    experiment = made.get_experiment_by_name("earthprior").experiment_id
    # what `mlflow run` gives to the run that it makes
    empty = made.create_run(experiment, tags={"mlflow.source.type": "PROJECT", "mlflow.user": "me"}).info.run_id
    made.log_param(empty, "lr", "3e-4")
    assert mlflow_run.describe_if_empty(store, empty, "nothing ran")
    assert not mlflow_run.describe_if_empty(store, used.run_id, "nothing ran")
    assert not mlflow_run.describe_if_empty(store, "unknown", "nothing ran")
    assert [made.get_run(run).data.tags.get("mlflow.note.content") for run in (empty, used.run_id)] == [
        "nothing ran",
        None,
    ]
