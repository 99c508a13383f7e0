"""Presets lie over params.yaml: values change, comments and everything else stay, and nothing invalid is written."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from earthprior import params
from earthprior.build import network
from earthprior.errors import ParamsError
from earthprior.networks.unet_att_d import UNetAttD
from earthprior.tools import preset

REPOSITORY = Path(__file__).parents[1]
PRESETS = sorted(path.stem for path in (REPOSITORY / "presets").glob("*.yaml"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project root with the committed params.yaml and presets."""
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    shutil.copytree(REPOSITORY / "presets", tmp_path / "presets")
    return tmp_path


def add_preset(root: Path, text: str) -> None:
    (root / "presets/mine.yaml").write_text(text)


def comments(text: str) -> list[str]:
    return [line.split("# ", 1)[1] for line in text.splitlines() if "# " in line]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_gives_valid_params_and_keeps_the_comments(root: Path, name: str) -> None:
    before = (root / "params.yaml").read_text()
    preset.run(name, root)
    after = (root / "params.yaml").read_text()
    params.load(root / "params.yaml")
    assert after != before
    assert comments(after) == comments(before)
    assert len(after.splitlines()) == len(before.splitlines())


def test_nicfi_100k_is_the_tutorials_configuration(root: Path) -> None:
    preset.run("nicfi-100k", root)
    got = params.load(root / "params.yaml")
    assert (got.network, got.objective, got.loss_fn, got.optimizer) == ("unet_att_d", "eps", "mse", "adamw")
    assert (got.batch_size, got.val_batch_size, got.epochs, got.warmup_epochs) == (40, 20, 100, 5)
    assert (got.lr, got.weight_decay, got.adamw.betas, got.adamw.eps) == (2e-4, 1e-4, (0.9, 0.999), 1e-8)
    assert (got.lr_schedule, *got.cosinewarm.model_dump().values()) == ("cosinewarm", 30, 2, 1e-5)
    diffusion = got.diffusion
    assert (diffusion.timesteps, diffusion.noise_schedule, diffusion.beta_range) == (1000, "linear", (1e-6, 0.02))
    assert (diffusion.precondition, diffusion.weighting, diffusion.timestep_sampling) == ("none", "uniform", "uniform")
    assert (diffusion.shift_reference_px, diffusion.zero_terminal_snr) == (None, False)
    assert (got.normalization.normal_strategy, got.normalization.stat_procedure) == ("min_max", "lab")
    assert (got.data.chip_size, got.data.crop_px, got.data.crops_per_chip) == (224, None, 1)
    augmentation = got.augmentation
    assert augmentation.scale_factor == (0.75, 1.5)
    assert (augmentation.br_range, augmentation.contrast_range) == ((-0.02, 0.02), (0.9, 1.2))
    assert (augmentation.sigma_range, augmentation.bshift_gamma_range) == ((0.03, 0.07), (0.2, 2.0))
    assert (augmentation.flip, augmentation.rotation_degree) == (False, (-180, -90, 90, 180))


def test_nicfi_100k_builds_the_tutorials_network(root: Path) -> None:
    preset.run("nicfi-100k", root)
    got = params.load(root / "params.yaml")
    with torch.device("meta"):
        built = network(got, len(got.data.bands), len(got.data.bands))
    assert isinstance(built, UNetAttD)
    lines = [f"{key} {tuple(value.shape)}" for key, value in built.state_dict().items()]
    assert len(lines) == 251
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == (
        "63f50561d7fec46a4ffbbf2c23b9b96f97a9b894ae5166d2b1f4f099f784b169"
    )
    assert sum(p.numel() for p in built.parameters()) == 636_757_747


def test_what_changed_is_printed_and_a_second_time_nothing_does(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_preset(root, "lr: 0.125\ndata: {crop_px: null}\naugmentation: {contrast_range: [0.5, 2.0]}\nseed: 0\n")
    preset.run("mine", root)
    first = capsys.readouterr().out
    old = params.load(REPOSITORY / "params.yaml")
    assert "changed 3 of its 4 values" in first
    assert f"  lr: {old.lr:g} -> 0.125\n" in first
    assert f"  data.crop_px: {old.data.crop_px} -> null\n" in first
    low, high = old.augmentation.contrast_range or (0, 0)
    assert f"  augmentation.contrast_range: [{low}, {high}] -> [0.5, 2.0]\n" in first
    written = (root / "params.yaml").read_bytes()
    preset.run("mine", root)
    assert "changed 0 of its 4 values" in capsys.readouterr().out
    assert (root / "params.yaml").read_bytes() == written


def test_only_the_named_lines_change(root: Path) -> None:
    add_preset(root, "lr: 0.125\nunet_film: {channels: [8, 16]}\n")
    before = (root / "params.yaml").read_text().splitlines()
    preset.run("mine", root)
    after = (root / "params.yaml").read_text().splitlines()
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 2
    assert changed[0].startswith("lr: 0.125")
    assert changed[1].startswith("  channels: [8, 16] ")
    assert changed[1].endswith(before[after.index(changed[1])].split("#")[1])


def test_block_lists_as_dvc_writes_them_keep_what_follows(root: Path) -> None:
    text = (root / "params.yaml").read_text()
    flow = next(line for line in text.splitlines() if line.startswith("  channels: ["))
    block = "  channels:\n  - 32\n  - 48\n  # about blocks"
    (root / "params.yaml").write_text(text.replace(flow, block))
    add_preset(root, "unet_film: {channels: [8, 16, 24]}\n")
    preset.run("mine", root)
    assert "  channels:\n  - 8\n  - 16\n  - 24\n  # about blocks\n  blocks:" in (root / "params.yaml").read_text()


def test_out_leaves_params_yaml_alone(root: Path) -> None:
    before = (root / "params.yaml").read_bytes()
    preset.run("nicfi-100k", root, root / "full.yaml")
    assert (root / "params.yaml").read_bytes() == before
    assert params.load(root / "full.yaml").network == "unet_att_d"
    with pytest.raises(ParamsError, match="folder does not exist"):
        preset.run("nicfi-100k", root, root / "missing/full.yaml")


@pytest.mark.parametrize("name", ["nicfi", "../params", "", "nicfi-100k.yaml"])
def test_an_unknown_preset_lists_those_that_exist(root: Path, name: str) -> None:
    with pytest.raises(ParamsError, match=r"does not exist.*nicfi-100k"):
        preset.run(name, root)


def test_without_presets_the_folder_is_named(root: Path) -> None:
    shutil.rmtree(root / "presets")
    with pytest.raises(ParamsError, match=r"presets/\*\.yaml"):
        preset.run("nicfi-100k", root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 0.1\n", "learning_rate: unknown key"),
        ("data: {chips_size: 32}\n", r"data\.chips_size.*did you mean data\.chip_size"),
        ("lr: -1\n", "lr: -1"),
        ("network: unet_att_d\ndata: {crop_px: 330}\n", "crop_px 330 is larger"),
        ("data: 3\n", "data: unknown key"),
        ("lr: [1\n", "not valid YAML"),
    ],
)
def test_a_faulty_preset_writes_nothing(root: Path, text: str, message: str) -> None:
    add_preset(root, text)
    before = (root / "params.yaml").read_bytes()
    with pytest.raises(ParamsError, match=message):
        preset.run("mine", root)
    assert (root / "params.yaml").read_bytes() == before
    assert sorted(path.name for path in root.iterdir()) == ["params.yaml", "presets"]
