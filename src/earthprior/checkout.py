"""A copy of this repository as it was for a run: its commit, its chips, its params; and commands run in it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from earthprior.errors import EarthPriorError
from earthprior.identity import data_version
from earthprior.recorded import RecordedRun

# What a shell, a stage or a git hook around this one has set for another run, or for another repository.
FOREIGN = re.compile(
    r"DVC_(EXP|STAGE|ROOT|STUDIO).*|MLFLOW_(RUN_ID|EXPERIMENT.*|TRACKING.*)|EARTHPRIOR_.*|PYTHONPATH"
    r"|GIT_(DIR|WORK_TREE|INDEX_FILE|COMMON_DIR|OBJECT_DIRECTORY|ALTERNATE.*|PREFIX|NAMESPACE)"
)


def call(command: Sequence[str], folder: Path, quiet: bool = False) -> int:
    """Run a command with this Python and a tracking store of the copy's own; its exit code."""
    environment = {name: value for name, value in os.environ.items() if not FOREIGN.fullmatch(name)}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    environment["MLFLOW_TRACKING_URI"] = "sqlite:///mlflow.db"
    said = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, cwd=folder, env=environment, stdout=said, stderr=said, check=False).returncode


def at(root: Path, commit: str, copy: Path) -> None:
    """Copy the files of a commit to the folder `copy`, which becomes a repository of its own.

    Raises:
        EarthPriorError: The commit is not to be had.
    """
    if call(["git", "-C", str(root), "cat-file", "-e", f"{commit}^{{commit}}"], root, quiet=True):
        raise EarthPriorError(f"commit {commit} of the run is not in this repository; git fetch, and try again")
    # The experiments' commits are in no branch: only shared objects make them known to the copy.
    for command in (
        ["git", "clone", "--quiet", "--shared", "--no-checkout", str(root), str(copy)],
        ["git", "-C", str(copy), "-c", "advice.detachedHead=false", "checkout", "--quiet", "--detach", commit],
    ):
        if code := call(command, root):
            raise EarthPriorError(f"`{shlex.join(command)}` failed with exit code {code}; what it said is above")


def get_chips(root: Path, then: RecordedRun, copy: Path) -> None:
    """Get the run's chips by their md5: linked from DVC's cache, or fetched from whatever remote has them.

    Raises:
        EarthPriorError: Nobody has them.
    """
    if data_version(copy)[0] != then.data_md5:
        out = {"md5": then.data_md5, "hash": "md5", "path": "data"}
        # stats.json holds their number, and the fingerprint follows stats.json.
        if nfiles := then.read("config.json").get("data", {}).get("nfiles"):
            out["nfiles"] = nfiles
        _write_yaml(copy / "data.dvc", {"outs": [out]})
    remotes = _configure_dvc(root, copy)
    try:
        _fetch_chips(then, copy, remotes)
    finally:
        # It may hold the remotes' passwords.
        (copy / ".dvc/config.local").unlink(missing_ok=True)


def _fetch_chips(then: RecordedRun, copy: Path, remotes: Sequence[str]) -> None:
    dvc = [sys.executable, "-m", "dvc"]
    if call([*dvc, "checkout", "--quiet", "data.dvc"], copy, quiet=True) == 0:
        return
    for remote in remotes:
        if call([*dvc, "pull", "--quiet", "-r", remote, "data.dvc"], copy, quiet=True) == 0:
            return
    tried = f"the remotes {', '.join(remotes)}" if remotes else "there is no remote to ask"
    raise EarthPriorError(
        f"the chips of run {then.asked}, md5 {then.data_md5}, are not in DVC's cache nor in {tried}; fetch them from "
        "where they were pushed to (dvc remote add, dvc pull), and try again"
    )


def _configure_dvc(root: Path, copy: Path) -> list[str]:
    """Let the copy use the cache and the remotes of this checkout; their names, the default one first."""
    from dvc.config import Config

    config = Config(dvc_dir=str(root / ".dvc"))
    (copy / ".dvc/config.local").touch(0o600)
    remotes: dict[str, Any] = dict(config["remote"])
    default = config["core"].get("remote")
    with Config(dvc_dir=str(copy / ".dvc")).edit("local", validate=False) as local:
        # Its file states, too, go with it.
        local["core"]["site_cache_dir"] = str(copy / ".dvc/site")
        local["cache"]["dir"] = str(config["cache"].get("dir") or root / ".dvc/cache")
        for name, settings in remotes.items():
            local["remote"][name] = dict(settings)
    return sorted(remotes, key=lambda name: name != default)


def write_params(root: Path, then: RecordedRun, copy: Path) -> None:
    """Give the copy the run's params, and the file of weights that they may name.

    Raises:
        EarthPriorError: They name a file by a path that leads out of the project.
    """
    _write_yaml(copy / "params.yaml", dict(then.content))
    weights = then.content.get("perceptual", {}).get("weights")
    if weights and "://" not in weights and not (copy / weights).exists() and (root / weights).is_file():
        if not (copy / weights).resolve().is_relative_to(copy.resolve()):
            raise EarthPriorError(
                f"run {then.asked}: perceptual.weights {weights} leads out of the project; put the file into it, under "
                "the name that the run had, or give it by its absolute path or URL"
            )
        (copy / weights).parent.mkdir(parents=True, exist_ok=True)
        (copy / weights).symlink_to(root / weights)


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as handle:
        YAML(typ="safe", pure=True).dump(content, handle)
