from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine
from torch import Tensor

from earthprior.chips.scene import open_scene
from earthprior.palette import OKABE_ITO, class_colours
from earthprior.prediction import scenes
from earthprior.prediction.maps import (
    TAG,
    Legend,
    Product,
    classes_product,
    probabilities_product,
    values_product,
    write_products,
)
from earthprior.prediction.scenes import Tiling

CPU = torch.device("cpu")


class PerPixel:
    """A model without context: three classes by the bands' values, and the sizes that it was given."""

    def __init__(self, local: bool = False) -> None:
        self.normalized: list[tuple[int, ...]] = []
        self.predicted: list[tuple[int, ...]] = []
        self._local = local

    def normalize(self, raw: Tensor, valid: Tensor) -> Tensor:
        self.normalized.append(tuple(raw.shape))
        x0 = raw.float() / 100
        if self._local:
            x0 = x0 - x0.mean((2, 3), keepdim=True)
        return torch.where(valid[:, None], x0, 0.0)

    def predict(self, x0: Tensor) -> Tensor:
        self.predicted.append(tuple(x0.shape))
        return x0[:, :3].softmax(1)


def some_pixels(height: int, width: int, dtype: str = "uint8") -> Any:
    return np.random.default_rng(height * width).integers(1, 250, (4, height, width)).astype(dtype)


def mapped(path: Path, out: Path, model: Any, tiling: Tiling, classes: Sequence[Any] = (1, 2, 7)) -> tuple[Any, Any]:
    """The map of classes and the probabilities of a scene."""
    products = [
        classes_product(out / "classes.tif", classes, "x"),
        probabilities_product(out / "probabilities.tif", classes, "x"),
    ]
    with open_scene(path.parent, [path.name]) as scene:
        done = sum(write_products(products, scene, model, tiling, len(classes), CPU))
        assert done == scene.grid.height * scene.grid.width
    found = []
    for product in products:
        with rasterio.open(product.path) as source:
            found.append(source.read())
    return found[0][0], found[1]


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (32, 32), (61, 47), (40, 200)])
@pytest.mark.parametrize("around", [16, 32])
def test_a_model_without_context_is_reproduced_pixel_by_pixel(
    write_chip: Callable[..., Path], tmp_path: Path, shape: tuple[int, int], around: int
) -> None:
    pixels = some_pixels(*shape)
    path = write_chip(tmp_path / "scene.tif", pixels)
    model = PerPixel()
    classes, probabilities = mapped(path, tmp_path / "out", model, Tiling(16, 8, around))
    expected = torch.from_numpy(pixels[:3]).float().div(100).softmax(0).numpy()
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    np.testing.assert_array_equal(classes, np.array([1, 2, 7])[probabilities.argmax(0)])
    assert {size[1:] for size in model.predicted} == {(4, 16, 16)}
    assert {size[2:] for size in model.normalized} == {(min(around, shape[0]), min(around, shape[1]))}


def test_pixels_without_data_get_the_maps_own_nodata_and_change_no_other(
    write_chip: Callable[..., Path], tmp_path: Path
) -> None:
    pixels = some_pixels(60, 70)
    whole = mapped(write_chip(tmp_path / "a.tif", pixels), tmp_path / "a", PerPixel(), Tiling(16, 8, 16))
    holes = pixels.copy()
    holes[:, :20] = holes[:, 30:50, 20:60] = holes[:, :, :3] = 0
    missing = (holes == 0).all(0)
    model = PerPixel()
    classes, probabilities = mapped(
        write_chip(tmp_path / "b.tif", holes, nodata=0), tmp_path / "b", model, Tiling(16, 8, 16)
    )
    assert (classes[missing] == 255).all()
    assert np.isnan(probabilities[:, missing]).all()
    np.testing.assert_array_equal(classes[~missing], whole[0][~missing])
    np.testing.assert_allclose(probabilities[:, ~missing], whole[1][:, ~missing], atol=1e-6)


def test_tiles_without_data_are_not_predicted(write_chip: Callable[..., Path], tmp_path: Path) -> None:
    path = write_chip(tmp_path / "a.tif", np.zeros((4, 40, 40), np.uint8), nodata=0)
    model = PerPixel()
    classes, probabilities = mapped(path, tmp_path, model, Tiling(16, 8, 16))
    assert not model.predicted
    assert (classes == 255).all()
    assert np.isnan(probabilities).all()


def test_where_statistics_are_a_chips_own_a_tile_is_normalized_with_its_surroundings(
    write_chip: Callable[..., Path], tmp_path: Path
) -> None:
    # A scene as large as a chip is normalized as that chip is, so that all tiles agree where they overlap.
    pixels = some_pixels(32, 32)
    path = write_chip(tmp_path / "a.tif", pixels)
    _, probabilities = mapped(path, tmp_path, PerPixel(local=True), Tiling(16, 8, 32))
    x0 = torch.from_numpy(pixels).float() / 100
    expected = (x0 - x0.mean((1, 2), keepdim=True))[:3].softmax(0).numpy()
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)


