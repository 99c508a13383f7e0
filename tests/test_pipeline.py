"""The pipeline as a user runs it: `dvc repro`, a kill, `dvc exp run -S`, on a dozen tiny chips in a new repository.

The tests share one repository and run in the order of this file, because each command costs seconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import kills
from earthprior.files import read_json, sha256_file
from earthprior.params import load
from earthprior.stages import pretrain
from kills import Kill, Patient
from tiny_project import ROOT, Project, make_repository

STEPS = 32
WEIGHTS = "results/pretrain/network.safetensors"
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
    if name in told and Path(params.__file__).parent not in Path(sys._getframe(1).f_code.co_filename).parents:
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


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, make_chips: Callable[..., Path]) -> Project:
    return make_repository(tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("state"), make_chips)


@pytest.fixture(scope="module")
def patient(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Patient:
    """The project, with notes of what its trainers do."""
    folder = tmp_path_factory.mktemp("notes")
    return Patient(Project(project.root, {**project.environment, "KILLS_FOLDER": str(folder)}), folder)


def test_a_trainer_leaves_without_dvc_and_goes_on_after_all_died(patient: Patient) -> None:
    kills.watch(patient.project)
    asked = [Kill("repro", signal.SIGTERM, "dvc", "step"), Kill("repro", signal.SIGKILL, "group", "save")]
    course = kills.treat(patient, "repro", asked, random.Random(os.urandom(8)), STEPS, to_the_end=False)
    assert course.faults == []
    assert [hit.kill for hit in course.hits] == asked
    assert course.hits[0].then == "continued"
    assert not (patient.project.root / WEIGHTS).exists()


def test_a_killed_pipeline_continues_and_a_second_dvc_beside_it_harms_nothing(patient: Patient) -> None:
    project = patient.project
    course = kills.treat(patient, "repro", [], random.Random(0), STEPS, beside=lambda _: refused(project))
    shutil.copy(ROOT / "src/earthprior/__main__.py", project.root / "src/earthprior/__main__.py")
    assert course.faults == []
    begun = [note["step"] for note in patient.notes() if note["what"] == "begin"]
    assert len(begun) == 3
    assert 0 == begun[0] < begun[1] <= begun[2]
    for name in ("stats/stats.json", "pretrain/network.safetensors", "evaluate/metrics.json", "evaluate/report.html"):
        assert (project.root / "results" / name).stat().st_size > 0
    # finished: a stage that starts anew shall train, not find its old state
    assert not list(project.root.glob("work/pretrain/*"))


def refused(project: Project) -> None:
    """`dvc exp run -S` in a workspace where the stage of a `dvc repro` stands still in the middle of its steps."""
    params = project.root / "params.yaml"
    before = params.read_bytes()
    done = subprocess.run(
        ["dvc", "exp", "run", "-n", "beside", "-S", "lr=0.5"], cwd=project.root, env=project.environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "is busy, it is being blocked by" in done.stdout + done.stderr
    assert b"\nlr: 0.5" in params.read_bytes(), "it leaves the value behind, which the stage tells of"
    # As the stage asks for: else it would end with exit code 2, and dvc record nothing.
    params.write_bytes(before)


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


def test_an_undisturbed_training_ends_with_the_same_bits(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").symlink_to(project.root / "data")
    shutil.copytree(project.root / "results/stats", tmp_path / "results/stats")
    monkeypatch.setattr("earthprior.tracking.import_mlflow", lambda: False)
    monkeypatch.chdir(tmp_path)
    pretrain.run(load(project.root / "params.yaml"), tmp_path)
    assert sha256_file(tmp_path / WEIGHTS) == sha256_file(project.root / WEIGHTS)


@pytest.mark.soak
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
    assert project.mlflow(f"select name from runs where run_uuid = '{run_id}'") == [("slow: lr=1e-05",)]


def test_experiments_are_shown_with_their_numbers(project: Project) -> None:
    shown = json.loads(project.run("dvc", "exp", "show", "--json"))
    found = {}
    for commit in shown:
        for experiment in commit.get("experiments") or []:
            data = experiment["revs"][0]["data"]
            found[experiment["name"]] = data["params"]["params.yaml"]["data"], data["metrics"]
    assert found.keys() == {"slow"}
    params, metrics = found["slow"]
    assert params["lr"] == 1e-5
    assert metrics["results/evaluate/metrics.json"]["data"]


def test_metrics_and_plots_can_be_compared(project: Project) -> None:
    compared = json.loads(project.run("dvc", "metrics", "diff", "--json", "--all", "slow", "workspace"))
    gain = compared["results/evaluate/metrics.json"]["gain_db.mean"]
    assert gain["old"] == gain["new"]
    project.run("dvc", "plots", "diff", "slow", "workspace")
    page = (project.root / "dvc_plots/index.html").read_text()
    for name in project.yaml("dvc.yaml")["plots"]:
        assert next(iter(name)) in page


@pytest.mark.soak
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


@pytest.mark.soak
def test_mlflow_run_logs_to_the_run_that_it_makes(project: Project) -> None:
    before = {run_id for (run_id,) in project.mlflow("select run_uuid from runs")}
    values = {"lr": "2e-5", "unet_film.channels": "[8,16]", "augmentation.flip": "False"}
    said = project.run(
        "mlflow", "run", ".", "--env-manager=local", "--experiment-name=earthprior", "-e", "pretrain",
        *(word for key, value in values.items() for word in ("-P", f"{key}={value}")),
    )  # fmt: skip
    assert "Running stage 'pretrain'" in said
    ((run_id, status),) = [row for row in project.mlflow("select run_uuid, status from runs") if row[0] not in before]
    assert status == "FINISHED"
    assert read_json(project.root / "results/pretrain/mlflow_run.json")["run_id"] == run_id
    assert read_json(project.root / "results/pretrain/config.json")["params"]["lr"] == 2e-5
    params = dict(project.mlflow(f"select key, value from params where run_uuid = '{run_id}'"))
    assert params["lr"] == "2e-5"
    assert params["epochs"] == "4"
    tags = dict(project.mlflow(f"select key, value from tags where run_uuid = '{run_id}'"))
    assert tags["mlflow.project.entryPoint"] == "pretrain"
    assert tags["dvc.exp_name"]
    assert not [name for name in tags if name.startswith("changed.")], "MLflow's spelling is taken for another value"
    metrics = {key for (key,) in project.mlflow(f"select key from latest_metrics where run_uuid = '{run_id}'")}
    assert "val/gain_db/mean" in metrics
    ((artifacts,),) = project.mlflow(f"select artifact_uri from runs where run_uuid = '{run_id}'")
    assert (Path(artifacts.removeprefix("file://")) / "weights/network.safetensors").is_file()

    # without values: as they are in params.yaml now, so that there is nothing to do, and the run says so
    project.run("mlflow", "run", ".", "--env-manager=local", "--experiment-name=earthprior", "-e", "pretrain")
    ((note,),) = project.mlflow("select value from tags where key = 'mlflow.note.content'")
    assert run_id in note
