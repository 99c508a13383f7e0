"""Every key acts: changing any key of downstream/params.yaml changes what a finetuning computes, keeps or logs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from earthprior import build
from earthprior.backbone import Backbone
from earthprior.chips.batch import Batch, prepare
from earthprior.downstream import finetuning
from earthprior.downstream.fitting import (
    BackboneNormalizer,
    KeptChips,
    Setup,
    fit,
    make_trainer,
    read,
)
from earthprior.errors import EarthPriorError
from earthprior.files import write_json
from earthprior.loading import load_backbone
from earthprior.params import DownstreamParams, Params, downstream_fields
from earthprior.training.course import prepare_torch
from earthprior.training.distributed import World
from earthprior.training.order import TrainingChips
from labelled import CPU, backbone_of, small, with_columns
from tiny_training import Log, bits, train

NETWORK = {"unet_film.channels": [4, 8], "unet_film.attention": False, "unet_film.time_embedding_dim": 8}
FAST: Mapping[str, Any] = {"epochs": 1, "steps_per_epoch": 2, "batch_size": 2, "threads": 1}


@dataclass
class Project:
    """Chips and a backbone."""

    root: Path
    backbone: Backbone
    scratch: Path

    def setup(self, params: DownstreamParams) -> tuple[Setup, list[Any], list[Any]]:
        """What is finetuned, with its chosen train and validate rows."""
        work = finetuning.prepare(params, self.root, self.backbone, CPU)
        return work.setup, work.train, work.validate


Look = Callable[[Project, DownstreamParams], Any]


def weights(project: Project, params: DownstreamParams) -> Any:
    """The network that a tiny finetuning ends with, and what it tells of itself."""
    setup, rows, _ = project.setup(params)
    model = fit(setup, rows)
    told = {name: model.description[name] for name in ("side", "t", "head", "classes", "crop_px")}
    return dict(model.state_dict()), told


def judged(project: Project, params: DownstreamParams) -> Any:
    """The same with a validation."""
    setup, rows, validate = project.setup(params)
    return dict(fit(setup, rows, validate).state_dict())


def history(project: Project, params: DownstreamParams) -> Any:
    setup, rows, validate = project.setup(params)
    chips = TrainingChips(rows, KeptChips(setup, rows).read, BackboneNormalizer(setup.backbone))
    return train(make_trainer(setup, chips, validate, World()), project.scratch).history


def points(project: Project, params: DownstreamParams) -> Any:
    setup, rows, _ = project.setup(params)
    chips = TrainingChips(rows, KeptChips(setup, rows).read, BackboneNormalizer(setup.backbone))
    log = Log()
    train(make_trainer(setup, chips, (), World()), project.scratch, log)
    return [step for step, _, _ in log.points], sorted(path.name for path in project.scratch.glob("*.json"))


def threads_used(project: Project, params: DownstreamParams) -> Any:
    before = torch.get_num_threads()
    try:
        prepare_torch(params.threads)
        return torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def where_from(project: Project, params: DownstreamParams) -> Any:
    return dict(load_backbone(project.root / params.pretrained).state_dict())


def batches(project: Project, params: DownstreamParams) -> Any:
    """How many crops a validation looks at in one pass."""
    setup, rows, validate = project.setup(params)
    chips = TrainingChips(rows, KeptChips(setup, rows).read, BackboneNormalizer(setup.backbone))
    trainer = make_trainer(setup, chips, validate, World())
    seen: list[int] = []
    loss = trainer.task.loss

    def counting(batch: Batch, generator: Any) -> Any:
        seen.append(len(batch))
        return loss(batch, generator)

    trainer.task.loss = counting  # type: ignore[method-assign]
    assert trainer.validation is not None
    trainer.validation.judge(trainer.task)
    return max(seen)


def reader_threads(project: Project, params: DownstreamParams) -> Any:
    setup, rows, _ = project.setup(params)
    chips = read(setup, rows, [[0]])
    next(chips)
    found = sum(thread.name.startswith("chip-reader") for thread in threading.enumerate())
    chips.close()
    return found


def device(project: Project, params: DownstreamParams) -> Any:
    return str(build.device(params))


def kept_for_backward(project: Project, params: DownstreamParams) -> Any:
    """How many numbers a forward pass keeps for the backward one."""
    setup, rows, _ = project.setup(params)
    chips = TrainingChips(rows, KeptChips(setup, rows).read, BackboneNormalizer(setup.backbone))
    task = make_trainer(setup, chips, (), World()).task.train()
    raw = next(read(setup, rows, [[0]]))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda packed: packed):
        task.loss(prepare(raw, BackboneNormalizer(setup.backbone), CPU), torch.Generator())
    return sum(kept)


@dataclass(frozen=True)
class Case:
    """A change and where it is seen."""

    value: Any
    given: Mapping[str, Any] = field(default_factory=dict)
    look: Look = weights


REFUSED = {
    "data.dir",
    "data.catalog",
    "data.chip_size",
    "data.bands",
    "label_column",
    "ignore_value",
    "operation.device",
}
"""Keys whose change is seen in what is refused."""

TWO = {"epochs": 2, "steps_per_epoch": 1}
CASES: dict[str, Case] = {
    "seed": Case(1),
    "threads": Case(2, look=threads_used),
    "precision": Case("bfloat16"),
    "pretrained": Case("other", look=where_from),
    "start": Case("untrained"),
    "task": Case("regression", {"task": "classification", "label_column": "code"}),
    "label_column": Case("none"),
    "ignore_value": Case(1),
    "labels": Case(2),
    "class_weights": Case("balanced"),
    "side": Case("encoder"),
    "t": Case(500),
    "head": Case("nonlinear"),
    "head_channels": Case(4, {"head": "nonlinear"}),
    "train": Case("head"),
    "last_levels": Case(2, {"train": "last", "last_levels": 1}),
    "lr": Case(0.5),
    "lr_decay": Case(0.1),
    "weight_decay": Case(0.9),
    "batch_size": Case(4),
    "accumulation_steps": Case(2),
    "val_batch_size": Case(3, look=batches),
    "epochs": Case(2, look=history),
    "steps_per_epoch": Case(1, look=history),
    "warmup_epochs": Case(1, TWO),
    "early_stopping_epochs": Case(1, {"epochs": 4, "steps_per_epoch": 1, "lr": 1e-30}, history),
    "keep": Case("last", {"epochs": 4, "steps_per_epoch": 2, "lr": 0.9, "lr_schedule": "none", "keep": "best"}, judged),
    "grad_clip": Case(1e-6, {"optimizer": "sgd"}),
    "optimizer": Case("sgd"),
    "lr_schedule": Case("none", TWO),
    "ema_decay": Case(0.1, {"ema_decay": 0.0}),
    "data.dir": Case("elsewhere"),
    "data.catalog": Case("none.csv"),
    "data.image_columns": Case(["again"]),
    "data.chip_size": Case(64),
    "data.bands": Case(["red", "green", "blue", "swir"]),
    "data.crop_px": Case(8),
    "data.nodata": Case([7.0], {"data.dir": "gaps"}),
    "data.buffer": Case(2, {"data.crop_px": None}),
    "augmentation.flip": Case(False),
    "adam.betas": Case([0.5, 0.9], {"optimizer": "adam"}),
    "adamw.eps": Case(0.1),
    "sgd.momentum": Case(0.1, {"optimizer": "sgd"}),
    "cosine.t_max": Case(1, {"epochs": 3, "steps_per_epoch": 1}),
    "operation.device": Case("cuda:99", look=device),
    "operation.readers": Case(1, look=reader_threads),
    "operation.activation_checkpointing": Case(True, look=kept_for_backward),
    "operation.checkpoint_interval": Case(1, {"epochs": 2}, points),
    "operation.checkpoint_every_seconds": Case(0, {"epochs": 2}, points),
    "operation.log_every_steps": Case(1, look=points),
}


class Refused(str):
    """The error that a user gets."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_chips: Callable[..., Path]) -> Path:
    """Twelve labelled chips with a second image column and a code of 0 or 1 each, and twelve with gaps."""
    root = tmp_path_factory.mktemp("keys")
    folder = with_columns(make_chips(root / "data", n=12, size=32, labels=True))
    make_chips(root / "gaps", n=12, size=32, labels=True, nodata=0)
    table = pd.read_csv(folder / "catalog.csv", dtype=str)
    table["again"] = table["image"].iloc[::-1].to_numpy()
    table["code"] = [str(int(cover == "dark")) for cover in table["cover"]]
    table.to_csv(folder / "catalog.csv", index=False)
    return root


