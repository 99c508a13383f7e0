"""Inputs that nobody should feed to a program, kind by kind, and what reads each: it takes them, or refuses in words.

Shared by test_hostile.py (a few hundred) and benchmarks/soak_inputs.py (ten thousand). An input is made from an
integer that hypothesis draws, so that it can be made again.
"""

from __future__ import annotations

import functools
import os
import random
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import hostile_left as left
import hostile_text as text
import hostile_tiff as tiff
from earthprior.errors import EarthPriorError
from earthprior.params import load
from earthprior.stages import stats
from earthprior.tools import synth
from tiny_project import SMALL, edit_params

# GDAL would hold Python up while it waits for an answer, and the listener with it: it shall go on and be counted.
os.environ["GDAL_HTTP_TIMEOUT"] = "1"

WATCHED = {
    "socket.connect": "connected", "socket.getaddrinfo": "connected", "socket.gethostbyname": "connected",
    "urllib.Request": "connected", "subprocess.Popen": "started", "os.system": "started", "os.exec": "started",
    "os.posix_spawn": "started", "os.fork": "started", "pickle.find_class": "unpickled",
}  # fmt: skip


class Listener:
    """A server on 127.0.0.1 that counts connections and answers none."""

    def __enter__(self) -> Listener:
        listener = self
        self.connections = 0

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                listener.connections += 1

        # text.PLACE has five digits for the port.
        while (server := socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)).server_address[1] < 10_000:
            server.server_close()
        self._server = server
        self.place = f"127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Audit:
    """What this process did that a reader of data has no business to do, by Python's own account."""

    connected: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    unpickled: list[str] = field(default_factory=list)


_audits: list[Audit] = []


@functools.cache
def _install() -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _audits and event in WATCHED:
            for audit in _audits:
                getattr(audit, WATCHED[event]).append(f"{event} {arguments[:2]!r}"[:300])

    # For the life of the process; it looks at nothing while nobody audits.
    sys.addaudithook(hook)


@contextmanager
def audited() -> Iterator[Audit]:
    """Records connections, processes and unpickled names."""
    _install()
    audit = Audit()
    _audits.append(audit)
    try:
        yield audit
    finally:
        _audits.remove(audit)


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        make: From random numbers and the project's folder to an input.
        read: What reads it, in that folder.
        share: Of ten thousand.
    """

    make: Callable[[random.Random, Path], bytes]
    read: Callable[[Path, bytes], None]
    share: int


KINDS = {
    "params.yaml, any YAML": Kind(lambda draw, _: text.some_yaml(draw), text.read_params, 1500),
    "params.yaml, changed": Kind(lambda draw, _: text.changed_params(draw), text.read_params, 1500),
    "-P and -S values": Kind(lambda draw, _: text.some_overrides(draw), text.read_overrides, 500),
    "presets": Kind(lambda draw, _: text.some_preset(draw), text.read_preset, 300),
    "ssl_train.yaml": Kind(lambda draw, _: text.some_config(draw), text.read_config, 500),
    "catalogs": Kind(text.some_catalog, text.read_catalog, 1500),
    "GeoTIFFs": Kind(lambda draw, _: tiff.some_tiff(draw), tiff.read_tiff, 2500),
    "stats.json": Kind(left.from_json("results/stats/stats.json"), left.of_stats, 300),
    **{
        name: Kind(left.from_json(f"results/pretrain/{name}"), left.of_pretraining(name), 200)
        for name in ("config.json", "mlflow_run.json")
    },
    "history.csv": Kind(
        lambda draw, folder: text.mutated(draw, (folder / "results/pretrain/history.csv").read_bytes()),
        left.of_pretraining("history.csv"), 100,
    ),
    "metrics.json": Kind(left.from_json("results/evaluate/metrics.json"), left.of_metrics, 200),
    "metrics.jsonl": Kind(left.some_journal, left.of_journal, 200),
    "network.safetensors": Kind(
        left.from_safetensors("network"), left.of_pretraining("network.safetensors"), 150,
    ),
    "linear.safetensors": Kind(
        left.from_safetensors("linear"), left.of_pretraining("linear.safetensors"), 150,
    ),
    "checkpoints": Kind(left.some_checkpoint, left.of_checkpoint, 200),
    "weights from elsewhere": Kind(left.some_weights, left.of_weights, 200),
}  # fmt: skip


def prepare(folder: Path) -> None:
    """A small finished project, which the kinds read their inputs in."""
    (folder / "params.yaml").write_bytes((text.ROOT / "params.yaml").read_bytes())
    edit_params(folder / "params.yaml", SMALL)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        synth.run(folder / "data", n=12, seed=0, workers=1, validate_fraction=0.3, size=32)
        stats.run(load(folder / "params.yaml"), folder)
    (folder / "catalog.csv").write_bytes((folder / "data/catalog.csv").read_bytes())
    (folder / "data/vrt.tif").write_text(tiff.VRT)
    (folder / "data/wms.tif").write_text(tiff.WMS)
    left.finish(folder)


def make(kind: Kind, number: int, folder: Path, place: str) -> bytes:
    """The input of a number, with the address of the server that counts."""
    return kind.make(random.Random(number), folder).replace(text.PLACE.encode(), place.encode())


def feed(kind: Kind, folder: Path, content: bytes) -> str:
    """Let an input be read; "accepted" or "refused". Whatever else is raised is a fault of ours."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        try:
            kind.read(folder, content)
        except EarthPriorError as error:
            words = str(error)
        else:
            return "accepted"
    assert 0 < len(words.strip()) < 50_000, "refused without a word, or without an end"
    return "refused"
