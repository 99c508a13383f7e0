"""The stage measures the training chips exactly, and tells everything that is wrong at once."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from earthprior import build
from earthprior.chips import survey
from earthprior.chips.selection import select
from earthprior.errors import DataError
from earthprior.params import CLIP_PERCENTS
from earthprior.stages import stats

ROOT = Path(__file__).parents[1]


@pytest.fixture
def stage(tmp_path, make_chips, make_params):
    """A function that writes chips, lets `spoil(folder)` change them, runs the stage and returns its folder."""

    def run(spoil=None, overrides=None, **chips):
        folder = make_chips(tmp_path / "data", **chips)
        if spoil:
            spoil(folder)
        stats.run(make_params(overrides), tmp_path)
        return tmp_path / "results/stats"

    return run


def problems_of(root: Path) -> list[dict[str, str]]:
    with (root / "results/stats/bad_chips.csv").open() as handle:
        return list(csv.DictReader(handle))


def rewrite(path: Path, change) -> None:
    """Change a chip's pixels in place, the header kept."""
    with rasterio.open(path) as source:
        pixels, profile, names = source.read(), source.profile, source.descriptions
    pixels = change(pixels)
    profile.update(dtype=pixels.dtype, count=len(pixels), height=pixels.shape[1], width=pixels.shape[2])
    with rasterio.open(path, "w", **profile) as target:
        target.write(pixels)
        target.descriptions = names[: len(pixels)]


def test_statistics_of_valid_train_pixels(stage, tmp_path):
    results = stage(nodata=0)
    found = json.loads((results / "stats.json").read_text())
    pixels = []
    for index in (0, 1, 3, 4, 6, 7, 9, 10):
        with rasterio.open(tmp_path / f"data/chips/chip_{index:03d}.tif") as source:
            chip = source.read()
        pixels.append(chip[:, (chip != 0).any(axis=0)])
    whole = np.concatenate(pixels, axis=1).astype(np.float64)
    assert found["bands"] == ["red", "green", "blue", "nir"]
    for name, band in zip(found["bands"], whole, strict=True):
        assert found["per_band"][name]["mean"] == pytest.approx(band.mean(), rel=1e-12)
        assert found["per_band"][name]["std"] == pytest.approx(band.std(), rel=1e-12)
        assert found["per_band"][name]["min"] == band.min() > 0
        assert found["per_band"][name]["percentiles"]["99.9"] == pytest.approx(np.percentile(band, 99.9))
        cut = band.clip(*np.percentile(band, [2, 98]))
        wanted = {"min": cut.min(), "max": cut.max(), "mean": cut.mean(), "std": cut.std()}
        assert found["per_band"][name]["clipped"]["2"] == pytest.approx(wanted, rel=1e-12)
    assert found["all_bands"]["count"] == whole.size
    assert found["all_bands"]["clipped"]["2"]["max"] == pytest.approx(np.percentile(whole, 98), rel=1e-12)
    assert found["valid_fraction"] == 0.75
    assert found["chips"] == {"train": 8, "validate": 4, "test": 0, "skipped_lines": []}
    assert (found["dtype"], found["chip_size"]) == ("uint16", 32)
    assert found["crs"] == {"EPSG:32614": 12}
    assert problems_of(tmp_path) == []
    with (results / "histograms.csv").open() as handle:
        assert {row["band"] for row in csv.DictReader(handle)} == set(found["bands"])
    assert (results / "samples.png").read_bytes()[:4] == b"\x89PNG"


def test_names_of_crs_without_end_are_counted_together(stage, monkeypatch):
    def rename(folder):
        for index in range(10):
            with rasterio.open(folder / f"chips/chip_{index:03d}.tif", "r+") as target:
                target.crs = rasterio.CRS.from_wkt(f'LOCAL_CS["made up {index % 5}",UNIT["metre",1]]')

    monkeypatch.setattr(survey, "MOST_NAMES", 3)
    found = json.loads((stage(rename) / "stats.json").read_text())
    assert found["crs"] == {"made up 0": 2, "made up 1": 2, "made up 2": 2, "others": 6}


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_readers_change_no_bit(stage, dtype):
    contents = []
    for readers in (1, 5):
        results = stage(dtype=dtype, overrides={"operation.readers": readers})
        contents.append((results / "stats.json").read_bytes())
    assert contents[0] == contents[1]


