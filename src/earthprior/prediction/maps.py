"""Maps on disk: a scene's classes, probabilities or values as GeoTIFFs on its grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from earthprior.chips.scene import Map, Scene, tags_of, write_map
from earthprior.palette import class_colours
from earthprior.prediction.scenes import MapModel, Rows, Tiling, map_rows

TAG = "EARTHPRIOR_PREDICTION"
"""Of a map: what it was made of, so that a second call knows whether it is to be made again."""

NO_CLASS = 255
"""Where there is no data, unless it is a class."""


@dataclass(frozen=True)
class Legend:
    """What stands in a map of classes.

    Attributes:
        values: Per class, in the order of the model's channels: its label value where all are numbers that a byte can
            hold, else 0, 1, 2, ...
        names: Per class.
        nodata: Where there is no data.
        colours: Per value.
    """

    values: tuple[int, ...]
    names: tuple[str, ...]
    nodata: int
    colours: Mapping[int, tuple[int, int, int]]

    @classmethod
    def of(cls, classes: Sequence[str | int]) -> Legend:
        """The legend of a model's classes."""
        numbers = [name for name in classes if isinstance(name, int) and 0 <= name <= 255]
        values = tuple(numbers) if len(numbers) == len(classes) < 256 else tuple(range(len(classes)))
        nodata = max(set(range(256)) - set(values))
        return cls(
            values, tuple(str(name) for name in classes), nodata,
            dict(zip(values, class_colours(classes), strict=True)),
        )  # fmt: skip

    def coded(self, rows: Rows) -> NDArray[np.uint8]:
        """The most probable class of each pixel, (1, n, W)."""
        found = np.full(rows.valid.shape, self.nodata, np.uint8)
        if rows.values is not None:
            likeliest = np.array(self.values, np.uint8)[rows.values.argmax(axis=0)]
            found[rows.valid] = likeliest[rows.valid]
        return found[None]


@dataclass(frozen=True)
class Product:
    """One file that is made of a scene.

    Attributes:
        path: Where.
        dtype: NumPy's name.
        names: Of its bands.
        nodata: Where there is no data.
        tags: Kept in the file.
        colours: Per value, or None.
        values: Of finished rows, (bands, n, W).
    """

    path: Path
    dtype: str
    names: tuple[str, ...]
    nodata: float
    tags: Mapping[str, str]
    colours: Mapping[int, tuple[int, int, int]] | None
    values: Callable[[Rows], NDArray[Any]]

    @property
    def is_done(self) -> bool:
        """Whether it is there, and made of the same."""
        return self.path.is_file() and tags_of(self.path).get(TAG) == self.tags[TAG]


def classes_product(path: Path, classes: Sequence[str | int], made_of: str) -> Product:
    """The map of the most probable classes."""
    legend = Legend.of(classes)
    named = {f"CLASS_{value}": name for value, name in zip(legend.values, legend.names, strict=True)}
    return Product(path, "uint8", ("class",), legend.nodata, {TAG: made_of, **named}, legend.colours, legend.coded)


def probabilities_product(path: Path, classes: Sequence[str | int], made_of: str) -> Product:
    """A band per class; of two classes one band, the second's, as the first's is 1 less that."""
    first = 1 if len(classes) == 2 else 0
    names = tuple(f"probability of {name}" for name in classes[first:])
    return Product(
        path, "float32", names, float("nan"), {TAG: made_of}, None, lambda rows: _blanked(rows, first, len(names))
    )


def values_product(path: Path, name: str, made_of: str) -> Product:
    """A quantity per pixel."""
    return Product(path, "float32", (name,), float("nan"), {TAG: made_of}, None, lambda rows: _blanked(rows, 0, 1))


def _blanked(rows: Rows, first: int, count: int) -> NDArray[np.float32]:
    """Channels from `first` on, NaN where there is no data."""
    if rows.values is None:
        return np.full((count, *rows.valid.shape), np.nan, np.float32)
    return np.where(rows.valid, rows.values[first:], np.float32(np.nan))


def write_products(
    products: Sequence[Product],
    scene: Scene,
    model: MapModel,
    tiling: Tiling,
    channels: int,
    device: torch.device,
) -> Iterator[int]:
    """Write all products of a scene; all are complete, or none that was not there before.

    Yields:
        Pixels done, after every strip.

    Raises:
        ChipError: The scene is damaged.
    """
    with ExitStack() as stack:
        # The first is finished last: where it is there, all are.
        maps: list[tuple[Product, Map]] = [
            (product, stack.enter_context(_open(product, scene))) for product in products
        ]
        for rows in map_rows(scene, model, tiling, channels, device):
            for product, target in maps:
                target.write(rows.left, product.values(rows))
            yield rows.valid.size


def _open(product: Product, scene: Scene) -> Any:
    return write_map(
        product.path, scene.grid, product.dtype, product.names, product.nodata, product.tags, product.colours
    )
