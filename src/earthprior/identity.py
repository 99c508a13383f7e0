"""Who a run is: its data, code, commit, experiment and machine.

Nothing here imports torch or mlflow, so that every stage can ask. A run's fingerprint names what its weights are made
of; its code digest is kept beside the checkpoints, so that resuming under other code can be refused with names.
"""

from __future__ import annotations

import ast
import getpass
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from earthprior.files import sha256_file

# Part of every fingerprint: raise it when a checkpoint of the version before could no longer be continued.
FORMAT_VERSION = 1

# How far the clock may be corrected while a process runs.
CLOCK_SECONDS = 60.0

TRAINING = "stages/pretrain.py"
# What training imports although it cannot change a weight: it records, names and shows.
WITHOUT_EFFECT_ON_WEIGHTS = (
    "__init__.py",
    "errors.py",
    "files.py",
    "handover.py",
    "identity.py",
    "journal.py",
    "made_of.py",
    "memory.py",
    "mirror.py",
    "mlflow_run.py",
    "naming.py",
    "outbox.py",
    "pictures.py",
    "tracking.py",
    "tracking_store.py",
    "under_dvc.py",
    "training/divergence.py",
    "training/failed_step.py",
    "training/progress.py",
)

PACKAGES = (
    "torch", "numpy", "scipy", "pandas", "rasterio", "mlflow", "dvc", "optuna", "diffusers", "pytorch-optimizer",
    "safetensors", "scikit-image", "scikit-learn",
)  # fmt: skip


@dataclass(frozen=True)
class CodeHash:
    """The code that can change weights.

    Attributes:
        files: SHA-256 by file, relative to the package, with forward slashes.
        digest: One SHA-256 over all of them.
    """

    files: Mapping[str, str]
    digest: str


def main_root(root: Path) -> Path:
    """The main checkout, also when `root` is the copy that `dvc exp run --temp` or the queue works in.

    What must outlive that copy (MLflow's store, resume state) belongs under the main checkout.
    """
    root = root.resolve()
    parts = root.parts
    for index in range(len(parts) - 2):
        if parts[index : index + 3] == (".dvc", "tmp", "exps"):
            return Path(*parts[:index])
    return root


def data_version(root: Path) -> tuple[str | None, int | None]:
    """The md5 and file count that DVC recorded for the data folder in data.dvc; None for what is not known."""
    try:
        content = YAML(typ="safe", pure=True).load((root / "data.dvc").read_text(encoding="utf-8"))
        out = content["outs"][0]
        md5, nfiles = out.get("md5"), out.get("nfiles")
    except (OSError, UnicodeDecodeError, YAMLError, LookupError, TypeError, AttributeError):
        return None, None
    return (str(md5) if md5 else None), (int(nfiles) if isinstance(nfiles, int) else None)


