"""A tutorial's ssl_train.yaml becomes a valid params.yaml, and the table tells the truth about every key."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from earthprior import cli, params
from earthprior.errors import ParamsError
from earthprior.tools import import_config, tutorial_keys
from earthprior.tools import tutorial_translation as translation

REPOSITORY = Path(__file__).parents[1]

TUTORIAL = """
Train_Validate:
  # Paths / data
  data_path: "TBD"
  log_dir: "TBD"
  train_csv_name: "TBD/catalog_2023.csv"
  data_size: 224
  buffer: 0
  buffer_comp: 0
  global_stats: null
  catalog_index: null
  trans: null
  parallel: null
  img_path_cols: ["image"]
  apply_normalization: true
  normal_strategy: "min_max"
  stat_procedure: "lab"
  downfactor: 32
  clip_val: 0
  nodata: []
  scale_factor: [0.75, 1.5]
  crop_strategy: "center"
  rotation_degree: [-180, -90, 90, 180]
  sigma_range: [0.03, 0.07]
  br_range: [-0.02, 0.02]
  contrast_range: [0.9, 1.2]
  bshift_gamma_range: [0.2, 2.0]
  patch_shift: true
  train_batch: 40
  validate_batch: 20
  diffusion:
    timesteps: 1000
    noise_schedule: "linear"     # or "cosine"
    beta_start: 1e-6
    beta_end: 0.02
  model: "unet_att_d"
  channels: 4
  save_dir: "TBD"
  model_kwargs:
    filter_config: [64, 256, 512, 1024, 2048, 4096]
    block_num: [2, 2, 2, 2, 2, 2]
    dropout_rate: 0.1
    dropout_type: "traditional"
    upmode: "deconv_2"
    use_skipAtt: true
    time_embedding_dim: 128
  epoch: 100
  optimizer: "adamw"
  learning_rate_init: 2e-4
  weight_decay: 1e-4
  betas: [0.9, 0.999]
  eps: 1e-8
  scheduler: "cosinewarm"        # options: cosinewarm | cosine | step | ...
  t_0: 30 #10
  t_mult: 2
  eta_min: 1e-5
  loss_fn: "mse"
  loss_weights:
    alpha: 0.9
    beta: 0.1
    gamma: 0.0
  checkpoint_interval: 1
  warmup_period: 5
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project's root with the committed params.yaml."""
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    return tmp_path


def imported(root: Path, text: str = TUTORIAL, **options: Any) -> params.Params:
    (root / "ssl_train.yaml").write_text(text)
    import_config.run(root / "ssl_train.yaml", root, **options)
    return params.load(root / "params.yaml")


def changed(**values: str) -> str:
    """The tutorial's file with other lines, or more of them."""
    text = TUTORIAL
    for key, value in values.items():
        text, found = re.subn(rf"^(\s+){key}:.*$", rf"\g<1>{key}: {value}", text, flags=re.MULTILINE)
        if not found or (key == "gamma" and "scheduler" in values):
            text += f"  {key}: {value}\n"
    return text


def groups(printed: str) -> dict[str, dict[str, str]]:
    """The printed table: lines by key of theirs (of ours, where theirs is empty), by group."""
    found: dict[str, dict[str, str]] = {}
    for block in printed.split("\n\n")[1:]:
        name, *lines = block.splitlines()
        found[name] = {line.split()[0]: line for line in lines}
    return found


def comments(text: str) -> list[str]:
    return [line.split("# ", 1)[1] for line in text.splitlines() if "# " in line]


