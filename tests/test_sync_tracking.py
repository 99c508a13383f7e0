"""What an outage left is delivered later, once each: by the verb, and by the next stage that reaches the store."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from matplotlib.image import imsave

from earthprior import cli, mlflow_find, outbox
from earthprior.courier import Delivery
from earthprior.errors import EarthPriorError, Interrupted
from earthprior.files import read_json, write_json
from earthprior.identity import process_tags
from earthprior.journal import Journal
from earthprior.mlflow_run import MlflowRun
from earthprior.outbox import Outbox, RunRecord
from earthprior.params import Params, load
from earthprior.stages import evaluate as evaluate_stage
from earthprior.stages import pretrain
from earthprior.tools import sync_tracking
from earthprior.tracking import RunRef, Tracker
from earthprior.tracking_store import Store, locate
from earthprior.undelivered import deliver, waiting
from mlflow_store import client, evaluate, history, open_plain, runs

TAGS = {"earthprior.fingerprint": "abc", "dvc.data_md5": "0123456789abcdef0123456789abcdef.dir"}
POINTS = [(step, step / 8) for step in range(1, 301)]

pytestmark = pytest.mark.usefixtures("own_store_only")


@pytest.fixture
def root(tracked_root: Path) -> Path:
    return tracked_root


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """A function for blocks in which no store answers."""

    def dead(self: Store) -> None:
        raise ConnectionError(f"no answer from {self.shown}")

    @contextmanager
    def make() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(Store, "probe", dead)
            yield

    return make


def train(root: Path, steps: int = len(POINTS), folder: str = "work/pretrain/abc", **options: Any) -> Tracker:
    """A training with two files and a picture; open, and if finished, set aside as the stage does it."""
    work = root / folder
    tracker = open_plain(root, Journal(work / "metrics.jsonl"), tags=TAGS, **options)
    for step, value in POINTS[:steps]:
        tracker.log({"loss": value, "bad": float("nan")}, step)
    tracker.log({"val/gain_db/mean": 0.75}, steps)
    imsave(work / "percent-000.png", [[[0.0, 0.5, 1.0]] * 8] * 8)
    tracker.log_picture(work / "percent-000.png", "denoising", 0)
    (work / "network.safetensors").write_bytes(b"weights")
    tracker.log_artifact(work / "network.safetensors", "weights")
    (root / "params.yaml").write_text("lr: 1\n")
    tracker.log_artifact(root / "params.yaml")
    tracker.set_tags({"levels_missing": "0.05"})
    return tracker


def finish(root: Path, tracker: Tracker, status: str = "FINISHED", folder: str = "work/pretrain/abc") -> RunRef:
    tracker.close(status)
    outbox.set_aside(root / folder, root)
    for path in sorted((root / folder).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (root / folder).rmdir()
    (root / "params.yaml").write_text("lr: the next experiment's\n")
    return tracker.ref


def artifacts(root: Path, run_id: str) -> dict[str, bytes]:
    folder = root / "mlruns" / run_id / "artifacts"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_whole(root: Path, run: Any, status: str = "FINISHED") -> None:
    """That a run has all that `train` told, once."""
    assert (run.info.status, run.info.run_name) == (status, "r")
    assert history(root, run.info.run_id, "loss") == POINTS
    assert history(root, run.info.run_id, "val/gain_db/mean") == [(300, 0.75)]
    assert run.data.params["lr"] == "1e-05"
    assert run.data.tags.items() >= {**TAGS, "levels_missing": "0.05"}.items()
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == TAGS["dvc.data_md5"]
    found = artifacts(root, run.info.run_id)
    assert found["weights/network.safetensors"] == b"weights"
    assert found["params.yaml"] == b"lr: 1\n"
    assert len([name for name in found if name.startswith("images/denoising+step+0+") and name.endswith(".png")]) == 1


def sync(root: Path) -> None:
    sync_tracking.run(root)
    assert waiting(root) == []
    assert not list((root / "work/undelivered").glob("*"))


def test_a_finished_training_is_delivered_later_as_it_would_have_been(
    root: Path, outage: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with outage():
        ref = finish(root, train(root))
        assert ref.run_id is None
        assert ref.uid
        assert "0 of 301 points delivered" in caplog.text
        assert "earthprior sync-tracking" in caplog.text
        with pytest.raises(EarthPriorError, match="1 of 1 runs wait for MLflow; nothing is lost") as caught:
            sync_tracking.run(root)
        assert caught.value.exit_code == 2
        assert "r in work/undelivered/abc-" in str(caught.value)
        assert "no answer from sqlite:///mlflow.db" in str(caught.value)
    told = [record["time_ms"] for record in Journal(waiting(root)[0][0].journal.path).read()]
    sync(root)
    assert "301 of 301 points delivered to sqlite:///mlflow.db" in capsys.readouterr().out
    (run,) = runs(root)
    check_whole(root, run)
    times = [metric.timestamp for metric in client(root).get_metric_history(run.info.run_id, "loss")]
    assert times == told[:300], "when it happened, not when it was delivered"
    assert run.info.start_time <= told[0] <= told[-1] <= run.info.end_time <= told[-1] + 60_000
    before = run.to_dictionary()
    sync(root)
    assert "nothing waits" in capsys.readouterr().out
    assert [run.to_dictionary() for run in runs(root)] == [before]


def test_the_verb_has_exit_codes(root: Path, outage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    with outage():
        finish(root, train(root, 3))
        result = CliRunner().invoke(cli.main, ["sync-tracking"])
        assert (result.exit_code, result.stderr.count("Traceback")) == (2, 0)
    result = CliRunner().invoke(cli.main, ["sync-tracking"])
    assert result.exit_code == 0, result.output
    assert "4 of 4 points delivered" in result.stdout


def test_training_and_evaluation_end_in_one_run(root: Path, outage: Any) -> None:
    with outage():
        ref = finish(root, train(root))
        evaluate(root, ref)
    assert [record.training is None for _, record in waiting(root)] == [True, False]
    sync(root)
    (run,) = runs(root)
    check_whole(root, run)
    assert run.data.metrics["evaluate/gain_db/mean"] == 2.0
    assert run.data.params["evaluate.steps"] == "20"
    assert run.data.tags[mlflow_find.EVALUATED] == "true"
    assert "pretrain_run_id" not in run.data.tags


def test_an_evaluation_in_an_outage_joins_the_run_that_is_there(root: Path, outage: Any) -> None:
    ref = finish(root, train(root))
    with outage():
        evaluate(root, ref)
        evaluate(root, ref, gain=3.0)
    sync(root)
    first, second = runs(root)
    check_whole(root, first)
    assert [run.data.metrics["evaluate/gain_db/mean"] for run in (first, second)] == [2.0, 3.0]
    assert second.data.tags["pretrain_run_id"] == ref.run_id, "as two evaluations always have a run each"


def test_an_evaluation_that_reaches_the_store_first_delivers_its_training(root: Path, outage: Any) -> None:
    with outage():
        ref = finish(root, train(root))
    evaluate(root, ref)
    (run,) = runs(root)
    check_whole(root, run)
    assert run.data.metrics["evaluate/gain_db/mean"] == 2.0
    assert waiting(root) == []
    # and one after a delivery finds it, although mlflow_run.json has no id
    later = evaluate(root, ref, gain=4.0)
    assert client(root).get_run(later.run_id).data.metrics["val/gain_db/mean"] == 0.75


def test_the_next_run_delivers_what_waits(root: Path, outage: Any, caplog: pytest.LogCaptureFixture) -> None:
    with outage():
        ref = finish(root, train(root))
        evaluate(root, ref)
    with caplog.at_level("INFO"):
        assert open_plain(root, Journal(root / "work/pretrain/other/metrics.jsonl"), run_name="next").close()
    assert waiting(root) == []
    assert "made up for r, 301 of 301 points delivered" in caplog.text
    whole = [run for run in runs(root) if run.info.run_name == "r"]
    assert len(whole) == 1
    check_whole(root, whole[0])


def test_what_is_meant_for_another_store_waits_for_that(
    root: Path, outage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9/mlflow")
        finish(root, train(root, 3))
    kept = b"".join(path.read_bytes() for path in (root / "work").rglob("*") if path.is_file())
    assert b"hunter2" not in kept
    open_plain(root, run_name="next").close()
    assert [run.info.run_name for run in runs(root)] == ["next"]
    with pytest.raises(EarthPriorError, match=r"meant for http://\*\*\*@127.0.0.1:9/mlflow; give that, with its"):
        sync_tracking.run(root)
    assert len(waiting(root)) == 1


def test_a_relative_store_is_found_again(root: Path, outage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with outage():
        finish(root, train(root))
    # the shell that delivers names another store; the run goes to its own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    sync(root)
    check_whole(root, runs(root)[0])


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:] = {path!r}
from earthprior.tracking_store import Store
def dead(self): raise ConnectionError("no answer")
if "down" in sys.argv: Store.probe = dead
import test_sync_tracking as tests
tests.train(Path(sys.argv[1]), 200)
print("told", flush=True)
if "wait" in sys.argv: sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", KILLED.format(path=sys.path), str(root), *arguments], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_killed_training_is_delivered_marked_and_can_go_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = start(root, "down", "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "told\n", process.communicate()
    sync_tracking.run(root)
    assert "r (work/pretrain/abc): a process has it in hand, and delivers it itself" in capsys.readouterr().out
    assert runs(root) == []
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    sync(root)
    (run,) = runs(root)
    assert run.info.status == "KILLED"
    assert history(root, run.info.run_id, "loss") == POINTS[:200]
    assert run.data.tags["earthprior.pid"] == str(process.pid)
    before = run.to_dictionary()
    sync(root)
    assert runs(root)[0].to_dictionary() == before, "what is delivered is not delivered again"
    # its checkpoint was at step 150
    journal = Journal(root / "work/pretrain/abc/metrics.jsonl")
    journal.truncate_after(150)
    tracker = open_plain(root, journal, tags=TAGS)
    assert client(root).get_run(run.info.run_id).info.status == "RUNNING"
    for step, value in POINTS[150:]:
        tracker.log({"loss": value}, step)
    assert tracker.close()
    (run,) = runs(root)
    assert run.info.status == "FINISHED"
    assert history(root, run.info.run_id, "loss") == POINTS


def test_a_run_that_died_with_its_server_is_completed(root: Path) -> None:
    process = start(root)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    sync(root)
    (run,) = runs(root)
    assert run.info.status == "KILLED"
    assert history(root, run.info.run_id, "loss") == POINTS[:200]


@pytest.mark.parametrize("ended", ["FAILED", "KILLED"])
def test_how_a_training_ended_is_told_and_its_folder_stays(root: Path, outage: Any, ended: str) -> None:
    with outage():
        tracker = train(root)
        tracker.set_tags({"earthprior.reason": "diverged at step 300"})
        tracker.close(ended)
    sync(root)
    (run,) = runs(root)
    check_whole(root, run, ended)
    assert run.data.tags["earthprior.reason"] == "diverged at step 300"
    assert (root / "work/pretrain/abc/network.safetensors").exists()


def test_trials_are_nested_in_their_study(root: Path, outage: Any) -> None:
    with outage():
        study = open_plain(root, run_name="study s")
        for number, status in enumerate(("FINISHED", "KILLED", "FAILED")):
            place = f"work/tune/s/trial-{number}/state"
            finish(root, train(root, 5, place, run_name=f"trial-{number}", parent=study.ref.uid), status, place)
        study.close()
    sync(root)
    found = {run.info.run_name: run for run in runs(root)}
    assert {name: run.info.status for name, run in found.items()} == {
        "study s": "FINISHED", "trial-0": "FINISHED", "trial-1": "KILLED", "trial-2": "FAILED",
    }  # fmt: skip
    parents = [run.data.tags.get("mlflow.parentRunId") for name, run in found.items() if name != "study s"]
    assert parents == [found["study s"].info.run_id] * 3
    assert [len(history(root, run.info.run_id, "loss")) for name, run in found.items() if name != "study s"] == [5] * 3


def test_a_study_whose_store_comes_back_is_the_parent_of_trials_before_and_after(root: Path, outage: Any) -> None:
    place = "work/tune/s/trial-{}/state"
    with outage():
        study = open_plain(root, run_name="study s")
        first = train(root, 5, place.format(0), run_name="trial-0", parent=study.ref.uid)
        finish(root, first, folder=place.format(0))
        second = train(root, 5, place.format(1), run_name="trial-1", parent=study.ref.uid)
    finish(root, second, folder=place.format(1))
    study.close()
    with suppress(EarthPriorError):
        sync_tracking.run(root)
    assert waiting(root) == []
    found = {run.info.run_name: run for run in runs(root)}
    parent = found["study s"].info.run_id
    assert [found[name].data.tags.get("mlflow.parentRunId") for name in ("trial-0", "trial-1")] == [parent] * 2


def test_delivery_may_stop_after_any_piece(root: Path, outage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("earthprior.courier.RECORDS_AT_ONCE", 100)
    with outage():
        ref = finish(root, train(root))
        evaluate(root, ref)
    stops = 0
    while found := waiting(root):
        # each try is a process of its own, one piece longer than the one before
        pieces = deliver(*found[0], locate(root), lambda record, delivery: None)
        for _ in zip(range(stops), pieces, strict=False):
            pass
        pieces.close()
        stops += 1
        assert stops < 50
    assert stops > 8
    (run,) = runs(root)
    check_whole(root, run)
    assert history(root, run.info.run_id, "evaluate/gain_db/mean") == [(20, 2.0)]


def test_delivered_twice_is_delivered_once(root: Path, outage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Outbox) -> None:
        raise KeyboardInterrupt

    with outage():
        ref = finish(root, train(root))
        evaluate(root, ref)
    # killed after MLflow had everything, and before that was noted
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(Outbox, "mark_told", killed)
            with pytest.raises(KeyboardInterrupt):
                sync_tracking.run(root)
        if len(waiting(root)) == 2:
            pieces = deliver(*waiting(root)[0], locate(root), lambda record, delivery: None)
            assert list(pieces)
    sync(root)
    (run,) = runs(root)
    check_whole(root, run)
    assert history(root, run.info.run_id, "evaluate/gain_db/mean") == [(20, 2.0)]


def test_requests_that_a_server_answered_too_late_leave_no_second_run(root: Path, outage: Any) -> None:
    with outage():
        ref = finish(root, train(root))
    open_plain(root, run_name="other").close()
    (run,) = [run for run in runs(root) if run.info.run_name == "r"]
    experiment = run.info.experiment_id
    # what a stopped server makes, when it goes on, of the requests that were repeated meanwhile
    for _ in range(2):
        client(root).create_run(experiment, tags={mlflow_find.UID: str(ref.uid), **process_tags()}, run_name="r")
    evaluate(root, ref)
    assert sorted(run.info.run_name for run in runs(root)) == ["other", "r", "r", "r"]
    tracker = open_plain(root, Journal(root / "work/pretrain/abc/metrics.jsonl"), resume=ref)
    tracker.close()
    check_whole(root, client(root).get_run(run.info.run_id))


@pytest.mark.parametrize("told", [False, True])
def test_an_outbox_comes_under_its_final_name_complete_or_not_at_all(
    root: Path, outage: Any, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    with outage():
        tracker = train(root)
        tracker.close()

    def killed(self: Path, target: Path) -> None:
        raise Interrupted("killed", signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(Interrupted):
            outbox.set_aside(root / "work/pretrain/abc", root)
    assert len(waiting(root)) == 1, "the training's folder has it still"
    assert len(list((root / "work/undelivered").iterdir())) == 1
    if told:
        for _ in deliver(*waiting(root)[0], locate(root), lambda record, delivery: None):
            pass
    finish(root, tracker)
    assert len(list((root / "work/undelivered").iterdir())) == (0 if told else 1), "nothing half-made is left"
    sync(root)
    check_whole(root, runs(root)[0])


def test_a_training_that_goes_on_stands_for_its_own_outbox_before_that_is_dropped(
    root: Path, outage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a dvc that died: the state is there still, and all of it was set aside."""

    def killed(self: Outbox, record: RunRecord) -> None:
        raise KeyboardInterrupt

    with outage():
        tracker = train(root)
        tracker.close()
        outbox.set_aside(root / "work/pretrain/abc", root)
        with monkeypatch.context() as patch:
            patch.setattr(Outbox, "begin", killed)
            with pytest.raises(KeyboardInterrupt):
                train(root)
    assert [box.folder.parent.name for box, _ in waiting(root)] == ["undelivered"]
    sync(root)
    check_whole(root, runs(root)[0])


