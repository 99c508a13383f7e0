from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch

from earthprior.downstream.saved import FORMAT, Finetuned, load_finetuned, network_of
from earthprior.errors import DataError, HeldError, ParamsError
from earthprior.prediction.tiling import predict_chip
from earthprior.tools import predict
from labelled import backbone_of, small, with_columns


def finetuned(make_params: Any, kind: str, classes: list[Any], stat_procedure: str = "gpb") -> Finetuned:
    """A network whose head nobody trained, but whose maps are not all of one class."""
    params = make_params({
        "unet_film.attention": False, "unet_film.time_embedding_dim": 16,
        "normalization.stat_procedure": stat_procedure,
    })  # fmt: skip
    backbone = backbone_of(params)
    description = {
        "format": FORMAT, "kind": kind, "classes": classes, "label_column": "cover", "crop_px": 16, "side": "decoder",
        "t": backbone.t, "head": {"kind": "linear", "channels": 8}, "scale": [10.0, 2.0],
    }  # fmt: skip
    network = network_of(backbone, description)
    torch.manual_seed(3)
    for layer in network.head.project:
        torch.nn.init.normal_(layer.weight)
    return Finetuned(network, description)


@pytest.fixture
def root(tmp_path: Path, make_chips: Any, make_params: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with six chips and a network that maps three classes, as the working directory."""
    with_columns(make_chips(tmp_path / "data", n=6, size=32, labels=True))
    finetuned(make_params, "segmentation", [1, 2, 7]).save(tmp_path / predict.MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(root: Path, *named: Path, **options: Any) -> Path:
    predict.run(small(), root, named, **options)
    return options.get("out") or root / predict.OUT


def read(path: Path) -> Any:
    with rasterio.open(path) as source:
        return source.read()


def test_the_catalogs_chips_are_mapped_as_predict_chip_maps_them(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(root, probabilities=True)
    assert "predict: 6 maps; in" in capsys.readouterr().err
    assert len(list(out.rglob("*.tif"))) == 12
    model = load_finetuned(root / predict.MODEL)
    with rasterio.open(root / "data/chips/chip_001.tif") as source:
        raw, crs, transform = source.read(), source.crs, source.transform
    x0 = model.backbone.normalize(torch.from_numpy(raw)[None])
    expected = predict_chip(model.predict, x0, 16)[0].numpy()
    found = read(out / "chips/chip_001_probabilities.tif")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with rasterio.open(out / "chips/chip_001.tif") as source:
        assert (source.crs, source.transform, source.nodata) == (crs, transform, 255)
        np.testing.assert_array_equal(source.read(1), np.array([1, 2, 7])[found.argmax(0)])


def test_a_second_call_does_what_is_missing_and_a_changed_model_does_all(
    root: Path, make_params: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(root)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.tif")}
    gone = out / "chips/chip_002.tif"
    gone.unlink()
    (out / "chips/.chip_003.tif.abc.tmp.tif").write_text("left by a kill")
    capsys.readouterr()
    run(root)
    assert "predict: 1 map, 5 made before; in" in capsys.readouterr().err
    assert not list(out.rglob(".*.tmp.tif"))
    assert {path for path, time in times.items() if path.stat().st_mtime_ns != time} == {gone}
    finetuned(make_params, "segmentation", [1, 2, 8]).save(root / predict.MODEL)
    run(root)
    assert "predict: 6 maps; in" in capsys.readouterr().err
    run(root, force=True)
    assert "predict: 6 maps; in" in capsys.readouterr().err


def test_a_bad_file_is_told_and_the_others_are_mapped(root: Path, write_chip: Any) -> None:
    folder = root / "scenes"
    noise = np.random.default_rng(0)
    write_chip(folder / "odd.tif", noise.integers(1, 4000, (4, 41, 57)).astype(np.uint16))
    write_chip(folder / "deep/small.tif", noise.integers(1, 4000, (4, 5, 9)).astype(np.float32))
    write_chip(folder / "three.tif", noise.integers(1, 200, (3, 20, 20)).astype(np.uint8))
    (folder / "bad.tif").write_bytes((folder / "odd.tif").read_bytes()[:300])
    with pytest.raises(DataError, match="2 images could not be predicted:") as caught:
        run(root, folder, out=root / "out")
    assert "bad.tif: is truncated or damaged" in str(caught.value)
    assert "three.tif: has 3 bands without names; the model takes 4 (red, green, blue, nir)" in str(caught.value)
    found = {path.relative_to(root / "out").as_posix() for path in (root / "out").rglob("*.tif")}
    assert found == {"odd.tif", "deep/small.tif"}
    assert read(root / "out/odd.tif").shape == (1, 41, 57)


def test_an_image_is_never_replaced_nor_what_was_not_made_here(root: Path) -> None:
    before = (root / "data/chips/chip_000.tif").read_bytes()
    with pytest.raises(DataError, match="would be replaced by its own map"):
        run(root, root / "data/chips", out=root / "data/chips", force=True)
    assert (root / "data/chips/chip_000.tif").read_bytes() == before
    other = root / "out/chip_000.tif"
    other.parent.mkdir()
    other.write_bytes(before)
    with pytest.raises(DataError, match="was not made by this command"):
        run(root, root / "data/chips/chip_000.tif", out=root / "out")
    assert other.read_bytes() == before
    run(root, root / "data/chips/chip_000.tif", out=root / "out", force=True)
    assert other.read_bytes() != before


def test_files_of_one_name_keep_their_folders(root: Path, write_chip: Any) -> None:
    pixels = np.ones((4, 8, 8), np.uint8)
    paths = [write_chip(root / f"{year}/scene.tif", pixels) for year in (2020, 2021)]
    out = run(root, *paths, out=root / "out")
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.tif")} == {"2020/scene.tif", "2021/scene.tif"}


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("gone.tif", "gone.tif not found"), ("gone", "gone not found"), ("empty", "empty holds no GeoTIFF"),
        ("data/chips/readme.md", "is neither a GeoTIFF"), ("bare.csv", "bare.csv has no column 'image'"),
    ],
)  # fmt: skip
def test_what_cannot_be_an_input_is_said(root: Path, named: str, said: str) -> None:
    (root / "empty").mkdir()
    (root / "data/chips/readme.md").touch()
    (root / "bare.csv").write_text("path\na.tif\n")
    with pytest.raises(DataError, match=said):
        run(root, Path(named))


def test_an_overlap_that_leaves_nothing_and_a_folder_in_use_are_refused(root: Path) -> None:
    from filelock import FileLock

    with pytest.raises(ParamsError, match="--overlap 16 leaves nothing of tiles of 16 px"):
        run(root, overlap=16)
    with FileLock(root / predict.OUT / ".lock"), pytest.raises(HeldError, match="another process predicts into"):
        run(root)


def test_where_chips_are_normalized_by_their_own_statistics_tiles_are_by_a_chips_surroundings(
    root: Path, make_params: Any
) -> None:
    finetuned(make_params, "segmentation", [1, 2, 7], "lpb").save(root / predict.MODEL)
    out = run(root, root / "data/chips/chip_001.tif", probabilities=True)
    model = load_finetuned(root / predict.MODEL)
    raw = read(root / "data/chips/chip_001.tif")
    expected = predict_chip(model.predict, model.backbone.normalize(torch.from_numpy(raw)[None]), 16)[0].numpy()
    np.testing.assert_allclose(read(out / "chip_001_probabilities.tif"), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_one_value_per_image_is_a_table_with_the_catalogs_columns(
    root: Path, make_params: Any, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = ["bright", "dark"] if kind == "classification" else []
    finetuned(make_params, kind, classes).save(root / predict.MODEL)
    (root / "data/chips/chip_004.tif").unlink()
    with pytest.raises(DataError, match=r"chip_004.tif \(catalog line 6\): not found"):
        run(root)
    with (root / predict.OUT / "predictions.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["image"] for row in rows] == [f"chips/chip_{index:03d}.tif" for index in (0, 1, 2, 3, 5)]
    assert {"usage", "group", "label", "cover", "height", "predicted_cover"} <= rows[0].keys()
    model = load_finetuned(root / predict.MODEL)
    x0 = model.backbone.normalize(torch.from_numpy(read(root / "data/chips/chip_003.tif"))[None])
    expected = model.predict(x0)[0]
    if kind == "regression":
        assert float(rows[3]["predicted_cover"]) == pytest.approx(float(expected[0]), rel=1e-4)
    else:
        found = [float(rows[3][f"predicted_cover_probability_{name}"]) for name in classes]
        assert found == pytest.approx(expected.tolist(), abs=1e-4)
        assert rows[3]["predicted_cover"] == classes[int(expected.argmax())]
    sound = root / "data/chips/chip_003.tif"
    with pytest.raises(DataError, match="catalogs of different columns, or from none"):
        run(root, sound, root / "data/catalog.csv", out=root / "both")
    for _ in range(2):
        capsys.readouterr()
        run(root, sound, out=root / "one")
    assert "0 predictions, 1 made before" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "classes"), [("segmentation", [1, 2, 7]), ("regression", [])])
def test_an_image_in_another_unit_is_told_of(
    root: Path, make_params: Any, capsys: pytest.CaptureFixture[str], kind: str, classes: list[int]
) -> None:
    finetuned(make_params, kind, classes).save(root / predict.MODEL)
    path = root / "data/chips/chip_002.tif"
    with rasterio.open(path) as source:
        profile, pixels = source.profile, source.read()
    with rasterio.open(path, "w", **{**profile, "dtype": "float32"}) as target:
        target.write(pixels / np.float32(1e6))
    run(root)
    said = capsys.readouterr().err
    assert "predict: chips/chip_002.tif: 100% of its values lie outside what the pretraining's chips had" in said
    assert said.count("the pretraining's chips had") == 1
