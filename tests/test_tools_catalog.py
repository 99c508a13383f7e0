"""The catalog tool splits by location: no ground is trained on and validated on."""

from __future__ import annotations

import csv
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from earthprior.chips.catalog import load_catalog
from earthprior.chips.georeference import overlaps_between
from earthprior.errors import DataError
from earthprior.files import sha256_file
from earthprior.tools import catalog, check

PIXELS = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open() as handle:
        return list(csv.DictReader(handle))


@pytest.fixture
def scattered(tmp_path, write_chip):
    """Thirty places far apart, two dates each; every third place has a neighbour that overlaps it by half."""
    folder = tmp_path / "chips"
    for place in range(30):
        for date in ("2019", "2020"):
            x = 500_000.0 + 1000.0 * place
            write_chip(folder / date / f"p{place:02d}.tif", PIXELS, x=x)
            if place % 3 == 0:
                write_chip(folder / date / f"p{place:02d}b.tif", PIXELS, x=x + 20.0)
    return folder


def test_groups_stay_together(scattered):
    rows = table_of(catalog.run(scattered, validate_fraction=0.2, test_fraction=0.1, seed=3))
    assert len(rows) == 80
    usages = defaultdict(set)
    for row in rows:
        usages[Path(row["image"]).stem[:3]].add((row["usage"], row["group"]))
    assert all(len(found) == 1 for found in usages.values())
    assert len({group for found in usages.values() for _, group in found}) == 30
    counts = {usage: sum(row["usage"] == usage for row in rows) for usage in ("train", "validate", "test")}
    assert abs(counts["validate"] - 16) <= 4
    assert abs(counts["test"] - 8) <= 4
    assert rows[0]["crs"] == "EPSG:32614"
    assert (float(rows[0]["x"]), float(rows[0]["y"])) == (500_020.0, 4_999_980.0)


def test_the_hashes_it_writes_find_a_chip_that_changed(tmp_path, make_chips, make_params):
    folder = make_chips(tmp_path / "data")
    rows = table_of(catalog.run(folder, force=True))
    assert all(row["sha256"] == sha256_file(folder / row["image"]) for row in rows)
    check.run(make_params(), tmp_path)
    changed = rows[5]["image"]
    (folder / changed).write_bytes((folder / changed).read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=rf"{changed} \(catalog line 7\): is not the file that the catalog was written"):
        check.run(make_params(), tmp_path)


def test_same_seed_same_catalog(scattered, tmp_path):
    contents = [catalog.run(scattered, tmp_path / "c.csv", 0.2, seed, force=True).read_text() for seed in (0, 0, 1)]
    assert contents[0] == contents[1] != contents[2]


def test_what_it_writes_can_be_loaded(scattered, make_params):
    catalog.run(scattered)
    found = load_catalog(make_params({"data.dir": "chips"}).data, scattered.parent)
    assert all((scattered / row.images[0]).is_file() for row in found.rows)


def test_refuses_to_overwrite(scattered):
    path = catalog.run(scattered)
    before = path.read_bytes()
    with pytest.raises(DataError, match="Use --force"):
        catalog.run(scattered, seed=1)
    assert path.read_bytes() == before
    catalog.run(scattered, seed=1, force=True)
    assert path.read_bytes() != before


@pytest.mark.parametrize("step", [1.0, 0.5])
def test_wall_to_wall_areas_are_split_in_blocks(step):
    boxes = [(x * step, y * step, x * step + 1, y * step + 1) for x in range(30) for y in range(30)]
    crs = ["a"] * len(boxes)
    split = catalog.split_by_location(crs, boxes, {"validate": 0.2, "test": 0.1}, seed=0)
    count = len(boxes)
    assert split.usages.count("validate") == pytest.approx(0.2 * count, rel=0.3)
    assert split.usages.count("test") == pytest.approx(0.1 * count, rel=0.5)
    assert split.usages.count(None) < 0.25 * count
    assert (split.usages.count(None) > 0) == (step < 1)
    left = [position for position, usage in enumerate(split.usages) if usage]
    ranks = [("train", "validate", "test").index(split.usages[position]) for position in left]
    assert overlaps_between(["a"] * len(left), [boxes[position] for position in left], ranks).pairs == 0
    assert "blocks" in split.notes[0]


def test_chips_of_one_place_cannot_be_split(tmp_path, write_chip):
    for date in range(5):
        write_chip(tmp_path / f"d{date}.tif", PIXELS)
    with pytest.raises(DataError, match="5 chips in 1 groups cannot be split: nothing is left for validate"):
        catalog.run(tmp_path)


def test_chips_without_a_place(tmp_path, write_chip, capsys):
    for number in range(10):
        write_chip(tmp_path / f"d{number}.tif", PIXELS, crs=None)
    rows = table_of(catalog.run(tmp_path))
    assert sum(row["usage"] == "validate" for row in rows) == 2
    assert len({row["group"] for row in rows}) == 10
    assert "10 of 10 chips have no place" in capsys.readouterr().err


def test_folders_it_cannot_use(tmp_path, write_chip):
    with pytest.raises(DataError, match="is not a folder"):
        catalog.run(tmp_path / "none")
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match=r"a\.png is not a folder\. Name the folder"):
        catalog.run(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"no chips \(\*\.tif\) below .*found 1 \.png"):
        catalog.run(tmp_path)
    write_chip(tmp_path / "b.tif", PIXELS)
    (tmp_path / "c.tif").write_text("<html>")
    with pytest.raises(DataError, match=r"1 of 2 files below .*\n  c\.tif: is not a GeoTIFF"):
        catalog.run(tmp_path)
    with pytest.raises(DataError, match="leave some chips"):
        catalog.run(tmp_path, validate_fraction=0.6, test_fraction=0.4)
    with pytest.raises(DataError, match="image paths are relative to the catalog"):
        catalog.run(tmp_path, tmp_path / "below/catalog.csv")


def test_real_chips(tmp_path, real_data):
    for name, chips in (("naip_prairie_5m_224", 120), ("naip_urban_trees_224", 470)):
        shutil.copytree(real_data / name / "images", tmp_path / name / "images")
        rows = table_of(catalog.run(tmp_path / name))
        known = {row["image"]: row for row in table_of(real_data / name / "catalog.csv")}
        assert len(rows) == chips
        groups = defaultdict(set)
        for row in rows:
            assert float(row["x"]) == pytest.approx(float(known[row["image"]]["x"]), abs=1e-3)
            groups[row["group"]].add(row["usage"])
        assert all(len(usages) == 1 for usages in groups.values())
