"""Whatever is read is taken or refused in words: no other exception, no connection, no process, no memory without end.

The long version is benchmarks/soak_inputs.py.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.errors import RasterioIOError

import hostile
import hostile_tiff
from earthprior.chips.catalog import ChipRow
from earthprior.chips.problems import ChipError
from earthprior.chips.read import ChipSpec, chip_header, inspect_chip
from hostile_text import MARK, PLACE

FEW = 12
"""Inputs of each kind; 200 in all."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    hostile.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def listener() -> Iterator[hostile.Listener]:
    with hostile.Listener() as listening:
        yield listening


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "soak_inputs", Path(__file__).parents[1] / "benchmarks/soak_inputs.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# GDAL's crashes would end the tests: those of GeoTIFFs run in a child, below.
@pytest.mark.parametrize("name", [name for name in hostile.KINDS if name != "GeoTIFFs"])
def test_an_input_is_taken_or_refused_in_words(project: Path, listener: hostile.Listener, name: str) -> None:
    kind = hostile.KINDS[name]

    @settings(max_examples=FEW, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**64 - 1))
    def read(number: int) -> None:
        content = hostile.make(kind, number, project, listener.place)
        with hostile.audited() as audit:
            assert hostile.feed(kind, project, content) in ("accepted", "refused")
        assert (audit.connected, audit.started, audit.unpickled) == ([], [], [])

    read()
    assert listener.connections == 0
    assert not [path for folder in (project, Path.cwd()) for path in folder.rglob(MARK) if ".venv" not in path.parts]


def test_geotiffs_and_catalogs_in_children(
    soak: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--count", "200", "--kind", "GeoTIFFs", "--keep", str(tmp_path / "kept")]
    assert soak.main(options) == 0, capsys.readouterr().out
    row = dict(zip(soak.COLUMNS, capsys.readouterr().out.splitlines()[1].removeprefix("GeoTIFFs").split(), strict=True))
    assert int(row["inputs"]) == 200
    assert int(row["accepted"]) > 20
    assert int(row["refused"]) > 20


def kill(folder: Path, content: bytes) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def connect(folder: Path, content: bytes) -> None:
    host, _, port = content.decode().partition(":")
    socket.create_connection((host, int(port))).close()


def start(folder: Path, content: bytes) -> None:
    subprocess.run([sys.executable, "-c", "pass"], check=True)


def fill(folder: Path, content: bytes) -> None:
    bytearray(b"x" * (600 * 2**20))


def fail(folder: Path, content: bytes) -> None:
    raise KeyError("evil")


def unpickle(folder: Path, content: bytes) -> None:
    pickle.loads(content)


def test_what_the_soak_is_there_to_find_is_found(
    soak: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostile, "prepare", lambda folder: None)
    readers = {"kill": kill, "connect": connect, "start": start, "fill": fill, "unpickle": unpickle, "raise": fail}
    content = {"connect": PLACE.encode(), "unpickle": pickle.dumps(print)}

    def made(name: str) -> Callable[[random.Random, Path], bytes]:
        return lambda draw, folder: content.get(name, b"x")

    evil = {name: hostile.Kind(made(name), read, 1) for name, read in readers.items()}
    assert soak.main(["--count", "12", "--keep", str(tmp_path / "kept")], evil) == 1
    out = capsys.readouterr().out
    # Two inputs each. A connection is heard thrice: looked up, begun, and at the listener.
    for words in (
        "kill: 2 deaths",
        "connect: 6 connections",
        "start: 2 started",
        "fill: 1 filled",
        "unpickle: 2 unpickled",
    ):
        assert words in out
    assert "raise: 2 other" in out
    kept = {path.name.partition("-")[0] for path in (tmp_path / "kept").glob("*.bin")}
    assert kept == set(readers)


SIDECAR = f"""<PAMDataset><Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">/vsicurl/http://{PLACE}/x.tif</MDI>
</Metadata><PAMRasterBand band="1"><NoDataValue>7</NoDataValue></PAMRasterBand></PAMDataset>"""


@pytest.mark.parametrize(
    ("name", "text", "followed"),
    [
        ("x.tif", hostile_tiff.VRT, True),
        ("x.tif", hostile_tiff.WMS, True),
        ("good.tif.ovr", hostile_tiff.VRT, True),
        # Which GDAL 3.10 does not follow either, where nodata says what is masked.
        ("good.tif.msk", hostile_tiff.VRT, False),
        ("good.tif.aux.xml", SIDECAR, False),
    ],
    ids=["vrt", "wms", "ovr", "msk", "aux"],
)
def test_gdal_would_go_there_but_is_not_let(tmp_path: Path, name: str, text: str, followed: bool) -> None:
    (tmp_path / "good.tif").write_bytes(hostile_tiff.good_tiffs()[0].replace(PLACE.encode(), b"127.0.0.1:00009"))
    spec = ChipSpec(hostile_tiff.BANDS, 16, 0, None)
    with hostile.Listener() as listening:
        (tmp_path / name).write_text(text.replace(PLACE, listening.place))
        tif = name.removesuffix(".ovr").removesuffix(".msk").removesuffix(".aux.xml")
        row = ChipRow(2, "train", (tif,), {})
        if tif == name:
            with pytest.raises(ChipError, match="is not a GeoTIFF"):
                inspect_chip(tmp_path, row, spec)
            with pytest.raises(ChipError, match="is not a GeoTIFF"):
                chip_header(tmp_path, tif)
        else:
            found = inspect_chip(tmp_path, row, spec)
            assert found.pixels.shape == (4, 16, 16)
        assert listening.connections == 0
        # That the listener would have heard it: rasterio, left to itself.
        try:
            with rasterio.open(tmp_path / tif) as source:
                source.overviews(1)
                source.read_masks(1)
                source.read(1, out_shape=(4, 4))
        except RasterioIOError:
            pass
        time.sleep(0.2)
        assert listening.connections > 0 or not followed
