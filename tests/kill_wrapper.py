"""Stands for src/earthprior/__main__.py in the projects of kills.py, where it is in no hash of the code.

The command is the real one. This notes what it does, keeps the state that a finished training deletes, and sends the
signal that it was told to send, at exactly the moment it was told: KILLS_ORDER is {"signal", "target", "moment", "n"}.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["KILLS_FOLDER"])
ORDER = json.loads(os.environ.get("KILLS_ORDER", "null"))
STAGE = sys.argv[1]
_append = os.open(FOLDER / "notes.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
_replace = os.replace


class Kill:
    """The signal that this process owes, if any."""

    def __init__(self) -> None:
        self.region: str | None = None
        self.waiting = list(ORDER["n"]) if ORDER and ORDER["moment"] in MOMENTS else None

    def enter(self, region: str) -> None:
        """Count one more entry of a region; in the one that was chosen, points count from here."""
        if self.waiting and ORDER["moment"] == region and self.waiting[0] > 0:
            self.waiting[0] -= 1
        self.region = region

    def point(self) -> None:
        """A moment at which a kill could matter."""
        if self.waiting and ORDER["moment"] == self.region and self.waiting[0] == 0:
            self.waiting[1] -= 1
            if self.waiting[1] <= 0:
                self.waiting = None
                note("kill", moment=self.region)
                send()


MOMENTS = ("step", "save", "judge", "results")


def note(what: str, **more: Any) -> None:
    """A line for the harness; one write, so that a kill leaves no half."""
    record = {"pid": os.getpid(), "stage": STAGE, "what": what, "time": time.time(), "cpu": time.process_time(), **more}
    os.write(_append, (json.dumps(record) + "\n").encode())


def send() -> None:
    """Send the signal, as the terminal, the batch system or the kernel would."""
    if ORDER["target"] == "group":
        os.killpg(os.getpgrp(), ORDER["signal"])
    else:
        os.kill(os.getpid() if ORDER["target"] == "trainer" else os.getppid(), ORDER["signal"])


def before_and_after(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with a point on either side."""

    def called(*arguments: Any, **named: Any) -> Any:
        KILL.point()
        done = function(*arguments, **named)
        KILL.point()
        return done

    return called


def half_written(path: Path, content: bytes) -> int:
    """`Path.write_bytes`, with a point where half is written."""
    with path.open("wb") as handle:
        handle.write(content[: len(content) // 2])
        handle.flush()
        KILL.point()
        return handle.write(content[len(content) // 2 :])


def wrap(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Put `replacement(original, ...)` in place of a method, with self, or of a function."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **named: replacement(original, *arguments, **named))


def one_step(original: Any, trainer: Any, *arguments: Any, **named: Any) -> None:
    original(trainer, *arguments, **named)
    note("step", step=trainer.step)
    KILL.enter("step")
    KILL.point()
    KILL.region = None


def end_epoch(original: Any, trainer: Any, *arguments: Any, **named: Any) -> None:
    note("epoch", step=trainer.step)
    original(trainer, *arguments, **named)


def save(original: Any, store: Any, step: int, state: Any) -> Any:
    note("save", step=step)
    KILL.enter("save")
    path = original(store, step, state)
    KILL.region = None
    note("saved", step=step)
    return path


def judged(original: Any, validation: Any, *arguments: Any, **named: Any) -> Any:
    note("judge")
    KILL.enter("judge")
    KILL.point()
    value = original(validation, *arguments, **named)
    KILL.point()
    KILL.region = None
    return value


def train(original: Any, trainer: Any, *arguments: Any, **named: Any) -> Any:
    note("begin", step=trainer.step)
    outcome = original(trainer, *arguments, **named)
    state = {part: digest(value) for part, value in {**trainer.state(), "last": outcome.last}.items()}
    with (FOLDER / "state.tmp").open("w") as handle:
        json.dump(state, handle)
    _replace(FOLDER / "state.tmp", FOLDER / "state.json")
    note("trained", step=trainer.step)
    return outcome


def digest(value: Any) -> str:
    """SHA-256 of nested plain values and tensors: equal if and only if they are bit-identical."""
    import torch

    if isinstance(value, torch.Tensor):
        parts = [str(value.dtype), str(tuple(value.shape)), value.detach().contiguous().numpy().tobytes().hex()]
    elif isinstance(value, Mapping):
        parts = [f"{key} {digest(inner)}" for key, inner in value.items()]
    elif isinstance(value, list | tuple):
        parts = [digest(inner) for inner in value]
    else:
        parts = [repr(value)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def write_outs(original: Any, outcome: Any, task: Any, environment: Any, run: Any, home: Any, tracker: Any) -> None:
    shutil.copyfile(home.folder / "metrics.jsonl", FOLDER / "journal.tmp")
    _replace(FOLDER / "journal.tmp", FOLDER / "journal.jsonl")
    KILL.enter("results")
    original(outcome, task, environment, run, home, tracker)


def run(original: Any, session: Any, *arguments: Any, **named: Any) -> Any:
    done = original(session, *arguments, **named)
    KILL.point()
    note("left")
    return done


def watch_training() -> None:
    """Patch what a training does; after this the order in which modules are imported is another, and nothing else."""
    from earthprior.training import outs
    from earthprior.training.checkpoint import CheckpointStore
    from earthprior.training.loop import Trainer
    from earthprior.training.session import Session
    from earthprior.training.validate import Validation

    wrap(Trainer, "run", train)
    wrap(Trainer, "_one_step", one_step)
    wrap(Trainer, "_end_epoch", end_epoch)
    wrap(CheckpointStore, "save", save)
    for name in ("_errors", "_loss"):
        wrap(Validation, name, judged)
    wrap(outs, "write", write_outs)
    wrap(Session, "run", run)
    for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (shutil, "rmtree")):
        setattr(owner, name, before_and_after(getattr(owner, name)))
    Path.write_bytes = half_written  # type: ignore[method-assign,assignment]


KILL = Kill()

if __name__ == "__main__":
    note("start")
    code: Any = 0
    try:
        if STAGE == "pretrain":
            watch_training()
            note("patched")
        from earthprior.cli import main

        main()
    except SystemExit as end:
        code = end.code
        raise
    except KeyboardInterrupt:
        # As earthprior's own __main__, while modules are imported.
        code = 130
        sys.exit(code)
    except BaseException:
        code = "error"
        raise
    finally:
        note("exit", code=code)