@pytest.fixture
def project(root: Path, make_params: Callable[..., Params], tmp_path: Path) -> Project:
    params = make_params(NETWORK)
    for name, shift in (("backbone", 0.05), ("other", 0.1)):
        if not (root / name).exists():
            found = backbone_of(params, shift)
            (root / name).mkdir()
            save_file(found.tensors(), root / name / "backbone.safetensors")
            write_json(root / name / "config.json", found.description)
    return Project(root, load_backbone(root / "backbone"), tmp_path)


def seen(project: Project, case: Case, changes: Mapping[str, Any]) -> Any:
    """What is seen; an error that a user would get is something seen, too."""
    values = {**FAST, "pretrained": "backbone", **case.given, **changes}
    try:
        params = small(**{key.replace(".", "__"): value for key, value in values.items()})
        return bits(case.look(project, params))
    except EarthPriorError as error:
        return Refused(str(error))


SHARED = ("augmentation", "adam", "adamw", "sgd", "cosine")
"""Sections of params.yaml, too, which the same code reads: one key of each shows that it is this file's."""


def test_every_key_has_a_case() -> None:
    keys = {key for key in downstream_fields() if not key.startswith("bench")}
    assert CASES.keys() <= keys
    missing = keys - CASES.keys()
    assert {key.split(".")[0] for key in missing} <= set(SHARED)
    assert {key.split(".")[0] for key in CASES} >= set(SHARED)


@pytest.mark.parametrize("key", list(CASES))
def test_acts(key: str, project: Project, before_any: dict[str, Any]) -> None:
    case = CASES[key]
    # Most cases begin with the same finetuning.
    name = f"{case.look.__name__} {case.given}"
    if name not in before_any:
        before_any[name] = seen(project, case, {})
    before = before_any[name]
    assert not isinstance(before, Refused), before
    after = seen(project, case, {key: case.value})
    assert after != before
    assert isinstance(after, Refused) == (key in REFUSED), after


@pytest.fixture(scope="module")
def before_any() -> dict[str, Any]:
    return {}
