from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine, from_origin

from earthprior.chips.problems import ChipError
from earthprior.chips.scene import BLOCK_PX, Grid, open_scene, tags_of, write_map

BANDS = ("red", "green", "blue", "nir")


def some_pixels(bands: int = 4, height: int = 20, width: int = 30, dtype: str = "uint16") -> Any:
    return np.random.default_rng(0).integers(1, 200, (bands, height, width)).astype(dtype)


def test_windows_are_the_files_pixels(write_chip: Callable[..., Path], tmp_path: Path) -> None:
    pixels = some_pixels()
    write_chip(tmp_path / "a.tif", pixels)
    with open_scene(tmp_path, ["a.tif"]) as scene:
        assert (scene.grid.height, scene.grid.width) == (20, 30)
        assert scene.choose(BANDS) == "bands are taken by position as red, green, blue, nir"
        found, valid = scene.read(3, 4, 10, 11)
    np.testing.assert_array_equal(found, pixels[:, 3:13, 4:15])
    assert valid.all()


def test_bands_are_taken_by_name_whatever_the_case_and_whatever_else_is_there(
    write_chip: Callable[..., Path], tmp_path: Path
) -> None:
    pixels = some_pixels(6)
    write_chip(tmp_path / "a.tif", pixels, descriptions=("coastal", "Blue", "Green", "RED", "edge", "NIR"))
    with open_scene(tmp_path, ["a.tif"]) as scene:
        assert scene.choose(BANDS) is None
        np.testing.assert_array_equal(scene.read(0, 0, 20, 30)[0], pixels[[3, 2, 1, 5]])


@pytest.mark.parametrize(
    ("descriptions", "said"),
    [
        (None, r"a.tif: has 3 bands without names; the model takes 4 \(red, green, blue, nir\)"),
        (("red", "green", "swir"), r"a.tif: has 3 bands, described as red, green, swir; the model takes 4"),
    ],
)
def test_other_bands_are_refused(write_chip: Callable[..., Path], tmp_path: Path, descriptions: Any, said: str) -> None:
    write_chip(tmp_path / "a.tif", some_pixels(3), descriptions=descriptions)
    with open_scene(tmp_path, ["a.tif"]) as scene, pytest.raises(ChipError, match=said):
        scene.choose(BANDS)


def test_a_known_name_at_another_position_is_refused_where_not_all_are_known(
    write_chip: Callable[..., Path], tmp_path: Path
) -> None:
    write_chip(tmp_path / "a.tif", some_pixels(), descriptions=("blue", "green", "red", "nir1"))
    with open_scene(tmp_path, ["a.tif"]) as scene, pytest.raises(ChipError, match="describes its bands as blue"):
        scene.choose(BANDS)


def test_nodata_in_all_bands_nan_and_infinity_are_no_data(write_chip: Callable[..., Path], tmp_path: Path) -> None:
    pixels = some_pixels(dtype="float64")
    pixels[:, 0, 0] = -9999
    pixels[0, 1, 1] = -9999  # in one band only: data
    pixels[2, 2, 2] = np.nan
    pixels[3, 3, 3] = 1e300
    write_chip(tmp_path / "a.tif", pixels, nodata=-9999)
    with open_scene(tmp_path, ["a.tif"]) as scene:
        found, valid = scene.read(0, 0, 20, 30)
    assert found.dtype == np.float32
    assert sorted(map(tuple, np.argwhere(~valid).tolist())) == [(0, 0), (2, 2), (3, 3)]
    assert (found[:, ~valid] == 0).all()
    with open_scene(tmp_path, ["a.tif"], nodata=(0.0,)) as scene:
        assert scene.read(0, 0, 1, 1)[1].all()


def test_files_of_one_grid_are_stacked(write_chip: Callable[..., Path], tmp_path: Path) -> None:
    pixels = some_pixels()
    write_chip(tmp_path / "a.tif", pixels[:3], descriptions=BANDS[:3])
    write_chip(tmp_path / "b.tif", pixels[3:], descriptions=BANDS[3:])
    write_chip(tmp_path / "c.tif", pixels[3:], x=0.0)
    with open_scene(tmp_path, ["a.tif", "b.tif"]) as scene:
        assert scene.choose(("nir", "red")) is None
        np.testing.assert_array_equal(scene.read(1, 2, 5, 5)[0], pixels[[3, 0], 1:6, 2:7])
    with (
        pytest.raises(ChipError, match="lies on another grid than a"),
        open_scene(tmp_path, ["a.tif", "c.tif"]),
    ):
        pass


