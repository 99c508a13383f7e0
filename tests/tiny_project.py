"""A repository of its own with the pipeline and a dozen tiny chips, for the tests that run DVC, Git and MLflow."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "data.chip_size": 32, "data.crop_px": 16, "data.crops_per_chip": 4, "threads": 1, "batch_size": 4,
    "val_batch_size": 4, "epochs": 4, "unet_film.channels": [8, 16], "unet_film.time_embedding_dim": 16,
    "evaluate.steps": 2, "evaluate.samples": 4, "evaluate.probe_rhos": [0.1],
    "evaluate.probe_pixels": 16, "operation.checkpoint_every_seconds": 0,
    "operation.readers": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Project:
    """A repository with chips, and the environment that a user would have in it."""

    root: Path
    environment: Mapping[str, str]

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """stdout and stderr of a command that must succeed."""
        done = subprocess.run(
            command, cwd=cwd or self.root, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
        return done.stdout

    def yaml(self, name: str) -> Any:
        return YAML(typ="safe", pure=True).load((self.root / name).read_text())

    def mlflow(self, query: str) -> list[tuple[Any, ...]]:
        with sqlite3.connect(self.root / "mlflow.db") as store:
            return store.execute(query).fetchall()

    def outputs(self) -> dict[str, tuple[int, int]]:
        """Every result and the time it was written."""
        files = [path for path in (self.root / "results").rglob("*") if path.is_file() and path.name != ".gitignore"]
        return {path.relative_to(self.root).as_posix(): (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def make_repository(root: Path, state: Path, make_chips: Callable[..., Path]) -> Project:
    """The repository in folder `root`, committed; DVC keeps what it knows of files in `state`."""
    (root / "src").mkdir()
    files = ("dvc.yaml", "params.yaml", "MLproject", "conda.yaml", ".dvcignore", ".gitignore", ".dvc/config")
    for name in (*files, ".dvc/.gitignore"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / ".dvc/plots", root / ".dvc/plots")
    shutil.copytree(ROOT / "src/earthprior", root / "src/earthprior", ignore=shutil.ignore_patterns("__pycache__"))
    make_chips(root / "data", n=12, size=32, labels=True)
    edit_params(root / "params.yaml", SMALL)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_", "GIT_"))}
    environment = {
        **clean,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(state),
        "DVC_GLOBAL_CONFIG_DIR": str(state),
        "GIT_CONFIG_GLOBAL": os.devnull,
        **{f"GIT_{who}_{what}": "nobody" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    made = Project(root, environment)
    made.run("git", "init", "-q")
    made.run("dvc", "add", "-q", "data")
    made.run("git", "add", "-A")
    made.run("git", "commit", "-qm", "chips")
    return made


def edit_params(path: Path, values: Mapping[str, Any]) -> None:
    """Set dotted keys, as DVC does it."""
    parser = YAML()
    content = parser.load(path.read_text())
    for key, value in values.items():
        *sections, last = key.split(".")
        target = content
        for section in sections:
            target = target[section]
        assert last in target, key
        target[last] = value
    with path.open("w") as handle:
        parser.dump(content, handle)
