from __future__ import annotations

import csv
import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from dvc_cache import put_in_cache
from earthprior import build, identity, memory, outbox, pictures, tracking
from earthprior.diffusion.gain import RHOS
from earthprior.diffusion.linear import LinearDenoiser
from earthprior.errors import DataError, DivergedError, EarthPriorError, Interrupted, ParamsError, StorageError
from earthprior.files import read_json, sha256_file, write_json
from earthprior.identity import CodeHash
from earthprior.mirror import Delivery
from earthprior.params import Params, active, load
from earthprior.stages import pretrain
from earthprior.training import linear_denoiser, session
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.distributed import World
from earthprior.training.loop import Trainer
from earthprior.undelivered import waiting

OUTS = [
    "config.json", "environment.json", "history.csv", "linear.safetensors", "mlflow_run.json", "network.safetensors",
]  # fmt: skip
EPOCHS, STEPS = 5, 20
MakeProject = Callable[..., tuple[Path, Params]]


@pytest.fixture(autouse=True)
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracking has its own tests; opening a store costs seconds."""
    monkeypatch.setattr(tracking, "import_mlflow", lambda: False)
    for name in ("DVC_STAGE", "DVC_EXP_NAME", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def project(make_project: MakeProject) -> MakeProject:
    """Makes a root after the stage stats, with its params."""

    def make(*root: Path, **overrides: Any) -> tuple[Path, Params]:
        return make_project(*root, **{"epochs": EPOCHS, **overrides})

    return make


@pytest.fixture(scope="module")
def uninterrupted_cache() -> dict[str, Path]:
    return {}


@pytest.fixture
def uninterrupted(
    project: MakeProject, uninterrupted_cache: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The root of a run that nobody disturbed."""
    if not uninterrupted_cache:
        root, params = project(tmp_path_factory.mktemp("uninterrupted") / "project")
        pretrain.run(params, root)
        uninterrupted_cache["root"] = root
    return uninterrupted_cache["root"]


def work_folder(root: Path, params: Params) -> Path:
    fingerprint = identity.fingerprint(active(params), sha256_file(root / "results/stats/stats.json"))
    return root / "work/pretrain" / fingerprint


def results(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "results/pretrain").iterdir())}


def load_with(root: Path, values: Mapping[str, Any]) -> Params:
    write_json(root / "params.yaml", {**read_json(root / "params.yaml"), **values})
    return load(root / "params.yaml")


def asked_after(steps: int, number: int = signal.SIGTERM) -> Any:
    """Stands for `stop_requests`: asked to stop at that step."""

    @contextmanager
    def requests() -> Iterator[Any]:
        seen = iter([None] * (steps - 1))

        class Request:
            @property
            def signal_number(self) -> int | None:
                return next(seen, number)

        yield Request()

    return requests


def test_the_outs_are_written_and_the_work_folder_is_gone(uninterrupted: Path) -> None:
    assert sorted(results(uninterrupted)) == OUTS
    assert list((uninterrupted / "work/pretrain").iterdir()) == []
    # There is no MLflow in these tests: what it has yet to hear of is kept.
    (kept,) = (uninterrupted / "work/undelivered").iterdir()
    assert (kept / "metrics.jsonl").is_file()
    assert (kept / "last.safetensors").is_file()


