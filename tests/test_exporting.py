from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import earthprior
from earthprior import build, recorded
from earthprior.errors import EarthPriorError
from earthprior.exporting import card, graphs, single_file
from earthprior.files import read_json, write_json
from earthprior.tools import export
from finished import raw_chips

PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name)

BLOCKED = {"earthprior", "pydantic", "rasterio", "pandas", "scipy", "sklearn", "mlflow", "dvc", "ruamel", "jinja2",
           "click", "onnx", "onnxruntime", "psutil", "filelock"}
sys.meta_path.insert(0, Blocked())
from safetensors.torch import load_file, save_file

for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    sys.modules.pop("earthprior_backbone", None)
    from earthprior_backbone import read

    backbone, asked = read(folder), load_file(folder + "/asked.safetensors")
    found = {"x0": backbone.normalize(asked["raw"], asked["valid"].bool())}
    for size in ("x0", "other"):
        for side in ("decoder", "encoder"):
            levels = backbone.features(found["x0"] if size == "x0" else asked["other"], side=side)
            found |= {f"{size}/{side}/{i}": level.detach().contiguous() for i, level in enumerate(levels)}
    save_file(found, folder + "/found.safetensors")
    sys.path.pop(0)
"""


@pytest.fixture
def make_exported(make_finished, tmp_path):
    """A function from a name and overrides to an exported backbone and its folder, without graphs."""

    def make(name="exported", **overrides):
        backbone = earthprior.load_backbone(make_finished(**overrides).folder)
        export.write(backbone, tmp_path / name, {})
        return backbone, tmp_path / name

    return make


def test_the_single_file_computes_the_same_bits_as_the_package(make_exported):
    made = {}
    kinds = [
        {},
        {"normalization__stat_procedure": "lpb", "normalization__clip_percent": 2.0},
        {"normalization__normal_strategy": "min_max", "normalization__clip_percent": 1.0},
    ]
    pairs = itertools.product(build.NETWORKS, ["none", "scalar", "wiener"])
    for index, (network, precondition) in enumerate(pairs):
        backbone, folder = make_exported(
            f"{network}-{precondition}", network=network, diffusion__precondition=precondition, **kinds[index % 3]
        )
        valid = torch.ones(8, 16, 16, dtype=torch.uint8)
        valid[0, :5] = 0
        asked = {"raw": raw_chips().contiguous(), "valid": valid, "other": torch.randn(2, 4, 21, 34)}
        save_file(asked, folder / "asked.safetensors")
        made[folder] = backbone, asked
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, made)], env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for folder, (backbone, asked) in made.items():
        found = load_file(folder / "found.safetensors")
        x0 = backbone.normalize(asked["raw"], asked["valid"].bool())
        assert torch.equal(found["x0"], x0)
        for size, side in itertools.product(("x0", "other"), ("decoder", "encoder")):
            levels = backbone.features(x0 if size == "x0" else asked["other"], side=side)
            for index, level in enumerate(levels):
                assert torch.equal(found[f"{size}/{side}/{index}"], level), (folder.name, size, side, index)


def test_two_modules_with_one_name_do_not_go_into_one_file(monkeypatch):
    monkeypatch.setattr(single_file, "_defined", lambda tree: ["same"])
    with pytest.raises(RuntimeError, match=r"same is defined in .* and in .*; rename one"):
        single_file.single_file()


def test_an_export_reads_back_as_it_was(make_exported):
    backbone, folder = make_exported()
    for asked in (folder, folder / "backbone.safetensors"):
        again = earthprior.load_backbone(asked)
        assert again.bands == backbone.bands
        assert again.description.keys() >= backbone.description.keys()
        x0 = torch.randn(1, 4, 16, 16)
        assert all(torch.equal(a, b) for a, b in zip(again.features(x0), backbone.features(x0), strict=True))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", b"{", "config.json cannot be read"),
        ("config.json", b'{"params": {}}', "config.json cannot be read"),
        ("config.json", b'{"format": 1}', "is not what this version's `earthprior export` writes"),
        (
            "config.json",
            b'{"format": 1, "network": {}, "bands": [], "serving": {}, "normalization": {}}',
            "describes no backbone .KeyError: 'crop_px'",
        ),
        ("config.json", None, "config.json is missing"),
        ("backbone.safetensors", b"nothing", "is damaged"),
    ],
)
def test_a_damaged_export_is_one_clear_error(make_exported, name, content, words):
    _, folder = make_exported()
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(EarthPriorError, match=words):
        earthprior.load_backbone(folder)


def test_weights_of_another_export_are_refused(make_exported):
    _, folder = make_exported()
    _, other = make_exported("other", unet_film__channels=[4, 8])
    (other / "backbone.safetensors").replace(folder / "backbone.safetensors")
    with pytest.raises(EarthPriorError, match=r"the weights do not fit .*network.stem.weight: \(4, 8, 3, 3\), not \(8"):
        earthprior.load_backbone(folder)


@pytest.mark.parametrize(
    ("overrides", "side"),
    [
        ({"diffusion__precondition": "scalar"}, "multiples of 2"),
        pytest.param({"unet_film__attention": True}, "multiples of 2", marks=pytest.mark.soak),
        pytest.param({"diffusion__precondition": "wiener", "network": "unet_att_d"}, "16", marks=pytest.mark.soak),
    ],
)
def test_the_graphs_compute_what_the_backbone_does(make_exported, overrides, side):
    import onnxruntime

    backbone, folder = make_exported(**overrides)
    told = graphs.write_graphs(backbone, folder)
    assert told.keys() == {"backbone.pt2", "backbone.onnx"}
    assert {entry["height"] for entry in told.values()} == {side}
    assert all(entry["max_abs_difference"] < 1e-3 * entry["largest_value"] for entry in told.values())
    x0 = torch.randn(5, 4, 16, 16)
    session = onnxruntime.InferenceSession(str(folder / "backbone.onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["level_0", "level_1"]
    for found in (torch.export.load(folder / "backbone.pt2").module()(x0), session.run(None, {"x0": x0.numpy()})):
        for one, other in zip(found, backbone(x0), strict=True):
            torch.testing.assert_close(torch.as_tensor(one), other, rtol=1e-3, atol=1e-3)


def test_a_graph_that_differs_fails_the_export_and_one_that_cannot_be_made_is_left_out(make_exported, monkeypatch):
    backbone, folder = make_exported()

    def wrong(program, path):
        path.write_bytes(b"")
        return lambda x0: [level + 0.1 for level in backbone(x0)]

    monkeypatch.setattr(graphs, "GRAPHS", {"a.pt2": wrong})
    monkeypatch.setattr(graphs, "_traced", lambda features, example, stride, fixed: None)
    with pytest.raises(EarthPriorError, match=r"a.pt2 differs from the backbone by 1.0\de-01 where the largest value"):
        graphs.write_graphs(backbone, folder)

    def refuses(*arguments):
        raise ValueError("no such operator\nand a page of advice")

    monkeypatch.setattr(graphs, "GRAPHS", {"a.pt2": refuses})
    told = graphs.write_graphs(backbone, folder)
    assert told == {"a.pt2": {"left_out": "ValueError: no such operator"}}
    assert not (folder / "a.pt2").exists()

    sized, folder = make_exported("sized", diffusion__precondition="wiener")
    monkeypatch.setattr(graphs, "GRAPHS", {"a.pt2": lambda program, path: sized})
    assert graphs.write_graphs(sized, folder)["a.pt2"]["height"] == "16"


METRICS = {"gain_db": {"mean": 0.75}, "judged_chips": 4, "probe": {"iou": 0.5, "iou_low": 0.41, "iou_high": 0.62}}


@pytest.fixture
def project(make_finished, monkeypatch, tmp_path):
    """A project with finished results as the working directory, where graphs are not made."""

    def quick(backbone, folder):
        (folder / "backbone.onnx").write_bytes(b"")
        seen = {"max_abs_difference": 2e-6, "largest_value": 3.0, "height": "16", "width": "16"}
        return {"backbone.pt2": {"left_out": "ValueError: no"}, "backbone.onnx": seen}

    monkeypatch.setattr(export, "write_graphs", quick)
    done = make_finished()
    write_json(tmp_path / "params.yaml", done.params.model_dump(mode="json"))
    write_json(tmp_path / "results/evaluate/metrics.json", METRICS)
    write_json(tmp_path / "results/stats/stats.json", {"chips": {"train": 8, "validate": 4, "test": 0}})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_verb_writes_a_folder_that_stands_alone(project, monkeypatch, capsys):
    monkeypatch.setattr(recorded, "git_commit", lambda root: "c" * 40)
    export.run(project, None, None, None)
    folder = project / "work/export/ffffffffffff"
    assert {path.name for path in folder.iterdir()} == {
        "backbone.safetensors", "config.json", "MODEL_CARD.md", "earthprior_backbone.py", "backbone.onnx",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "backbone.pt2 is left out, torch cannot write it: ValueError: no" in said
    assert "backbone.onnx differs from the backbone by 2.0e-06 at most" in said
    config = read_json(folder / "config.json")
    assert config["graphs"]["backbone.onnx"]["max_abs_difference"] == 2e-6
    assert config["origin"]["metrics"] == {
        "gain_db/mean": 0.75, "judged_chips": 4, "probe/iou": 0.5, "probe/iou_low": 0.41, "probe/iou_high": 0.62,
    }  # fmt: skip
    text = (folder / card.NAME).read_text()
    for words in (
        "(0 is the linear filter), of 4 validate chips;\nprobes",
        "gain_db/mean | 0.75",
        "probe/iou | 0.5 (0.41 to 0.62) |",
        "red, green, blue, nir",
        "0" * 32 + ".dir",
        "ffffffffffff",
        "| Git commit at the export | " + "c" * 40,
        "imagery's licence",
    ):
        assert words in text
    assert "channels: [8, 16]" in text
    # every heading, table and list begins after an empty line
    lines = text.splitlines()
    for before, line in itertools.pairwise(lines):
        if line.startswith(("#", "|", "- ")) and before and not before.startswith(("|", "- ", "  ", "```")):
            raise AssertionError(f"{line!r} comes right after {before!r}")
    # as it says, from wherever the folder lies
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(folder.parent)
    names = {"raw": raw_chips()}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert sys.modules.pop("earthprior_backbone").__file__ == str(folder / "earthprior_backbone.py")
    assert [level.shape[1] for level in names["pyramid"]] == [8, 16]
    monkeypatch.chdir(project)
    # again: over itself, and nothing else; what is known stays known
    export.run(project, str(folder), folder, None)
    assert read_json(folder / "config.json")["origin"] == config["origin"]
    again = (folder / card.NAME).read_text()
    assert again.split("## Parameters")[0] == text.split("## Parameters")[0]
    with pytest.raises(EarthPriorError, match="holds other files than an earlier export's"):
        export.run(project, None, project, None)


def test_numbers_of_other_weights_are_not_passed_on(project):
    write_json(project / "results/evaluate/serving.json", {"fingerprint": "0" * 12, "t": 1, "rho": 0.1})
    export.run(project, None, project / "out", None)
    assert read_json(project / "out/config.json")["origin"].get("metrics") is None
    assert "No evaluation of these weights" in (project / "out/MODEL_CARD.md").read_text()
