"""Tiny seeded chips for every test, and the real ones where they are at hand."""

from __future__ import annotations

import os

# Before numpy and torch are imported: two test workers with a thread pool each would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import csv
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.transform import from_origin
from scipy.ndimage import gaussian_filter

from earthprior.params import Params, load, parse, read_mapping

ROOT = Path(__file__).parents[1]
BAND_NAMES = ("red", "green", "blue", "nir")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test before may have left torch another number of threads, which changes how sums round."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def _write_chip(
    path: Path,
    pixels: NDArray[Any],
    *,
    x: float = 500_000.0,
    y: float = 5_000_000.0,
    pixel_m: float = 5.0,
    crs: str | None = "EPSG:32614",
    nodata: float | None = None,
    descriptions: tuple[str, ...] | None = None,
    **profile: Any,
) -> Path:
    """Write (C, H, W) as a GeoTIFF whose upper left corner lies at x, y."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    place = {"crs": crs, "transform": from_origin(x, y, pixel_m, pixel_m)} if crs else {}
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=pixels.dtype, nodata=nodata,
        **place, **profile,
    ) as target:  # fmt: skip
        target.write(pixels)
        if descriptions:
            target.descriptions = descriptions
    return path


def _smooth_pixels(seed: int, bands: int, size: int, dtype: str) -> NDArray[Any]:
    """Spatially correlated pixels (bands, size, size), all above 0, in a plausible range of the dtype."""
    noise = np.random.default_rng(seed)
    shared = gaussian_filter(noise.standard_normal((size, size)), 3.0, mode="wrap")
    own = gaussian_filter(noise.standard_normal((bands, size, size)), (0.0, 1.5, 1.5), mode="wrap")
    field = shared / shared.std() + 0.5 * own / own.std() + 0.05 * noise.standard_normal(own.shape)
    mean, spread = {"uint8": (120.0, 30.0)}.get(dtype, (2000.0, 400.0))
    levels = mean * (1.0 + 0.2 * np.arange(bands)[:, None, None] / bands) + spread * field
    top = np.iinfo(dtype).max if np.issubdtype(np.dtype(dtype), np.integer) else 1e4
    return np.clip(levels, 1, top).astype(dtype)


@pytest.fixture(scope="session")
def make_chips() -> Callable[..., Path]:
    """A function that writes a catalog and its chips.

    `make_chips(folder, n=12, size=32, bands=4, dtype="uint16", labels=False, nodata=None, seed=0)` writes
    folder/chips/chip_000.tif ..., folder/catalog.csv (image, usage, group; every third row validate, the others train)
    and returns the folder. Chips lie apart on the ground. With `labels`, rasters of classes 0 and 1 that follow the
    first band, in the column `label`. With `nodata`, it is declared and the upper left quarter filled with it.
    """

    def make(
        folder: Path,
        n: int = 12,
        size: int = 32,
        bands: int = 4,
        dtype: str = "uint16",
        labels: bool = False,
        nodata: float | None = None,
        seed: int = 0,
    ) -> Path:
        names = BAND_NAMES if bands == len(BAND_NAMES) else tuple(f"band_{number}" for number in range(bands))
        rows = []
        for index in range(n):
            pixels = _smooth_pixels(1000 * seed + index, bands, size, dtype)
            place = {"x": 500_000.0 + index * 2 * size * 5.0, "y": 5_000_000.0}
            row = {
                "image": f"chips/chip_{index:03d}.tif",
                "usage": "validate" if index % 3 == 2 else "train",
                "group": f"g{index}",
            }
            if labels:
                label = (pixels[:1] > np.median(pixels[0])).astype(np.uint8)
                row["label"] = f"labels/chip_{index:03d}.tif"
                _write_chip(folder / row["label"], label, **place)
            if nodata is not None:
                pixels[:, : size // 2, : size // 2] = nodata
            _write_chip(folder / row["image"], pixels, nodata=nodata, descriptions=names, **place)
            rows.append(row)
        with (folder / "catalog.csv").open("w", newline="") as handle:
            writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return folder

    return make


@pytest.fixture
def write_chip() -> Callable[..., Path]:
    """A function that writes one GeoTIFF: `write_chip(path, pixels (C, H, W), x=..., y=..., nodata=..., ...)`."""
    return _write_chip


@pytest.fixture
def make_params() -> Callable[..., Params]:
    """A function from dotted overrides to Params: the committed params.yaml, cut down to 32 px chips and one epoch."""

    def make(overrides: Mapping[str, Any] | None = None) -> Params:
        content = read_mapping(ROOT / "params.yaml")
        small = {
            "data.chip_size": 32, "data.crop_px": 16, "batch_size": 4, "val_batch_size": 4, "epochs": 1,
            "warmup_epochs": 0, "unet_film.channels": [8, 16], "unet_film.blocks": 1, "operation.readers": 2,
        }  # fmt: skip
        for key, value in {**small, **(overrides or {})}.items():
            *sections, last = key.split(".")
            target = content
            for section in sections:
                target = target[section]
            target[last] = value
        return parse(content, "params.yaml")

    return make


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory, make_chips: Callable[..., Path]) -> Path:
    """A project of a dozen chips, to be read only."""
    root = tmp_path_factory.mktemp("tiny")
    make_chips(root / "data", n=12, size=32)
    return root


@pytest.fixture
def make_tiny(tiny_root: Path, make_params: Callable[..., Params]) -> Callable[..., Any]:
    """A function from overrides, with double underscores for dots, to a `Tiny` training on the chips of tiny_root."""
    # Here, because it imports torch, which most tests of files and tables do without.
    from tiny_training import TINY, Tiny

    def make(**overrides: Any) -> Tiny:
        changed = {key.replace("__", "."): value for key, value in overrides.items()}
        return Tiny(tiny_root, make_params({**TINY, **changed}))

    return make


@pytest.fixture
def tiny(make_tiny: Callable[..., Any]) -> Any:
    """The `Tiny` training as it is."""
    return make_tiny()


@pytest.fixture
def make_finished(make_params: Callable[..., Params], tmp_path: Path) -> Callable[..., Any]:
    """A function from overrides, with double underscores for dots, to a `Finished` pretraining in tmp_path."""
    from finished import SMALL, finish

    def make(**overrides: Any) -> Any:
        changed = {key.replace("__", "."): value for key, value in overrides.items()}
        return finish(make_params({**SMALL, **changed}), tmp_path)

    return make


@pytest.fixture(scope="session")
def whole_run_cache() -> dict[str, Any]:
    return {}


@pytest.fixture
def whole_run(tiny: Any, tmp_path: Path, whole_run_cache: dict[str, Any]) -> Any:
    """The bits of that training, which nobody disturbed."""
    from tiny_training import final_bits, train

    if not whole_run_cache:
        trainer = tiny.trainer()
        whole_run_cache["bits"] = final_bits(trainer, train(trainer, tmp_path / "whole"))
    return whole_run_cache["bits"]


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory, make_chips: Callable[..., Path]) -> Path:
    """A root with a dozen labelled chips; the first test that needs statistics leaves them there."""
    root = tmp_path_factory.mktemp("measured")
    make_chips(root / "data", n=12, size=32, labels=True)
    return root


@pytest.fixture
def make_project(
    measured: Path, make_params: Callable[..., Params], tmp_path: Path
) -> Callable[..., tuple[Path, Params]]:
    """A function that makes a root after the stage stats, and its params.

    `make_project(root=tmp_path / "project", **overrides)`, with double underscores for dots in the overrides.
    """
    from earthprior.files import write_json
    from earthprior.stages import stats
    from tiny_training import TINY

    def make(root: Path = tmp_path / "project", **overrides: Any) -> tuple[Path, Params]:
        params = make_params(
            {**TINY, "threads": 1, "operation.checkpoint_every_seconds": 0}
            | {key.replace("__", "."): value for key, value in overrides.items()}
        )
        if not (measured / "results").exists():
            stats.run(params, measured)
        shutil.copytree(measured, root)
        write_json(root / "params.yaml", params.model_dump(mode="json"))  # JSON is YAML
        return root, load(root / "params.yaml")

    return make


@pytest.fixture(scope="session")
def prepared_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with its schema: making one takes seconds, copying it milliseconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").get_experiment_by_name("x")
    return path


@pytest.fixture
def own_store_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what a developer's shell says of MLflow and DVC, and without long waits."""
    from earthprior import mirror

    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "DVC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.05)


@pytest.fixture
def tracked_root(tmp_path: Path, prepared_database: Path) -> Path:
    """An empty project with an MLflow store."""
    home = tmp_path / "project"
    home.mkdir()
    shutil.copy(prepared_database, home / "mlflow.db")
    return home


@pytest.fixture
def real_data() -> Path:
    """The folder of real chips; tests that need it skip where it is missing."""
    folder = ROOT.parent / "shared/data"
    if not (folder / "quirks").is_dir():
        pytest.skip("no real chips beside this checkout")
    return folder