def git_commit(root: Path) -> str | None:
    """The commit that is checked out, or None outside git."""
    try:
        command = ["git", "-C", str(root), "rev-parse", "--verify", "HEAD"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def dvc_experiment() -> str | None:
    """The name of the DVC experiment that this stage runs in (`dvc exp run` sets it), else None."""
    return os.environ.get("DVC_EXP_NAME") or None


def code_hash(package: Path | None = None, start: str = TRAINING) -> CodeHash:
    """Hash the modules that a training comes to import, except those in WITHOUT_EFFECT_ON_WEIGHTS.

    What `stats` computes needs no hash of its code: it enters the fingerprint by stats.json itself.

    Args:
        package: The package's folder; this package by default.
        start: The module that trains; that of the pretraining by default.
    """
    package = package or Path(__file__).parent
    found: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in found and name not in WITHOUT_EFFECT_ON_WEIGHTS:
            found.add(name)
            waiting += _own_imports(package, name)
    files = {name: sha256_file(package / name) for name in sorted(found)}
    return CodeHash(files, hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest())


def _own_imports(package: Path, name: str) -> Iterator[str]:
    """Modules of the package that a module imports, at its top or inside a function."""
    for first, *others in (path.split(".") for path in _imported((package / name).read_bytes())):
        if first == package.name:
            candidates = ("/".join(others) + ".py", "/".join([*others, "__init__.py"]))
            yield from (candidate for candidate in candidates if (package / candidate).is_file())


@lru_cache(maxsize=1024)
def _imported(source: bytes) -> tuple[str, ...]:
    """The dotted names that may be modules; kept, as a search hashes its code for each of its trainings."""
    dotted: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from a.b import c` runs a/b.py, and a/b/c.py where c is a module
            dotted += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(dotted)


def changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files that differ between two `CodeHash.files`, added and removed ones included."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def fingerprint(active: Mapping[str, Any], stats_sha256: str) -> str:
    """What a run's weights are made of, in 12 hex digits.

    Args:
        active: The parameters that can change weights, flat (`params.active`).
        stats_sha256: Of stats.json, which carries the data's md5 and the catalog's hash.

    Raises:
        ValueError: A parameter is NaN or infinite.
    """
    content = {"format": FORMAT_VERSION, "params": dict(active), "stats": stats_sha256}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def environment() -> dict[str, Any]:
    """Python, machine and package versions, for manifests and the report.

    torch's own facts (threads, GPU) are there only where torch is loaded already, since importing it takes seconds.
    """
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count() or 1,
        "packages": {name: version for name in PACKAGES if (version := _installed(name))},
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["torch"] = str(torch.__version__)
        facts["torch_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpu"] = torch.cuda.get_device_name(0)
            facts["cuda"] = torch.version.cuda
    return facts


def recorded_environment(setting: Mapping[str, str], code: CodeHash | None = None) -> dict[str, Any]:
    """The content of environment.json: all that a run's bits depend on beside its params and its chips.

    Args:
        setting: What changes how numbers round: device, precision, number of processes.
        code: The code in force; hashed here when absent.

    Returns:
        `environment()`, with `setting` and, as `code`, the SHA-256 of each file that can change weights.
    """
    return {**environment(), "setting": dict(setting), "code": dict((code or code_hash()).files)}


def identity_tags(root: Path, fingerprint: str, code: CodeHash | None = None) -> dict[str, str]:
    """The tags by which an MLflow run is tied to its data, code, commit and DVC experiment.

    Args:
        root: The folder that the stage runs in (holds data.dvc).
        fingerprint: Of the training, see `fingerprint`.
        code: The code in force; hashed here when absent.
    """
    md5, nfiles = data_version(root)
    commit = git_commit(root)
    tags = {
        "earthprior.fingerprint": fingerprint,
        "earthprior.code": (code or code_hash()).digest[:12],
        "dvc.exp_name": dvc_experiment(),
        "dvc.exp_baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV"),
        "dvc.data_md5": md5,
        "dvc.data_nfiles": None if nfiles is None else str(nfiles),
        "git.commit": commit,
        # MLflow's own name for it: its runs table shows this one as the version.
        "mlflow.source.git.commit": commit,
    }
    return {name: value for name, value in tags.items() if value}


def process_tags() -> dict[str, str]:
    """By which a later process knows whether this one is alive, and MLflow's columns for user and source."""
    tags = {
        "earthprior.host": socket.gethostname(),
        "earthprior.pid": str(os.getpid()),
        "earthprior.process_start": f"{psutil.Process().create_time():.0f}",
        "mlflow.source.name": " ".join(["earthprior", *sys.argv[1:2]]),
        "mlflow.source.type": "LOCAL",
    }
    # A container may run under a number that has no name.
    with suppress(KeyError, OSError):
        tags["mlflow.user"] = getpass.getuser()
    return tags


def process_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process that wrote these `process_tags`, on this machine, still runs.

    Its start tells it from a later process that was given the same number.
    """
    try:
        process = psutil.Process(int(tags["earthprior.pid"]))
        started = float(tags["earthprior.process_start"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return False


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
