"""What stages leave for one another, and weights from elsewhere, changed or cut short; and what reads them."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from earthprior import build, handover
from earthprior.chips.selection import read_stats, select
from earthprior.files import write_json
from earthprior.journal import Journal
from earthprior.metrics import data_ranges
from earthprior.networks import vgg16
from earthprior.params import load
from earthprior.tools import tutorial_weights
from earthprior.tracking_store import RunRef
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.linear_denoiser import fit_linear
from hostile_text import MARK, PLACE, mutated, params_of

JSON_VALUES = (
    "null", "true", "[]", "{}", "0", "-1", "1e999", "NaN", "Infinity", '""', '"x"', '"\\ud800"', '"\\u0000"',
    "9" * 400, "9" * 5000,
    "[" * 2000, '{"a":' * 2000, "[[[[[1]]]]]", f'"http://{PLACE}/"', '"../../x"', "1.5", '["a"]', '{"a": 1}',
    '"<script>"', "16384",
)  # fmt: skip


def changed_json(draw: random.Random, content: bytes) -> bytes:
    """JSON with values and keys replaced, or its bytes changed."""
    if draw.random() < 0.3:
        return mutated(draw, content)
    tree = json.loads(content)
    marks = {}
    for number in range(draw.randint(1, 4)):
        node, key = tree, None
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
            if not keys or (key is not None and draw.random() < 0.2):
                break
            parent, key = node, draw.choice(keys)
            node = parent[key]
        if key is None:
            break
        if draw.random() < 0.2:
            del parent[key]
        else:
            parent[key] = mark = f"mark {number}"
            marks[json.dumps(mark)] = draw.choice(JSON_VALUES)
    text = json.dumps(tree)
    for mark, value in marks.items():
        text = text.replace(mark, value)
    return text.encode()


def changed_safetensors(draw: random.Random, content: bytes) -> bytes:
    """A .safetensors file with its header changed, or its bytes."""
    if draw.random() < 0.4:
        return mutated(draw, content)
    (length,) = struct.unpack("<Q", content[:8])
    header = changed_json(draw, content[8 : 8 + length])
    shown = draw.choice((len(header), len(header), len(header), 0, 2**62, length))
    return struct.pack("<Q", shown) + header + content[8 + length :]


def changed_zip(draw: random.Random, content: bytes) -> bytes:
    """A file of torch.save with one of its members changed or replaced by code, or its bytes changed."""
    if draw.random() < 0.4:
        return mutated(draw, content)
    code = f"cos\nsystem\n(S'touch {MARK}'\ntR.".encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            if draw.random() < 0.4:
                part = code if name.endswith("data.pkl") and draw.random() < 0.5 else mutated(draw, part)
            new.writestr(name, part)
    return buffer.getvalue()


def finish(folder: Path) -> None:
    """Add what a pretraining leaves, its network as it was initialized, a checkpoint and weights from elsewhere."""
    params = load(folder / "params.yaml")
    stats, _ = read_stats(folder)
    selection = select(params, folder, stats)
    linear = fit_linear(params, selection, build.normalizer(params, stats))
    task, results = build.task(params, linear), folder / "results/pretrain"
    linear.save(results / "linear.safetensors")
    save_file(task.network.state_dict(), results / "network.safetensors")
    write_json(results / "config.json", build.config(params, "f" * 12, {}, 3, linear, stats))
    write_json(results / "mlflow_run.json", RunRef("sqlite:///mlflow.db", "earthprior", "0" * 32).to_json())
    (results / "history.csv").write_text("epoch,step,train_loss,gain_db/mean\n1,4,0.5,-0.25\n2,8,0.4,\n")
    write_json(folder / "results/evaluate/metrics.json", {"gain_db": {"mean": 0.5, "rho_1": 0.25}, "judged_chips": 4})
    lines = [{"step": step, "time_ms": 1, "metrics": {"loss": 0.5, "gain": "NaN"}} for step in range(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    CheckpointStore(folder / "kept", "f" * 12, {}).save(
        3, {"network": task.network.state_dict(), "history": [{"a": 1.0}]}
    )
    torch.save({"state_dict": task.network.state_dict()}, folder / "weights.pth")


def from_json(name: str) -> Any:
    """A function that makes hostile versions of a JSON file of the finished project."""
    return lambda draw, folder: changed_json(draw, (folder / name).read_bytes())


def from_safetensors(name: str) -> Any:
    """A function that makes hostile versions of weights of the finished project."""
    return lambda draw, folder: changed_safetensors(
        draw, (folder / f"results/pretrain/{name}.safetensors").read_bytes()
    )


def of_stats(folder: Path, content: bytes) -> None:
    path = folder / "results/stats/stats.json"
    with _instead(path, content):
        params = params_of(folder)
        stats, _ = read_stats(folder)
        data_ranges(stats)
        build.normalizer(params, stats)
        select(params, folder, stats)


def of_pretraining(name: str) -> Any:
    """A function that reads results/pretrain/ with one of its files in another version."""

    def read(folder: Path, content: bytes) -> None:
        pretrained = folder / "results/pretrain"
        with _instead(pretrained / name, content):
            handover.read_config(pretrained / "config.json")
            handover.read_history(pretrained / "history.csv")
            RunRef.read(pretrained / "mlflow_run.json")
            build.pretrained_task(pretrained)

    return read


def of_metrics(folder: Path, content: bytes) -> None:
    (folder / "hostile.json").write_bytes(content)
    handover.read_metrics(folder / "hostile.json")


def some_journal(draw: random.Random, folder: Path) -> bytes:
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    lines[draw.randrange(len(lines))] = changed_json(draw, lines[0])
    return mutated(draw, b"\n".join(lines)) if draw.random() < 0.5 else b"\n".join([*lines, b""])


def of_journal(folder: Path, content: bytes) -> None:
    (folder / "hostile.jsonl").write_bytes(content)
    journal = Journal(folder / "hostile.jsonl")
    journal.append({"step": 5, "metrics": {"loss": 1.0}})
    journal.truncate_after(2)
    assert all("step" in record for record in journal.read() if "metrics" in record)
    journal.close()


def some_checkpoint(draw: random.Random, folder: Path) -> bytes:
    """A manifest and a checkpoint: one of them changed; or both, the manifest's hashes made right by somebody evil."""
    store = folder / "kept"
    manifest, content = (store / "ckpt-00000003.json").read_bytes(), (store / "ckpt-00000003.pt").read_bytes()
    kind = draw.random()
    if kind < 0.3:
        manifest = changed_json(draw, manifest)
    elif kind < 0.5:
        content = mutated(draw, content)
    else:
        content = changed_zip(draw, content)
        told = json.loads(manifest)
        told["sha256"] = hashlib.sha256(content).hexdigest()
        del told["manifest_sha256"]
        told["manifest_sha256"] = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        manifest = json.dumps(told).encode()
    return len(manifest).to_bytes(8, "little") + manifest + content