def test_a_wide_scene_is_worked_through_in_parts_and_none_can_be_seen(
    write_chip: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Context(PerPixel):
        def predict(self, x0: Tensor) -> Tensor:
            return torch.nn.functional.avg_pool2d(super().predict(x0), 9, 1, 4)

    path = write_chip(tmp_path / "a.tif", some_pixels(40, 600))
    whole = mapped(path, tmp_path / "a", Context(), Tiling(16, 8, 24))
    monkeypatch.setattr(scenes, "BAND_BYTES", 1)
    parts = mapped(path, tmp_path / "b", Context(), Tiling(16, 8, 24))
    np.testing.assert_allclose(parts[1], whole[1], atol=1e-6)
    np.testing.assert_array_equal(parts[0], whole[0])


def test_a_map_tells_its_classes_and_what_it_was_made_of(write_chip: Callable[..., Path], tmp_path: Path) -> None:
    transform = Affine(4.3, 2.5, 5e5, 2.5, -4.3, 5e6)
    path = write_chip(tmp_path / "a.tif", some_pixels(20, 20))
    with rasterio.open(path, "r+") as source:
        source.transform = transform
    mapped(path, tmp_path, PerPixel(), Tiling(16, 8, 16), ["water", "crops", "forest"])
    with rasterio.open(tmp_path / "classes.tif") as source:
        assert (source.tags()["CLASS_0"], source.tags()["CLASS_2"], source.tags()[TAG]) == ("water", "forest", "x")
        assert source.transform.almost_equals(transform)
        assert source.crs.to_epsg() == 32614
        assert source.colormap(1)[0][:3] == (0, 114, 178)
    with rasterio.open(tmp_path / "probabilities.tif") as source:
        assert source.descriptions == ("probability of water", "probability of crops", "probability of forest")


def test_of_two_classes_one_probability_is_written(write_chip: Callable[..., Path], tmp_path: Path) -> None:
    class Binary(PerPixel):
        def predict(self, x0: Tensor) -> Tensor:
            return x0[:, :2].softmax(1)

    pixels = some_pixels(20, 20)
    path = write_chip(tmp_path / "a.tif", pixels)
    classes, probabilities = mapped(path, tmp_path, Binary(), Tiling(16, 8, 16), [0, 1])
    assert probabilities.shape == (1, 20, 20)
    np.testing.assert_array_equal(classes, probabilities[0] > 0.5)


def test_a_quantity_is_written_as_it_is(write_chip: Callable[..., Path], tmp_path: Path) -> None:
    class Amount(PerPixel):
        def predict(self, x0: Tensor) -> Tensor:
            return x0[:, :1]

    pixels = some_pixels(20, 20)
    path = write_chip(tmp_path / "a.tif", pixels)
    with open_scene(tmp_path, [path.name]) as scene:
        list(
            write_products(
                [values_product(tmp_path / "v.tif", "biomass", "x")], scene, Amount(), Tiling(16, 8, 16), 1, CPU
            )
        )
    with rasterio.open(tmp_path / "v.tif") as source:
        assert source.descriptions == ("biomass",)
        np.testing.assert_allclose(source.read(1), pixels[0] / 100, rtol=1e-5)


def test_a_product_is_done_when_it_is_there_and_made_of_the_same(
    write_chip: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_chip(tmp_path / "a.tif", some_pixels(20, 20))

    def product(made_of: str) -> Product:
        return classes_product(tmp_path / "classes.tif", (1, 2, 7), made_of)

    assert not product("x").is_done
    mapped(path, tmp_path, PerPixel(), Tiling(16, 8, 16))
    assert product("x").is_done
    assert not product("y").is_done


def test_what_fails_in_the_middle_leaves_nothing(write_chip: Callable[..., Path], tmp_path: Path) -> None:
    class Failing(PerPixel):
        def predict(self, x0: Tensor) -> Tensor:
            if len(self.predicted) > 1:
                raise RuntimeError("out of it")
            return super().predict(x0)

    path = write_chip(tmp_path / "a.tif", some_pixels(100, 100))
    with pytest.raises(RuntimeError):
        mapped(path, tmp_path / "out", Failing(), Tiling(16, 8, 16))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("classes", "values", "nodata"),
    [
        ([1, 2, 7], (1, 2, 7), 255),
        ([0, 255], (0, 255), 254),
        ([0, 300], (0, 1), 255),
        (["water", "land"], (0, 1), 255),
    ],
)
def test_legends(classes: list[Any], values: tuple[int, ...], nodata: int) -> None:
    legend = Legend.of(classes)
    assert (legend.values, legend.nodata) == (values, nodata)
    assert legend.nodata not in legend.values
    assert set(legend.colours) == set(values)


def test_colours_are_all_different_and_those_that_a_name_makes_expect() -> None:
    for count in (3, 8, 9, 40):
        assert len(set(class_colours(list(range(count))))) == count
    names = ["bare soil", "open water", "cropland", "forest", "built-up", "other", "lake"]
    colours = dict(zip(names, class_colours(names), strict=True))
    assert colours["open water"] == OKABE_ITO[0]
    assert colours["forest"] == OKABE_ITO[2]
    assert len(set(colours.values())) == len(names)
