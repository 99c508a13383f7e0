from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from dvc_cache import put_in_cache
from earthprior import under_dvc
from earthprior.errors import ParamsError
from earthprior.files import write_json
from earthprior.params import load
from tiny_project import ROOT, edit_params


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "results/pretrain").mkdir(parents=True)
    (tmp_path / under_dvc.NETWORK).write_bytes(b"weights")
    monkeypatch.setenv("DVC_STAGE", "pretrain")
    return tmp_path


@pytest.fixture
def folder(root: Path) -> Path:
    """State of a training that is done."""
    made = root / "work/pretrain/abc"
    (made / "pictures").mkdir(parents=True)
    for name in ("ckpt-00000007.pt", "lock", "owner", "pictures/0.png"):
        (made / name).touch()
    under_dvc.keep(made, root)
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def lock_with(root: Path, content: Any) -> None:
    write_json(root / "dvc.lock", content)


def outs(md5: str) -> dict[str, Any]:
    return {"stages": {"pretrain": {"outs": [{"path": "results/pretrain/config.json", "md5": "0"},
                                             {"path": under_dvc.NETWORK, "md5": md5}]}}}  # fmt: skip


@pytest.mark.parametrize("lock", [None, {}, {"stages": {"stats": {}}}, [], outs("of another training")])
def test_state_stays_until_dvc_has_the_outs(root: Path, folder: Path, lock: Any) -> None:
    if lock is not None:
        lock_with(root, lock)
    under_dvc.reopen(folder, root)
    assert names(folder) == ["ckpt-00000007.pt", "lock", "owner", "pictures"]


@pytest.mark.parametrize("cached", [False, True])
def test_a_stage_whose_outs_dvc_has_runs_anew(root: Path, folder: Path, cached: bool) -> None:
    """It has them where they are in its cache: a dvc.lock may be that of others, whose results were never pulled."""
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=root, check=True)
    lock_with(root, outs(hashlib.md5(b"weights", usedforsecurity=False).hexdigest()))
    if cached:
        put_in_cache(root, b"weights")
    under_dvc.reopen(folder, root)
    assert names(folder) == (["lock", "owner"] if cached else ["ckpt-00000007.pt", "lock", "owner", "pictures"])


def test_only_what_is_done_and_free_is_forgotten(folder: Path) -> None:
    unfinished = folder.with_name("def")
    unfinished.mkdir()
    under_dvc.forget(unfinished)
    assert unfinished.exists()
    with FileLock(folder / "lock"):
        under_dvc.forget(folder)
        assert folder.exists()
    under_dvc.forget(folder)
    assert not folder.exists()


def test_what_dvc_has_nowhere_outlives_the_next_training(root: Path, folder: Path) -> None:
    """A dvc that died after a training, and the next experiment of the same night."""
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=root, check=True)
    following = folder.with_name("def")
    following.mkdir()
    (root / under_dvc.NETWORK).write_bytes(b"its weights")
    under_dvc.keep(following, root)
    assert names(folder) == ["ckpt-00000007.pt", "done.json", "lock", "owner", "pictures"]
    put_in_cache(root, b"weights")
    under_dvc.keep(following, root)
    assert not folder.exists()
    assert names(following) == ["done.json"]


@pytest.mark.parametrize(
    ("stage", "changed", "told"),
    [
        ("pretrain", {"lr": 0.5}, "lr: 0.001 -> 0.5"),
        ("pretrain", {"unet_film.blocks": 2, "seed": 1}, "seed: 0 -> 1; unet_film.blocks: 1 -> 2"),
        ("evaluate", {"evaluate.steps": 5}, "evaluate.steps: 20 -> 5"),
        ("stats", {"data.buffer": 4}, "data.buffer: 0 -> 4"),
        ("pretrain", {"operation.readers": 1, "evaluate.steps": 5}, None),
        ("stats", {"lr": 0.5, "data.crop_px": 28}, None),
        ("evaluate", {"lr": 0.5}, None),
    ],
)
def test_params_that_changed_under_a_stage_are_not_recorded_with_it(
    root: Path, stage: str, changed: dict[str, Any], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load(root / "params.yaml")
    under_dvc.check_params(stage, before, root)
    edit_params(root / "params.yaml", changed)
    if told is None:
        under_dvc.check_params(stage, before, root)
        return
    with pytest.raises(ParamsError) as fault:
        under_dvc.check_params(stage, before, root)
    assert f"while {stage} ran" in str(fault.value)
    assert f"({told})" in str(fault.value)
    monkeypatch.delenv("DVC_STAGE")
    under_dvc.check_params(stage, before, root)


def test_params_that_change_under_a_stage_are_told_at_once_and_again_when_they_are_put_back(root: Path) -> None:
    path, told = root / "params.yaml", list[str]()
    before = path.read_text()
    watch = under_dvc.ParamsWatch("pretrain", load(path), root)

    def looked() -> list[str]:
        told.clear()
        watch.look(told.append)
        watch.look(told.append)
        return told

    assert looked() == []
    edit_params(path, {"evaluate.steps": 5, "operation.readers": 1})
    assert looked() == [], "no keys of the stage"
    edit_params(path, {"lr": 0.5})
    (warning,) = looked()
    assert "while pretrain runs with the values before (lr: 0.001 -> 0.5)" in warning
    assert "Put them back before it ends, and dvc records its results" in warning
    edit_params(path, {"evaluate.steps": 6})
    assert looked() == [], "nothing new"
    edit_params(path, {"lr": 0.25})
    assert "(lr: 0.001 -> 0.25)" in looked()[0]
    for broken in ("lr: [", "", "lr: high\n"):
        path.write_text(broken)
        assert looked() == [], "may be half written"
    path.write_text(before)
    assert looked() == ["params.yaml is again what pretrain runs with: dvc will record its results"]
    path.unlink()
    assert looked() == []


def test_without_dvc_params_may_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE")
    watch = under_dvc.ParamsWatch("pretrain", load(root / "params.yaml"), root)
    edit_params(root / "params.yaml", {"lr": 0.5})
    watch.look(pytest.fail)


@pytest.mark.parametrize("content", [None, "", "stages: {train: {cmd: x}}", "stages: {pretrain: {cmd: x}}", "{"])
def test_a_pipeline_of_ones_own_is_no_fault_after_days_of_training(root: Path, content: str | None) -> None:
    before = load(root / "params.yaml")
    edit_params(root / "params.yaml", {"lr": 0.5})
    (root / "dvc.yaml").unlink()
    if content is not None:
        (root / "dvc.yaml").write_text(content)
    under_dvc.check_params("pretrain", before, root)