def test_the_tutorials_file_is_carried_over(root: Path) -> None:
    before = (root / "params.yaml").read_text()
    got = imported(root)
    assert (got.network, got.objective, got.loss_fn, got.optimizer) == ("unet_att_d", "eps", "mse", "adamw")
    assert (got.batch_size, got.val_batch_size, got.epochs, got.warmup_epochs) == (40, 20, 100, 5)
    assert (got.lr, got.weight_decay, got.adamw.betas, got.adamw.eps) == (2e-4, 1e-4, (0.9, 0.999), 1e-8)
    assert (got.lr_schedule, got.cosinewarm.model_dump()) == ("cosinewarm", {"t_0": 30, "t_mult": 2, "eta_min": 1e-5})
    diffusion = got.diffusion
    assert (diffusion.timesteps, diffusion.noise_schedule, diffusion.beta_range) == (1000, "linear", (1e-6, 0.02))
    assert (diffusion.precondition, diffusion.weighting, diffusion.timestep_sampling) == ("none", "uniform", "uniform")
    assert (got.normalization.normal_strategy, got.normalization.stat_procedure) == ("min_max", "lab")
    assert (got.normalization.clip_percent, got.normalization.clip_val) == (0.0, None)
    assert (got.data.catalog, got.data.dir, got.data.image_columns) == ("catalog_2023.csv", "data", ("image",))
    assert (got.data.chip_size, got.data.crop_px, got.data.crops_per_chip, got.data.nodata) == (224, None, 1, None)
    assert got.data.bands == ("red", "green", "blue", "nir")
    assert (got.grad_clip, got.accumulation_steps, got.ema_decay) == (None, 1, 0.0)
    assert got.unet_att_d.model_dump() == {
        "filter_config": (64, 256, 512, 1024, 2048, 4096), "block_num": (2,) * 6, "dropout_rate": 0.1,
        "dropout_type": "traditional", "upmode": "deconv_2", "use_skipAtt": True, "time_embedding_dim": 128,
        "time_injection": "bottleneck",
    }  # fmt: skip
    assert got.augmentation.model_dump() == {
        "flip": False, "rotation_degree": (-180, -90, 90, 180), "scale_factor": (0.75, 1.5), "crop_strategy": "center",
        "patch_shift_px": 4, "contrast_range": (0.9, 1.2), "br_range": (-0.02, 0.02), "bshift_gamma_range": (0.2, 2.0),
        "patch_gamma_range": None, "sigma_range": (0.03, 0.07),
    }  # fmt: skip
    assert got.operation.checkpoint_interval == 1
    after = (root / "params.yaml").read_text()
    assert comments(after) == comments(before)
    assert len(after.splitlines()) == len(before.splitlines())


