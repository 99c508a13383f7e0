"""The pipeline as a user runs it: `dvc repro`, a kill, `dvc exp run -S`, on a dozen tiny chips in a new repository.

The tests share one repository and run in the order of this file, because each command costs seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from earthprior.files import read_json, sha256_file

ROOT = Path(__file__).parents[1]
WEIGHTS = "results/pretrain/network.safetensors"
SMALL: dict[str, Any] = {
    "data.chip_size": 32, "data.crop_px": 16, "data.crops_per_chip": 4, "threads": 1, "batch_size": 4,
    "val_batch_size": 4, "epochs": 4, "unet_film.channels": [8, 16], "unet_film.time_embedding_dim": 16,
    "evaluate.steps": 2, "evaluate.samples": 4, "evaluate.probe_pixels": 16, "operation.checkpoint_every_seconds": 0,
    "operation.readers": 2,
}  # fmt: skip
# Runs the stages in one process and notes which parameters they read.
RECORD = """
import json, sys
from importlib import import_module
from pathlib import Path
from earthprior import params

sections = {field.annotation: f"{name}." for name, field in params.Params.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, params.Section)}
reads, look = set(), params.Section.__getattribute__
def record(self, name):
    kind = type(self)
    key = sections.get(kind, "") + name
    told = {*kind.model_fields, "read_px", "train_px", "model_dump"} - {part[:-1] for part in sections.values()}
    if name in told and sys._getframe(1).f_code.co_filename != params.__file__:
        reads.add(key)
    return look(self, name)
loaded, root, found = params.load(Path("params.yaml")), Path.cwd(), {}
params.Section.__getattribute__ = record
for stage in ("stats", "pretrain", "evaluate"):
    reads.clear()
    import_module(f"earthprior.stages.{stage}").run(loaded, root)
    found[stage] = sorted(reads)
Path("reads.json").write_text(json.dumps(found))
"""


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


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, make_chips: Callable[..., Path]) -> Project:
    root = tmp_path_factory.mktemp("project")
    (root / "src").mkdir()
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / ".dvc/plots", root / ".dvc/plots")
    shutil.copytree(ROOT / "src/earthprior", root / "src/earthprior", ignore=shutil.ignore_patterns("__pycache__"))
    make_chips(root / "data", n=12, size=32, labels=True)
    edit_params(root / "params.yaml", SMALL)
    state = tmp_path_factory.mktemp("state")
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


def test_a_killed_pipeline_continues(project: Project) -> None:
    command = subprocess.Popen(
        ["dvc", "repro"], cwd=project.root, env=project.environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(project.root.glob("work/pretrain/*/ckpt-*.json"))) < 2:
        assert command.poll() is None, command.stdout and command.stdout.read()
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.002)
    os.killpg(command.pid, signal.SIGKILL)
    command.communicate()
    assert not (project.root / WEIGHTS).exists(), "the kill came too late to test anything"

    said = project.run("dvc", "repro")
    assert "continuing at step" in said
    for name in ("stats/stats.json", "pretrain/network.safetensors", "evaluate/metrics.json", "evaluate/report.html"):
        assert (project.root / "results" / name).stat().st_size > 0
    # finished: a stage that starts anew shall train, not find its old state
    assert not list(project.root.glob("work/pretrain/*"))


def test_one_run_holds_training_and_evaluation(project: Project) -> None:
    ref = read_json(project.root / "results/pretrain/mlflow_run.json")
    ran = dict(project.mlflow("select run_uuid, status from runs where lifecycle_stage = 'active'"))
    # the killed process's run is the one that was continued, or is closed
    assert ran[ref["run_id"]] == "FINISHED"
    assert "RUNNING" not in ran.values()
    keys = {key for (key,) in project.mlflow(f"select key from latest_metrics where run_uuid = '{ref['run_id']}'")}
    assert any(key.startswith("val/gain_db") for key in keys)
    assert any(key.startswith("evaluate/") for key in keys)


def test_a_second_repro_does_nothing(project: Project) -> None:
    before = project.outputs()
    assert "up to date" in project.run("dvc", "repro")
    assert project.outputs() == before


def test_uninterrupted_stages_agree_and_read_what_they_list(project: Project, tmp_path: Path) -> None:
    # outside DVC, in a copy: it would restore the results from its cache
    copy = shutil.copytree(
        project.root, tmp_path / "copy", ignore=shutil.ignore_patterns("cache", "results", "work", "mlflow.db")
    )
    project.run("env", "PYTHONPATH=src", "python", "-c", RECORD, cwd=copy)
    assert sha256_file(copy / WEIGHTS) == sha256_file(project.root / WEIGHTS)
    assert sha256_file(copy / "results/stats/stats.json") == sha256_file(project.root / "results/stats/stats.json")

    reads = read_json(copy / "reads.json")
    stages = project.yaml("dvc.yaml")["stages"]
    for stage, keys in reads.items():
        # what `evaluate` reads of the training's keys comes to it with config.json
        listed = stages[stage]["params"] + (stages["pretrain"]["params"] if stage == "evaluate" else [])
        assert not [key for key in keys if not key.startswith("operation.") and not listed_in(key, listed)], stage
    # read only where a chip is bad
    assert set(stages["stats"]["params"]) - set(reads["stats"]) == {"data.max_bad_fraction"}


def listed_in(key: str, listed: list[str]) -> bool:
    """Whether a stage's list covers what it read; properties stand for the keys they are made of."""
    if key == "model_dump":
        # the whole file: logged, fingerprinted, or written to config.json
        return True
    parts = {
        "data.read_px": ["data.chip_size", "data.buffer"],
        "data.train_px": ["data.chip_size", "data.buffer", "data.crop_px"],
    }
    return all(part in listed or part.split(".")[0] in listed for part in parts.get(key, [key]))


