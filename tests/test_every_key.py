"""Every key acts: changing any key of params.yaml changes something that the program computes or writes.

A changed fingerprint or logged parameter does not count. Each case names what is looked at, the change, and the other
choices under which the key is meant to act; the same look is first taken without the change.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import pandas as pd
import pytest
import torch

from earthprior import build
from earthprior.errors import EarthPriorError
from earthprior.evaluation import probing, samples
from earthprior.evaluation.labelled import Material
from earthprior.networks.vgg16 import SHAPES
from earthprior.params import Params, known_keys
from earthprior.stages import pretrain, stats
from earthprior.tools import tune
from earthprior.training.stop import StopRequest
from earthprior.tuning.space import suggest
from earthprior.tuning.trial import Context
from tiny_training import TINY, Log, Tiny, bits, train

Look = Callable[["Project", Params], Any]


class Refused(str):
    """The error that a user gets."""


@dataclass
class Project:
    """A folder with chips, where looks are taken; `make` fills in the small settings."""

    root: Path
    make: Callable[[Mapping[str, Any]], Params]
    scratch: Path

    def look(self, look: Look, overrides: Mapping[str, Any]) -> Any:
        """What is seen; an error that a user would get is something seen, too."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        try:
            return bits(look(self, self.make({**TINY, **overrides})))
        except EarthPriorError as error:
            return Refused(str(error))


def weights(project: Project, params: Params) -> Any:
    """The weights that a tiny training ends with, and its validation."""
    outcome = train(Tiny(project.root, params).trainer(), project.scratch)
    return outcome.last, outcome.history


def final_weights(project: Project, params: Params) -> Any:
    """The averaged weights alone: for keys that must change more than the validation."""
    trainer = Tiny(project.root, params).trainer()
    if params.lr_schedule != "plateau":
        # It changes no weight, and takes as long as the training.
        trainer.validation = None
    return train(trainer, project.scratch).last


def epochs_run(project: Project, params: Params) -> Any:
    return len(weights(project, params)[1])


def checkpoints(project: Project, params: Params) -> Any:
    """The steps of the checkpoints that a training leaves behind."""
    weights(project, params)
    return sorted(path.name for path in project.scratch.glob("*.json"))


def points(project: Project, params: Params) -> Any:
    """The steps that are logged."""
    log = Log()
    train(Tiny(project.root, params).trainer(), project.scratch, log)
    return [step for step, _, _ in log.points]


def kept_for_backward(project: Project, params: Params) -> Any:
    """How many numbers a forward pass keeps for the backward one."""
    tiny = Tiny(project.root, params)
    task = build.task(params, tiny.linear).train()
    batch, _ = next(iter(tiny.validation_batches()))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda packed: packed):
        task.loss(batch, torch.Generator().manual_seed(0))
    return sum(kept)


def threads_used(project: Project, params: Params) -> Any:
    """What the stage asks of torch."""
    (project.scratch / "data").symlink_to(project.root / "data")
    asked: list[int] = []
    # Not given: two threads for so small tensors would mostly wait for each other.
    with patch("torch.set_num_threads", asked.append):
        stats.run(params, project.scratch)
        pretrain.run(params, project.scratch)
    return asked


def reader_threads(project: Project, params: Params) -> Any:
    """How many threads read chips."""
    with closing(Tiny(project.root, params).read([[0]])) as batches:
        next(batches)
        return sum(thread.name.startswith("chip-reader") for thread in threading.enumerate())


def device(project: Project, params: Params) -> Any:
    return str(build.device(params))


def statistics(project: Project, params: Params) -> Any:
    """What the stage stats writes of chips of which one is broken."""
    shutil.copytree(project.root / "data", project.scratch / "data")
    broken = project.scratch / "data/chips/chip_000.tif"
    broken.write_bytes(broken.read_bytes()[:300])
    stats.run(params, project.scratch)
    return (project.scratch / "results/stats/stats.json").read_text()