def test_normalization_takes_its_limits_from_the_stage(stage, make_params, tmp_path):
    found = json.loads((stage(dtype="float32") / "stats.json").read_text())
    chips = []
    for index in (0, 1, 3, 4, 6, 7, 9, 10):
        with rasterio.open(tmp_path / f"data/chips/chip_{index:03d}.tif") as source:
            chips.append(source.read())
    raw = torch.from_numpy(np.stack(chips))
    for percent in CLIP_PERCENTS:
        overrides = {"normalization.clip_percent": percent, "normalization.normal_strategy": "min_max"}
        normalizer = build.normalizer(make_params(overrides), found)
        x0, _ = normalizer.normalize(raw, torch.ones(8, 32, 32, dtype=torch.bool))
        assert (x0.min(), x0.max()) == pytest.approx((0, 1), abs=1e-6)
        cut = ((x0 == 0) | (x0 == 1)).float().mean()
        assert cut == pytest.approx(2 * percent / 100, abs=2e-3)


def test_identity_follows_every_chip(stage):
    def other(folder):
        rewrite(folder / "chips/chip_002.tif", lambda pixels: pixels + 1)

    before = json.loads((stage() / "stats.json").read_text())
    after = json.loads((stage(other) / "stats.json").read_text())
    # A validate chip is in no statistic, yet another one is another data set.
    assert before["per_band"] == after["per_band"]
    assert before["data"]["chips_sha256"] != after["data"]["chips_sha256"]


def test_pixels_under_nodata_change_no_statistic(stage):
    def fill(value):
        def change(pixels):
            pixels = pixels.astype(np.float32)
            pixels[:, :5, :5] = value
            return pixels

        def spoil(folder):
            for path in (folder / "chips").glob("*.tif"):
                rewrite(path, change)

        return spoil

    found = [
        json.loads((stage(fill(value), {"data.nodata": [-9999.0, 3e4]}) / "stats.json").read_text())
        for value in (-9999.0, 3e4, np.nan)
    ]
    assert found[0]["per_band"] == found[1]["per_band"] == found[2]["per_band"]
    assert [one["problems"]["warnings"] for one in found] == [0, 0, 12]


def test_everything_wrong_is_told_at_once(stage, tmp_path):
    def spoil(folder):
        chips = folder / "chips"
        (chips / "chip_000.tif").unlink()
        (chips / "chip_001.tif").write_bytes((chips / "chip_001.tif").read_bytes()[:900])
        rewrite(chips / "chip_003.tif", lambda pixels: pixels[:3])
        rewrite(chips / "chip_004.tif", lambda pixels: pixels.astype(np.int16))
        rewrite(chips / "chip_006.tif", lambda pixels: pixels[:, :16, :16])
        rewrite(chips / "chip_007.tif", lambda pixels: np.full_like(pixels, 7))
        shutil.copy(chips / "chip_009.tif", chips / "chip_008.tif")
        shutil.copy(chips / "chip_009.tif", chips / "chip_010.tif")
        with (folder / "catalog.csv").open("a") as handle:
            handle.write("chips/new.tif,val,g99\n")

    with pytest.raises(DataError) as caught:
        stage(spoil)
    wanted = {
        ("error", "2"): "not found",
        ("error", "3"): "truncated or damaged",
        ("error", "5"): "has 3 bands, data.bands lists 4",
        ("error", "6"): "has dtype int16",
        ("error", "8"): "is 16 x 16 px, data.chip_size asks for 32",
        ("warning", "9"): "every band is constant",
        ("error", "11"): "is train where that is validate, which leaks",
        ("error", "14"): "usage 'val' is not allowed",
    }
    found = {(row["severity"], row["line"]): row["what"] for row in problems_of(tmp_path)}
    for place, words in wanted.items():
        assert words in found[place]
        if place[0] == "error":
            assert f"line {place[1]})" in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "results/stats/stats.json").exists()