def test_history_has_a_row_per_epoch(uninterrupted: Path) -> None:
    with (uninterrupted / "results/pretrain/history.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    levels = [f"gain_db/rho_{rho:g}" for rho in RHOS]
    assert list(rows[0]) == ["epoch", "step", "train_loss", "lr", "loss", *levels, "gain_db/mean"]
    assert [(row["epoch"], row["step"]) for row in rows] == [(str(n), str(4 * n)) for n in range(1, EPOCHS + 1)]
    for row in rows:
        gains = [float(row[level]) for level in levels]
        assert float(row["gain_db/mean"]) == pytest.approx(sum(gains) / len(gains))


def test_the_configuration_rebuilds_the_network(uninterrupted: Path) -> None:
    folder = uninterrupted / "results/pretrain"
    params = load(uninterrupted / "params.yaml")
    config = read_json(folder / "config.json")
    assert config["params"] == params.model_dump(mode="json", exclude={"tune"})
    assert config["format"] == identity.FORMAT_VERSION
    assert config["fingerprint"] == work_folder(uninterrupted, params).name
    assert config["bands"] == ["red", "green", "blue", "nir"]
    assert config["data"] == read_json(uninterrupted / "results/stats/stats.json")["data"]
    with (folder / "history.csv").open() as handle:
        gains = [float(row["gain_db/mean"]) for row in csv.DictReader(handle)]
    assert config["best_epoch"] == gains.index(max(gains)) + 1

    task, trained = build.pretrained_task(folder)
    assert trained == params.model_copy(update={"tune": None})
    assert config["std"] == float(task.linear.std)
    weights = load_file(folder / "network.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in task.network.state_dict().items())


def test_no_result_names_this_machine(uninterrupted: Path) -> None:
    for name, content in results(uninterrupted).items():
        if name != "mlflow_run.json":
            assert str(uninterrupted).encode() not in content, name
            assert socket.gethostname().encode() not in content, name


def test_without_statistics_it_says_what_to_run(project: MakeProject) -> None:
    root, params = project()
    (root / "results/stats/stats.json").unlink()
    with pytest.raises(EarthPriorError, match=r"stats\.json is missing; run: dvc repro stats"):
        pretrain.run(params, root)


def test_a_catalog_that_changed_since_stats_is_refused(project: MakeProject) -> None:
    root, params = project()
    catalog = root / "data/catalog.csv"
    catalog.write_text("".join(catalog.read_text().splitlines(keepends=True)[:-1]))
    whole = catalog.read_text()
    with pytest.raises(
        DataError, match=r"catalog\.csv changed since .* \(chips: validate 4 -> 3\); run: dvc repro stats"
    ):
        pretrain.run(params, root)
    catalog.write_text(whole.replace("g1", "g2"))
    with pytest.raises(DataError, match=r"\(chips: validate 4 -> 3\)"):
        pretrain.run(params, root)


def test_statistics_of_other_bands_are_refused(project: MakeProject) -> None:
    root, params = project()
    path = root / "results/stats/stats.json"
    write_json(path, {**read_json(path), "bands": ["blue", "green", "red", "nir"]})
    with pytest.raises(EarthPriorError, match="was made for bands"):
        pretrain.run(params, root)


def test_a_batch_larger_than_an_epoch_is_refused(project: MakeProject) -> None:
    root, params = project(batch_size=17)
    with pytest.raises(ParamsError, match="batch_size 17 is more than an epoch has: 8 train chips"):
        pretrain.run(params, root)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"batch_size": 500_000, "data__crops_per_chip": 100_000, "data__crop_px": None}, "batch_size 500,000"),
        ({"data__crops_per_chip": 100_000}, "data.crops_per_chip 100,000"),
    ],
)
def test_what_no_memory_holds_is_refused_before_any_work(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], words: str
) -> None:
    # A machine of 10 MiB: what is asked for is never taken.
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=10 * 2**20))
    root, params = project(**overrides)
    with pytest.raises(ParamsError, match=f"{words} needs about .* this machine has 0.0 GB; lower it"):
        pretrain.run(params, root)
    assert not (root / "results/pretrain").exists()


