"""What dvc does around a stage, and what follows for the stage.

It deletes a stage's outs before it runs the stage. So if dvc is killed after a training and before it has written
dvc.lock, the outs of days are gone with the next `dvc repro`, unless their state is still there.

It reads params.yaml and hashes the sources after the stage, for dvc.lock. So what was changed meanwhile, by hand or by
a `dvc exp run -S` that dvc then refused, would be recorded with results that were made of something else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from earthprior.errors import EarthPriorError, ParamsError
from earthprior.files import read_json, write_json
from earthprior.params import Params, load
from earthprior.params.acting import flatten

DONE, HELD_BY = "done.json", ("lock", "owner")
NETWORK = "results/pretrain/network.safetensors"


def present() -> bool:
    """Whether dvc runs this process as a stage."""
    return "DVC_STAGE" in os.environ


def check_params(stage: str, params: BaseModel, root: Path, read: Callable[[Path], BaseModel] = load) -> None:
    """Refuse to end well where params.yaml is no longer what the stage was run with.

    Args:
        stage: Its name in dvc.yaml, where its keys are listed; others may change.
        params: What it was run with.
        root: The folder of dvc.yaml and params.yaml: the project's root, or that of another pipeline.
        read: Reads its params.yaml.

    Raises:
        ParamsError: It differs in a key of the stage.
    """
    if present() and (changed := _changed(stage, params, root, read)):
        raise ParamsError(
            f"params.yaml was changed while {stage} ran with the values before ({changed}), and dvc would "
            "record the new ones with its results. Put the old ones back, and nothing is lost; or go on with the new "
            "ones, as a new run"
        )


class ParamsWatch:
    """Tells of a changed params.yaml while there is time to put it back: what `check_params` refuses at the end.

    Args:
        stage: See `check_params`.
        params: What it was run with.
        root: The project's root.
    """

    def __init__(self, stage: str, params: Params, root: Path) -> None:
        self._stage, self._params, self._path = stage, params, root / "params.yaml"
        self._seen: tuple[int, int] | None = None
        self._told = ""

    def look(self, tell: Callable[[str], None]) -> None:
        """Tell once what has changed, and once that it is as before; reads the file only where it was written to."""
        if not present() or (stamp := self._stamp()) == self._seen:
            return
        try:
            changed = _changed(self._stage, self._params, self._path.parent)
        except (EarthPriorError, OSError):
            # In the middle of a write, or a slip of its editor. Whether it stays so, the end of the stage will tell.
            return
        self._seen = stamp
        if changed and changed != self._told:
            tell(
                f"warning: params.yaml was changed while {self._stage} runs with the values before ({changed}). It "
                "goes on with those. Put them back before it ends, and dvc records its results; if not, it ends with "
                f"exit code {ParamsError.exit_code} and dvc records nothing"
            )
        elif self._told and not changed:
            tell(f"params.yaml is again what {self._stage} runs with: dvc will record its results")
        self._told = changed

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size


def _changed(stage: str, params: BaseModel, root: Path, read: Callable[[Path], BaseModel] = load) -> str:
    """The keys of a stage that params.yaml has otherwise now, with both values; empty where there are none.

    Raises:
        ParamsError: It cannot be read.
    """
    try:
        entries = _yaml(root / "dvc.yaml")["stages"][stage]["params"]
        # Of another file than the params.yaml of the working directory: {file: [keys]}.
        listed = [key for each in entries for key in (next(iter(each.values())) if isinstance(each, dict) else [each])]
    except (OSError, ValueError, YAMLError, LookupError, TypeError):
        # A pipeline of one's own, which may call the stage otherwise: no reason to lose what it has made.
        return ""
    before, now = (dict(flatten(each.model_dump(mode="json"))) for each in (params, read(root / "params.yaml")))
    return "; ".join(
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and any(f"{key}.".startswith(f"{name}.") for name in listed)
    )


def keep(folder: Path, root: Path, network: str = NETWORK) -> None:
    """Mark the state in `folder` as that of a finished training, and forget those of others whose outs DVC has.

    Args:
        folder: The training's work folder, held by this process.
        root: The project's root, with the training's outs.
        network: Which of these holds its weights.
    """
    with (root / network).open("rb") as handle:
        digest = hashlib.file_digest(handle, lambda: hashlib.md5(usedforsecurity=False))
    write_json(folder / DONE, {"md5": digest.hexdigest()})
    for other in folder.parent.iterdir():
        if other != folder and _in_cache(other, root):
            forget(other)


def reopen(folder: Path, root: Path, network: str = NETWORK, stage: str = "pretrain", lock: str = "dvc.lock") -> None:
    """Decide on the state of a finished training when the same one starts again.

    If DVC has its outs, the stage is meant to run anew, and the state goes. If not, dvc died in between: the training
    goes on at its last checkpoint.

    Args:
        folder: The training's work folder, held by this process.
        root: The project's root.
        network: See `keep`.
        stage: That trains.
        lock: dvc.lock of its pipeline.
    """
    if not (folder / DONE).exists():
        return
    # A clone has the dvc.lock of others, and not what they made, before it has pulled.
    if _known_to_dvc(folder, root / lock, stage, network) and _in_cache(folder, root):
        for path in [path for path in folder.iterdir() if path.name not in HELD_BY]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        (folder / DONE).unlink()


def forget(folder: Path) -> None:
    """Delete the state of a finished training; one that is not finished, or that a process holds, stays."""
    if not (folder / DONE).exists():
        return
    try:
        with FileLock(folder / "lock", timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
    except Timeout:
        return


def _known_to_dvc(folder: Path, lock: Path, stage: str, network: str) -> bool:
    """Whether dvc.lock holds the outs that the training left."""
    try:
        outs = _yaml(lock)["stages"][stage]["outs"]
        return read_json(folder / DONE)["md5"] in [out["md5"] for out in outs if out["path"] == network]
    except (OSError, ValueError, YAMLError, LookupError, TypeError):
        return False


def _in_cache(folder: Path, root: Path) -> bool:
    """Whether DVC's cache holds the network that a training left: days would be lost if neither had it."""
    try:
        md5 = str(read_json(folder / DONE)["md5"])
        from dvc.repo import Repo

        with Repo(str(root)) as repo:
            return bool(repo.cache.local.exists(md5))
    except Exception:  # noqa: BLE001 (whatever DVC complains of, it is not known to have it)
        return False


def _yaml(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