def test_an_experiment_reruns_what_its_parameter_touches(project: Project) -> None:
    before = project.outputs()
    said = project.run("dvc", "exp", "run", "-S", "lr=1e-5", "-n", "slow")
    assert "Stage 'stats' didn't change" in said
    assert "Running stage 'pretrain'" in said
    assert "Running stage 'evaluate'" in said
    after = project.outputs()
    assert {name: after[name] for name in after if "/stats/" in name} == {
        n: before[n] for n in before if "/stats/" in n
    }
    changed = {name for name in after if after[name] != before.get(name)}
    assert {WEIGHTS, "results/pretrain/history.csv", "results/evaluate/metrics.json"} <= changed

    # 1e-05 is how DVC writes it, and what a YAML 1.1 parser takes for text
    lr = read_json(project.root / "results/pretrain/config.json")["params"]["lr"]
    assert (type(lr), lr) == (float, 1e-5)
    run_id = read_json(project.root / "results/pretrain/mlflow_run.json")["run_id"]
    assert project.mlflow(f"select value from params where run_uuid = '{run_id}' and key = 'lr'") == [("1e-05",)]
    assert project.mlflow(f"select name from runs where run_uuid = '{run_id}'") == [("slow",)]


def test_evaluation_parameters_rerun_evaluate_alone(project: Project) -> None:
    weights = project.outputs()[WEIGHTS]
    said = project.run("dvc", "exp", "run", "-S", "evaluate.steps=3", "-n", "steps")
    assert "Stage 'pretrain' didn't change" in said
    assert "Running stage 'evaluate'" in said
    assert project.outputs()[WEIGHTS] == weights
    # the finished run is not written to again: the new numbers are a run of their own
    pretrained = read_json(project.root / "results/pretrain/mlflow_run.json")["run_id"]
    runs = project.mlflow("select run_uuid from tags where key = 'pretrain_run_id'")
    assert len(runs) == 1
    assert runs[0] != (pretrained,)


def test_experiments_are_shown_with_their_numbers(project: Project) -> None:
    shown = json.loads(project.run("dvc", "exp", "show", "--json"))
    found = {}
    for commit in shown:
        for experiment in commit.get("experiments") or []:
            data = experiment["revs"][0]["data"]
            found[experiment["name"]] = data["params"]["params.yaml"]["data"], data["metrics"]
    assert found.keys() == {"slow", "steps"}
    assert {name: params["lr"] for name, (params, _) in found.items()} == {"slow": 1e-5, "steps": 1e-5}
    assert found["steps"][0]["evaluate"]["steps"] == 3
    for _, metrics in found.values():
        assert metrics["results/evaluate/metrics.json"]["data"]


def test_metrics_and_plots_can_be_compared(project: Project) -> None:
    assert json.loads(project.run("dvc", "metrics", "diff", "--json", "slow", "steps")) is not None
    project.run("dvc", "plots", "diff", "slow", "workspace")
    page = (project.root / "dvc_plots/index.html").read_text()
    for name in project.yaml("dvc.yaml")["plots"]:
        assert next(iter(name)) in page
