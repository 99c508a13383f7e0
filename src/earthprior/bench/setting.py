"""A bench made ready: from downstream/params.yaml to chips, labels, backbone, plan and table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earthprior import build
from earthprior.backbone import Backbone
from earthprior.bench.fits import Fitter, Train
from earthprior.bench.ground import Ground, Mapper, divide
from earthprior.bench.pages import About
from earthprior.bench.plan import Fit, plan
from earthprior.bench.table import Table
from earthprior.bench.work import work
from earthprior.chips.catalog import ChipRow, load_catalog
from earthprior.chips.read import ChipSpec
from earthprior.digests import digest, tensors_digest
from earthprior.downstream import labels as label_columns
from earthprior.downstream.fitting import Setup, untrained
from earthprior.downstream.fitting import fit as finetune
from earthprior.downstream.labels import Labels
from earthprior.errors import ParamsError
from earthprior.files import sha256_file
from earthprior.identity import code_hash, data_version, main_root
from earthprior.loading import load_backbone, within
from earthprior.params import DownstreamParams
from earthprior.params.bench import BenchParams
from earthprior.report import count
from earthprior.training.course import prepare_torch

FORMAT = 1
"""Part of every bench's fingerprint: raise it when rows of the version before say something else."""

FREE = ("budgets", "seeds", "methods")
"""Keys of `bench` that say which rows there shall be, and change none."""

METRICS = {2: ("average_precision", "iou", "f1")}
MORE_METRICS = ("mean_iou", "average_precision", "accuracy", "f1")
"""The headline first: masks of two classes are ranked, since what is positive may be small and its outline loose."""


@dataclass(frozen=True)
class Setting:
    """A bench made ready.

    Args:
        name: Its fingerprint: what a row depends on.
        params: The whole of downstream/params.yaml.
        fits: The plan.
        fitter: Does them.
        table: Keeps them.
        about: What the report tells.
        told: Parameters for MLflow.
    """

    name: str
    params: DownstreamParams
    fits: Sequence[Fit]
    fitter: Fitter
    table: Table
    about: About
    told: Mapping[str, Any]

    def work(self, after: Callable[[], None]) -> None:
        """See `bench.work.work`."""
        work(self.fits, self.fitter, self.table, after)


def prepare(params: DownstreamParams, root: Path, jobs: int) -> Setting:
    """Read all that the fits share.

    Args:
        params: The whole of downstream/params.yaml.
        root: The project's root.
        jobs: Processes that share the threads.

    Raises:
        EarthPriorError: Something is missing or does not fit.
    """
    if params.task != "segmentation":
        raise ParamsError(f"task {params.task}: bench compares maps; set task: segmentation in downstream/params.yaml")
    prepare_torch(max(1, params.threads // jobs))
    bench = params.bench
    if bench is None:
        raise ParamsError(
            "downstream/params.yaml has no section bench; git checkout downstream/params.yaml restores it"
        )
    # Here, since it is no affair of a finetuning with other epochs.
    if bench.steps % params.epochs:
        raise ParamsError(
            f"downstream/params.yaml: bench.steps {bench.steps} cannot be divided into {params.epochs} epochs; use a "
            "multiple"
        )
    device = build.device(params)
    backbone = load_backbone(within(root, params.pretrained)).to(device)
    catalog = load_catalog(params.data, root)
    labels, rows, strata = label_columns.find(params, catalog.dir, catalog.split("train"))
    validate, test = (
        label_columns.labelled(catalog.split(usage), params.label_column) for usage in ("validate", "test")
    )
    rest, held, judged = divide(bench, catalog.dir, rows, validate, test)
    kinds = {row.line: kind for row, kind in zip(rows, strata, strict=True)}
    usage = "test" if test else "validate"
    spec = ChipSpec.from_params(params.data)
    ground = Ground(
        backbone, lambda seed: untrained(backbone, seed).to(device), catalog.dir, spec, labels.classes, labels.read,
        rest,        [kinds[row.line] for row in rest], held, judged, device,
    )  # fmt: skip
    made_of = _made_of(params, bench, backbone, root, catalog.path)
    name = digest(made_of)[:12]
    metrics = METRICS.get(len(labels.classes), MORE_METRICS)
    table = Table(main_root(root) / "work/bench" / name / "bench.csv", name, metrics)
    code = code_hash(start="tools/bench.py").digest[:12]
    fitter = Fitter(ground, bench, _trainer(params, bench, ground, labels), code, metrics)
    judged_text = f"{count(len(judged), f'{usage} chip')}"
    about = About(
        judged_text, len(rest), len(held), metrics, _identity(params, bench, made_of, code), "earthprior bench"
    )
    told = {f"bench.{key}": value for key, value in bench.model_dump(mode="json").items()}
    told |= {key: value for key, value in made_of.items() if not key.startswith("bench.")}
    return Setting(name, params, plan(bench, len(rest)), fitter, table, about, told)


def _trainer(params: DownstreamParams, bench: BenchParams, ground: Ground, labels: Labels) -> Train:
    """How a network is trained: as `earthprior finetune` does it, to the end of its steps, with nothing chosen."""

    def train(method: str, rows: Sequence[ChipRow], lr: float, seed: int) -> Mapper:
        # Below a pretrained network's levels lies what it has learned; from scratch there is nothing to spare.
        pretrained = method == "finetune"
        decay = params.lr_decay if pretrained else 1.0
        changed = {"train": "all", "lr": lr, "lr_decay": decay, "seed": seed, "keep": "last"}
        own = params.model_copy(update={**changed, "steps_per_epoch": bench.steps // params.epochs})
        start = ground.backbone if pretrained else ground.untrained(seed)
        tuned = finetune(Setup(own, start, labels, ground.device), rows)
        return Mapper(tuned.predict, tuned.crop_px, normalized=True)

    return train


def _made_of(
    params: DownstreamParams, bench: BenchParams, backbone: Backbone, root: Path, catalog: Path
) -> dict[str, Any]:
    """What any row depends on, by name; plain values."""
    section = {f"bench.{key}": value for key, value in bench.model_dump(mode="json").items() if key not in FREE}
    own = {"start", "train", "lr", "seed", "steps_per_epoch"}
    # All of a network is trained here, whatever the file says; and by its epochs goes the warm-up's share of the steps.
    acting = params.model_copy(update={"train": "all"}).active()
    finetuning = {key: value for key, value in acting.items() if key not in own}
    data = {"catalog": sha256_file(catalog)[:12], "data_md5": data_version(root)[0]}
    return {"format": FORMAT, "backbone": _backbone_digest(backbone), **data, **finetuning, **section}


def _backbone_digest(backbone: Backbone) -> str:
    """What a backbone is: its description and every weight, in 12 hex digits."""
    return digest({"description": backbone.description, "tensors": tensors_digest(backbone.tensors())})[:12]


def _identity(
    params: DownstreamParams, bench: BenchParams, made_of: Mapping[str, Any], code: str
) -> list[tuple[str, str]]:
    return [
        ("Backbone", f"{params.pretrained}, {made_of['backbone']}"),
        ("Catalog", f"{params.data.dir}/{params.data.catalog}, {made_of['catalog']}"),
        ("Label column", params.label_column),
        ("Trainings", f"{bench.steps} steps of {params.batch_size} crops of {params.data.train_px} px"),
        ("Code", code),
    ]
