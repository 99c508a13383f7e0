"""A catalog is right as a whole, or every fault is named with its line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from earthprior.chips.catalog import load_catalog, path_fault, scan_catalog
from earthprior.errors import DataError

GOOD = "image,usage\na.tif,train\nb.tif,validate\n"


@pytest.fixture
def load(tmp_path, make_params):
    def load_text(text: str | bytes, **overrides):
        data = make_params({"data.dir": "chips", **overrides}).data
        (tmp_path / "chips").mkdir(exist_ok=True)
        content = text.encode() if isinstance(text, str) else text
        (tmp_path / "chips/catalog.csv").write_bytes(content)
        return load_catalog(data, tmp_path)

    return load_text


def test_rows_lines_and_splits(load):
    catalog = load("image,usage,city\na.tif,train,NA\n\nb.tif,validate,007\nc.tif,test,\nd.tif,train,x\n")
    assert [row.line for row in catalog.rows] == [2, 4, 5, 6]
    assert [row.images for row in catalog.split("train")] == [("a.tif",), ("d.tif",)]
    # Text stays text: no missing values, no numbers.
    assert [row.values["city"] for row in catalog.rows] == ["NA", "007", "", "x"]
    assert [row.line for row in catalog.without([2, 5]).rows] == [4, 6]


def test_several_image_columns(load):
    text = "red,usage,nir\nr.tif,train,n.tif\nr2.tif,validate,n2.tif\n"
    catalog = load(text, **{"data.image_columns": ["nir", "red"]})
    assert catalog.rows[0].images == ("n.tif", "r.tif")


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + GOOD, GOOD.replace("\n", "\r\n"), GOOD.replace("\n", "\r"), GOOD.replace("a.tif", '"a.tif"'),
        GOOD.rstrip("\n"), GOOD.replace("\n", "\n\n,\n"), "\n" + GOOD,
    ],
)  # fmt: skip
def test_other_ways_to_write_csv(load, text):
    assert [row.images[0] for row in load(text).rows] == ["a.tif", "b.tif"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", ["catalog.csv is empty"]),
        (b"\n\n", ["catalog.csv is empty"]),
        (b"image,usage\n\xff,train\n", ["not UTF-8", "byte 12"]),
        (GOOD.replace(",", ";"), ["no column ['usage', 'image']", "separated by ';'"]),
        (GOOD.replace(",", "\t"), ["no column ['usage', 'image']", "separated by a tab"]),
        (GOOD.replace(",", "|"), ["separated by '|'"]),
        (GOOD.encode("utf-16"), ["catalog.csv is UTF-16 text", "CSV UTF-8"]),
        (GOOD.encode("utf-16-le"), ["NUL bytes: is it UTF-16 text?"]),
        ((GOOD + "\u00e4.tif,train\n").encode("latin-1"), ["line 4 is not UTF-8 text (byte 39)"]),
        (GOOD + "x\0.tif,train\n", ["line 4", "control character"]),
        (GOOD + "x" * 10_000_000 + ",train\n", ["line 4: the row is longer than 1,048,576 characters"]),
        (GOOD + '"' + "x" * 200_000 + '",train\n', ["line 4: field larger than field limit"]),
        (GOOD + '"a\n",' * 300_000, ["line 4: the row is longer"]),
        (GOOD + "x" * 5000 + ".tif,train\n", ["line 4", "has more than 4,096 characters"]),
        (",".join(map(str, range(2000))) + "\n", ["has 2,000 columns in its first line"]),
        ("image,usage,sha256\na.tif,train,abc\nb.tif,validate,\n", ["line 2", "'abc' is no SHA-256 (64 hexadecimal"]),
        (GOOD.replace("usage", "Usage "), ["no column ['usage']", "Did you mean 'Usage '"]),
        (GOOD.replace("image", "chip"), ["no column ['image']", "data.image_columns"]),
        ("image,usage,usage\na.tif,train,train\n", ["['usage'] appear twice"]),
        (GOOD + "c.tif\n", ["line 4", "1 cells, the header 2"]),
        (GOOD + "c.tif,train,x,y\n", ["line 4", "4 cells"]),
        (GOOD + '"c.tif,train\n', ["line 4", "quotes"]),
        (GOOD + "c.tif,Train \n", ["line 4", "'Train ' is not allowed", "Did you mean 'train'"]),
        (GOOD + "c.tif,val\n", ["Did you mean 'validate'"]),
        (GOOD + ",train\n", ["line 4", "is empty"]),
        (GOOD + "a.tif,validate\n", ["line 4", "train in line 2, which leaks"]),
        ("image,usage\na.tif,train\n", ["no row has usage 'validate'"]),
        ("image,usage\n", ["no row has usage 'train'", "no row has usage 'validate'"]),
    ],
)
def test_faults_are_named(load, text, words):
    with pytest.raises(DataError) as caught:
        load(text)
    for word in words:
        assert word in str(caught.value)


def test_a_million_blank_lines(load):
    catalog = load("image,usage\na.tif,train\n" + "\n" * 1_000_000 + "b.tif,validate\n")
    assert [row.line for row in catalog.rows] == [2, 1_000_003]


def test_hashes_by_column(load):
    sound = "AB" * 32
    one = load(f"image,usage,sha256\na.tif,train,{sound}\nb.tif,validate,\n")
    assert [row.hashes for row in one.rows] == [(sound,), ("",)]
    text = f"red,usage,nir,nir_sha256\nr.tif,train,n.tif,{sound}\nr2.tif,validate,n2.tif,\n"
    assert load(text, **{"data.image_columns": ["red", "nir"]}).rows[0].hashes == ("", sound)
    assert load(GOOD).rows[0].hashes == ()


def test_all_faults_at_once(load):
    with pytest.raises(DataError) as caught:
        load(GOOD + "c.tif,trian\n/d.tif,train\ne.tif\n")
    assert all(f"line {line}" in str(caught.value) for line in (4, 5, 6))


@pytest.mark.parametrize(
    "text",
    [
        ",".join(f"column{index}" for index in range(200_000)) + "\n",
        "x" * 100_000 + ",usage\na.tif,train\n",
        GOOD + "".join(f"{'x' * 100_000}\n" for _ in range(30)),
        GOOD + "".join(f"c.tif,{'t' * 100_000}\n" for _ in range(30)),
        GOOD + "".join(f"/{'c' * 100_000},train\n" for _ in range(30)),
        GOOD + f"{'x' * 200_000},train\n",
    ],
    ids=["columns", "column", "cells", "usages", "paths", "field"],
)
def test_faults_of_giants_are_told_in_a_few_words(load, text):
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        load(text)
    assert len(str(caught.value)) < 10_000
    assert time.monotonic() - began < 10


def test_a_catalog_is_a_regular_file(tmp_path, make_params):
    (tmp_path / "chips").mkdir()
    os.mkfifo(tmp_path / "chips/catalog.csv")
    with pytest.raises(DataError, match=r"catalog\.csv is no regular file"):
        load_catalog(make_params({"data.dir": "chips"}).data, tmp_path)


def test_repeated_chip_in_one_split_only_warns(tmp_path, load, make_params):
    load(GOOD + "a.tif,train\n")
    _, problems = scan_catalog(make_params({"data.dir": "chips"}).data, tmp_path)
    assert [(problem.severity, problem.line) for problem in problems] == [("warning", 4)]


def test_missing_folder_and_file(tmp_path: Path, make_params):
    data = make_params({"data.dir": "chips"}).data
    with pytest.raises(DataError, match="folder chips/ does not exist"):
        load_catalog(data, tmp_path)
    (tmp_path / "chips").mkdir()
    with pytest.raises(DataError, match=r"catalog\.csv not found in chips/"):
        load_catalog(data, tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        "", "/etc/passwd", "../a.tif", "a/../../b.tif", "http://x/a.tif", "/vsicurl/http://x/a.tif", "C:/a.tif",
        "C:a.tif", "GTIFF_DIR:1:a.tif", "STACIT:a.tif", "file:///etc/passwd", "//server/a.tif", "./../a.tif", "..",
        "G_D:1:/vsicurl/http://x/a.tif", "a\0.tif", "a\n.tif", "a\\b.tif", "vrt:///vsicurl/x", " a.tif",
        "a\x9b2J.tif", "a\x7f.tif", "a/" * 4000, "a\u202efit.exe", "a\u2028.tif",
    ],
)  # fmt: skip
def test_refused_paths(path):
    assert path_fault(path)


@pytest.mark.parametrize(
    "path", ["a.tif", "x/y/a.tif", "x..y/a.tif", "2020-01-01T10:00.tif", "ä ö.tif", "\u0645\u200c\u0646.tif"]
)
def test_plain_paths(path):
    assert path_fault(path) is None


def test_real_catalogs(real_data, make_params):
    for name, train, validate in (("naip_prairie_5m_224", 90, 30), ("naip_urban_trees_224", 416, 54)):
        catalog = load_catalog(make_params({"data.dir": name}).data, real_data)
        assert (len(catalog.split("train")), len(catalog.split("validate"))) == (train, validate)
