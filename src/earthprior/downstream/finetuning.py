"""One finetuning from params to files, with all that a pretraining has: state, resume, tracking, progress.

Until it is done everything is in `work/finetune/<fingerprint>/`, where the same call finds it again after a kill.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from earthprior import identity
from earthprior.backbone import Backbone
from earthprior.chips.catalog import ChipRow, load_catalog
from earthprior.chips.content import is_tiff
from earthprior.chips.problems import chip_error
from earthprior.chips.selection import JUDGED_CHIPS, chip_key, spread
from earthprior.digests import digest, tensors_digest
from earthprior.downstream import labels as labels_module
from earthprior.downstream.budget import choose
from earthprior.downstream.fitting import BackboneNormalizer, Setup, finetuned, make_trainer, reader, untrained
from earthprior.downstream.labels import judgeable
from earthprior.downstream.saved import CONFIG, WEIGHTS, Finetuned
from earthprior.errors import DataError
from earthprior.files import read_json, sha256_file, sweep, write_csv, write_json
from earthprior.params import DownstreamParams
from earthprior.tracking import Tracker
from earthprior.training.course import Course, Hooks, Made, weights_of
from earthprior.training.demands import check_batch_size
from earthprior.training.distributed import World
from earthprior.training.loop import Outcome, Trainer
from earthprior.training.order import TrainingChips
from earthprior.training.outs import told_where
from earthprior.training.run import Home

TRAINING = "downstream/finetuning.py"

VALIDATED_CHIPS = 256
"""That choose the epoch, at most, evenly spread over their split: looked at after each, they must cost less than it."""


@dataclass(frozen=True)
class Work:
    """What is finetuned on what, and who that is.

    Attributes:
        setup: Params, backbone and labels.
        train: The chips that it learns from.
        available: How many labelled train chips there are.
        validate: That choose the epoch.
        judged: That the result is judged on.
        usage: Their split.
        unlabelled: Rows of these splits that have no label.
        made: What the weights are made of.
    """

    setup: Setup
    train: list[ChipRow]
    available: int
    validate: list[ChipRow]
    judged: list[ChipRow]
    usage: str
    unlabelled: int
    made: Made


@dataclass(frozen=True)
class Done:
    """A finetuning that is done, while its MLflow run is still open.

    Attributes:
        model: The network that was kept.
        outcome: Weights and history.
        tracker: For further numbers and files.
    """

    model: Finetuned
    outcome: Outcome
    tracker: Tracker


def prepare(params: DownstreamParams, root: Path, backbone: Backbone, device: torch.device) -> Work:
    """Find labels, choose chips, and name the run.

    Args:
        params: Of the finetuning.
        root: The project's root, which `data.dir` is relative to.
        backbone: As it was loaded.
        device: Of this process.

    Raises:
        DataError: The catalog or its labels cannot be used.
    """
    catalog = load_catalog(params.data, root)
    rows = catalog.without(_skipped(root, catalog.path)).split
    found, with_label, strata = labels_module.find(params, catalog.dir, rows("train"))
    if not with_label:
        raise DataError(f"{params.data.catalog}: no train chip has a label in column {params.label_column!r}")
    train = choose(with_label, params.labels, params.seed, strata)
    validate, test = (judgeable(found, rows(usage)) for usage in ("validate", "test"))
    if not validate:
        raise DataError(
            f"{params.data.catalog}: no validate chip has a label in column {params.label_column!r}"
            f"{' that a train chip has, too' * bool(found.classes)}"
        )
    used = [row for usage in ("train", "validate", "test") for row in rows(usage)]
    unlabelled = len(used) - len(with_label) - len(validate) - len(test)
    if params.start == "untrained":
        backbone = untrained(backbone, params.seed)
    setup = Setup(params, backbone, found, device)
    judged = spread(test or validate, JUDGED_CHIPS)
    validate = spread(validate, VALIDATED_CHIPS)
    made = _made(setup, catalog.path, train, validate)
    usage = "test" if test else "validate"
    return Work(setup, train, len(with_label), validate, judged, usage, unlabelled, made)


def _skipped(root: Path, catalog: Path) -> list[int]:
    """The lines that the stage stats has skipped, if it was this catalog that it read."""
    try:
        stats = read_json(root / "results/stats/stats.json")
        same = stats["data"]["catalog_sha256"] == sha256_file(catalog)
        return list(stats["chips"]["skipped_lines"]) if same else []
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _made(setup: Setup, catalog: Path, train: Sequence[ChipRow], validate: Sequence[ChipRow]) -> Made:
    folder, column = setup.labels.folder, setup.labels.column
    facts = {
        "data": {
            "catalog_sha256": sha256_file(catalog),
            "train_sha256": _digest_of_chips(folder, train, column),
            "validate_sha256": _digest_of_chips(folder, validate, column),
        },
        "pretrained": {
            "sha256": backbone_digest(setup.backbone),
            "fingerprint": setup.backbone.description.get("fingerprint"),
            "t": setup.backbone.t,
            "side": setup.backbone.description["serving"].get("side"),
        },
    }
    values = setup.params.active()
    # Which chips are used counts, not what else the catalog says of others.
    seen = {**facts, "data": {name: value for name, value in facts["data"].items() if name != "catalog_sha256"}}
    return Made(identity.fingerprint(values, digest(seen)), values, {}, facts)


def _digest_of_chips(folder: Path, rows: Sequence[ChipRow], column: str) -> str:
    """SHA-256 of chips and labels, their files read."""
    found = hashlib.sha256()
    for row in rows:
        cell = row.values[column]
        names = [*row.images, *([cell] if is_tiff(cell) else [])]
        try:
            hashes = [sha256_file(folder / name) for name in names]
        except OSError as error:
            fix = "Restore the file, or leave the chip out of the catalog"
            raise chip_error(row.images[0], row.line, f"cannot be read ({error.strerror})", fix) from None
        found.update(json.dumps([chip_key(row), cell, hashes]).encode())
    return found.hexdigest()


def backbone_digest(backbone: Backbone) -> str:
    """SHA-256 of all tensors of a backbone, and of what normalizes its chips."""
    told = {name: backbone.description.get(name) for name in ("network", "bands", "precondition", "normalization")}
    return digest({**told, "tensors": tensors_digest(backbone.tensors())})


class Finetuning(Course):
    """One process's work on a finetuning.

    Args:
        work: What is finetuned.
        home: Where.
        hooks: What the caller does in between; that of `trained` is given a `Done`.
        place: This process among others.

    Raises:
        ParamsError: Batches cannot be shared out.
    """

    def __init__(self, work: Work, home: Home, hooks: Hooks, place: World) -> None:
        self.work, params = work, work.setup.params
        check_batch_size(params, len(work.train), place.size)
        code = identity.code_hash(start=TRAINING)
        super().__init__(params, work.made, home, hooks, work.setup.device, place, code)

    def trainer(self, rests_on: str | None) -> Trainer:
        """See `Course.trainer`."""
        setup, rows = self.work.setup, self.work.train
        chips = TrainingChips(rows, reader(setup, rows), BackboneNormalizer(setup.backbone))
        return make_trainer(setup, chips, self.work.validate, self.place)

    def banner(self, trainer: Trainer) -> str:
        """See `Course.banner`."""
        params, work, task = self.work.setup.params, self.work, trainer.task
        begin = f"continuing at step {trainer.step:,} of" if trainer.step else "training"
        learned = sum(p.numel() for p in task.network.parameters() if p.requires_grad)
        classes = len(work.setup.labels.classes)
        return (
            f"finetune {work.made.fingerprint}: {begin} {trainer.total_steps:,} steps "
            f"({params.epochs} epochs of {trainer.steps_per_epoch}) of {params.task}"
            f"{f' into {classes} classes' * bool(classes)}, {len(work.train):,} of {work.available:,} labelled train "
            f"chips, {len(work.validate):,} validate chips, {params.data.train_px} px, {learned:,} of "
            f"{weights_of(task):,} weights ({params.start}, train: {params.train}) on {self.device} "
            f"({self.place.size} process{'es' * (self.place.size > 1)}, {params.threads} threads), state in "
            f"{self.home.shown(self.home.folder)}"
        )

    def tags(self, task: Any) -> dict[str, str]:
        """By which a finetuning is told from a pretraining in MLflow."""
        return {"earthprior.kind": "finetune"}

    def finish(self, trainer: Trainer, outcome: Outcome, tracker: Tracker) -> Done:
        """Write model.safetensors, config.json, history.csv, environment.json and mlflow_run.json."""
        model = finetuned(self.work.setup, trainer, outcome)
        model.description |= {"fingerprint": self.made.fingerprint, "params": dict(self.made.values)}
        results = self.home.results
        with told_where(self.home):
            sweep(results)
            model.save(results)
            write_csv(results / "history.csv", pd.DataFrame(outcome.history))
            write_json(results / "environment.json", self.environment)
            write_json(results / "mlflow_run.json", tracker.ref.to_json())
        tracker.log_artifact(results / WEIGHTS, "weights")
        for path in (results / CONFIG, results / "environment.json", results / "history.csv", self.home.params_path):
            tracker.log_artifact(path)
        tracker.log_artifact(self.home.folder / "metrics.jsonl")
        return Done(model, outcome, tracker)