def of_checkpoint(folder: Path, content: bytes) -> None:
    length = int.from_bytes(content[:8], "little")
    (folder / "store").mkdir(exist_ok=True)
    (folder / "store/ckpt-00000003.json").write_bytes(content[8 : 8 + length])
    (folder / "store/ckpt-00000003.pt").write_bytes(content[8 + length :])
    CheckpointStore(folder / "store", "f" * 12, {}).load_latest()


def some_weights(draw: random.Random, folder: Path) -> bytes:
    if draw.random() < 0.3:
        return b"S" + changed_safetensors(draw, (folder / "results/pretrain/network.safetensors").read_bytes())
    return b"P" + changed_zip(draw, (folder / "weights.pth").read_bytes())


def of_weights(folder: Path, content: bytes) -> None:
    """Weights from elsewhere, as import-weights reads them, and as the loss perceptual does."""
    path = folder / ("hostile.safetensors" if content[:1] == b"S" else "hostile.pth")
    path.write_bytes(content[1:])
    weights = tutorial_weights.read_weights(path)
    tutorial_weights.check_keys(weights, tutorial_weights.architecture(weights, path.name), path.name)
    vgg16.read_weights(str(path))


class _instead:
    """A file in another version, and then as it was."""

    def __init__(self, path: Path, content: bytes) -> None:
        self._path, self._content, self._before = path, content, path.read_bytes()

    def __enter__(self) -> None:
        self._path.write_bytes(self._content)

    def __exit__(self, *_: object) -> None:
        self._path.write_bytes(self._before)
