"""Tutorial checkpoints come in whole or not at all, run no code, and give the tutorial's numbers."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from earthprior import build, tracking
from earthprior.errors import EarthPriorError
from earthprior.files import read_json, write_json
from earthprior.networks.unet_att_d import UNetAttD
from earthprior.params import Params, load
from earthprior.stages import evaluate, stats
from earthprior.tools import import_weights
from earthprior.tools.tutorial_weights import SHOWN_FAULTS, read_weights

ROOT = Path(__file__).parents[1]
OPTIONS: dict[str, Any] = {
    "filter_config": [4, 6, 8], "block_num": [2, 1, 3], "upmode": "deconv_2", "use_skipAtt": True,
    "time_embedding_dim": 10,
}  # fmt: skip
MATCHING: dict[str, Any] = {
    "network": "unet_att_d", "objective": "eps", "diffusion.precondition": "none", "threads": 1,
    "diffusion.weighting": "uniform", "evaluate.samples": 2, "evaluate.steps": 2, "evaluate.probe_pixels": 16,
    "evaluate.probe_rhos": [0.1],
    **{f"unet_att_d.{key}": value for key, value in OPTIONS.items()},
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracking has its own tests; opening a store costs seconds."""
    monkeypatch.setattr(tracking, "import_mlflow", lambda: False)
    for name in ("DVC_STAGE", "DVC_EXP_NAME", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def tutorial_weights(seed: int = 0, channels: int = 4, **options: Any) -> dict[str, Tensor]:
    """A state_dict as the tutorial's code would save it, with statistics as after some training."""
    torch.manual_seed(seed)
    weights = UNetAttD(channels, **{**OPTIONS, **options}).state_dict()
    for key, tensor in weights.items():
        if key.endswith("running_mean"):
            tensor.normal_(0, 0.2)
        elif key.endswith(("running_var", "num_batches_tracked")):
            tensor.copy_(torch.rand(tensor.shape) * 2 + 0.5)
        else:
            tensor.mul_(1.5)
    return weights


class Tutorial:
    """The tutorial's `unet_att_d` in eval mode, written again from its description, on a raw state_dict.

    With `time` False as before its commit b7b84cb, where the embedding was added after the decoder had read the
    bottleneck.
    """

    def __init__(self, weights: Mapping[str, Tensor], levels: int, time: bool) -> None:
        self.weights, self.levels, self.time = weights, levels, time

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        skips = []
        for level in range(1, self.levels):
            skips.append(self.block(x, f"encoder_{level}"))
            x = F.max_pool2d(skips[-1], 2)
        x = self.block(x, f"encoder_{self.levels}")
        if self.time:
            matrix, bias = self.weights["time_mlp.0.weight"], self.weights["time_mlp.0.bias"]
            x = x + (self.embedding(t, matrix.shape[1]) @ matrix.T + bias).clamp(min=0)[:, :, None, None]
        for level in range(1, self.levels):
            skip = skips.pop()
            x = self.up(x, f"decoder_{level}")
            if f"Att{level}.psi.0.weight" in self.weights:
                skip = self.attention(x, skip, f"Att{level}")
            x = self.block(torch.cat([skip, x], 1), f"conv{level}")
        return F.conv2d(x, self.weights["output_conv.weight"], self.weights["output_conv.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean, var, scale, shift = (
            self.weights[f"{name}.{part}"].reshape(1, -1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift

    def block(self, x: Tensor, name: str) -> Tensor:
        for n in range(0, 12, 3):
            if f"{name}.block.{n}.weight" in self.weights:
                x = F.conv2d(x, self.weights[f"{name}.block.{n}.weight"], padding=1)
                x = self.norm(x, f"{name}.block.{n + 1}").clamp(min=0)
        return x

    def up(self, x: Tensor, name: str) -> Tensor:
        if f"{name}.block.2.weight" in self.weights:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            return F.conv2d(self.norm(x, f"{name}.block.1"), self.weights[f"{name}.block.2.weight"])
        kernel, bias = self.weights[f"{name}.block.0.weight"], self.weights[f"{name}.block.0.bias"]
        if f"{name}.block.1.weight" in self.weights:
            x = self.norm(F.conv2d(x, kernel, bias, padding=1), f"{name}.block.1")
            return F.pixel_shuffle(x.clamp(min=0), 2)
        return F.conv_transpose2d(x, kernel, bias, stride=2, padding=(kernel.shape[-1] - 2) // 2)

    def attention(self, gate: Tensor, skip: Tensor, name: str) -> Tensor:
        def projected(x: Tensor, part: str) -> Tensor:
            key = f"{name}.{part}"
            return self.norm(F.conv2d(x, self.weights[f"{key}.0.weight"], self.weights[f"{key}.0.bias"]), f"{key}.1")

        merged = (projected(gate, "W_g") + projected(skip, "W_x")).clamp(min=0)
        return skip * torch.sigmoid(projected(merged, "psi"))

    @staticmethod
    def embedding(t: Tensor, dim: int) -> Tensor:
        frequencies = 10000.0 ** (-torch.arange(dim // 2) / (dim // 2))
        angles = t[:, None] * frequencies[None]
        return torch.cat([angles.sin(), angles.cos(), torch.zeros(len(t), dim % 2)], 1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


@pytest.fixture
def root(
    prepared: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    make_chips: Callable[..., Path],
    make_params: Callable[..., Params],
) -> Path:
    """A project's root after the stage stats, its params.yaml that of the checkpoint."""
    if not prepared:
        first = tmp_path_factory.mktemp("prepared")
        make_chips(first / "data", n=12, size=32)
        stats.run(make_params(MATCHING), first)
        prepared["root"] = first
    root = tmp_path / "project"
    shutil.copytree(prepared["root"], root)
    write_json(root / "params.yaml", make_params(MATCHING).model_dump(mode="json"))  # JSON is YAML
    return root


def run(root: Path, content: Any, name: str = "best_model.pth", **options: Any) -> None:
    """Save as the tutorial does, and import."""
    if name.endswith(".safetensors"):
        save_file(content, root / name)
    else:
        torch.save(content, root / name)
    import_weights.run(root / name, load(root / "params.yaml"), root, **options)


@pytest.mark.parametrize("time", ["bottleneck", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"upmode": "fixed"}, {"upmode": "deconv_1"}, {"upmode": "DUC"}, {"use_skipAtt": False},
        {"time_embedding_dim": 7, "filter_config": [2, 4, 6, 9], "block_num": [1, 2, 1, 2]},
    ],
    ids=str,
)  # fmt: skip
def test_the_output_is_the_tutorials(root: Path, time: Any, options: dict[str, Any]) -> None:
    weights = tutorial_weights(**options)
    run(root, weights, time_conditioning=time, write_params=True)
    task, params = build.pretrained_task(root / "results/pretrain")
    assert params == load(root / "params.yaml").model_copy(update={"tune": None})
    assert params.unet_att_d.time_injection == time
    x, t = torch.randn(3, 4, 32, 16), torch.tensor([0, 417, 999])
    levels = len(params.unet_att_d.filter_config)
    with torch.no_grad():
        got = task.network.eval()(x, t)
    torch.testing.assert_close(got, Tutorial(weights, levels, time == "bottleneck")(x, t), atol=1e-5, rtol=1e-5)
    assert (got - Tutorial(weights, levels, time != "bottleneck")(x, t)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("t", "dim", "values"),
    [
        (1, 4, [0.841471, 0.0099998, 0.5403023, 0.99995]),
        (10, 5, [-0.5440211, 0.0998334, -0.8390715, 0.9950042, 0]),
        (999, 8, [-0.0264608, -0.5899291, -0.5356032, 0.8409302, 0.9996498, 0.8074551, -0.8444698, 0.5411435]),
    ],
)
def test_the_time_embedding_is_the_tutorials(t: int, dim: int, values: list[float]) -> None:
    torch.testing.assert_close(Tutorial.embedding(torch.tensor([t]), dim)[0], torch.tensor(values), atol=1e-5, rtol=0)


def test_prefixes_containers_and_formats_give_the_same_weights(root: Path) -> None:
    weights = tutorial_weights()
    wrapped = {f"module.{key}": value for key, value in weights.items()}
    forms: list[tuple[Any, str]] = [
        (wrapped, "a.pth"),
        ({f"_orig_mod.{key}": value for key, value in wrapped.items()}, "b.pt"),
        ({"epoch": 3, "model": {"state_dict": wrapped}, "optimizer": {}}, "c.pth"),
        (wrapped, "d.safetensors"),
        ({key: value.half() if value.is_floating_point() else value for key, value in weights.items()}, "e.pth"),
    ]
    for content, name in forms:
        run(root, content, name)
        got = load_file(root / "results/pretrain/network.safetensors")
        assert got.keys() == weights.keys()
        tolerance = 2e-3 if name == "e.pth" else 0
        for key, tensor in weights.items():
            assert got[key].dtype == tensor.dtype
            torch.testing.assert_close(got[key], tensor, atol=tolerance, rtol=tolerance)


def test_evaluate_accepts_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(root, tutorial_weights())
    said = capsys.readouterr().out
    assert "dvc commit -f pretrain && dvc repro evaluate" in said
    assert "note" not in said
    config = read_json(root / "results/pretrain/config.json")
    assert config["imported"]["file"] == "best_model.pth"
    evaluate.run(load(root / "params.yaml"), root)
    numbers = read_json(root / "results/evaluate/metrics.json")
    assert numbers["gain_db"]["mean"] < 0  # random weights
    assert config["fingerprint"] in (root / "results/evaluate/report.html").read_text()


def test_an_untrained_time_embedding_is_noticed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tutorial_weights()
    for name in ("weight", "bias"):
        weights[f"time_mlp.0.{name}"].div_(1.5)  # as initialized
    run(root, weights)
    assert "--time-conditioning none" in capsys.readouterr().out
    run(root, weights, time_conditioning="none", write_params=True)
    assert "note" not in capsys.readouterr().out


class Payload:
    """What a hostile file would hold."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["zip", "legacy", "nested"])
def test_a_hostile_pickle_is_refused_and_runs_nothing(root: Path, form: str) -> None:
    marker, path = root / "owned", root / "best_model.pth"
    content = {"state_dict": tutorial_weights(), "x": Payload(marker)} if form == "nested" else Payload(marker)
    torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(EarthPriorError, match=r"best_model\.pth names .*mkdir, and was not loaded.*run code"):
        import_weights.run(path, load(root / "params.yaml"), root)
    assert not marker.exists()
    assert not (root / "results/pretrain").exists()
    # the payload does work
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"not a checkpoint at all", "damaged"),
        (torch.zeros(3), "no state_dict: it holds no tensors"),
        ({"epoch": 3}, "the entry epoch is no tensor"),
        ({}, "no state_dict: it holds no tensors"),
        ({"a": torch.eye(2).to_sparse()}, "the entry a is no plain tensor"),
        ({"a": torch.zeros(2, device="meta")}, "the entry a is no plain tensor"),
        ({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "the entry a is no plain tensor"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "the entry a holds complex64 values"),
        ({"a": torch.zeros(2, dtype=torch.int32)}, "the entry a holds int32 values"),
        ({"num_batches_tracked": torch.tensor(True)}, "the entry num_batches_tracked holds bool values"),
        ({"a": torch.zeros(0)}, "the entry a has no values"),
        ({"a.b": torch.zeros(2), "module.a.b": torch.ones(2)}, r"holds a\.b twice, with and without a prefix"),
        ({"a": torch.zeros(2), "b": "text"}, "the entry b is no tensor"),
        ({"a": torch.zeros(()).expand(10**12)}, "names 1,000,000,000,000 values, more than it has bytes"),
        ({"conv.weight": torch.zeros(2)}, r"no unet_att_d.*begin with conv\.weight"),
    ],
)
def test_files_that_are_no_checkpoint(root: Path, content: Any, message: str) -> None:
    if isinstance(content, bytes):
        (root / "x.pth").write_bytes(content)
        with pytest.raises(EarthPriorError, match=message):
            import_weights.run(root / "x.pth", load(root / "params.yaml"), root)
    else:
        with pytest.raises(EarthPriorError, match=message):
            run(root, content)
    with pytest.raises(EarthPriorError, match=r"other\.pth does not exist"):
        import_weights.run(root / "other.pth", load(root / "params.yaml"), root)
    (root / "x.safetensors").write_bytes(b"xx")
    with pytest.raises(EarthPriorError, match=r"x\.safetensors is damaged"):
        import_weights.run(root / "x.safetensors", load(root / "params.yaml"), root)


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_checkpoints_are_named(root: Path, legacy: bool) -> None:
    weights, path = tutorial_weights(), root / "best_model.pth"
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    whole, params = path.read_bytes(), load(root / "params.yaml")
    generator = random.Random(0)
    for cut in (2, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(EarthPriorError, match=r"^best_model\.pth (is damaged|names|is no state_dict)"):
            import_weights.run(path, params, root)
    for _ in range(60):
        # A flipped bit among values is not seen; in what describes them it must end in a message, whatever torch says.
        flipped = bytearray(whole)
        flipped[generator.randrange(min(len(whole), 3000))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        with contextlib.suppress(EarthPriorError):
            read_weights(path)


def test_a_decoder_that_is_a_scalar_is_refused(root: Path) -> None:
    weights = {**tutorial_weights(), "decoder_1.block.0.weight": torch.tensor(1.0)}
    with pytest.raises(EarthPriorError, match=r"decoder_1\.block\.0\.weight: \(\), not"):
        run(root, weights)


def test_a_killed_import_leaves_nothing_that_looks_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(root, tutorial_weights())
    config = root / "results/pretrain/config.json"
    assert config.is_file()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("write_csv", "locate"):
        with monkeypatch.context() as patch:
            patch.setattr(import_weights, name, killed)
            with pytest.raises(KeyboardInterrupt):
                run(root, tutorial_weights(seed=1))
        assert not config.exists()
    run(root, tutorial_weights(seed=1))
    assert config.is_file()


def test_every_wrong_key_and_shape_is_listed(root: Path) -> None:
    weights = tutorial_weights()
    del weights["conv1.block.1.running_mean"]
    weights["extra.weight"] = torch.zeros(3)
    weights["output_conv.bias"] = torch.zeros(5)
    with pytest.raises(EarthPriorError) as caught:
        run(root, weights)
    text = str(caught.value)
    assert "3 fault(s)" in text
    assert "missing: conv1.block.1.running_mean (6,)" in text
    assert "unexpected: extra.weight (3,)" in text
    assert "output_conv.bias: (5,), not (4,)" in text

    with pytest.raises(EarthPriorError) as caught:
        run(root, {key: value for key, value in weights.items() if not key.startswith(("conv", "Att2"))})
    assert len(str(caught.value).splitlines()) == 1 + SHOWN_FAULTS + 2
    assert not (root / "results/pretrain").exists()


def test_weights_that_are_not_finite_are_refused(root: Path) -> None:
    weights = tutorial_weights()
    weights["output_conv.bias"][1] = torch.nan
    with pytest.raises(EarthPriorError, match=r"output_conv\.bias .*diverged"):
        run(root, weights)


def test_params_of_another_network_are_named_and_written_if_asked(
    root: Path, make_params: Callable[..., Params]
) -> None:
    shutil.copy(ROOT / "params.yaml", root / "params.yaml")
    (root / "params.yaml").write_text(
        (root / "params.yaml").read_text().replace("chip_size: 224", "chip_size: 32").replace("px: 56", "px: 16")
    )
    before = (root / "params.yaml").read_text()
    with pytest.raises(EarthPriorError) as caught:
        run(root, tutorial_weights())
    text = str(caught.value)
    assert "--write-params" in text
    assert "  network: unet_film -> unet_att_d" in text
    assert "  unet_att_d.filter_config: [16, 32, 64, 128, 256, 512] -> [4, 6, 8]" in text
    assert "  diffusion.precondition: wiener -> none" in text
    assert "dropout_rate" in text
    assert (root / "params.yaml").read_text() == before

    run(root, tutorial_weights(), write_params=True)
    after = load(root / "params.yaml")
    assert after.unet_att_d.filter_config == (4, 6, 8)
    assert after.diffusion.precondition == "none"
    assert (root / "params.yaml").read_text().count("# ") == before.count("# ")
    build.pretrained_task(root / "results/pretrain")


def test_bands_are_for_the_user_to_name(root: Path) -> None:
    with pytest.raises(EarthPriorError, match=r"takes 3 channels, data\.bands names 4 \(red"):
        run(root, tutorial_weights(channels=3), write_params=True)


def test_a_compressed_file_is_not_unpacked(root: Path) -> None:
    torch.save({"a": torch.zeros(10**7)}, root / "plain.pth")
    with zipfile.ZipFile(root / "plain.pth") as plain, zipfile.ZipFile(root / "x.pth", "w", zipfile.ZIP_DEFLATED) as to:
        for name in plain.namelist():
            to.writestr(name, plain.read(name))
    assert (root / "x.pth").stat().st_size < 10**5
    with pytest.raises(EarthPriorError, match=r"x\.pth is compressed, which torch\.save never does"):
        import_weights.run(root / "x.pth", load(root / "params.yaml"), root)


def test_without_statistics_it_says_what_to_run(root: Path) -> None:
    shutil.rmtree(root / "results/stats")
    with pytest.raises(EarthPriorError, match="dvc repro stats"):
        run(root, tutorial_weights())
