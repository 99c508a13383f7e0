"""What runs are called."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from earthprior import naming
from earthprior.params import Params, active, load
from earthprior.params.editing import overlay

ROOT = Path(__file__).parents[1]
MakeParams = Callable[..., Params]
COMMITTED = (ROOT / "params.yaml").read_text()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project in a folder of a git checkout, whose last commit has the params.yaml of this one."""
    home = tmp_path / "checkout/project"
    home.mkdir(parents=True)
    git(home, "init", "--quiet")
    commit(home, COMMITTED)
    return home


def git(root: Path, *arguments: str) -> None:
    person = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(root), *person, *arguments], check=True, capture_output=True)


def commit(root: Path, text: str) -> None:
    (root / "params.yaml").write_text(text)
    git(root, "add", "params.yaml")
    git(root, "commit", "--quiet", "-m", "x")


def changed(root: Path, values: dict[str, Any]) -> tuple[Params, str]:
    """The params of a working copy that was edited, and its text."""
    text, _ = overlay(root / "params.yaml", values, "params.yaml")
    (root / "params.yaml").write_text(text)
    return load(root / "params.yaml"), text


@pytest.mark.parametrize(
    ("now", "text"),
    [
        ({"lr": 0.1, "epochs": 8}, ""),
        ({"epochs": 9, "lr": 3e-4}, "epochs=9 lr=0.0003"),
        ({"lr": 0.00123456, "seed": 1}, "lr=0.001235 seed=1"),
        ({"grad_clip": None, "flip": True}, "grad_clip=null flip=true"),
        ({"a": [8, 16], "b": {"low": -15.0, "high": 15.5}}, "a=[8,16] b={low:-15,high:15.5}"),
    ],
)  # fmt: skip
def test_only_what_differs_is_said_and_shortly(now: dict[str, Any], text: str) -> None:
    assert naming.differences(now, {"lr": 0.1, "epochs": 8, "seed": 0}) == text


def test_many_differences_are_cut_and_counted() -> None:
    now = {"network": "unet_att_d", "x" * 40: 1, "y" * 40: 2, "lr": 0.5}
    assert naming.differences(now, {}) == f"network=unet_att_d {'x' * 40}=1 +2 more"
    now = {"network": "unet_att_d", "y" * 80: 2, "lr": 0.5}
    assert naming.differences(now, {}) == "network=unet_att_d lr=0.5 +1 more"
    alone = naming.differences({"y" * 80: 2}, {})
    assert len(alone) == naming.LENGTH
    assert alone.endswith("...")


def test_words_stand_for_their_keys_where_no_other_key_ends_so() -> None:
    now = {"diffusion.noise_schedule": "cosine", "loss_weights.alpha": 0.5, "evaluate.steps": 4}
    assert naming.differences(now, {}) == "noise_schedule=cosine loss_weights.alpha=0.5 evaluate.steps=4"


def test_a_run_differs_from_the_last_commit_and_only_in_what_acts(root: Path) -> None:
    params, text = changed(root, {"lr": 3e-4, "sgd.momentum": 0.5, "evaluate.steps": 10, "operation.readers": 1})
    assert params.sgd.momentum == 0.5
    assert naming.from_commit(params, root) == "lr=0.0003 evaluate.steps=10"
    commit(root, text)
    assert naming.from_commit(params, root) == ""


def test_a_section_that_becomes_active_is_compared_with_what_the_file_says_of_it(root: Path) -> None:
    params, _ = changed(root, {"optimizer": "sgd", "sgd.nesterov": True})
    assert "sgd.momentum" in active(params)
    assert naming.from_commit(params, root) == "optimizer=sgd nesterov=true"


def test_spelling_makes_no_difference(root: Path) -> None:
    commit(root, COMMITTED.replace("\nlr: 0.001", "\nlr: 1.0e-3").replace("[0, 90, 180, 270]", "[0.0, 90, 180, 270]"))
    assert naming.from_commit(load(ROOT / "params.yaml"), root) == ""


def test_a_commit_that_is_older_than_the_code_still_compares(root: Path) -> None:
    commit(root, COMMITTED.replace("\nlr: 0.001", "\nlr: 0.5").replace("\nseed: 0", "") + "\nlong_gone: 1\n")
    assert naming.from_commit(load(ROOT / "params.yaml"), root) == "seed=0 lr=0.001"


@pytest.mark.parametrize("text", ["", "a: [", "- 1\n"])
def test_a_commit_without_readable_params_says_nothing(root: Path, text: str) -> None:
    commit(root, text)
    assert naming.from_commit(load(ROOT / "params.yaml"), root) == ""


def test_outside_git_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load(ROOT / "params.yaml")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert naming.from_commit(params, tmp_path) == ""
    monkeypatch.setenv("PATH", "")
    assert naming.from_commit(params, tmp_path) == ""


def test_names(make_params: MakeParams) -> None:
    assert naming.plain_name(make_params(), "1a2b3c4d5e6f") == "unet_film-wiener-1a2b3c"
    assert naming.titled("puffy-daks", "lr=0.1") == "puffy-daks: lr=0.1"
    assert naming.titled(None, "lr=0.1") == "lr=0.1"
    assert naming.titled("trial-003", "") == "trial-003"
    assert naming.titled(None, "") is None