def sampled(project: Project, params: Params) -> Any:
    """Chips drawn from an untrained prior."""
    tiny = Tiny(project.root, params)
    batch, _ = next(iter(tiny.validation_batches()))
    task = build.task(params, tiny.linear).eval()
    drawn = samples.draw(task, batch, params.evaluate, bounds=tiny.normalizer.range).sampled
    return drawn.shape, hashlib.sha256(drawn.tobytes()).hexdigest()


def probed(project: Project, params: Params) -> Any:
    """What the probe says of an untrained network."""
    tiny = Tiny(project.root, params)
    task = build.task(params, tiny.linear).eval()
    material = Material(params, tiny.selection, tiny.normalizer, torch.device("cpu"))
    return repr(probing.probe(material, {"network": task}, tiny.selection.validate))


def study(project: Project, params: Params) -> Any:
    """What a search does, with a curve instead of a training."""

    def curve(trial: optuna.Trial, context: Context, stop: Any) -> tuple[float, ...]:
        values = suggest(trial, context.params, context.tune)
        trial.set_user_attr("settings", {**context.settings, **values})
        end = -abs(values["lr"] - 0.01)
        if len(trial.study.directions) == 1:
            for epoch in range(1, 4):
                trial.report(end * epoch, epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned
        return (end,) * len(trial.study.directions)

    (project.scratch / "data").symlink_to(project.root / "data")
    (project.scratch / "params.yaml").write_text(json.dumps(params.model_dump(mode="json")))
    stats.run(params, project.scratch)
    with (
        patch("earthprior.tuning.worker.run_trial", curve),
        patch("earthprior.tracking.import_mlflow", lambda: False),
        patch("earthprior.tools.tune._Search._report", lambda self: self.place.folder / "report.html"),
    ):
        search = tune._Search(params, tune.space.searched(params), project.scratch)
        search.coordinate(1, params.tune.trials if params.tune else 0, StopRequest())
    trials = [(trial.state.name, trial.params, trial.values, trial.user_attrs) for trial in search.study.trials]
    for _, _, _, attributes in trials:
        attributes.pop("worker", None)
    storage = search.place.storage.replace(str(project.scratch), "")
    return search.place.name, storage, search.study.user_attrs["metrics"], trials


@dataclass(frozen=True)
class Case:
    """A change and where it is seen."""

    value: Any
    given: Mapping[str, Any] = field(default_factory=dict)
    look: Look = final_weights


def given(look: Look = final_weights, **choices: Any) -> Callable[[Any], Case]:
    """Makes cases under other choices; double underscores stand for dots."""
    return lambda value: Case(value, {key.replace("__", "."): chosen for key, chosen in choices.items()}, look)


ATT_D = given(network="unet_att_d", unet_att_d__filter_config=[4, 8, 8], unet_att_d__block_num=[1, 1, 1])
ATT_D_DROPOUT = given(network="unet_att_d", unet_att_d__filter_config=[4, 8], unet_att_d__dropout_rate=0.4)
PLAIN = {"diffusion__precondition": "none", "diffusion__weighting": "uniform"}
SKIP = {"data.on_bad_chip": "skip", "data.max_bad_fraction": 0.5}
LONG = {"epochs": 6, "warmup_epochs": 1}
MIN_MAX = {"normalization.normal_strategy": "min_max", "normalization.stat_procedure": "lab"}

FEW = {"tune__trials": 8, "tune__startup_trials": 2, "tune__space": {"lr": {"low": 0.001, "high": 0.02}},
  "tune__study": "mine", "tune__pruning_warmup_epochs": 0}  # fmt: skip
SEARCH = given(study, **FEW)

CASES: dict[str, Case] = {
    "seed": Case(1),
    "threads": Case(1, {"threads": 2, "epochs": 1, "warmup_epochs": 0}, threads_used),
    "precision": Case("bfloat16"),
    # The one word that there is; a second task comes with its own case.
    "task": Case("none"),
    "network": Case("unet_att_d"),
    "objective": given(**PLAIN)("v"),
    "loss_fn": Case("l1"),
    "lr": Case(0.02),
    "weight_decay": Case(0.5),
    "batch_size": Case(8),
    # The parts draw their own views and noise.
    "accumulation_steps": Case(2),
    "val_batch_size": Case(48, look=weights),
    "epochs": Case(2),
    "warmup_epochs": Case(2),
    "early_stopping_epochs": Case(1, {"epochs": 8, "lr": 1e-12}, epochs_run),
    "grad_clip": Case(1e-6),
    "optimizer": Case("sgd"),
    "lr_schedule": Case("none"),
    "ema_decay": Case(0.0),
    "data.dir": Case("other"),
    "data.catalog": Case("fewer.csv"),
    "data.image_columns": Case(["again"]),
    "data.chip_size": Case(16),
    # The files name their bands, so that another order is refused.
    "data.bands": Case(["nir", "green", "blue", "red"], SKIP, statistics),
    "data.crop_px": Case(8),
    "data.crops_per_chip": Case(1),
    # These files declare 0, which another value overrides.
    "data.nodata": Case([1], {"data.dir": "gaps"}),
    "data.buffer": Case(2),
    "data.on_bad_chip": Case("error", SKIP, statistics),
    "data.max_bad_fraction": Case(0.01, SKIP, statistics),
    "normalization.apply_normalization": Case(False),
    "normalization.normal_strategy": Case("min_max"),
    "normalization.stat_procedure": Case("lpb"),
    "normalization.clip_percent": Case(5.0),
    "normalization.clip_val": Case(1.0),
    "augmentation.flip": Case(False),
    "augmentation.rotation_degree": Case({"low": -20, "high": 20}),
    "augmentation.scale_factor": Case([0.5, 0.6]),
    "augmentation.crop_strategy": Case("center"),
    "augmentation.patch_shift_px": given(augmentation__crop_strategy="center")(5),
    "augmentation.contrast_range": Case([2.0, 3.0]),
    "augmentation.br_range": Case([1.0, 2.0]),
    "augmentation.bshift_gamma_range": Case([0.4, 0.5]),
    "augmentation.patch_gamma_range": Case([0.2, 0.3]),
    "augmentation.sigma_range": Case([0.5, 0.6]),
    "diffusion.timesteps": Case(100),
    "diffusion.noise_schedule": given(**PLAIN)("cosine"),
    "diffusion.beta_start": given(**PLAIN, diffusion__timestep_sampling="uniform")(0.001),
    "diffusion.beta_end": given(**PLAIN, diffusion__timestep_sampling="uniform")(0.01),
    "diffusion.scale_betas": given(**PLAIN, diffusion__timesteps=100, diffusion__timestep_sampling="uniform")(True),
    "diffusion.shift_reference_px": given(**PLAIN, diffusion__timestep_sampling="uniform")(4),
    "diffusion.zero_terminal_snr": given(evaluate__sampler="ddim", diffusion__timestep_sampling="uniform")(True),
    "diffusion.precondition": Case("scalar"),
    "diffusion.weighting": Case("min_snr"),
    "diffusion.min_snr_gamma": given(diffusion__weighting="soft_min_snr")(1.0),
    "diffusion.timestep_sampling": Case("stratified"),
    "unet_film.channels": Case([8, 8]),
    "unet_film.blocks": Case(2),
    "unet_film.attention": Case(True),
    "unet_film.dropout_rate": Case(0.5),
    "unet_film.time_embedding_dim": Case(8),
    "unet_att_d.filter_config": ATT_D([4, 4, 8]),
    "unet_att_d.block_num": ATT_D([2, 1, 1]),
    "unet_att_d.dropout_rate": ATT_D(0.5),
    "unet_att_d.dropout_type": ATT_D_DROPOUT("spatial"),
    "unet_att_d.upmode": ATT_D("DUC"),
    "unet_att_d.use_skipAtt": ATT_D(False),
    "unet_att_d.time_embedding_dim": ATT_D(8),
    "unet_att_d.time_injection": ATT_D("all"),
    "loss_weights.alpha": given(loss_fn="hybrid_light")(0.2),
    "loss_weights.beta": given(loss_fn="hybrid_light")(0.9),
    "loss_weights.gamma": given(loss_fn="hybrid_light")(0.5),
    "ssim.data_range": given(loss_fn="ssim")(8.0),
    "perceptual.weights": given(loss_fn="perceptual", perceptual__weights="vgg-a.pth", epochs=1, warmup_epochs=0)(
        "vgg-b.pth"
    ),
    **{
        f"{name}.betas": given(optimizer=name)([0.5, 0.9])
        for name in ("adam", "adamw", "nadam", "adamax", "radam", "adabelief")
    },
    **{
        f"{name}.eps": given(optimizer=name)(0.1)
        for name in ("adam", "adamw", "rmsprop", "adagrad", "adadelta", "nadam", "adamax", "adabelief")
    },
    # RAdam's eps acts once its variance is rectified, after the sixth step.
    "radam.eps": given(optimizer="radam")(0.1),
    "sgd.momentum": given(optimizer="sgd")(0.1),
    "sgd.nesterov": given(optimizer="sgd")(True),
    "rmsprop.alpha": given(optimizer="rmsprop")(0.5),
    "rmsprop.momentum": given(optimizer="rmsprop")(0.5),
    "adagrad.lr_decay": given(optimizer="adagrad")(0.5),
    "adadelta.rho": given(optimizer="adadelta")(0.5),
    "nadam.momentum_decay": given(optimizer="nadam")(0.5),
    "sam.base_optimizer": given(optimizer="sam")("sgd"),
    "sam.rho": given(optimizer="sam")(0.5),
    "sam.adaptive": given(optimizer="sam")(True),
    "cosine.t_max": Case(1),
    "cosine.eta_min": Case(0.005),
    "cosinewarm.t_0": given(lr_schedule="cosinewarm", cosinewarm__t_0=2)(1),
    "cosinewarm.t_mult": given(lr_schedule="cosinewarm", cosinewarm__t_0=1, **LONG)(1),
    "cosinewarm.eta_min": given(lr_schedule="cosinewarm", cosinewarm__t_0=1)(0.005),
    "step.step_size": given(lr_schedule="step", step__step_size=2, **LONG)(1),
    "step.gamma": given(lr_schedule="step", step__step_size=1)(0.5),
    "multistep.milestones": given(lr_schedule="multistep", multistep__milestones=[2], **LONG)([3, 4]),
    "multistep.gamma": given(lr_schedule="multistep", multistep__milestones=[2])(0.5),
    "plateau.patience": given(lr_schedule="plateau", plateau__patience=0, lr=0.9, **LONG)(5),
    "plateau.factor": given(lr_schedule="plateau", plateau__patience=0, lr=0.9, **LONG)(0.1),
    "plateau.min_lr": given(lr_schedule="plateau", plateau__patience=0, lr=0.9, **LONG)(0.8),
    "poly.max_decay_epochs": given(lr_schedule="poly")(1),
    "poly.min_lr": given(lr_schedule="poly")(0.005),
    "poly.power": given(lr_schedule="poly")(3.0),
    "onecycle.pct_start": given(lr_schedule="onecycle")(0.6),
    "onecycle.div_factor": given(lr_schedule="onecycle")(2.0),
    "onecycle.final_div_factor": given(lr_schedule="onecycle")(2.0),
    "evaluate.sampler": Case("ddim", look=sampled),
    "evaluate.steps": Case(3, look=sampled),
    "evaluate.samples": Case(2, look=sampled),
    "evaluate.sampling_seed": Case(1, look=sampled),
    "evaluate.clip_sample": Case(False, {**MIN_MAX, "evaluate.clip_sample": True}, sampled),
    "evaluate.label_column": Case("none", look=probed),
    "evaluate.image_label_column": Case("number", {"evaluate.label_column": "none"}, probed),
    "evaluate.probe_rhos": Case([0.5], look=probed),
    "evaluate.probe_rho": Case(2.0, {"evaluate.label_column": "none"}, probed),
    "evaluate.probe_pixels": Case(7, look=probed),
    "operation.device": Case("cuda:99", look=device),
    "operation.readers": Case(1, look=reader_threads),
    "operation.activation_checkpointing": Case(True, look=kept_for_backward),
    "operation.checkpoint_interval": Case(1, look=checkpoints),
    "operation.checkpoint_every_seconds": Case(0, look=checkpoints),
    "operation.log_every_steps": Case(1, look=points),
    "tune.study": SEARCH("other"),
    "tune.storage": SEARCH("elsewhere.log"),
    "tune.trials": SEARCH(3),
    "tune.metric": given(study, **FEW, tune__pruner="none")("both"),
    "tune.sampler": SEARCH("random"),
    "tune.sampler_seed": SEARCH(1),
    "tune.startup_trials": SEARCH(20),
    "tune.pruner": SEARCH("none"),
    "tune.pruning_warmup_epochs": SEARCH(3),
    "tune.epochs": SEARCH(5),
    "tune.space": SEARCH({"lr": {"low": 0.02, "high": 0.03}}),
}


REFUSED = {"task", "data.chip_size", "data.bands", "data.on_bad_chip", "data.max_bad_fraction", "operation.device"}
"""Keys whose change is seen in what is refused: chips that do not fit it, or a word that does not exist."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_chips: Callable[..., Path]) -> Path:
    """Twelve chips with labels, a second catalog and a second image column; twelve others; twelve with gaps."""
    root = tmp_path_factory.mktemp("chips")
    folder = make_chips(root / "data", n=12, size=32, labels=True)
    make_chips(root / "other", n=12, size=32, seed=1)
    make_chips(root / "gaps", n=12, size=32, nodata=0)
    catalog = pd.read_csv(folder / "catalog.csv", dtype=str)
    catalog["number"] = [str(place / 3) for place in range(len(catalog))]
    catalog["again"] = catalog["image"].iloc[::-1].to_numpy()
    catalog.to_csv(folder / "catalog.csv", index=False)
    catalog.drop(index=[0, 1]).to_csv(folder / "fewer.csv", index=False)
    return root


@pytest.fixture
def project(root: Path, tmp_path: Path, make_params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return Project(root, make_params, tmp_path / "scratch")


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What is seen before any change, by look and choices."""
    return {}


def test_every_key_has_a_case() -> None:
    assert sorted(CASES) == sorted(known_keys())


@pytest.mark.parametrize("key", list(CASES))
def test_acts(key: str, project: Project, seen: dict[str, Any]) -> None:
    case = CASES[key]
    if key == "perceptual.weights":
        write_vgg(Path("vgg-a.pth"), 0.01)
        write_vgg(Path("vgg-b.pth"), 0.02)
    # Most cases begin with the same training.
    name = f"{case.look.__name__} {case.given}"
    if name not in seen:
        seen[name] = project.look(case.look, case.given)
    before = seen[name]
    assert not isinstance(before, Refused), before
    after = project.look(case.look, {**case.given, key: case.value})
    assert after != before
    assert isinstance(after, Refused) == (key in REFUSED), after


@pytest.mark.parametrize(
    ("look", "choices"),
    [
        *((look, {}) for look in (weights, sampled, probed, points, checkpoints, kept_for_backward)),
        (study, SEARCH(None).given),
    ],
)
def test_the_same_params_look_the_same_anywhere(look: Look, choices: Mapping[str, Any], project: Project) -> None:
    # What differs by itself would make every key seem to act.
    elsewhere = replace(project, scratch=project.scratch.with_name("elsewhere"))
    assert project.look(look, choices) == elsewhere.look(look, choices)


def write_vgg(path: Path, value: float) -> None:
    """VGG16 weights of one value each, which take no room in the file."""
    torch.save({name: torch.tensor(value).expand(shape) for name, shape in SHAPES.items()}, path)