def test_what_is_no_scene_is_said(write_chip: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text.tif").write_text("<html>not found</html>")
    (tmp_path / "empty.tif").touch()
    (tmp_path / "folder.tif").mkdir()
    (tmp_path / "bad.tif").write_bytes(write_chip(tmp_path / "good.tif", some_pixels()).read_bytes()[:100])
    write_chip(tmp_path / "complex.tif", some_pixels().astype("complex64"))
    for name, said in [
        ("gone.tif", "not found"), ("text.tif", "it is a web page"), ("empty.tif", "is empty"),
        ("folder.tif", "is a folder"), ("bad.tif", "truncated or damaged"), ("complex.tif", "has dtype complex64"),
    ]:  # fmt: skip
        with pytest.raises(ChipError, match=f"{name}: .*{said}"), open_scene(tmp_path, [name]) as scene:
            scene.read(0, 0, 20, 30)


def test_a_file_that_is_one_large_block_is_refused(
    write_chip: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("earthprior.chips.scene.LARGEST_BLOCK_BYTES", 1000)
    write_chip(tmp_path / "a.tif", some_pixels(), compress="deflate", blockysize=20)
    with pytest.raises(ChipError, match="has blocks of 20 x 30 px"), open_scene(tmp_path, ["a.tif"]):
        pass


def test_gdal_sees_no_sidecar(write_chip: Callable[..., Path], tmp_path: Path) -> None:
    write_chip(tmp_path / "a.tif", some_pixels(), nodata=7)
    (tmp_path / "a.tif.aux.xml").write_text(
        "<PAMDataset><PAMRasterBand band='1'><NoDataValue>9</NoDataValue>"
        "<Description>evil</Description></PAMRasterBand></PAMDataset>"
    )
    with open_scene(tmp_path, ["a.tif"]) as scene:
        assert scene.descriptions == (None,) * 4


def test_nothing_stays_open(write_chip: Callable[..., Path], tmp_path: Path) -> None:
    write_chip(tmp_path / "a.tif", some_pixels())

    def handles() -> int:
        gc.collect()
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    with open_scene(tmp_path, ["a.tif"]):
        pass
    before = handles()
    for _ in range(5):
        with open_scene(tmp_path, ["a.tif"]) as scene:
            scene.read(0, 0, 2, 2)
    assert handles() == before


PLACES = {
    "nowhere": (None, Affine.identity()),
    "rotated": ("EPSG:32614", Affine(4.3, 2.5, 5e5, 2.5, -4.3, 5e6)),
    "degrees": ("EPSG:4326", from_origin(6.86, 53.4, 9e-5, 9e-5)),
    "without a CRS": (None, from_origin(10, 20, 2, 2)),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_map_lies_where_its_scene_lies(tmp_path: Path, name: str) -> None:
    crs, transform = PLACES[name]
    grid = Grid(7, 9, rasterio.crs.CRS.from_user_input(crs) if crs else None, transform)
    values = np.arange(63, dtype=np.uint8).reshape(1, 7, 9)
    with write_map(tmp_path / "m.tif", grid, "uint8", ["class"], 255, {"KEY": "x y"}, {1: (1, 2, 3)}) as target:
        target.write(0, values)
    with open_scene(tmp_path, ["m.tif"]) as scene:
        assert (scene.grid.crs, scene.grid.height, scene.grid.width) == (grid.crs, 7, 9)
        assert scene.grid.transform.almost_equals(transform)
    assert tags_of(tmp_path / "m.tif")["KEY"] == "x y"
    with rasterio.open(tmp_path / "m.tif") as source:
        np.testing.assert_array_equal(source.read(), values)
        assert (source.nodata, source.descriptions, source.dtypes) == (255, ("class",), ("uint8",))
        assert source.colormap(1)[1] == (1, 2, 3, 255)


def test_rows_and_parts_come_together(tmp_path: Path) -> None:
    height, width = 2 * BLOCK_PX + 30, BLOCK_PX + 77
    values = np.random.default_rng(0).random((2, height, width)).astype(np.float32)
    grid = Grid(height, width, None, Affine.identity())
    with write_map(tmp_path / "m.tif", grid, "float32", ["a", "b"], float("nan"), {}) as target:
        for left, right in [(0, BLOCK_PX), (BLOCK_PX, width)]:
            for top in range(0, height, 100):
                target.write(left, values[:, top : top + 100, left:right])
    with rasterio.open(tmp_path / "m.tif") as source:
        np.testing.assert_array_equal(source.read(), values)
        assert source.profile["tiled"]
        assert source.block_shapes[0] == (BLOCK_PX, BLOCK_PX)
        assert source.descriptions == ("a", "b")
        assert np.isnan(source.nodata)


def test_a_map_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    def begin() -> None:
        with write_map(tmp_path / "m.tif", Grid(7, 9, None, Affine.identity()), "uint8", ["class"], 255, {}) as target:
            target.write(0, np.zeros((1, 3, 9), np.uint8))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        begin()
    assert not list(tmp_path.iterdir())


def test_tags_of_what_is_no_map_are_none(tmp_path: Path) -> None:
    (tmp_path / "m.tif").write_text("x")
    assert tags_of(tmp_path / "m.tif") == tags_of(tmp_path / "gone.tif") == {}


def test_real_files_are_read_whole_or_in_windows(real_data: Path) -> None:
    for path in sorted((real_data / "quirks").glob("*.tif")):
        with rasterio.open(path) as source, open_scene(path.parent, [path.name]) as scene:
            whole, valid = scene.read(0, 0, source.height, source.width)
            np.testing.assert_array_equal(whole[:, valid], source.read()[:, valid].astype(whole.dtype))
            window = scene.read(11, 13, 50, 60)[0]
            np.testing.assert_array_equal(window, whole[:, 11:61, 13:73])
