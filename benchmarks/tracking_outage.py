"""Does training wait for MLflow? Steps per second with stores in every state, beside a run without MLflow.

    PYTHONPATH=src python benchmarks/tracking_outage.py [--epochs 40] [--rounds 3]

Trains a tiny network on synthetic chips, each time in a process of its own, logging at every step, which is far more
than a real training does:

    none      MLflow cannot be imported: the journal alone, the baseline
    sqlite    a healthy database
    locked    a database that another process holds from beginning to end
    dead      a server that is not there
    hanging   a server that takes connections and never answers
    slow      a server that takes 2 seconds for every answer, and answers what MLflow does not understand

Prints medians over the rounds, which take turns: steps per second from the first to the last step, wall and processor
milliseconds per step (the latter of all threads: what delivering costs), the seconds before the first step and after
the last, points in the journal, and whether the weights are the baseline's. Neighbours on the machine disturb the wall
time; the processor time least.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

from earthprior.files import write_json
from earthprior.params import load, read_mapping
from earthprior.stages import stats
from earthprior.tools import synth

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "data.chip_size": 32, "data.crop_px": 16, "threads": 1, "batch_size": 8, "val_batch_size": 8, "warmup_epochs": 0,
    "unet_film.channels": [8, 16], "unet_film.blocks": 1, "operation.readers": 1, "operation.device": "cpu",
    "operation.log_every_steps": 1, "operation.checkpoint_every_seconds": 3600, "tune": None,
}  # fmt: skip

# What a process of its own does: times are taken around the training's own steps.
CHILD = """
import hashlib, json, os, sys, time
began = time.perf_counter()
if os.environ.get("WITHOUT_MLFLOW"):
    sys.modules["mlflow"] = None
from pathlib import Path
from earthprior.journal import Journal
from earthprior.params import load
from earthprior.stages import pretrain
from earthprior.training.loop import Trainer
root, times, points = Path.cwd(), [], []
update, append = Trainer._update, Journal.append
def timed(self, *rest):
    times.append((time.perf_counter(), time.process_time()))
    return update(self, *rest)
def counted(self, record):
    points.append(len(record.get("metrics", {})))
    return append(self, record)
Trainer._update, Journal.append = timed, counted
ready = time.perf_counter()
pretrain.run(load(root / "params.yaml"), root)
ended, steps = time.perf_counter(), len(times) - 1
(first, cpu), (last, cpu_last) = times[0], times[-1]
weights = hashlib.sha256((root / "results/pretrain/network.safetensors").read_bytes()).hexdigest()
print(json.dumps({"steps_s": steps / (last - first), "wall_ms": 1e3 * (last - first) / steps,
  "cpu_ms": 1e3 * (cpu_last - cpu) / steps, "start_s": first - ready, "end_s": ended - last, "points": sum(points),
  "weights": weights}))
"""


def prepare(root: Path, epochs: int) -> None:
    """Chips, params and statistics."""
    synth.run(root / "data", 80, 0, 1, 0.2, 32, False)
    content = read_mapping(ROOT / "params.yaml")
    for key, value in {**SMALL, "epochs": epochs}.items():
        *sections, last = key.split(".")
        target = content
        for section in sections:
            target = target[section]
        target[last] = value
    write_json(root / "params.yaml", content)  # JSON is YAML
    stats.run(load(root / "params.yaml"), root)


@contextmanager
def none(root: Path) -> Iterator[dict[str, str]]:
    """Without MLflow."""
    yield {"WITHOUT_MLFLOW": "1"}


@contextmanager
def sqlite(root: Path) -> Iterator[dict[str, str]]:
    """A database with its tables."""
    yield {"MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}


@contextmanager
def locked(root: Path) -> Iterator[dict[str, str]]:
    """Held by this process."""
    with closing(sqlite3.connect(root / "mlflow.db", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        yield {"MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}


@contextmanager
def dead(root: Path) -> Iterator[dict[str, str]]:
    """Nobody listens at port 9."""
    yield {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}


@contextmanager
def hanging(root: Path) -> Iterator[dict[str, str]]:
    """The system takes the connections, nobody the requests."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{listener.getsockname()[1]}"}


@contextmanager
def slow(root: Path) -> Iterator[dict[str, str]]:
    """Each connection is answered after 2 seconds."""

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.recv(1 << 16)
            time.sleep(2)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{listener.getsockname()[1]}"}


STATES: dict[str, Callable[[Path], AbstractContextManager[dict[str, str]]]] = {
    "none": none, "sqlite": sqlite, "locked": locked, "dead": dead, "hanging": hanging, "slow": slow,
}  # fmt: skip


def measure(state: str, prepared: Path, copy: Path) -> dict[str, Any]:
    """One training with the store in this state."""
    shutil.copytree(prepared, copy)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "DVC_"))}
    with STATES[state](copy) as environment:
        done = subprocess.run(
            [sys.executable, "-c", CHILD], cwd=copy, env={**clean, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        sys.exit(f"{state}: the training failed\n{done.stderr}")
    shutil.rmtree(copy)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure all states and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared"
        prepared.mkdir()
        prepare(prepared, options.epochs)
        # The first contact makes the tables, which takes a second of its own.
        from mlflow import MlflowClient

        MlflowClient(tracking_uri=f"sqlite:///{prepared}/mlflow.db").get_experiment_by_name("x")
        found: dict[str, list[dict[str, Any]]] = {state: [] for state in STATES}
        for number in range(options.rounds):
            for state in STATES:
                found[state].append(measure(state, prepared, Path(folder) / f"{state}-{number}"))
                print(f"round {number + 1}, {state}: {found[state][-1]}", file=sys.stderr, flush=True)
    keys = ("steps_s", "wall_ms", "cpu_ms", "start_s", "end_s")
    medians = {
        state: {key: statistics.median(run[key] for run in runs) for key in keys} for state, runs in found.items()
    }
    base, weights = medians["none"], found["none"][0]["weights"]
    print("store     steps/s  ratio  wall ms  ratio  cpu ms  ratio  start s  end s  points  weights")
    for state, row in medians.items():
        same = all(run["weights"] == weights for run in found[state])
        ratios = {key: row[key] / base[key] for key in keys}
        print(
            f"{state:<9} {row['steps_s']:7.1f} {ratios['steps_s']:6.2f} {row['wall_ms']:8.2f} {ratios['wall_ms']:6.2f} "
            f"{row['cpu_ms']:7.2f} {ratios['cpu_ms']:6.2f} {row['start_s']:8.1f} {row['end_s']:6.1f} "
            f"{found[state][0]['points']:7,}  {'the same' if same else 'OTHER'}"
        )


if __name__ == "__main__":
    main()
