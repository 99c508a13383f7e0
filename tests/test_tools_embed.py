from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
from safetensors.torch import save_file

from earthprior.errors import DataError
from earthprior.files import write_json
from earthprior.loading import load_backbone
from earthprior.params import Params
from earthprior.prediction import embedding
from earthprior.tools import embed
from labelled import backbone_of

PATH = "backbone"


@pytest.fixture
def params(make_params: Any) -> Params:
    found: Params = make_params({"unet_film.attention": False, "unet_film.time_embedding_dim": 16})
    return found


@pytest.fixture
def root(tmp_path: Path, make_chips: Any, params: Params, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with five chips and a backbone, as the working directory."""
    make_chips(tmp_path / "data", n=5, size=32)
    backbone = backbone_of(params)
    (tmp_path / PATH).mkdir()
    save_file(backbone.tensors(), tmp_path / PATH / "backbone.safetensors")
    write_json(tmp_path / PATH / "config.json", backbone.description)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(params: Params, root: Path, **options: Any) -> Path:
    embed.run(params, root, backbone_path=root / PATH, **options)
    return options.get("out") or root / embed.OUT


def test_every_chip_has_a_vector_of_means_and_deviations(
    params: Params, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(embed, "CHIPS_AT_ONCE", 2)
    path = run(params, root)
    table = pd.read_parquet(path)
    catalog = pd.read_csv(root / "data/catalog.csv", dtype=str)
    pd.testing.assert_frame_equal(table.drop(columns="features").astype(str), catalog.astype(str), check_dtype=False)
    assert pq.read_metadata(path).num_row_groups == 3
    facts = json.loads(pq.read_metadata(path).metadata[b"earthprior"])
    vectors = np.stack(table.features)
    assert vectors.shape == (5, len(facts["names"]))
    assert vectors.dtype == np.float32
    assert (facts["fingerprint"], facts["bands"]) == ("f" * 12, ["red", "green", "blue", "nir"])
    backbone = load_backbone(root / PATH)
    assert (facts["t"], facts["rho"]) == (backbone.t, backbone.rho)
    # A chip of 32 px is four crops of 16.
    with rasterio.open(root / "data/chips/chip_003.tif") as source:
        x0 = backbone.normalize(torch.from_numpy(source.read())[None])
    crops = [x0[..., top : top + 16, left : left + 16] for top in (0, 16) for left in (0, 16)]
    with torch.no_grad():
        finest = backbone.features(torch.cat(crops))[0]
    width = finest.shape[1]
    assert facts["names"][0] == "decoder_0_mean_0"
    np.testing.assert_allclose(vectors[3, :width], finest.mean((0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(vectors[3, width : 2 * width], finest.std((0, 2, 3), correction=0), atol=1e-3)


def test_it_is_made_once_and_again_when_a_chip_changes(
    params: Params, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run(params, root)
    time = path.stat().st_mtime_ns
    run(params, root)
    assert "was made before" in capsys.readouterr().err
    assert path.stat().st_mtime_ns == time
    (root / "data/chips/chip_000.tif").touch()
    run(params, root)
    assert path.stat().st_mtime_ns != time


def test_a_bad_chip_is_told_and_left_out_and_one_without_data_has_no_vector(
    params: Params, root: Path, write_chip: Any
) -> None:
    write_chip(root / "data/chips/chip_001.tif", np.zeros((4, 32, 32), np.uint16), nodata=0)
    write_chip(root / "data/chips/chip_002.tif", np.ones((4, 9, 20), np.uint8))
    (root / "data/chips/chip_004.tif").write_text("no")
    for _ in range(2):  # what is not whole is made again
        with pytest.raises(DataError, match=r"1 chip could not be read, .* lacks them") as caught:
            run(params, root)
    assert "chip_004.tif (catalog line 6): is not a GeoTIFF" in str(caught.value)
    table = pd.read_parquet(root / embed.OUT)
    assert list(table.image) == [f"chips/chip_{index:03d}.tif" for index in range(4)]
    assert np.isnan(np.stack(table.features)).all(axis=1).tolist() == [False, True, False, False]
    assert np.isfinite(np.stack(table.features)).all(axis=1).tolist() == [True, False, True, True]


def test_no_other_file_is_replaced_and_no_column_hidden(params: Params, root: Path) -> None:
    other = root / "mine.parquet"
    other.write_text("x")
    with pytest.raises(DataError, match="is no file of features"):
        run(params, root, out=other)
    assert other.read_text() == "x"
    run(params, root, out=other, force=True)
    assert len(pd.read_parquet(other)) == 5
    catalog = root / "data/catalog.csv"
    catalog.write_text(catalog.read_text().replace("group", "features"))
    with pytest.raises(DataError, match="has a column 'features'"):
        run(params, root)