def test_each_key_of_theirs_has_one_line_in_the_right_group(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(root, changed(rotation_degrees="[1]"))
    printed = capsys.readouterr().out
    found = groups(printed)
    leaves = {*re.findall(r"^  +(\w+):", TUTORIAL, re.MULTILINE)} - {"diffusion", "model_kwargs", "loss_weights"}
    listed = [key.split(".")[-1] for group, lines in found.items() if group != translation.FIXED for key in lines]
    assert leaves <= set(listed)
    assert found[translation.ACTS].keys() >= {"scale_factor", "sigma_range", "patch_shift", "contrast_range"}
    assert found[translation.DEAD].keys() >= {"buffer_comp", "catalog_index", "parallel", "downfactor"}
    assert found[translation.CARRIED].keys() >= {"train_batch", "model_kwargs.filter_config", "learning_rate_init"}
    assert not found[translation.CARRIED].keys() & {"scale_factor", "patch_shift"}
    assert "rotation_degree meant" in found[translation.UNKNOWN]["rotation_degrees"]
    assert "dvc add PATH -o data" in printed


def test_as_run_leaves_off_what_never_acted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = imported(root, changed(eps="1e-3", trans="[h_flip, rotate]", crop_strategy="random"), as_run=True)
    augmentation = got.augmentation.model_dump()
    assert augmentation.pop("crop_strategy") == "center"  # which moves nothing
    assert set(augmentation.values()) == {None, False}
    assert got.adamw.eps == 1e-8
    assert got.precision == "float32"
    assert groups(capsys.readouterr().out)[translation.OFF].keys() >= {"scale_factor", "eps", "trans", "crop_strategy"}
    assert imported(root, changed(eps="1e-3", trans="[h_flip, rotate]")).augmentation.flip
    assert params.load(root / "params.yaml").adamw.eps == 1e-3


G = translation


@pytest.mark.parametrize(
    ("theirs", "group", "key", "said"),
    [
        ({}, G.DEAD, "model", "fixed in its code"),
        ({}, G.FIXED, "network", "unet_att_d"),
        ({}, G.NEUTRAL, "trans", "never applied"),
        ({}, G.NEUTRAL, "eps", "never handed on"),
        ({"eps": "1e-3"}, G.ACTS, "eps", "never handed on"),
        ({}, G.USELESS, "loss_weights.alpha", "not read by loss_fn mse"),
        ({"scheduler": "step"}, G.USELESS, "t_0", "not read by scheduler step"),
        ({"optimizer": "sgd"}, G.USELESS, "betas", "not read by optimizer sgd"),
        ({"max_lr": "0.1"}, G.USELESS, "max_lr", "not read by scheduler cosinewarm"),
        ({"scheduler": "null"}, G.CARRIED, "scheduler", "none"),
        ({"scheduler": '""'}, G.ACTS, "scheduler", "ends in an error"),
        ({"scheduler": "plateau"}, G.CARRIED, "scheduler", "per epoch, as there; watches the gain"),
        ({"scheduler": "plateau", "eps": "1e-3"}, G.LEFT, "eps", "the least change that plateau makes"),
        *(({"scheduler": "plateau", key: "x"}, G.LEFT, key, "")
          for key in ("mode", "threshold", "threshold_mode", "cooldown", "verbose")),
        *(({"scheduler": "onecycle", key: "7"}, G.LEFT, key, "")
          for key in ("anneal_strategy", "total_steps", "epochs", "steps_per_epoch")),
        ({"total_steps": "7"}, G.USELESS, "total_steps", "not read by scheduler cosinewarm"),
        ({"scheduler": "onecycle"}, G.CARRIED, "max_lr", "(absent)"),
        ({"scheduler": "onecycle"}, G.CARRIED, "scheduler", "there 100 x 100 epochs"),
        ({"scheduler": "onecycle"}, G.LEFT, "learning_rate_init", "there warm-up ends with it"),
        ({"scheduler": "onecycle"}, G.LEFT, "warmup_period", "written over the cycle's beginning"),
        ({"scheduler": "onecycle", "warmup_period": "0"}, G.USELESS, "learning_rate_init", "whose peak is max_lr"),
        ({"scheduler": "onecycle", "warmup_period": "0"}, G.USELESS, "warmup_period", "a rise of its own"),
        ({"scheduler": "step", "epoch": "20"}, G.CARRIED, "scheduler", "it never does"),
        ({"scheduler": "step", "epoch": "20", "step_size": "25"}, G.USELESS, "step_size", "the rate never falls"),
        ({"epoch": "5"}, G.CARRIED, "warmup_period", "shortened, for it fills all 5 epochs"),
        ({"data_size": "null"}, G.DEAD, "data_size", "null"),
        ({}, G.LEFT, "data_path", "data.dir stays as it is"),
    ],
    ids=str,
)  # fmt: skip
def test_the_table_tells_the_truth(
    root: Path, capsys: pytest.CaptureFixture[str], theirs: dict[str, str], group: str, key: str, said: str
) -> None:
    imported(root, changed(**theirs))
    found = groups(capsys.readouterr().out)
    assert said in found[group][key]
    assert not [key for key in theirs if key in found.get(G.UNKNOWN, {})]
    ours = [line.split("  lr  ") for lines in found.values() for line in lines.values()]
    assert sum(len(parts) == 2 for parts in ours) == 1, "one row says where lr comes from"


def test_other_blocks_are_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(root, TUTORIAL + "Inference:\n  batch: 3\n")
    assert "another block than Train_Validate" in groups(capsys.readouterr().out)[G.LEFT]["Inference"]


def test_as_run_needs_not_understand_what_it_switches_off(root: Path) -> None:
    assert imported(root, changed(scale_factor="[1, 2, 3]"), as_run=True).augmentation.scale_factor is None


def test_the_block_may_stand_alone_and_numbers_may_be_text(root: Path) -> None:
    lines = changed(learning_rate_init='"2e-4"', train_batch='"40"', patch_shift="no").splitlines()[2:]
    got = imported(root, "\n".join(line[2:] for line in lines))
    assert (got.lr, got.batch_size, got.augmentation.patch_shift_px) == (2e-4, 40, None)


@pytest.mark.parametrize(
    ("theirs", "here"),
    [
        ({"noise_schedule": "cosine"}, {"diffusion.noise_schedule": "clipped_cosine"}),
        ({"channels": "3"}, {"data.bands": ("band_1", "band_2", "band_3")}),
        ({"nodata": "[0, 65535]"}, {"data.nodata": (0, 65535)}),
        ({"nodata": "0"}, {"data.nodata": (0,)}),
        ({"img_path_cols": "[wet, dry]"}, {"data.image_columns": ("wet", "dry")}),
        ({"scale_factor": "null"}, {"augmentation.scale_factor": None}),
        ({"clip_val": "1.5"}, {"normalization.clip_percent": 1.5, "normalization.clip_val": None}),
        ({"clip_val": "1.5", "stat_procedure": "gpb"}, {"normalization.clip_percent": 1.0}),
        (
            {"clip_val": "1.5", "normal_strategy": "z_value"},
            {"normalization.clip_percent": 0.0, "normalization.clip_val": 1.5},
        ),
        ({"scheduler": '""'}, {"lr_schedule": "none"}),
        ({"scheduler": "none"}, {"lr_schedule": "none"}),
        ({"scheduler": "cosine", "T_max": "50"}, {"cosine.t_max": 50, "cosine.eta_min": 1e-5}),
        ({"scheduler": "cosine"}, {"cosine.t_max": 100}),
        ({"scheduler": "step", "step_size": "20", "gamma": "0.5"}, {"step.step_size": 20, "step.gamma": 0.5}),
        (
            {"scheduler": "multistep", "milestones": "[40, 80]", "gamma": "0.3"},
            {"multistep.milestones": (40, 80), "multistep.gamma": 0.3},
        ),
        (
            {"scheduler": "plateau", "patience": "5", "factor": "0.2", "min_lr": "1e-7"},
            {"plateau.patience": 5, "plateau.factor": 0.2, "plateau.min_lr": 1e-7},
        ),
        (
            {"scheduler": "poly", "max_decay_steps": "90", "min_learning_rate": "5e-6", "power": "2.0"},
            {"poly.max_decay_epochs": 90, "poly.min_lr": 5e-6, "poly.power": 2.0},
        ),
        (
            {"scheduler": "onecycle", "pct_start": "0.2", "div_factor": "10", "final_div_factor": "1e3"},
            {"lr": 1e-3, "onecycle.pct_start": 0.2, "onecycle.div_factor": 10, "onecycle.final_div_factor": 1000},
        ),
        ({"scheduler": "onecycle", "max_lr": "3e-3"}, {"lr": 3e-3}),
        ({"scheduler": "null"}, {"lr_schedule": "none", "lr": 2e-4}),
        ({"scheduler": "step", "epoch": "20"}, {"lr_schedule": "none", "step.step_size": 4}),
        ({"scheduler": "step", "epoch": "30"}, {"lr_schedule": "none"}),
        ({"scheduler": "step", "epoch": "31"}, {"lr_schedule": "step", "step.step_size": 30}),
        ({"scheduler": "multistep", "epoch": "20"}, {"lr_schedule": "none"}),
        ({"scheduler": "multistep", "milestones": "[3, 5, 200]"}, {"lr_schedule": "none"}),
        ({"scheduler": "multistep", "milestones": "[80, 40]"}, {"multistep.milestones": (40, 80)}),
        ({"epoch": "5"}, {"epochs": 5, "warmup_epochs": 4}),
        ({"epoch": "1", "scheduler": "none"}, {"epochs": 1, "warmup_epochs": 0}),
        ({"epoch": "5", "scheduler": "step", "step_size": "4"}, {"warmup_epochs": 4, "lr_schedule": "none"}),
        ({"checkpoint_interval": "0"}, {"operation.checkpoint_interval": None}),
        ({"checkpoint_interval": "null"}, {"operation.checkpoint_interval": None}),
        ({"patch_shift": "null", "crop_strategy": "null"},
         {"augmentation.patch_shift_px": None, "augmentation.crop_strategy": "center"}),
        ({"data_size": "null"}, {"data.chip_size": 224}),
        ({"betas": "null", "eps": "null"}, {"adamw.betas": (0.9, 0.999), "adamw.eps": 1e-8}),
        ({"timesteps": "10"}, {"diffusion.timesteps": 10, "evaluate.steps": 10}),
        ({"optimizer": "adam", "eps": "1e-7"}, {"optimizer": "adam", "adam.eps": 1e-7, "adam.betas": (0.9, 0.999)}),
        ({"optimizer": "SGD"}, {"optimizer": "sgd", "sgd.momentum": 0.9, "sgd.nesterov": False}),
        (
            {"optimizer": "sam", "base_optimizer": "adam", "rho": "0.1", "adaptive": "true", "betas": "[0.8, 0.9]"},
            {"optimizer": "sam", "sam.base_optimizer": "adam", "sam.rho": 0.1, "sam.adaptive": True,
             "adam.betas": (0.8, 0.9)},
        ),
        ({"optimizer": "sam", "momentum": "0.8"}, {"sam.base_optimizer": "sgd", "sgd.momentum": 0.8}),
        (
            {"loss_fn": "hybrid_light", "alpha": "0.5", "gamma": "1e-2"},
            {"loss_fn": "hybrid_light", "loss_weights.alpha": 0.5, "loss_weights.gamma": 0.01},
        ),
        ({"time_embedding_dim": "112"}, {"unet_att_d.time_embedding_dim": 112}),
        ({"upmode": "DUC"}, {"unet_att_d.upmode": "DUC"}),
    ],
    ids=lambda values: " ".join(f"{key}={value}" for key, value in values.items()),
)  # fmt: skip
def test_values_arrive_where_they_belong(root: Path, theirs: dict[str, str], here: dict[str, Any]) -> None:
    got = imported(root, changed(**theirs))
    for key, value in here.items():
        found: Any = got
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, key


@pytest.mark.parametrize("name", [rule.theirs for rule in tutorial_keys.PLAIN_RULES])
def test_every_key_may_be_missing(root: Path, name: str) -> None:
    last = name.split(".")[-1]
    lines = [line for line in TUTORIAL.splitlines() if not re.match(rf"\s+{last}:", line)]
    assert len(lines) == len(TUTORIAL.splitlines()) - 1
    imported(root, "\n".join(lines))


def test_a_missing_key_takes_the_tutorials_default_and_says_so(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = imported(root, TUTORIAL.replace("    use_skipAtt: true\n", "").replace("  t_mult: 2\n", ""))
    assert not got.unet_att_d.use_skipAtt
    assert got.cosinewarm.t_mult == 1
    assert "(absent)" in groups(capsys.readouterr().out)[translation.CARRIED]["t_mult"]


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"train_batch": "many"}, r"ssl_train\.yaml has 1 fault.*\n  train_batch: 'many' is not allowed; a number"),
        ({"epoch": "1.5", "betas": "[0.9, x]"}, r"2 fault.*\n  epoch: 1\.5.*whole number.*\n  betas: "),
        ({"scale_factor": "[1, 2, 3]"}, r"scale_factor: \[1, 2, 3\].*two numbers"),
        ({"use_skipAtt": "maybe"}, r"use_skipAtt: 'maybe'.*true or false"),
        ({"train_batch": "true"}, "train_batch: True is not allowed"),
        ({"optimizer": "lbfgs"}, "optimizer: 'lbfgs' is not allowed"),
        ({"train_batch": "-3"}, r"batch_size: -3 is not allowed.*\(from train_batch: -3\)"),
        ({"scheduler": "triangle"}, r"lr_schedule: 'triangle'.*cosinewarm.*\(from scheduler: triangle\)"),
        ({"scale_factor": "[2, 1]"}, r"augmentation\.scale_factor.*backwards \(from scale_factor: \[2, 1\]\)"),
        ({"train_batch": "9" * 400}, "train_batch: a whole number of [0-9,]+ bits is not allowed; a number is needed"),
        ({"train_batch": '"1e400"'}, "train_batch: .*a number is needed"),
        ({"channels": "1000000000"}, "channels: 1000000000 is not allowed; a number from 1 to 1000"),
        ({"channels": "0"}, "channels: 0 is not allowed"),
        ({"block_num": "[2, 2]"}, r"unet_att_d: .*\(from model_kwargs.filter_config: .*kwargs.block_num: \[2, 2\]"),
        ({"eta_min": "0.5"}, r"eta_min 0\.5 is above lr .*\(from .*learning_rate_init: 0\.0002, .*eta_min: 0\.5\)"),
        (
            {"scheduler": "multistep", "milestones": "[40, 40]"},
            r"must rise \(from milestones: \[40, 40\]\)",
        ),
        ({"loss_fn": "perceptual"}, r"perceptual\.weights"),
    ],
)  # fmt: skip
def test_a_wrong_value_writes_nothing_and_is_named(root: Path, theirs: dict[str, str], message: str) -> None:
    before = (root / "params.yaml").read_bytes()
    with pytest.raises(ParamsError, match=message):
        imported(root, changed(**theirs))
    assert (root / "params.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Train_Validate: 3\n", "not a block"),
        ("Train_Validate: {}\n", "not a block"),
        ("", "empty"),
        ("a: [1\n", "not valid YAML"),
        ("a: 1\n", "no configuration of the tutorial: .* begins with a;"),
        ((REPOSITORY / "params.yaml").read_text(), "no configuration of the tutorial: .*looks like a params.yaml"),
        ((REPOSITORY / "presets/nicfi-100k.yaml").read_text(), "no configuration of the tutorial: .*or a preset"),
        ((REPOSITORY / "dvc.yaml").read_text(), "looks like DVC's dvc.yaml"),
        ("epoch: &x {again: *x}\n", "an anchor that holds itself"),
        ("epoch: &x [*x]\n", "an anchor that holds itself"),
        (
            "a: &a [0,0,0,0,0,0,0,0]\n"
            + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
            "more than 10,000 values",
        ),
    ],
    ids=["number", "nothing", "empty", "no YAML", "other", "params", "preset", "dvc", "loop", "list loop", "bomb"],
)
def test_a_file_that_is_no_configuration(root: Path, text: str, message: str) -> None:
    before = (root / "params.yaml").read_bytes()
    with pytest.raises(ParamsError, match=message):
        imported(root, text)
    assert (root / "params.yaml").read_bytes() == before
    with pytest.raises(ParamsError, match=r"other\.yaml does not exist"):
        import_config.run(root / "other.yaml", root)
    with pytest.raises(ParamsError, match="cannot be read"):
        import_config.run(root, root)


