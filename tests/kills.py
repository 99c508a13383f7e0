"""Real runs, killed at moments drawn from a seed and started again until they are done.

Each run is compared, bit by bit, with one that nobody disturbed; each kill is told where it hit and what the next try
made of it. tests/test_kills.py has a few of them, benchmarks/soak_kills.py a hundred.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tiny_project import Project, edit_params, make_repository

# All that may differ between two runs of the same bits: when it was, and how fast.
TIMING_FIELDS, TIMING_METRICS = ("time_ms", "seconds"), ("time/chips_per_second",)

COMMANDS = {
    "stats": ("python", "-m", "earthprior", "stats"),
    "pretrain": ("python", "-m", "earthprior", "pretrain"),
    "repro pretrain": ("dvc", "repro", "pretrain"),
    "repro": ("dvc", "repro"),
    "exp run": ("dvc", "exp", "run", "-n", "killed"),
    "exp run --temp": ("dvc", "exp", "run", "--temp", "-n", "killed"),
}
DIALS = {"epochs": 6, "operation.log_every_steps": 1}

# Which point of which repetition: (repetitions to choose from, points in one).
POINTS = {"step": (10, 1), "save": (8, 16), "judge": (5, 2), "results": (1, 44)}
# Sent from outside; within which share of the whole command's time.
OUTSIDE = {"any": 1.0, "stats": 0.05, "evaluate": 0.3, "commit": 0.02}
SECONDS = 240.0
HELD = "is training this very run"


@dataclass(frozen=True)
class Kill:
    """What is done to a run.

    Attributes:
        command: Of COMMANDS.
        signal: What is sent.
        target: group (all processes, as Ctrl-C or a dying machine), dvc, or trainer.
        moment: any (time since the start), stats and evaluate (time since that stage's start), step (after a step),
            save (inside a checkpoint's write), judge (inside a validation), results (inside the writing of results and
            after), commit (trained, and dvc not yet done).
    """

    command: str
    signal: signal.Signals
    target: str
    moment: str

    @property
    def row(self) -> tuple[str, str, str]:
        """Where it stands in the table."""
        return self.signal.name, self.target, self.moment


@dataclass
class Hit:
    """What came of a kill.

    Attributes:
        kill: What was done.
        where: The last thing that the run did.
        seconds: Until all of its processes were gone.
        lost: Steps to be done again.
        then: What the next try did.
        identical: Whether the run came to the same bits in the end.
    """

    kill: Kill
    where: str
    seconds: float
    lost: int = 0
    then: str = ""
    identical: bool = False


Beside = Callable[[int], None]


@dataclass
class Try:
    """One start of the command: its exit code, what it said, its notes, and when the signal was sent (or None)."""

    code: int
    said: str
    notes: list[dict[str, Any]]
    sent: float | None
    seconds: float

    def last(self, what: str, stage: str = "pretrain") -> dict[str, Any] | None:
        """The last note of that kind."""
        found = [note for note in self.notes if (note["what"], note["stage"]) == (what, stage)]
        return found[-1] if found else None


class Bench:
    """A small project, what it gives undisturbed, and copies of it that are killed.

    Args:
        folder: For all of it; made.
        make_chips: See tiny_project.make_repository.
        command: Of COMMANDS, that is run undisturbed.
        tracked: With MLflow, whose import and start take longer than these trainings.
    """

    def __init__(
        self, folder: Path, make_chips: Callable[..., Path], command: str = "repro", tracked: bool = True
    ) -> None:
        self.folder = folder
        (folder / "fresh").mkdir(parents=True)
        self._fresh = self._prepare(make_repository(folder / "fresh", folder / "state", make_chips), tracked)
        self._measured = Project(folder / "measured", self._copy(self._fresh, folder / "measured", folder).environment)
        self._measured.run(*(COMMANDS["stats"] if command == "pretrain" else ("dvc", "repro", "-q", "stats")))
        self.calm = Patient(self._copy(self._measured, folder / "calm/project", folder / "calm"), folder / "calm")
        began = time.monotonic()
        done = self.calm.attempt(COMMANDS[command], None, random.Random(0))
        assert done.code == 0, done.said
        self.seconds = time.monotonic() - began
        self.results = self.calm.results()
        self.steps = int(json.loads((self.calm.folder / "journal.jsonl").read_text().splitlines()[-1])["at"])

    def patient(self, name: str, command: str) -> Patient:
        """A project to be killed: with statistics already where the command is about the training alone."""
        whole = command in ("repro", "exp run", "exp run --temp")
        folder = self.folder / name
        return Patient(self._copy(self._fresh if whole else self._measured, folder / "project", folder), folder)

    def _prepare(self, project: Project, tracked: bool) -> Project:
        """Longer, watched, and with a tracking store that has its tables: those of MLflow's first use are no topic."""
        path = ["src"]
        edit_params(project.root / "params.yaml", DIALS)
        watch(project)
        if tracked:
            client = "from mlflow import MlflowClient; MlflowClient('sqlite:///mlflow.db').search_experiments()"
            project.run("python", "-c", client)
        else:
            path.append(str(self.folder / "without"))
            (self.folder / "without").mkdir()
            (self.folder / "without/sitecustomize.py").write_text("import sys; sys.modules['mlflow'] = None\n")
        project.run("git", "commit", "-qam", "longer")
        return Project(project.root, {**project.environment, "PYTHONPATH": os.pathsep.join(path)})

    @staticmethod
    def _copy(project: Project, root: Path, folder: Path) -> Project:
        shutil.copytree(project.root, root, symlinks=True)
        return Project(root, {**project.environment, "KILLS_FOLDER": str(folder)})


def watch(project: Project) -> None:
    """Put the wrapper in the place of the command."""
    shutil.copy(Path(__file__).with_name("kill_wrapper.py"), project.root / "src/earthprior/__main__.py")


class Patient:
    """A project whose command is killed and started again."""

    def __init__(self, project: Project, folder: Path) -> None:
        self.project, self.folder = project, folder
        self.saved = 0

    def attempt(
        self,
        command: Sequence[str],
        kill: Kill | None,
        chance: random.Random,
        seconds: float = 0.0,
        beside: Beside | None = None,
    ) -> Try:
        """Start the command, see it killed or left alone, and wait until all of its processes are gone.

        Args:
            command: What to start.
            kill: What to do to it.
            chance: Chooses when.
            seconds: Within which a kill at any time comes.
            beside: Called with the trainer's number while it stands still in the middle of its steps.
        """
        # A dvc exp run that is killed leaves params.yaml staged, and takes no further edit before that is undone.
        if "exp" not in command or not self.notes():
            edit_params(self.project.root / "params.yaml", {"operation.readers": chance.choice([1, 2, 3, 5])})
        before, began = len(self.notes()), time.monotonic()
        with (self.folder / "said.txt").open("w+") as said:
            process = subprocess.Popen(
                command, cwd=self.project.root, env={**self.project.environment, **_order(kill, chance)},
                stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            sent = None
            if kill is not None and kill.moment in OUTSIDE:
                sent = self._send(kill, process, before, chance, seconds)
            if beside is not None:
                self._stand_still(process, before, beside)
            code = process.wait(SECONDS)
            self._wait_for_orphans(before)
            said.seek(0)
            text = said.read()
        notes = self.notes()[before:]
        sent = next((note["time"] for note in notes if note["what"] == "kill"), sent)
        return Try(code, text, notes, sent, time.monotonic() - began)

    def notes(self) -> list[dict[str, Any]]:
        """All that the wrapper has noted so far."""
        path = self.folder / "notes.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def newest(self) -> int:
        """The step of the newest checkpoint that is whole, 0 without one."""
        return max((int(path.stem[5:]) for path in self.project.root.glob("work/pretrain/*/ckpt-*.json")), default=0)

    def logs_every_step(self) -> bool:
        """Whether the journal must end where the newest checkpoint is."""
        return bool(self.project.yaml("params.yaml")["operation"]["log_every_steps"] == 1)

    def results(self) -> dict[str, Any]:
        """All that must come out the same: state, journal and files, each as something to compare."""
        root = self.project.root
        state = json.loads((self.folder / "state.json").read_text())
        files = [*(root / "results").glob("stats/*"), *(root / "results").glob("pretrain/*")]
        files += [root / "results/evaluate/metrics.json", root / "results/evaluate/levels.csv"]
        return {
            **{f"state {part}": value for part, value in state.items()},
            "metrics.jsonl": [_untimed(line) for line in (self.folder / "journal.jsonl").read_text().splitlines()],
            **{
                str(path.relative_to(root)): _content(path)
                for path in files
                if path.is_file() and path.name not in ("mlflow_run.json", ".gitignore")
            },
        }

    def _send(
        self, kill: Kill, process: subprocess.Popen[bytes], before: int, chance: random.Random, seconds: float
    ) -> float | None:
        """Send the signal from outside; None where the command was done before."""
        first = {"commit": ("exit", "pretrain")}.get(kill.moment, ("start", kill.moment))
        while process.poll() is None and kill.moment != "any" and not self._noted(before, first):
            time.sleep(0.005)
        until = time.monotonic() + chance.uniform(0.0, OUTSIDE[kill.moment] * seconds)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        while process.poll() is None:
            with suppress(ProcessLookupError):
                if kill.target == "group":
                    os.killpg(process.pid, kill.signal)
                elif kill.target == "dvc":
                    os.kill(process.pid, kill.signal)
                elif stage := self._alive(before):
                    os.kill(stage, kill.signal)
                else:
                    time.sleep(0.01)
                    continue
                return time.time()
        return None

    def _stand_still(self, process: subprocess.Popen[bytes], before: int, beside: Beside) -> None:
        while not (steps := [note for note in self.notes()[before:] if note["what"] == "step"]):
            assert process.poll() is None, "no step"
            time.sleep(0.005)
        trainer = psutil.Process(steps[0]["pid"])
        trainer.suspend()
        try:
            beside(trainer.pid)
        finally:
            trainer.resume()

    def _noted(self, before: int, wanted: tuple[str, str]) -> bool:
        return any((note["what"], note["stage"]) == wanted for note in self.notes()[before:])

    def _alive(self, before: int) -> int | None:
        """The stage that runs now."""
        pids = [note["pid"] for note in self.notes()[before:] if note["what"] == "start"]
        return pids[-1] if pids and _running(pids[-1]) else None

    def _wait_for_orphans(self, before: int) -> None:
        until = time.monotonic() + 60
        while stage := self._alive(before):
            assert time.monotonic() < until, f"process {stage} goes on without dvc"
            time.sleep(0.01)


def _order(kill: Kill | None, chance: random.Random) -> dict[str, str]:
    """The environment that tells the wrapper when to kill."""
    if kill is None or kill.moment in OUTSIDE:
        return {}
    order = {"signal": int(kill.signal), "target": kill.target, "moment": kill.moment}
    order["n"] = [chance.randint(1, most) for most in POINTS[kill.moment]]
    return {"KILLS_ORDER": json.dumps(order)}


def _running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _content(path: Path) -> Any:
    """The bytes of a file; config.json also tells what cannot change a result, as the number of readers."""
    if path.name != "config.json":
        return path.read_bytes()
    config = json.loads(path.read_text())
    del config["params"]["operation"]
    return config


def _untimed(line: str) -> dict[str, Any]:
    record = {name: value for name, value in json.loads(line).items() if name not in TIMING_FIELDS}
    record["metrics"] = {name: value for name, value in record["metrics"].items() if name not in TIMING_METRICS}
    return record


@dataclass
class Course:
    """The kills of one run, from its first start to the comparison.

    Attributes:
        hits: What came of each kill that was delivered.
        faults: What is not as promised.
        left: Kills for which the run was over too early.
    """

    hits: list[Hit] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    left: list[Kill] = field(default_factory=list)


def run(bench: Bench, name: str, kills: Sequence[Kill], chance: random.Random, beside: Beside | None = None) -> Course:
    """`treat` a project of its own, then compare it with the undisturbed one."""
    patient = bench.patient(name, kills[0].command)
    course = treat(patient, kills[0].command, kills, chance, bench.steps, bench.seconds, beside)
    if not course.faults and kills[0].command == "exp run --temp":
        patient.project.run("git", "checkout", "-q", "params.yaml")
        patient.project.run("dvc", "exp", "apply", "killed")
    if not course.faults:
        course.faults = _compared(bench, patient)
    course.faults = [f"{name} ({kills[0].command}): {fault}" for fault in course.faults]
    for hit in course.hits:
        hit.identical = not course.faults
    if not course.faults:
        shutil.rmtree(patient.folder)
    return course


def treat(
    patient: Patient,
    command: str,
    kills: Sequence[Kill],
    chance: random.Random,
    steps: int,
    seconds: float = 0.0,
    beside: Beside | None = None,
    to_the_end: bool = True,
) -> Course:
    """Start a run, kill it as told and start it again until it is done.

    Args:
        patient: What is started.
        command: How.
        kills: One for each start, all of this command.
        chance: Chooses when.
        steps: Of the whole training.
        seconds: Of the whole command, for kills at any time.
        beside: See `Patient.attempt`; for the first try that is not killed.
        to_the_end: Else it is left after the last kill.
    """
    course, waiting = Course(), list(kills)
    done, starts = False, 0
    while not done and (waiting or to_the_end):
        starts += 1
        assert starts < len(kills) + 5, "it does not come to an end"
        kill = waiting.pop(0) if waiting else None
        tried = patient.attempt(COMMANDS[command], kill, chance, seconds, None if kill else beside)
        course.faults += _resumed(steps, patient, course, tried)
        done = tried.code == 0
        if tried.sent is not None and kill is not None:
            course.faults += _obeyed(patient, kill, tried)
            course.hits.append(Hit(kill, _where(tried), tried.seconds, _lost(patient, tried)))
            course.hits[-1].then = "went on to the end" if done else ""
        elif kill is not None:
            course.left.append(kill)
        elif not done and HELD not in tried.said:
            course.faults.append(f"fails undisturbed: {tried.said[-2000:]}")
            break
    course.left += waiting
    return course


def _resumed(total: int, patient: Patient, course: Course, tried: Try) -> list[str]:
    """Whether this try began where the one before had got to; told in the hit before."""
    begin, expected = tried.last("begin"), patient.saved
    steps = [note["step"] for note in tried.notes if note["what"] == "saved"]
    patient.saved = max([patient.newest(), *steps]) or expected
    if begin is None:
        if course.hits and not course.hits[-1].then and tried.code == 0:
            for hit in course.hits:
                hit.then = hit.then or "training was done"
            return [] if patient.folder.joinpath("state.json").exists() else ["did not train"]
        return []
    told = f"continuing at step {begin['step']} of {total}" if begin["step"] else f"training {total} steps"
    faults = [] if told in tried.said else [f"does not say {told!r}: {tried.said[-1000:]}"]
    if begin["step"] < expected:
        faults.append(f"begins at step {begin['step']} though step {expected} was saved")
    if course.hits and not course.hits[-1].then:
        for hit in course.hits:
            hit.then = hit.then or ("continued" if begin["step"] else "began, nothing was saved")
    return faults


def _obeyed(patient: Patient, kill: Kill, tried: Try) -> list[str]:
    """Whether a trainer that was asked in its loop saved and said so, and one without dvc left within two steps."""
    begin, trained, end = (tried.last(what) for what in ("begin", "trained", "exit"))
    assert tried.sent is not None
    orderly = (0, 130, 143)
    left = [note for note in tried.notes if note["what"] == "exit" and note["code"] not in orderly]
    if left:
        return [f"{left[0]['stage']} left with {left[0]['code']} after {kill}: {tried.said[-1000:]}"]
    if begin is None or begin["time"] > tried.sent or (trained and trained["time"] < tried.sent):
        return []
    hears = kill.target != "dvc" or kill.signal != signal.SIGINT
    if (kill.signal == signal.SIGKILL and kill.target != "dvc") or not hears:
        return []
    if trained is not None:
        return [] if end and end["code"] == 0 else [f"was done when asked, and left with {end}"]
    asked = signal.SIGINT if kill.signal == signal.SIGINT else signal.SIGTERM
    faults = [] if end and end["code"] == 128 + asked else [f"asked by {kill}, left with {end}"]
    steps = [note for note in tried.notes if note["what"] == "step"]
    if steps and steps[-1]["step"] != patient.newest():
        faults.append(f"asked at step {steps[-1]['step']}, saved {patient.newest()}")
    journals = list(patient.project.root.glob("work/pretrain/*/metrics.jsonl"))
    reached = json.loads(journals[0].read_text().splitlines()[-1])["step"] if journals else None
    if patient.logs_every_step() and reached != patient.newest():
        faults.append(f"the journal ends at step {reached}, the checkpoint is of {patient.newest()}")
    after = [note for note in steps if note["time"] > tried.sent]
    if len(after) > 2:
        faults.append(f"{len(after)} steps after {kill}")
    if kill.command == "pretrain" and tried.code != 128 + asked:
        faults.append(f"exit code {tried.code}")
    last = tried.said.splitlines()[-1]
    if kill.command == "pretrain" and last != "continue with: python -m earthprior pretrain":
        faults.append(f"ends with {last!r}")
    return faults


def _lost(patient: Patient, tried: Try) -> int:
    steps = [note["step"] for note in tried.notes if note["what"] in ("step", "epoch")]
    return max(steps[-1] - patient.newest(), 0) if steps and not tried.last("left") else 0


def _where(tried: Try) -> str:
    """The last thing before the signal."""
    before = [note for note in tried.notes if note["time"] <= (tried.sent or 0.0) and note["what"] != "kill"]
    if not before:
        return "before the first stage"
    last = before[-1]
    return f"{last['stage']}: {last['what']}" + (f" {last['step']}" if "step" in last else "")


def _compared(bench: Bench, patient: Patient) -> list[str]:
    """All that is not as in the undisturbed run, and what kills have left behind."""
    have, root = patient.results(), patient.project.root
    faults = [f"{name} differs" for name, value in have.items() if bench.results.get(name) != value]
    whole = (root / "results/evaluate/metrics.json").exists()
    wanted = {name for name in bench.results if whole or not name.startswith("results/evaluate/")}
    faults += [f"{name} is missing" for name in wanted - have.keys()]
    stumps = [path.relative_to(root) for path in root.rglob(".*.tmp*") if ".dvc" not in path.parts]
    # The state of a finished training is there until dvc has come to the next stage.
    over = [path for path in root.glob("work/pretrain/*") if not (path / "done.json").exists()]
    stumps += [path.relative_to(root) for path in (root.glob("work/pretrain/*") if whole else over)]
    faults += [f"{path} was left behind" for path in stumps]
    tracked = (root / "mlflow.db").exists()
    if tracked and any(root.glob("work/undelivered/*")):
        # Who is asked to stop while MLflow hears the rest leaves that for later.
        patient.project.run("env", "PYTHONPATH=src", "python", "-m", "earthprior", "sync-tracking")
    return faults + (_tracked(patient.project) if tracked else [])


def _tracked(project: Project) -> list[str]:
    """What is wrong in MLflow: one run, ended, with each point once."""
    ref: Mapping[str, Any] = json.loads((project.root / "results/pretrain/mlflow_run.json").read_text())
    states = dict(project.mlflow("select run_uuid, status from runs"))
    faults = [f"run {run} is {state}" for run, state in states.items() if state not in ("FINISHED", "KILLED")]
    if states.get(ref["run_id"]) != "FINISHED":
        faults.append(f"run {ref['run_id']} is {states.get(ref['run_id'])}")
    doubled = project.mlflow(
        "select key, step, count(*) from metrics where key not like 'system/%' group by run_uuid, key, step "
        "having count(*) > 1"
    )
    faults += [f"{key} at step {step} is in MLflow {count} times" for key, step, count in doubled[:5]]
    return faults