def test_copies_within_a_split_and_overlaps_only_warn(stage, tmp_path, write_chip, capfd):
    def spoil(folder):
        shutil.copy(folder / "chips/chip_000.tif", folder / "chips/chip_001.tif")
        pixels = np.random.default_rng(0).integers(1, 99, (4, 32, 32), np.uint16)
        # Chip 2 is in validate; chip 3, in train, lies 640 m east of it.
        write_chip(folder / "chips/chip_002.tif", pixels, x=500_000.0 + 3 * 320.0 - 80.0)

    found = json.loads((stage(spoil) / "stats.json").read_text())
    assert found["overlapping_pairs"] == 1
    whats = {row["line"]: row["what"] for row in problems_of(tmp_path)}
    assert "has the same pixels as chips/chip_000.tif (catalog line 2)" in whats["3"]
    assert "overlaps on the ground with chips/chip_003.tif (train)" in whats["4"]
    assert "2 warnings" in capfd.readouterr().err


def test_skip_leaves_out_bad_chips_up_to_a_share(stage, tmp_path, make_params):
    def spoil(folder):
        (folder / "chips/chip_000.tif").write_bytes(b"")

    with pytest.raises(DataError, match=r"8\.3%\), more than data\.max_bad_fraction \(5\.0%\)"):
        stage(spoil, {"data.on_bad_chip": "skip", "data.max_bad_fraction": 0.05})
    results = stage(spoil, {"data.on_bad_chip": "skip", "data.max_bad_fraction": 0.1})
    found = json.loads((results / "stats.json").read_text())
    assert found["chips"] == {"train": 7, "validate": 4, "test": 0, "skipped_lines": [2]}
    assert found["problems"] == {"errors": 0, "warnings": 1}
    assert problems_of(tmp_path)[0]["what"].startswith("skipped: ")
    left = select(make_params(), tmp_path, found)
    assert [row.images[0] for row in left.train][:2] == ["chips/chip_001.tif", "chips/chip_003.tif"]
    assert (len(left.train), len(left.validate)) == (7, 4)


def test_nothing_to_train_on(stage):
    def empty(folder):
        for path in (folder / "chips").glob("*.tif"):
            rewrite(path, np.zeros_like)

    with pytest.raises(DataError, match="no train chip has a valid pixel"):
        stage(empty, {"data.nodata": [0]})

    def gone(folder):
        shutil.rmtree(folder / "chips")
        folder.with_name(f"{folder.name}.dvc").touch()

    with pytest.raises(DataError, match=r"Not one chip was found: is the data there \(dvc pull\)"):
        stage(gone)


def test_a_failed_run_leaves_earlier_results_alone(stage):
    results = stage()
    before = {path.name: path.read_bytes() for path in results.iterdir() if path.name != "bad_chips.csv"}
    with pytest.raises(DataError):
        stage(lambda folder: (folder / "chips/chip_000.tif").unlink())
    assert before == {path.name: path.read_bytes() for path in results.iterdir() if path.name != "bad_chips.csv"}


def test_neither_torch_nor_mlflow():
    code = "import sys, earthprior.stages.stats; print([m for m in ('torch', 'mlflow', 'pandas') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONPATH": "src"}
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "train"), [("naip_prairie_5m_224", 90), ("naip_urban_trees_224", 416)])
def test_real_chips(tmp_path, real_data, make_params, name, train):
    stats.run(make_params({"data.dir": str(real_data / name), "data.chip_size": 224, "data.crop_px": 56}), tmp_path)
    found = json.loads((tmp_path / "results/stats/stats.json").read_text())
    assert found["chips"]["train"] == train
    assert found["overlapping_pairs"] == 0
    assert problems_of(tmp_path) == []
    published = {"naip_prairie_5m_224": (0.379, 0.146), "naip_urban_trees_224": (0.447, 0.179)}[name]
    # The README's numbers are over all chips, these over the training chips.
    assert found["per_band"]["red"]["mean"] / 255 == pytest.approx(published[0], abs=0.02)
    assert found["per_band"]["red"]["std"] / 255 == pytest.approx(published[1], abs=0.02)