def takes_no_file(self: MlflowRun, path: Path, folder: str) -> None:
    raise RuntimeError("413 Request Entity Too Large")


def test_a_file_that_is_refused_is_told_and_tried_again(
    root: Path, outage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with outage():
        finish(root, train(root))

    with monkeypatch.context() as patch:
        patch.setattr(MlflowRun, "upload", takes_no_file)
        with pytest.raises(EarthPriorError, match="not all of its files were taken"):
            sync_tracking.run(root)
    (run,) = runs(root)
    assert (run.info.status, len(history(root, run.info.run_id, "loss"))) == ("FINISHED", 300)
    sync(root)
    check_whole(root, runs(root)[0])


def test_a_file_that_is_refused_for_ever_is_given_up_and_costs_the_others_nothing(
    root: Path, outage: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with outage():
        finish(root, train(root))
    upload, asked = MlflowRun.upload, []

    def refuses(self: MlflowRun, path: Path, folder: str) -> None:
        asked.append(path.name)
        if path.name == "network.safetensors":
            raise RuntimeError("413 Request Entity Too Large")
        upload(self, path, folder)

    monkeypatch.setattr(MlflowRun, "upload", refuses)
    for _ in range(2):
        with pytest.raises(EarthPriorError, match="not all of its files were taken"):
            sync_tracking.run(root)
    assert asked == ["network.safetensors", "params.yaml", "network.safetensors"], "what was taken is not sent again"
    monkeypatch.chdir(root)
    caplog.clear()
    sync_tracking.run(root)
    assert waiting(root) == []
    (kept,) = (root / "work/undelivered").iterdir()
    place = f"work/undelivered/{kept.name}/network.safetensors"
    assert (root / place).read_bytes() == b"weights"
    assert re.findall(r"MLflow: .*network.*", caplog.text) == [
        f"MLflow: refused network.safetensors 3 times (413 Request Entity Too Large), gave it up; it lies in {place}"
    ]
    (run,) = runs(root)
    assert run.info.status == "FINISHED"
    assert artifacts(root, run.info.run_id).keys() >= {"params.yaml"}
    sync_tracking.run(root)
    assert len(asked) == 4


def test_a_run_that_is_made_anew_hears_all_again(root: Path, outage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with outage():
        finish(root, train(root))

    with monkeypatch.context() as patch:
        patch.setattr(MlflowRun, "upload", takes_no_file)
        with pytest.raises(EarthPriorError, match="not all of its files were taken"):
            sync_tracking.run(root)
    client(root).delete_run(runs(root)[0].info.run_id)
    sync(root)
    check_whole(root, runs(root)[0])


def test_a_run_that_somebody_deletes_meanwhile_is_told_of_once_and_made_again(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("earthprior.mirror.FIRST_RETRY_SECONDS", 0.05)
    tracker = train(root, 1)
    end = time.monotonic() + 30
    while not runs(root) or not runs(root)[0].data.metrics:
        assert time.monotonic() < end
        time.sleep(0.02)
    client(root).delete_run(runs(root)[0].info.run_id)
    for step, value in POINTS[1:]:
        tracker.log({"loss": value}, step)
        time.sleep(0.4 * (step in (2, 3, 4)))
    assert not tracker.close()
    assert caplog.text.count("Current state is deleted") == 1
    sync(root)
    (run,) = runs(root)
    assert history(root, run.info.run_id, "loss") == POINTS


def test_a_killed_evaluation_leaves_nothing_to_deliver(root: Path, outage: Any) -> None:
    ref = finish(root, train(root))
    with outage():
        evaluate(root, ref)
    ((box, _),) = waiting(root)
    box.messages.path.unlink()
    sync(root)
    assert "evaluate/gain_db/mean" not in runs(root)[0].data.metrics


def test_an_evaluation_that_was_stopped_and_made_again_has_one_run(root: Path, outage: Any) -> None:
    ref = finish(root, train(root))
    with outage():
        evaluate(root, ref, status="KILLED")
    assert len(waiting(root)) == 1
    evaluate(root, ref)
    assert waiting(root) == []
    (run,) = runs(root)
    check_whole(root, run)
    assert history(root, run.info.run_id, "evaluate/gain_db/mean") == [(20, 2.0)]


def test_two_deliveries_of_one_outbox_exclude_each_other(root: Path, outage: Any) -> None:
    with outage():
        finish(root, train(root))
    ((box, record),) = waiting(root)
    ended: list[Delivery] = []
    first = deliver(box, record, locate(root), lambda _, delivery: ended.append(delivery))
    next(first)
    assert list(deliver(Outbox(box.folder), record, locate(root), lambda _, delivery: ended.append(delivery))) == []
    assert ended == []
    list(first)
    assert [bool(delivery) for delivery in ended] == [True]
    check_whole(root, runs(root)[0])


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    training = outbox.Training("t", None, {"lr": "1"}, {"gain": 0.5})
    record = RunRecord("u", "here", "e", "1", None, "j", "n", "d", {"a": "b"}, {"c": "d"}, 7, "p", training)
    box = Outbox(tmp_path / "box")
    box.begin(record)
    assert Outbox(box.folder).record() == record
    box.remember("run")
    found = box.record()
    assert found is not None
    assert (found.run_id, found.training) == ("run", training)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "{}", '{"run_id": "abc", "experiment": "e"}'])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "work/pretrain/abc"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(text)
    assert Outbox(folder).record() is None
    assert waiting(tmp_path) == []
    sync_tracking.run(tmp_path)


def test_nobody_is_waited_for_who_is_not_here(root: Path, outage: Any) -> None:
    with outage():
        finish(root, train(root, 3, parent="gone"))
    sync(root)
    assert "mlflow.parentRunId" not in runs(root)[0].data.tags


def test_a_damaged_line_costs_only_itself(root: Path, outage: Any) -> None:
    with outage():
        finish(root, train(root))
    ((box, _),) = waiting(root)
    lines = box.journal.path.read_bytes().splitlines(keepends=True)
    lines[7] = lines[7][:10] + b"\xff" + lines[7][11:]
    lines[9] = b'{"metrics":{"loss":1.0}}\n'
    box.journal.path.write_bytes(b"".join(lines))
    sync(root)
    (run,) = runs(root)
    assert history(root, run.info.run_id, "loss") == [point for point in POINTS if point[0] not in (8, 10)]


def test_without_mlflow_everything_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mlflow", None)
        ref = finish(root, train(root))
        evaluate(root, ref)
        with pytest.raises(EarthPriorError, match="MLflow cannot be imported, 2 runs wait"):
            sync_tracking.run(root)
    sync(root)
    check_whole(root, runs(root)[0])


@pytest.mark.soak
def test_a_killed_training_goes_on_with_other_readers_in_one_run(
    make_project: Callable[..., tuple[Path, Params]], prepared_database: Path
) -> None:
    root, params = make_project(epochs=12)
    shutil.copy(prepared_database, root / "mlflow.db")
    command = [sys.executable, "-m", "earthprior", "pretrain"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 50
    while len(list(root.glob("work/pretrain/*/ckpt-*.json"))) < 2:
        assert killed.poll() is None, killed.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.005)
    killed.kill()
    killed.communicate()
    assert [run.info.status for run in runs(root)] in ([], ["RUNNING"])
    content = read_json(root / "params.yaml")
    content["operation"]["readers"] = params.operation.readers + 2
    write_json(root / "params.yaml", content)
    pretrain.run(load(root / "params.yaml"), root)
    (run,) = runs(root)
    assert run.info.status == "FINISHED"
    assert not [name for name in run.data.tags if name.startswith("changed.")]
    steps = [step for step, _ in history(root, run.info.run_id, "train/loss")]
    assert steps == sorted(set(steps))
    assert steps[-1] == max(steps)
    assert len(history(root, run.info.run_id, "val/gain_db/mean")) == 12


def test_no_secret_of_an_address_is_kept_or_shown(
    make_project: Callable[..., tuple[Path, Params]], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    root, params = make_project()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9/x?token=hunter3")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter4")
    pretrain.run(params, root)
    evaluate_stage.run(params, root)
    with pytest.raises(EarthPriorError) as caught:
        sync_tracking.run(root)
    out, err = capfd.readouterr()
    files = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert {path.name for path in files} >= {"run.json", "mlflow_run.json", "metrics.jsonl", "report.html"}
    for text in (out, err, caplog.text, str(caught.value), *map(str, files)):
        assert "hunter" not in text
    assert [path for path, content in files.items() if b"hunter" in content] == []
