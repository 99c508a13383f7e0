"""A run made before, found by the id of its MLflow run or the name of its DVC experiment, with what was kept of it."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from ruamel.yaml import YAML

from earthprior import mlflow_read
from earthprior.errors import EarthPriorError
from earthprior.files import read_json
from earthprior.handover import read_history, read_metrics
from earthprior.identity import data_version, git_commit, main_root
from earthprior.params import read_mapping
from earthprior.tracking_store import RunRef, locate

RUN_ID = re.compile(r"[0-9a-f]{32}")
# DVC keeps an experiment as refs/exps/<first 2 digits of the commit it began at>/<the other 38>/<name>.
EXPERIMENT_REF = re.compile(r"refs/exps/([0-9a-f]{2})/([0-9a-f]{38})/(.+)")
# Where a DVC experiment has each file. MLflow has them under the names of mlflow_read.ARTIFACTS.
FILES = {
    "params.yaml": "params.yaml",
    "stats.json": "results/stats/stats.json",
    **{
        name: f"results/pretrain/{name}"
        for name in (
            "network.safetensors", "linear.safetensors", "config.json", "history.csv", "environment.json",
            "mlflow_run.json",
        )
    },
    "metrics.json": "results/evaluate/metrics.json",
    "serving.json": "results/evaluate/serving.json",
}  # fmt: skip


@dataclass(frozen=True)
class RecordedRun:
    """A run made before.

    Attributes:
        asked: What the user typed.
        title: For the eye: the DVC experiment's name or the MLflow run's.
        content: The plain mapping of its params.yaml; an older file may lack keys of today.
        commit: That it ran at; of a DVC experiment the commit that DVC made of it, code and params included.
        data_md5: Of its chips, as data.dvc had it.
        history: results/pretrain/history.csv; may be empty.
        metrics: Those of evaluate, flat (`gain_db/mean`); may be empty.
        folder: Copies of its files, as far as they were kept: params.yaml, config.json, network.safetensors,
            linear.safetensors, stats.json, history.csv, environment.json, metrics.json, serving.json.
        run_id: Its MLflow run, if that is known.
        experiment: The DVC experiment that it was made as, if it was; its ref may be gone.
        code: The beginning of its code's digest (see `identity.code_hash`), if it was kept.
    """

    asked: str
    title: str
    content: Mapping[str, Any]
    commit: str | None
    data_md5: str | None
    history: pd.DataFrame
    metrics: Mapping[str, float]
    folder: Path
    run_id: str | None = None
    experiment: str | None = None
    code: str | None = None

    def read(self, name: str) -> dict[str, Any]:
        """The content of one of the JSON files; empty where it was not kept."""
        return _read_json(self.folder / name)


def find(root: Path, asked: str, into: Path) -> RecordedRun:
    """Find a run and copy what was kept of it.

    Args:
        root: The project's root.
        asked: The id of an MLflow run or the name of a DVC experiment.
        into: Folder for the copies, made here.

    Raises:
        EarthPriorError: There is no such run, MLflow's store does not answer, or what was kept cannot be used.
    """
    root = main_root(root)
    into.mkdir(parents=True, exist_ok=True)
    if not RUN_ID.fullmatch(asked) and (commit := experiment_commit(root, asked)):
        return _from_dvc(root, asked, commit, into)
    kept = mlflow_read.read(locate(root), asked, into) if RUN_ID.fullmatch(asked) else None
    if kept is None:
        raise EarthPriorError(_unknown(root, asked))
    return _from_mlflow(asked, kept, into)


def of_workspace(root: Path, into: Path) -> RecordedRun:
    """The run whose results lie in a checkout."""
    into.mkdir(parents=True, exist_ok=True)
    for name, path in FILES.items():
        if (root / path).is_file():
            shutil.copyfile(root / path, into / name)
    return RecordedRun(
        asked=root.name,
        title=root.name,
        content=_params(root.name, into),
        commit=git_commit(root),
        data_md5=data_version(root)[0],
        history=read_history(into / "history.csv"),
        metrics=read_metrics(into / "metrics.json"),
        folder=into,
    )


def experiment_commit(root: Path, name: str) -> str | None:
    """The commit of a DVC experiment; that of the newest if several commits have one of this name.

    An experiment of the commit that is checked out comes before newer ones, as in DVC.
    """
    commits = {ref: commit for ref, commit in _experiments(root) if ref[1] == name}
    head = _git(root, "rev-parse", "--verify", "-q", "HEAD").strip()
    return commits.get((head, name)) or next(iter(commits.values()), None)


def _experiments(root: Path) -> list[tuple[tuple[str, str], str]]:
    """((commit that it began at, name), commit) of every DVC experiment, the newest first."""
    listed = _git(root, "for-each-ref", "--sort=-committerdate", "--format=%(objectname) %(refname)", "refs/exps")
    pairs = [line.partition(" ")[::2] for line in listed.splitlines()]
    found = [(EXPERIMENT_REF.fullmatch(ref), commit) for commit, ref in pairs]
    return [((match[1] + match[2], match[3]), commit) for match, commit in found if match]


def _from_dvc(root: Path, name: str, commit: str, into: Path) -> RecordedRun:
    from dvc.api import DVCFileSystem

    files = DVCFileSystem(str(root), rev=commit)
    for file, path in FILES.items():
        # In Git, else in DVC's cache, else in its default remote. Whatever that remote complains of, the file is not
        # to be had.
        with suppress(Exception):
            files.get_file(path, str(into / file))
    ref = RunRef.read(into / "mlflow_run.json")
    try:
        out = YAML(typ="safe", pure=True).load(files.read_text("data.dvc"))["outs"][0]
    except (OSError, LookupError, TypeError):
        out = {}
    return RecordedRun(
        asked=name,
        title=name,
        content=_params(name, into),
        commit=commit,
        data_md5=out.get("md5"),
        history=read_history(into / "history.csv"),
        metrics=read_metrics(into / "metrics.json"),
        folder=into,
        run_id=ref.run_id if ref else None,
        experiment=name,
    )


def _from_mlflow(asked: str, kept: mlflow_read.KeptRun, into: Path) -> RecordedRun:
    content = _params(asked, into)
    # An evaluation may be made later, and with other values than the training stored.
    told = {key.removeprefix("evaluate."): text for key, text in kept.params.items() if key.startswith("evaluate.")}
    yaml = YAML(typ="safe", pure=True)
    content["evaluate"] = {**content.get("evaluate", {}), **{key: yaml.load(text) for key, text in told.items()}}
    return RecordedRun(
        asked=asked,
        title=kept.name,
        content=content,
        commit=kept.tags.get("git.commit"),
        data_md5=kept.tags.get("dvc.data_md5"),
        history=read_history(into / "history.csv"),
        metrics=read_metrics(into / "metrics.json"),
        folder=into,
        run_id=asked,
        experiment=kept.tags.get("dvc.exp_name"),
        code=kept.tags.get("earthprior.code"),
    )


def _params(asked: str, into: Path) -> dict[str, Any]:
    if not (into / "params.yaml").is_file():
        raise EarthPriorError(
            f"run {asked}: its params.yaml was not kept. A training stores it when it is done, so this one was "
            "stopped, failed, or is no training; `mlflow ui` tells. Name a finished run; of a study, one of its trials"
        )
    content = read_mapping(into / "params.yaml")
    # It is stored at the end of a training, and may have been edited meanwhile; these are the values that acted.
    trained = _read_json(into / "config.json").get("params", {})
    return content | {key: value for key, value in trained.items() if key != "evaluate"}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _unknown(root: Path, asked: str) -> str:
    """What to say of a run that nobody knows: the nearest names, and how to list all."""
    runs = mlflow_read.names(locate(root))
    # A run's name is that of its experiment or trial, then what it has otherwise than params.yaml.
    meant = [run_id for run_id, name in runs.items() if asked in (name, name.partition(":")[0], run_id[: len(asked)])]
    if meant and len(asked) >= 4:
        hint = "MLflow runs go by their whole id here: did you mean " + ", ".join(meant[:3]) + "?"
    else:
        known = [name for (_, name), _ in _experiments(root)]
        ids = {name: f"{name} (id {run_id})" for run_id, name in runs.items()} | {run_id: run_id for run_id in runs}
        shown = ids | {name: name for name in known}
        near = [shown[name] for name in difflib.get_close_matches(asked, list(shown), n=3)]
        hint = f"did you mean {', '.join(near)}?" if near else ""
    return (
        f"run {asked} is neither a DVC experiment of this repository nor the id of a run in {locate(root).shown}; "
        f"{hint}{' ' * bool(hint)}`dvc exp list --all-commits` and `mlflow ui` list them all"
    )


def _git(root: Path, *command: str) -> str:
    """What git answers; nothing where it fails."""
    done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""