def test_out_leaves_params_yaml_alone(root: Path) -> None:
    before = (root / "params.yaml").read_bytes()
    imported(root, out=root / "mine.yaml")
    assert (root / "params.yaml").read_bytes() == before
    assert params.load(root / "mine.yaml").network == "unet_att_d"
    with pytest.raises(ParamsError, match="is a folder; name a file in it"):
        imported(root, out=root)


def test_it_agrees_with_the_table_in_the_docs() -> None:
    table = (REPOSITORY / "docs/params.md").read_text().split("## The tutorial's `ssl_train.yaml`")[1]
    documented = dict(re.findall(r"^\| `([\w.]+)` \| `?([\w.]+)`? \|", table, re.MULTILINE))
    rules: dict[str, list[str]] = {rule.theirs: [rule.here or "none"] for rule in tutorial_keys.PLAIN_RULES}
    for options in (tutorial_keys.OPTIMIZER_OPTIONS, tutorial_keys.SCHEDULE_OPTIONS, tutorial_keys.LOSS_OPTIONS):
        for rule, owners in options:
            sections = ["loss_weights"] if options is tutorial_keys.LOSS_OPTIONS else owners
            rules.setdefault(rule.theirs, []).extend(
                f"{name}.{rule.here}" if rule.here else "none" for name in sections
            )
    assert rules.keys() <= set(tutorial_keys.KEYS)
    assert documented.keys() == set(tutorial_keys.KEYS)
    # Documented by what they are about; the tool leaves the first alone and sets the others by what the code fixes.
    rules |= {"data_path": ["data.dir"], "model": ["network"], "trans": ["augmentation"]}
    assert {key: here for key, here in documented.items() if here not in rules.get(key, [here])} == {}
    assert set(tutorial_keys.HALLMARKS) <= set(tutorial_keys.KEYS) - set(params.Params.model_fields) | {"model_kwargs"}


def test_the_commands_in_the_docs_exist() -> None:
    text = (REPOSITORY / "docs/migration.md").read_text()
    lines = [
        line.split(" #")[0] for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    commands = [line.split() for line in lines if line.startswith("earthprior ")]
    assert {command[1] for command in commands} == {"import-config", "import-weights"}
    for _, name, *arguments in commands:
        cli.main.commands[name].make_context(name, arguments)
    for group in translation.GROUPS:
        assert f"\n| {group.split(';')[0]}" in text, group
    for option in set(re.findall(r"`(--[\w-]+)", text)):
        assert any(
            option in parameter.opts
            for name in ("import-config", "import-weights")
            for parameter in cli.main.commands[name].params
        ), option