def test_batches_that_cannot_be_shared_out_are_refused(project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def three(device: torch.device) -> Iterator[tuple[World, torch.device]]:
        yield World(0, 3), device

    monkeypatch.setattr(pretrain, "world", three)
    root, params = project()
    with pytest.raises(ParamsError, match="batch_size 4 cannot be shared out evenly to 3 processes; use a multiple of"):
        pretrain.run(params, root)


def test_a_second_process_on_the_same_run_is_refused_at_once(project: MakeProject) -> None:
    root, params = project()
    folder = work_folder(root, params)
    folder.mkdir(parents=True)
    (folder / "owner").write_text("pid 4711 on earth")
    with FileLock(folder / "lock"):
        began = time.monotonic()
        with pytest.raises(EarthPriorError, match="pid 4711 on earth is training this very run"):
            pretrain.run(params, root)
        assert time.monotonic() - began < 5
        assert sorted(path.name for path in folder.iterdir()) == ["lock", "owner"]
        assert not (root / "results/pretrain").exists()


def test_a_stopped_run_says_what_is_saved_and_goes_on_also_from_a_copy_of_dvc(
    project: MakeProject, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, params = project(tmp_path / "main/.dvc/tmp/exps/copy")
    folder = tmp_path / "main/work/pretrain" / work_folder(root, params).name
    monkeypatch.setattr(pretrain, "stop_requests", asked_after(7))
    with pytest.raises(Interrupted) as stopped:
        pretrain.run(params, root)
    assert stopped.value.exit_code == 143
    assert str(stopped.value) == f"saved step 7 of {STEPS}"
    assert not (root / "results/pretrain").exists()
    assert (folder / "ckpt-00000007.pt").is_file()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 4, 6], "losses every second step, and the first epoch"
    assert (folder / "owner").read_text().startswith(f"pid {os.getpid()} on {socket.gethostname()}, since 2")

    monkeypatch.undo()
    monkeypatch.setattr(tracking, "import_mlflow", lambda: False)
    pretrain.run(params, root)
    assert not folder.exists()
    assert {k: v for k, v in results(root).items() if k != "mlflow_run.json"} == {
        k: v for k, v in results(uninterrupted).items() if k != "mlflow_run.json"
    }


def test_what_was_reported_after_the_last_checkpoint_is_reported_once(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, params = project()
    monkeypatch.setattr(pretrain, "stop_requests", asked_after(5))
    with pytest.raises(Interrupted):
        pretrain.run(params, root)
    journal = work_folder(root, params) / "metrics.jsonl"
    with journal.open("a") as handle:
        handle.write('{"step":6,"time_ms":1,"metrics":{"train/loss":1.0}}\n{"step":8,"metr')
    monkeypatch.setattr(pretrain, "stop_requests", asked_after(2))
    with pytest.raises(Interrupted):
        pretrain.run(params, root)
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 4, 6]
    assert records[-1]["time_ms"] > 1


def test_pictures_are_made_on_the_way_and_change_nothing(
    project: MakeProject, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []
    levels: list[int] = []
    monkeypatch.setattr(tracking.Tracker, "mirrors", True)
    monkeypatch.setattr(tracking.Tracker, "log_picture", lambda self, path, key, step: shown.append(step))
    monkeypatch.setattr(tracking.Tracker, "log_levels", lambda self, row, at: levels.append(int(row["epoch"])))
    monkeypatch.setattr(pictures, "SHARE", 1e9)
    root, params = project()
    monkeypatch.setattr(pretrain, "stop_requests", asked_after(10))
    with pytest.raises(Interrupted):
        pretrain.run(params, root)
    assert shown == [0, 20, 40]
    monkeypatch.setattr(pretrain, "stop_requests", asked_after(1000))
    pretrain.run(params, root)
    assert shown[3:] == [0, 20, 40, 60, 80, 100], "those of the first process are handed over again"
    assert levels == [read_json(root / "results/pretrain/config.json")["best_epoch"]]
    assert results(root)["network.safetensors"] == results(uninterrupted)["network.safetensors"]


def test_a_run_that_begins_beside_an_unfinished_one_says_what_it_has_otherwise(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(params: Params, steps: int) -> str:
        monkeypatch.setattr(pretrain, "stop_requests", asked_after(steps))
        with pytest.raises(Interrupted):
            pretrain.run(params, root)
        return capsys.readouterr().err

    def note(said: str) -> str:
        (line,) = [line for line in said.splitlines() if line.startswith("note: ")]
        return line

    root, params = project(lr=0.002)
    first = work_folder(root, params)
    assert "note: " not in stopped(params, 3)

    other = params.model_copy(update={"lr": 0.0003})
    said = stopped(other, 2)
    told = f"work/pretrain/{first.name} (stopped at step 3) is another run: lr 0.002 -> 0.0003. It is kept: put the old"
    assert note(said).startswith(f"note: {told} back to continue it, or delete that folder")
    assert "continuing" not in said

    # The nearest of two; and the first one still goes on where it was.
    third = params.model_copy(update={"lr": 0.0003, "seed": 5, "network": "unet_att_d"})
    said = note(stopped(third, 1))
    named = f"work/pretrain/{work_folder(root, other).name} (stopped at step 2) is another run: "
    assert f"{named}network unet_film -> unet_att_d, seed 0 -> 5, 13 keys that only one of both reads. It is" in said
    assert said.endswith("(1 more unfinished run lies beside it)")
    said = stopped(params, 1)
    assert f"pretrain {first.name}: continuing at step 3" in said
    assert "note: " not in said

    # One that a process trains is no folder to be deleted.
    (first / "owner").write_text("pid 4711 on earth, since noon,")
    with FileLock(first / "lock"):
        fourth = params.model_copy(update={"weight_decay": 0.5})
        said = note(stopped(fourth, 1))
    assert f"work/pretrain/{first.name} is another run, which pid 4711 on earth, since noon is training: weight" in said
    assert "delete" not in said


def test_changed_statistics_begin_a_new_run_and_are_named(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, params = project()
    first = work_folder(root, params)
    monkeypatch.setattr(pretrain, "stop_requests", asked_after(3))
    with pytest.raises(Interrupted):
        pretrain.run(params, root)
    capsys.readouterr()
    path = root / "results/stats/stats.json"
    stats = read_json(path)
    mean = stats["per_band"]["red"]["mean"]
    stats["per_band"]["red"]["mean"] = mean + 1
    stats["data"]["md5"] = "0123456789abcdef0123456789abcdef.dir"
    write_json(path, stats)
    monkeypatch.setattr(pretrain, "stop_requests", asked_after(1))
    with pytest.raises(Interrupted):
        pretrain.run(params, root)
    said = capsys.readouterr().err
    wanted = f"data.md5 null -> 01234567.., stats.json's per_band.red.mean {mean!r} -> {mean + 1!r}. It is kept"
    assert f"note: work/pretrain/{first.name} (stopped at step 3) is another run: stats.json's {wanted}" in said
    assert work_folder(root, params) != first
    assert (first / "ckpt-00000003.pt").is_file()


def test_changed_code_is_refused_unless_accepted(project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    root, params = project(epochs=2)
    monkeypatch.setattr(pretrain, "stop_requests", asked_after(2))
    with pytest.raises(Interrupted):
        pretrain.run(params, root)
    monkeypatch.undo()
    monkeypatch.setattr(tracking, "import_mlflow", lambda: False)
    files = {**identity.code_hash().files, "losses.py": "changed"}
    monkeypatch.setattr(identity, "code_hash", lambda **_: CodeHash(files, "changed"))
    with pytest.raises(EarthPriorError, match=r"losses\.py"):
        pretrain.run(params, root)
    pretrain.run(params, root, accept_code=True)
    assert sorted(results(root)) == OUTS


def test_results_that_cannot_be_written_keep_the_run(
    project: MakeProject, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, params = project()

    save = LinearDenoiser.save

    def full_at_the_end(linear: LinearDenoiser, path: Path) -> None:
        if "results" in path.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(linear, path)

    monkeypatch.setattr(LinearDenoiser, "save", full_at_the_end)
    with pytest.raises(StorageError, match=r"results/pretrain/ could not be written .*No space left") as caught:
        pretrain.run(params, root)
    assert caught.value.exit_code == 4
    assert "free some space; the same command then continues" in str(caught.value)
    assert not (root / "results/pretrain/config.json").exists()
    assert (work_folder(root, params) / f"ckpt-{STEPS - 1:08d}.json").is_file()
    monkeypatch.undo()
    monkeypatch.setattr(tracking, "import_mlflow", lambda: False)
    pretrain.run(params, root)
    assert results(root)["network.safetensors"] == results(uninterrupted)["network.safetensors"]


def test_a_diverged_run_says_why_in_mlflow_too_and_keeps_its_state(
    project: MakeProject, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, params = project()
    update, ended, tags = Trainer._update, [], {}

    def diverging(trainer: Trainer, shares: Any) -> Any:
        if trainer.step == 9:
            for share in shares:
                share.batch.x0[:] = torch.nan
        return update(trainer, shares)

    close = tracking.Tracker.close
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", diverging)
        patch.setattr(tracking.Tracker, "set_tags", lambda self, told: tags.update(told))
        patch.setattr(tracking.Tracker, "close", lambda self, status: (ended.append(status), close(self, status))[1])
        with pytest.raises(DivergedError) as caught:
            pretrain.run(params, root)
    assert ended == ["FAILED"]
    assert tags["earthprior.reason"] == str(caught.value)
    assert "diverged at step 10 of 20" in str(caught.value)
    assert read_json(work_folder(root, params) / "diverged.json")["last_checkpoint"] == "ckpt-00000009.pt"
    pretrain.run(params, root)
    assert results(root)["network.safetensors"] == results(uninterrupted)["network.safetensors"]


def test_a_request_while_mlflow_hears_the_rest_shortens_that_and_loses_nothing(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, params = project(epochs=2)
    request, close, hurried = SimpleNamespace(signal_number=None), tracking.Tracker.close, []

    def closing(tracker: tracking.Tracker, status: str) -> Any:
        hurried.append(tracker.hurried())
        request.signal_number = signal.SIGTERM
        hurried.append(tracker.hurried())
        return close(tracker, status)

    @contextmanager
    def requests() -> Iterator[Any]:
        yield request

    monkeypatch.setattr(tracking.Tracker, "close", closing)
    monkeypatch.setattr(pretrain, "stop_requests", requests)
    pretrain.run(params, root)
    assert hurried == [False, True]
    assert sorted(results(root)) == OUTS


@pytest.mark.parametrize(
    "damage", ["flipped", "gone", *(pytest.param(word, marks=pytest.mark.soak) for word in ("truncated", "text"))]
)
def test_a_damaged_linear_denoiser_is_fitted_again_and_the_bits_stay(
    project: MakeProject, uninterrupted: Path, damage: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    root, params = project()
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "stop_requests", asked_after(7))
        with pytest.raises(Interrupted):
            pretrain.run(params, root)
    path = work_folder(root, params) / "linear.safetensors"
    whole = path.read_bytes()
    damaged = {
        "flipped": whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:], "truncated": whole[:-100], "text": b"{}",
    }  # fmt: skip
    path.unlink()
    if damage != "gone":
        path.write_bytes(damaged[damage])
    pretrain.run(params, root)
    assert "warning: linear.safetensors is damaged or missing; it is fitted again" in capsys.readouterr().err
    for name in ("network.safetensors", "linear.safetensors"):
        assert results(root)[name] == results(uninterrupted)[name]


def test_another_linear_denoiser_than_the_run_began_with_is_refused(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, params = project()
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "stop_requests", asked_after(7))
        with pytest.raises(Interrupted):
            pretrain.run(params, root)
    (work_folder(root, params) / "linear.safetensors").unlink()
    fit = linear_denoiser.fit_linear
    monkeypatch.setattr(linear_denoiser, "fit_linear", lambda *given: _brighter(fit(*given)))
    with pytest.raises(EarthPriorError, match=r"linear\.safetensors was damaged, and fitted again it is another one"):
        pretrain.run(params, root)


def _brighter(linear: LinearDenoiser) -> LinearDenoiser:
    linear.mean += 1e-6
    return linear


def test_a_journal_without_checkpoints_is_no_silent_fresh_start(
    project: MakeProject, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, params = project()
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "stop_requests", asked_after(7))
        with pytest.raises(Interrupted):
            pretrain.run(params, root)
    for path in work_folder(root, params).glob("ckpt-*"):
        path.unlink()
    pretrain.run(params, root)
    said = capsys.readouterr().err
    assert "holds no checkpoint, though step 6 was reached" in said
    assert "It begins anew" in said
    assert results(root)["network.safetensors"] == results(uninterrupted)["network.safetensors"]


def test_a_damaged_journal_loses_only_the_damaged_lines(
    project: MakeProject, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root, params = project()
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "stop_requests", asked_after(7))
        with pytest.raises(Interrupted):
            pretrain.run(params, root)
    journal = work_folder(root, params) / "metrics.jsonl"
    first, *others = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first.replace(b'"step"', b'"st\xffp"') + b"".join(others))
    monkeypatch.setattr(pretrain, "stop_requests", asked_after(2))
    with pytest.raises(Interrupted):
        pretrain.run(params, root)
    assert "metrics.jsonl: 1 damaged lines skipped" in caplog.text
    assert [json.loads(line)["step"] for line in journal.read_text().splitlines()] == [4, 4, 6, 8, 8]
    monkeypatch.setattr(pretrain, "stop_requests", asked_after(1000))
    pretrain.run(params, root)
    assert results(root)["network.safetensors"] == results(uninterrupted)["network.safetensors"]


def test_the_curve_over_levels_is_in_the_journal_once_also_after_a_late_kill(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, params = project(epochs=2)
    journals: list[list[int]] = []

    def note(store: CheckpointStore) -> None:
        lines = (store.folder / "metrics.jsonl").read_text().splitlines()
        journals.append([json.loads(line)["step"] for line in lines if "by_rho" in line])

    def killed(store: CheckpointStore) -> None:
        note(store)
        raise RuntimeError("killed")

    monkeypatch.setattr(CheckpointStore, "delete", killed)
    with pytest.raises(RuntimeError, match="killed"):
        pretrain.run(params, root)
    monkeypatch.setattr(CheckpointStore, "delete", note)
    pretrain.run(params, root)
    assert journals == [[5, 10, 20, 50, 100, 200, 500]] * 2


def test_other_threads_are_another_run_and_the_first_is_kept(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    root, params = project()
    first = work_folder(root, params)
    monkeypatch.setattr(pretrain, "stop_requests", asked_after(7))
    with pytest.raises(Interrupted):
        pretrain.run(params, root)
    monkeypatch.setattr(pretrain, "stop_requests", asked_after(3))
    with pytest.raises(Interrupted, match="saved step 3"):
        pretrain.run(load_with(root, {"threads": 2}), root)
    assert "is another run: threads 1 -> 2. It is kept" in capsys.readouterr().err
    with pytest.raises(Interrupted, match="saved step 10"):
        pretrain.run(load_with(root, {"threads": 1}), root)
    assert (first / "ckpt-00000010.pt").exists()


@pytest.mark.parametrize("name", ["device", "precision", "processes"])
def test_a_run_continued_in_another_setting_says_so_in_a_line(
    project: MakeProject, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, params = project()
    monkeypatch.setattr(pretrain, "stop_requests", asked_after(2))
    with pytest.raises(Interrupted):
        pretrain.run(params, root)
    setting = session.Session._setting
    monkeypatch.setattr(session.Session, "_setting", lambda self: {**setting(self), name: "other"})
    capsys.readouterr()
    with pytest.raises(Interrupted, match="saved step 4"):
        pretrain.run(params, root)
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warned) == 1
    assert "(now other): the last digits of the results differ" in warned[0]
    assert f"was written with {name} " in warned[0]


def test_what_dvc_has_not_recorded_is_not_trained_again(
    project: MakeProject, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, params = project()
    folder, network = work_folder(root, params), root / "results/pretrain/network.safetensors"
    monkeypatch.setenv("DVC_STAGE", "pretrain")
    pretrain.run(params, root)
    assert (folder / "done.json").exists()
    # dvc was killed before it wrote dvc.lock, and has deleted the outs
    shutil.rmtree(root / "results/pretrain")
    capsys.readouterr()
    pretrain.run(params, root)
    assert f"continuing at step {STEPS - 1} of {STEPS}" in capsys.readouterr().err
    assert network.read_bytes() == (uninterrupted / "results/pretrain/network.safetensors").read_bytes()

    # now it has, and is asked to run the stage again
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=root, check=True)
    md5 = put_in_cache(root, network.read_bytes())
    outs = [{"path": "results/pretrain/network.safetensors", "md5": md5}]
    write_json(root / "dvc.lock", {"stages": {"pretrain": {"outs": outs}}})
    pretrain.run(params, root)
    assert f"training {STEPS} steps" in capsys.readouterr().err


def test_under_dvc_a_changed_params_file_is_told_while_the_training_can_still_be_recorded(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, params = project()
    shutil.copy(Path(__file__).parents[1] / "dvc.yaml", root)
    path = root / "params.yaml"
    before = path.read_text()
    one_step = Trainer._one_step

    def edited(trainer: Trainer, *arguments: Any) -> None:
        if trainer.step == 5:
            load_with(root, {"lr": 0.5})
        if trainer.step == 12:
            path.write_text(before)
        one_step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_one_step", edited)
    monkeypatch.setenv("DVC_STAGE", "pretrain")
    pretrain.run(params, root)
    said = capsys.readouterr().err
    warned, again = f"(lr: {params.lr} -> 0.5)", "params.yaml is again what pretrain runs with"
    assert said.count(warned) == said.count(again) == 1
    ends = [said.index(f"epoch {epoch}/{EPOCHS}: ") for epoch in (1, 2, 3, 4)]
    assert ends[0] < said.index(warned) < ends[2] < said.index(again)


def test_what_mlflow_has_not_heard_outlives_the_work_folder(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking.Tracker, "close", lambda self, status="FINISHED": Delivery(0, 9, False))
    root, params = project(epochs=2)
    pretrain.run(params, root)
    (kept,) = (root / "work/undelivered").iterdir()
    assert kept.name.startswith(work_folder(root, params).name)
    assert (kept / "metrics.jsonl").read_text().count("\n") > 2
    assert not work_folder(root, params).exists()


@pytest.mark.parametrize("stage", [None, "pretrain"])
def test_a_disk_too_full_to_set_aside_what_mlflow_has_not_heard_stops_nothing_and_loses_nothing(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stage: str | None
) -> None:
    def full(path: Path, kept: Path) -> None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if stage:
        monkeypatch.setenv("DVC_STAGE", stage)
    monkeypatch.setattr(outbox, "_link", full)
    root, params = project(epochs=2)
    pretrain.run(params, root)
    assert (root / "results/pretrain/network.safetensors").exists()
    ((waits, _),) = waiting(root)
    assert waits.folder == work_folder(root, params)
    assert (waits.folder / "metrics.jsonl").read_text().count("\n") > 2
    assert not list((root / "work/undelivered").glob("*")), "nothing half-made takes up room"
    (warned,) = [record.getMessage() for record in caplog.records if "stays" in record.getMessage()]
    assert warned.startswith(f"work/pretrain/{waits.folder.name} stays: MLflow has yet to hear of it")
    assert "No space left" in warned
    # with room again, the same command goes to its end once more, and tidies up
    monkeypatch.undo()
    monkeypatch.setattr(tracking, "import_mlflow", lambda: False)
    pretrain.run(params, root)
    assert not waits.folder.exists()


class Command:
    """The real command in a process of its own, MLflow kept out of it."""

    def __init__(self, root: Path, largest_file: int = resource.RLIM_INFINITY) -> None:
        blocked = root / "blocked"
        blocked.mkdir(exist_ok=True)
        (blocked / "sitecustomize.py").write_text("import sys; sys.modules['mlflow'] = None\n")
        path = os.pathsep.join([str(blocked), *(entry for entry in sys.path if entry)])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "earthprior", "pretrain"], cwd=root, text=True, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY)),
        )  # fmt: skip

    def end(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=50)[1]
        return self.process.returncode, said


def test_on_a_full_disk_training_goes_to_its_end_and_the_same_command_continues(
    project: MakeProject, uninterrupted: Path
) -> None:
    """The system itself refuses: no file may be larger than a journal or a linear denoiser."""
    root, params = project()
    code, said = Command(root, largest_file=40_000).end()
    assert code == 4, said
    assert said.count("warning: checkpoint of step ") == 1, said
    assert "checkpoint of step 1 not written in " in said
    assert "Training goes on, and tries again at every checkpoint" in said
    *_, fault, last = said.splitlines()
    assert fault.startswith("earthprior: results/pretrain/ could not be written (File too large). To mend it: a limit")
    assert last == "continue with: python -m earthprior pretrain"
    assert "epoch 5/5" in said
    folder = work_folder(root, params)
    assert not list(folder.glob("ckpt-*")) + list(folder.glob(".*.tmp*"))
    assert not list(root.glob("results/pretrain/*"))

    pretrain.run(params, root)
    assert results(root)["network.safetensors"] == results(uninterrupted)["network.safetensors"]
