"""Checkpoints that are complete or absent: hashed, atomic, two kept, and never loaded by executing code.

A checkpoint is `ckpt-<step>.pt` with a manifest `ckpt-<step>.json` (SHA-256, step, fingerprint, digests of the code and
the torch version). The manifest is written last, so a file without one is a stump.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import pickle
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from earthprior.errors import CodeChangedError, EarthPriorError, StorageError
from earthprior.files import read_json, sha256_file, write_atomic, write_json
from earthprior.identity import changed_files

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
        folder.mkdir(parents=True, exist_ok=True)

    def sweep(self) -> None:
        """Remove what kills left behind: temporary files, and checkpoints without a manifest.

        For the process that writes alone: in another one's hands a temporary file is no stump.
        """
        whole = {self._path(step) for step in self.steps()}
        for stump in [*self.folder.glob(".*.tmp*"), *(set(self.folder.glob("ckpt-*.pt")) - whole)]:
            stump.unlink()

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
        free = 0
        try:
            free = shutil.disk_usage(self.folder).free
            if free < 2 * len(content):
                raise OSError(errno.ENOSPC, "No space left on device")
            write_atomic(path, content)
            manifest = {
                "step": step,
                "sha256": sha256_file(path),
                "fingerprint": self._fingerprint,
                "code": self._code,
                "setting": self._setting,
            }
            write_json(path.with_suffix(".json"), {**manifest, "manifest_sha256": _digest(manifest)})
        except OSError as error:
            if not path.with_suffix(".json").exists():
                path.unlink(missing_ok=True)
            raise StorageError(
                f"checkpoint of step {step:,} not written ({error.strerror or error}): it needs {2 * len(content):,} "
                f"bytes, {free:,} are free in {self.folder}; kept the earlier ones. Free some space"
            ) from error
        # A later step than this one belongs to a damaged checkpoint that was fallen back from.
        done = [other for other in self.steps() if other <= step]
        for other in set(self.steps()) - set(done[-KEPT:]):
            self._drop(other)
        return path

    def steps(self) -> list[int]:
        """Steps with a checkpoint and a manifest, oldest first."""
        manifests = [re.fullmatch(r"ckpt-(\d+)\.json", path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in manifests if match)

    def load_latest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest intact checkpoint as (step, state), tensors on the CPU; None where there is none yet.

        A damaged one is reported on stderr and the one before is taken.

        Raises:
            EarthPriorError: Checkpoints exist but none is intact, or the code that wrote them differs.
        """
        faults = []
        for step in reversed(self.steps()):
            path = self._path(step)
            try:
                return step, self._load(path)
            except _Unusable as fault:
                faults.append(f"{path.name} {fault}")
                print(f"warning: {faults[-1]}; looking for the checkpoint before it", file=sys.stderr)
        if faults:
            raise EarthPriorError(
                f"no intact checkpoint in {self.folder} ({'; '.join(faults)}); "
                "delete that folder to start this run from the beginning"
            )
        return None

    def delete(self) -> None:
        """Remove the work folder of a finished run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"ckpt-{step:08d}.pt"

    def _load(self, path: Path) -> dict[str, Any]:
        """The state in a checkpoint, verified before it is opened and opened without executing anything."""
        try:
            manifest = read_json(path.with_suffix(".json"))
            wrote, setting = dict(manifest["code"]), dict(manifest["setting"])
            if manifest.pop("manifest_sha256") != _digest(manifest):
                raise _Unusable("has a damaged manifest")
            if manifest["sha256"] != sha256_file(path):
                raise _Unusable("is damaged (its SHA-256 is not the manifest's)")
            if manifest["fingerprint"] != self._fingerprint:
                raise _Unusable(f"belongs to run {manifest['fingerprint']}, not {self._fingerprint}")
        except FileNotFoundError:
            raise _Unusable("is missing beside its manifest") from None
        except (KeyError, TypeError, ValueError):
            raise _Unusable("has a damaged manifest") from None
        except OSError as error:
            raise _Unusable(f"cannot be read ({error.strerror})") from None
        self._check_code(path, wrote)
        now = self._setting
        others = [f"{name} {setting.get(name)} (now {now[name]})" for name in now if setting.get(name) != now[name]]
        if others:
            print(
                f"warning: {path.name} was written with {', '.join(others)}: the last digits of the results differ",
                file=sys.stderr,
            )
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            # Not torch's own words: they advise to load it all the same.
            raise _Unusable("holds something else than tensors and plain values, and was not opened") from None
        return state

    def _check_code(self, path: Path, wrote: Mapping[str, str]) -> None:
        """Refuse to go on under other code than the checkpoint's, unless accepted."""
        changed = changed_files(wrote, self._code)
        if changed and not self._accept_code:
            raise CodeChangedError(
                f"the code changed since {path.name} was written ({', '.join(changed)}), so continuing would mix two "
                f"programs. Restore it; or continue all the same, with {ACCEPT_CODE}=1 in the environment or "
                f"--accept-code after pretrain; or start afresh by deleting {path.parent}"
            )

    def _drop(self, step: int) -> None:
        # Manifest first: a kill in between leaves a stump, not a manifest without its file.
        path = self._path(step)
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, which is all that a resumed run is compared with."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
