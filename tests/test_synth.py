"""Procedural chips: the same from the same seed, spectrally plausible, apart on the ground, and safe to interrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from scipy import ndimage

from earthprior.chips.landscapes import spectra
from earthprior.chips.landscapes.placement import place, region_size, usages
from earthprior.chips.landscapes.synth import STEP, synth_chip
from earthprior.errors import DataError, EarthPriorError
from earthprior.tools import synth

SIZE = 96


@pytest.fixture(scope="module")
def chips():
    """Pixels (N, 4, S, S), labels (N, S, S), infos of some chips."""
    made = [synth_chip(3, index, SIZE) for index in range(40)]
    return np.stack([m[0] for m in made]), np.stack([m[1] for m in made]), [m[2] for m in made]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_chip_is_a_function_of_seed_and_index():
    first = synth_chip(0, 5, 64)
    again = synth_chip(0, 5, 64)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert first[2] == again[2]
    assert not np.array_equal(first[0], synth_chip(0, 6, 64)[0])
    assert not np.array_equal(first[0], synth_chip(1, 5, 64)[0])


def test_shape_type_range_and_nodata(chips):
    pixels, labels, infos = chips
    assert pixels.dtype == np.uint16
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) <= set(spectra.CLASSES)
    missing = labels == spectra.NODATA
    assert (pixels.transpose(0, 2, 3, 1)[missing] == 0).all()
    assert (pixels.transpose(0, 2, 3, 1)[~missing] > 0).all(), "0 in a band is reserved for missing data"
    assert pixels.max() <= 16_000
    assert (pixels % STEP == 0).all()
    wedged = [info.nodata > 0 for info in infos]
    assert 0 < sum(wedged) < len(infos) / 3
    assert np.allclose([info.nodata for info in infos], missing.mean((1, 2)))


def test_landscapes_differ(chips):
    _, labels, infos = chips
    assert len({info.biome for info in infos}) >= 6
    shares = np.stack([(labels == label).mean((1, 2)) for label in range(1, 8)], axis=1)
    assert (shares.std(0)[:6] > 0.04).all(), "each class is common in some chips and rare in others"
    assert 0.02 < np.mean([info.cloud > 0.01 for info in infos]) < 0.5


def test_spectra_fit_the_labels(chips):
    pixels, labels, infos = chips
    clear = [i for i, info in enumerate(infos) if info.cloud == 0]
    reflectance = pixels[clear].transpose(1, 0, 2, 3) / 10_000
    # Pixels on an edge are mixtures by intention: judge the classes inside.
    inside = {
        label: np.stack([ndimage.binary_erosion(labels[i] == label, iterations=2, border_value=1) for i in clear])
        for label in range(1, 7)
    }
    index = spectra.ndvi(reflectance)
    forest, water, bare = (inside[label] for label in (spectra.FOREST, spectra.WATER, spectra.BARE))
    assert np.percentile(index[forest], 10) > 0.6
    assert np.percentile(reflectance[3][water], 90) < 0.1
    assert np.median(index[water]) < 0.1
    red, green, blue, nir = (np.median(band[bare]) for band in reflectance)
    assert nir > red > green > blue
    built = inside[spectra.BUILT]
    assert np.median(index[built]) < 0.35
    crops = index[inside[spectra.CROPLAND]]
    low, high = np.percentile(crops, [5, 95])
    assert low < 0.3 < 0.7 < high, "fields are closed or bare"


def test_clouds_are_bright_and_darken_the_ground(chips):
    pixels, labels, infos = chips
    cloudy = [i for i, info in enumerate(infos) if info.cloud > 0.03]
    for i in cloudy:
        blue, cloud = pixels[i, 2], labels[i] == spectra.CLOUD
        assert np.median(blue[cloud]) > 2 * np.median(blue[(labels[i] != spectra.CLOUD) & (labels[i] > 0)])
    assert cloudy


def test_bands_and_space_correlate_as_in_real_chips(chips):
    pixels, _, infos = chips
    whole = [i for i, info in enumerate(infos) if info.nodata == 0 and info.cloud == 0]
    correlation = np.mean([np.corrcoef(pixels[i].reshape(4, -1).astype(float)) for i in whole], axis=0)
    # Real 5 m chips of farmland: visible bands .91 to .94, with near infrared .25 to .37.
    assert correlation[0, 1] > 0.85
    assert correlation[1, 2] > 0.85
    assert -0.1 < correlation[0, 3] < 0.65
    window = np.hanning(SIZE)[:, None] * np.hanning(SIZE)
    bands = pixels[whole].reshape(-1, SIZE, SIZE).astype(float)
    power = np.mean([np.abs(np.fft.fft2((b - b.mean()) * window)) ** 2 / b.var() for b in bands], axis=0)
    radius = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.fftfreq(SIZE)[None])
    coarse, middle, fine, finest = (
        power[(radius >= low) & (radius < high)].mean()
        for low, high in ((0.02, 0.05), (0.1, 0.2), (0.3, 0.4), (0.46, 0.5))
    )
    assert coarse > 3 * middle
    assert middle > 3 * fine
    assert fine > 1.5 * finest, "power falls down to the finest scale: never white"


def test_chips_never_touch_on_the_ground():
    n, size = 700, 224
    side_m = size * 4.77
    places = [place(9, index, size) for index in range(n)]
    corners = np.array([(p.left_m, p.top_m) for p in places])
    apart = np.abs(corners[:, None] - corners[None]).max(2) - side_m
    apart[np.diag_indices(n)] = np.inf
    assert apart.min() > 4.77 * 5
    # Neighbours in number are neighbours on the ground: a region is compact.
    assert np.abs(corners[:16] - corners[0]).max() < 6 * side_m
    zones = {place(9, index, size).crs for index in (0, 99_999, 700_000)}
    assert len(zones) == 2, "a zone holds 100,000 chips and more go to the next"
    with pytest.raises(DataError, match="n is too large"):
        place(0, 10**9, size)


@pytest.mark.parametrize(
    ("n", "fraction"), [(2, 0.2), (5, 0.5), (12, 1 / 3), (80, 0.2), (330, 0.1), (1000, 0.2), (1000, 0.004)]
)
def test_split_takes_whole_regions_near_the_fraction(n, fraction):
    split = np.array(usages(0, n, fraction))
    side = region_size(n, fraction)
    for start in range(0, n, side):
        assert len(set(split[start : start + side])) == 1
    count = (split == "validate").sum()
    assert 1 <= count < n
    assert abs(count - n * fraction) <= max(side, 1)
    assert usages(0, n, fraction) == split.tolist()


def test_written_set(tmp_path):
    out = tmp_path / "set"
    synth.run(out, 6, seed=2, workers=1, validate_fraction=0.34, size=48)
    table = pd.read_csv(out / "catalog.csv")
    assert list(table.columns) == ["image", "label", "usage", "region", "crs", "x", "y"]
    assert (table.usage == "validate").sum() == 2
    assert table.groupby("region").usage.nunique().max() == 1
    assert sorted(p.name for p in out.iterdir()) == ["catalog.csv", "chips", "labels"], "nothing else for DVC"
    for index, row in table.iterrows():
        expected, classes, _ = synth_chip(2, index, 48)
        with rasterio.open(out / row.image) as image, rasterio.open(out / row.label) as label:
            assert np.array_equal(image.read(), expected)
            assert np.array_equal(label.read(1), classes)
            assert image.descriptions == ("red", "green", "blue", "nir")
            assert image.nodata == 0
            assert image.crs == label.crs == rasterio.crs.CRS.from_string(row.crs)
            assert image.transform == label.transform
            assert image.res == (4.77, 4.77)
            assert image.xy(23.5, 23.5) == pytest.approx((row.x, row.y), abs=0.01)
            assert image.block_shapes == [(48, 48)] * 4
            assert image.overviews(1) == []
            assert rasterio.enums.ColorInterp.alpha not in image.colorinterp


def test_workers_change_no_byte(tmp_path):
    synth.run(tmp_path / "one", 18, seed=0, workers=1, size=32)
    synth.run(tmp_path / "two", 18, seed=0, workers=2, size=32)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_continues_after_a_kill(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    synth.run(whole, 60, seed=4, workers=1, size=96)
    call = f"synth.run(Path({str(killed)!r}), 60, 4, 1, size=96)"
    code = f"from pathlib import Path; from earthprior.tools import synth; {call}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 50
    while not list((killed / "chips").glob("synth_*.tif")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in (killed / "chips").glob("synth_*.tif")}
    assert 0 < len(done) < 60
    assert not (killed / "catalog.csv").exists()
    (killed / "chips" / ".synth_000059.tif.abc.tmp.tif").write_bytes(b"half")

    with pytest.raises(DataError, match="seed 4 there, 5 now"):
        synth.run(killed, 60, seed=5, workers=1, size=96)
    synth.run(killed, 60, seed=4, workers=1, size=96)
    assert files_of(killed) == files_of(whole)
    kept = [path for path, stamp in done.items() if path.stat().st_mtime_ns == stamp]
    assert len(kept) >= len(done) - 1, "finished chips were not made again"


def test_an_interrupted_set_is_continued(tmp_path, monkeypatch):
    made = synth.synth_chip

    def stop(seed, index, size):
        if index == 9:
            raise KeyboardInterrupt
        return made(seed, index, size)

    monkeypatch.setattr(synth, "synth_chip", stop)
    with pytest.raises(KeyboardInterrupt):
        synth.run(tmp_path / "set", 12, seed=0, workers=1, size=32)
    monkeypatch.undo()
    first = tmp_path / "set/chips/synth_000000.tif"
    stamp = first.stat().st_mtime_ns
    synth.run(tmp_path / "set", 12, seed=0, workers=1, size=32)
    assert first.stat().st_mtime_ns == stamp
    assert len(pd.read_csv(tmp_path / "set/catalog.csv")) == 12


def test_refuses_a_folder_with_content_and_force_replaces_only_its_own(tmp_path):
    out = tmp_path / "set"
    synth.run(out, 5, seed=0, workers=1, size=32)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        synth.run(out, 3, seed=1, workers=1, size=32)
    synth.run(out, 3, seed=1, workers=1, size=32, force=True)
    assert len(pd.read_csv(out / "catalog.csv")) == len(list((out / "chips").iterdir())) == 3
    assert (out / "notes.txt").read_text() == "mine"


def test_all_wrong_arguments_are_reported_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as caught:
        synth.run(tmp_path / "file", 1, seed=-1, workers=0, validate_fraction=1.0, size=8)
    for word in ("n is 1", "seed is -1", "workers is 0", "validate_fraction is 1.0", "size is 8", "is a file"):
        assert word in str(caught.value)


def test_a_full_disk_is_said_before_work_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(synth.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10_000})())
    with pytest.raises(EarthPriorError, match="GB are free") as caught:
        synth.run(tmp_path / "set", 10, seed=0, workers=1, size=224)
    assert caught.value.exit_code == 4


def test_needs_no_torch():
    code = "import sys, earthprior.tools.synth; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
