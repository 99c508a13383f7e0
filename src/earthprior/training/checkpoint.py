"""Checkpoints that are complete or absent: hashed, atomic, two kept, and never loaded by executing code.

A checkpoint is `ckpt-<step>.pt` with a manifest `ckpt-<step>.json` (SHA-256, step, fingerprint, digests of the code and
the torch version). The manifest is written last, so a file without one is a stump.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from earthprior.errors import CodeChangedError, EarthPriorError, StorageError, mended_by
from earthprior.files import read_json, sha256_file, sweep, write_atomic, write_json
from earthprior.identity import FORMAT_VERSION, changed_files

KEPT = 2

ACCEPT_CODE = "EARTHPRIOR_ACCEPT_CODE"
"""The environment variable that stands for --accept-code, which a command in dvc.yaml cannot be given."""


class _Unusable(Exception):
    """Why a checkpoint cannot be trusted; the one before it may be."""


class CheckpointStore:
    """The checkpoints of one run in its work folder.

    Args:
        folder: `work/<stage>/<fingerprint>`; made when missing.
        fingerprint: Of the run.
        code: Digest per source file that can change weights, by path.
        accept_code: Resume although the code has changed.
        setting: What changes how numbers round (device, precision, processes), by name; resuming under another one is
            warned of.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        code: Mapping[str, str],
        accept_code: bool = False,
        setting: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self._fingerprint = fingerprint
        self._code = dict(code)
        self._accept_code = accept_code
        self._setting = {"torch": torch.__version__, **(setting or {})}
        self._damaged: set[int] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def sweep(self) -> None:
        """Remove what kills left behind: temporary files, and checkpoints without a manifest.

        For the process that writes alone: in another one's hands a temporary file is no stump.
        """
        unfinished = self._without_manifest()
        stumps = sweep(self.folder)
        for stump in unfinished:
            stump.unlink()
        if stumps or unfinished:
            what = [path.name for path in unfinished] + [f"{len(stumps)} temporary files"] * bool(stumps)
            _say(f"removed {' and '.join(what)} of an earlier process, which had not finished writing them")

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state of `step`, then drop all but the newest two checkpoints.

        Args:
            step: Optimizer steps done.
            state: Tensors, numbers, text, and lists and dicts of them.

        Raises:
            StorageError: The disk is full or failing; what was saved before is untouched.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        path = self._path(step)
        free = None
        try:
            if not self.folder.exists():
                # Under a running training, which is worth more than the wish to be rid of its folder.
                _say(f"warning: {self.folder} was deleted; it is made anew")
                self.folder.mkdir(parents=True)
            free = shutil.disk_usage(self.folder).free
            if free < 2 * len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write_atomic(path, content)
            manifest = {
                "format": FORMAT_VERSION,
                "step": step,
                "sha256": sha256_file(path),
                "fingerprint": self._fingerprint,
                "code": self._code,
                "setting": self._setting,
            }
            write_json(path.with_suffix(".json"), {**manifest, "manifest_sha256": _digest(manifest)})
        except OSError as error:
            raise StorageError(self._not_written(step, 2 * len(content), free, error)) from error
        # What was fallen back from is of no use: it must not take the place of one that is whole.
        self._damaged.discard(step)
        done = [other for other in self.steps() if other <= step and other not in self._damaged]
        for other in set(self.steps()) - set(done[-KEPT:]):
            self._drop(other)
        return path

    def _not_written(self, step: int, needed: int, free: int | None, error: OSError) -> str:
        path = self._path(step)
        kept: list[int] = []
        # On a disk that fails, looking may fail, too.
        with suppress(OSError):
            if not path.with_suffix(".json").exists():
                path.unlink(missing_ok=True)
            kept = self.steps()
        full = free is not None and error.errno in (errno.ENOSPC, errno.EDQUOT)
        space = f": it needs {_size(needed)}, {_size(free or 0)} are free" if full else ""
        there = f"{self._path(kept[-1]).name} is kept" if kept else "there is no earlier one"
        fix = mended_by(error) or "look at that folder"
        why = error.strerror or error
        return f"checkpoint of step {step:,} not written in {self.folder} ({why}){space}; {there}. To mend it: {fix}"

    def steps(self) -> list[int]:
        """Steps with a checkpoint and a manifest, oldest first."""
        manifests = [re.fullmatch(r"ckpt-(\d+)\.json", path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in manifests if match)

    def newest(self) -> str | None:
        """The name of the newest checkpoint, for messages."""
        with suppress(OSError):
            if steps := self.steps():
                return self._path(steps[-1]).name
        return None

    def _without_manifest(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("ckpt-*.pt") if not path.with_suffix(".json").exists())

    def load_latest(self, reached: int = 0) -> tuple[int, dict[str, Any]] | None:
        """The newest intact checkpoint as (step, state), tensors on the CPU; None where there is none yet.

        A damaged one is reported on stderr and the one before is taken.

        Args:
            reached: The last step that the run's journal tells of.

        Raises:
            EarthPriorError: Checkpoints exist but none is intact, or the code or format is not this program's.
        """
        if not self.steps():
            self._check_nothing_is_lost(reached)
            return None
        faults = []
        for step in reversed(self.steps()):
            path = self._path(step)
            try:
                return step, self._load(path)
            except _Unusable as fault:
                self._damaged.add(step)
                faults.append(f"{path.name} {fault}")
                _say(f"warning: {faults[-1]}; looking for the checkpoint before it")
        raise EarthPriorError(
            f"no intact checkpoint in {self.folder} ({'; '.join(faults)}). Bring one back from a copy, or delete that "
            "folder to start this run from the beginning"
        )

    def delete(self) -> None:
        """Remove the work folder of a finished run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"ckpt-{step:08d}.pt"

    def _check_nothing_is_lost(self, reached: int) -> None:
        """Refuse to begin anew beside checkpoints whose manifests are gone.

        A kill leaves one such at most, which nothing in the folder is newer than.
        """
        left = self._without_manifest()
        if len(left) > 1 or any(self._path(reached).name > path.name for path in left):
            raise EarthPriorError(
                f"{', '.join(path.name for path in left)} in {self.folder} cannot be trusted: the manifests (.json) "
                "beside them are gone. Bring those back, or delete that folder to start this run from the beginning"
            )

    def _load(self, path: Path) -> dict[str, Any]:
        """The state in a checkpoint, verified before it is opened and opened without executing anything."""
        try:
            manifest = read_json(path.with_suffix(".json"))
            wrote, setting, version = dict(manifest["code"]), dict(manifest["setting"]), manifest["format"]
            if manifest.pop("manifest_sha256") != _digest(manifest):
                raise _Unusable("has a damaged manifest")
            if manifest["sha256"] != sha256_file(path):
                raise _Unusable("is damaged (its SHA-256 is not the manifest's)")
            if manifest["fingerprint"] != self._fingerprint:
                raise _Unusable(f"belongs to run {manifest['fingerprint']}, not {self._fingerprint}")
            if self._path(manifest["step"]) != path:
                raise _Unusable(f"is that of step {manifest['step']} under another name")
        except FileNotFoundError:
            raise _Unusable("is missing beside its manifest") from None
        except (KeyError, TypeError, ValueError):
            raise _Unusable("has a damaged manifest") from None
        except OSError as error:
            raise _Unusable(f"cannot be read ({error.strerror})") from None
        if version != FORMAT_VERSION:
            raise EarthPriorError(
                f"{path.name} has format {version} of another version of EarthPrior, this one reads format "
                f"{FORMAT_VERSION}. Continue with the version that wrote it, or start afresh by deleting {self.folder}"
            )
        self._check_code(path, wrote)
        now = self._setting
        others = [f"{name} {setting.get(name)} (now {now[name]})" for name in now if setting.get(name) != now[name]]
        if others:
            _say(f"warning: {path.name} was written with {', '.join(others)}: the last digits of the results differ")
        return self._opened(path)

    def _opened(self, path: Path) -> dict[str, Any]:
        """What a verified checkpoint holds, and no code from it run."""
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if self._path(state["step"]) != path:
                raise _Unusable(f"holds the state of step {state['step']}")
        except (_Unusable, MemoryError):
            raise
        except Exception:  # noqa: BLE001 - a file of another kind makes torch raise whatever it likes
            # Not torch's own words: they advise to load it all the same.
            raise _Unusable("holds something else than tensors and plain values, and was not opened") from None
        return state

    def _check_code(self, path: Path, wrote: Mapping[str, str]) -> None:
        """Refuse to go on under other code than the checkpoint's, unless accepted."""
        changed = changed_files(wrote, self._code)
        verb = "finetune" if self.folder.parent.name == "finetune" else "pretrain"
        if changed and not self._accept_code:
            raise CodeChangedError(
                f"the code changed since {path.name} was written ({', '.join(changed)}), so continuing would mix two "
                f"programs. Restore it; or continue all the same, with {ACCEPT_CODE}=1 in the environment or "
                f"--accept-code after {verb}; or start afresh by deleting {path.parent}"
            )

    def _drop(self, step: int) -> None:
        # Manifest first: a kill in between leaves a stump, not a manifest without its file.
        path = self._path(step)
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _size(count: int) -> str:
    """Of a file or a disk, for the eye: 310 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} bytes"


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, which is all that a resumed run is compared with."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
