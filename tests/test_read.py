"""One function reads a chip: exact where the file is right, and a clear refusal where it is not."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import rasterio

from earthprior.chips.catalog import ChipRow
from earthprior.chips.problems import ChipError
from earthprior.chips.read import ChipSpec, chip_header, inspect_chip, read_chip, read_label

SPEC = ChipSpec(("red", "green", "blue", "nir"), chip_size=16, buffer=0, nodata=None)


def row_of(*images: str, **values: str) -> ChipRow:
    return ChipRow(7, "train", images, values)


def pixels_of(dtype="uint16", size=16, bands=4, seed=0):
    return np.random.default_rng(seed).integers(1, 200, (bands, size, size)).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
def test_pixels_come_as_they_are(tmp_path, write_chip, dtype):
    pixels = pixels_of(dtype)
    write_chip(tmp_path / "a.tif", pixels, compress="deflate")
    found, valid = read_chip(tmp_path, row_of("a.tif"), SPEC)
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, pixels)
    assert valid.dtype == bool
    assert valid.all()


def test_out_is_filled(tmp_path, write_chip):
    pixels = pixels_of()
    write_chip(tmp_path / "a.tif", pixels)
    out = np.empty_like(pixels)
    found, _ = read_chip(tmp_path, row_of("a.tif"), SPEC, out)
    assert found is out
    np.testing.assert_array_equal(out, pixels)


def test_nodata_needs_all_bands(tmp_path, write_chip):
    pixels = pixels_of()
    pixels[:, 0, 0] = 0
    pixels[3, 5, 5] = 0
    write_chip(tmp_path / "a.tif", pixels, nodata=0)
    _, valid = read_chip(tmp_path, row_of("a.tif"), SPEC)
    assert not valid[0, 0]
    assert valid[5, 5]
    assert valid.sum() == 255


def test_nodata_of_params_replaces_the_files(tmp_path, write_chip):
    pixels = pixels_of()
    pixels[:, 0, 0] = 0
    pixels[:, 1, 1] = 999
    write_chip(tmp_path / "a.tif", pixels, nodata=0)
    spec = ChipSpec(SPEC.bands, 16, 0, nodata=(999.0, -1.0, float("nan"), 0.5))
    found, valid = read_chip(tmp_path, row_of("a.tif"), spec)
    assert valid[0, 0]
    assert not valid[1, 1]
    assert valid.sum() == 255
    # What is invalid is 0, whatever was there.
    assert (found[:, 1, 1] == 0).all()


def test_not_finite_is_invalid_in_any_band(tmp_path, write_chip):
    pixels = pixels_of("float64")
    pixels[0, 0, 0], pixels[1, 0, 1], pixels[2, 0, 2] = np.nan, -np.inf, 1e300
    write_chip(tmp_path / "a.tif", pixels)
    chip = inspect_chip(tmp_path, row_of("a.tif"), SPEC)
    assert chip.not_finite == (1, 1, 1, 0)
    assert chip.valid.sum() == 253
    assert np.isfinite(chip.pixels.astype(np.float32)).all()


def test_nan_as_nodata(tmp_path, write_chip):
    pixels = pixels_of("float32")
    pixels[:, 0, 0] = np.nan
    write_chip(tmp_path / "a.tif", pixels, nodata=np.nan)
    chip = inspect_chip(tmp_path, row_of("a.tif"), SPEC)
    assert chip.valid.sum() == 255
    assert chip.not_finite == (0, 0, 0, 0)


def test_alpha_is_a_band(tmp_path, write_chip):
    pixels = pixels_of("uint8")
    pixels[3] = 0
    write_chip(tmp_path / "a.tif", pixels, photometric="RGB", ALPHA="YES")
    with rasterio.open(tmp_path / "a.tif") as source:
        assert source.colorinterp[3].name == "alpha"
    found, valid = read_chip(tmp_path, row_of("a.tif"), SPEC)
    assert valid.all()
    np.testing.assert_array_equal(found, pixels)


def test_several_files_stack(tmp_path, write_chip):
    pixels = pixels_of()
    pixels[:2, 3, 3], pixels[2:, 3, 3] = 0, 9
    write_chip(tmp_path / "rg.tif", pixels[:2], nodata=0)
    write_chip(tmp_path / "bn.tif", pixels[2:], nodata=9)
    found, valid = read_chip(tmp_path, row_of("rg.tif", "bn.tif"), SPEC)
    assert not valid[3, 3]
    np.testing.assert_array_equal(found[:, valid], pixels[:, valid])


def test_stacked_files_of_different_places_are_refused(tmp_path, write_chip):
    pixels = pixels_of()
    write_chip(tmp_path / "rg.tif", pixels[:2])
    write_chip(tmp_path / "bn.tif", pixels[2:], x=600_000.0)
    with pytest.raises(ChipError, match="lies elsewhere than"):
        inspect_chip(tmp_path, row_of("rg.tif", "bn.tif"), SPEC)


@pytest.mark.parametrize("size", [16, 18, 20])
def test_buffer_is_real_where_the_file_has_it(tmp_path, write_chip, size):
    pixels = pixels_of(size=size)
    write_chip(tmp_path / "a.tif", pixels)
    found, valid = read_chip(tmp_path, row_of("a.tif"), ChipSpec(SPEC.bands, 16, 2, None))
    rim = (20 - size) // 2
    assert found.shape == (4, 20, 20)
    inside = slice(rim, 20 - rim)
    np.testing.assert_array_equal(found[:, inside, inside], pixels)
    assert valid[inside, inside].all()
    assert valid.sum() == size**2
    assert (found[:, ~valid] == 0).all()


@pytest.mark.parametrize(
    ("pixels", "profile", "words"),
    [
        (
            pixels_of(bands=3),
            {},
            "nir). Write it with these bands; only if all chips are so, list theirs in data.bands, in the files' order",
        ),
        (
            pixels_of(size=32),
            {},
            "asks for 16. Cut it to that size; only if all chips are so, set data.chip_size to 32",
        ),
        (pixels_of(size=17), {}, "is 17 x 17 px"),
        (pixels_of("int32"), {}, "has dtype int32"),
        (pixels_of(), {"descriptions": ("red", "nir", "blue", "green")}, "described as red, nir, blue, green"),
    ],
)
def test_what_params_do_not_say(tmp_path, write_chip, pixels, profile, words):
    write_chip(tmp_path / "a.tif", pixels, **profile)
    with pytest.raises(ChipError) as caught:
        inspect_chip(tmp_path, row_of("a.tif"), SPEC)
    assert str(caught.value).startswith("a.tif (catalog line 7): ")
    assert words in str(caught.value)


@pytest.mark.parametrize("names", [("Red", "GREEN ", "blue", "NIR"), ("b1", "b2", "b3", "b4"), ("red", "", "", "")])
def test_descriptions_that_do_not_contradict(tmp_path, write_chip, names):
    write_chip(tmp_path / "a.tif", pixels_of(), descriptions=names)
    inspect_chip(tmp_path, row_of("a.tif"), SPEC)


@pytest.mark.parametrize("profile", [{}, {"compress": "deflate"}, {"compress": "lzw"}, {"tiled": True}])
@pytest.mark.parametrize("share", [0.95, 0.5, 0.05])
def test_truncation_names_the_file(tmp_path, write_chip, profile, share):
    path = write_chip(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 9999, (4, 16, 16), np.uint16), **profile)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(
        ChipError, match=r"^a\.tif \(catalog line 7\): is (truncated or damaged|not a GeoTIFF)"
    ) as caught:
        read_chip(tmp_path, row_of("a.tif"), SPEC)
    assert "vsimem" not in str(caught.value)
    assert "See previous exception" not in str(caught.value)


VRT = """<VRTDataset rasterXSize="16" rasterYSize="16">
<VRTRasterBand dataType="UInt16" band="1" subClass="VRTRawRasterBand">
<SourceFilename>/etc/passwd</SourceFilename></VRTRasterBand></VRTDataset>"""


@pytest.mark.parametrize(
    ("content", "words"), [("", "is empty"), ("<html></html>", "is not a GeoTIFF"), (VRT, "is not a GeoTIFF")]
)
def test_other_files_named_tif(tmp_path, content, words):
    (tmp_path / "a.tif").write_text(content)
    with pytest.raises(ChipError, match=words):
        read_chip(tmp_path, row_of("a.tif"), SPEC)


def test_missing_folder_and_special_file(tmp_path):
    (tmp_path / "d.tif").mkdir()
    with pytest.raises(ChipError, match="not found"):
        read_chip(tmp_path, row_of("a.tif"), SPEC)
    with pytest.raises(ChipError, match="is a folder, no regular file"):
        read_chip(tmp_path, row_of("d.tif"), SPEC)


def test_no_path_reaches_the_network(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for path in ("http://127.0.0.1:9/a.tif", "/vsicurl/http://127.0.0.1:9/a.tif", "../a.tif", "/etc/passwd"):
        with pytest.raises(ChipError, match="the path"):
            read_chip(tmp_path, row_of(path), SPEC)


def test_sidecars_change_nothing(tmp_path, write_chip):
    pixels = pixels_of()
    path = write_chip(tmp_path / "a.tif", pixels)
    Path(f"{path}.aux.xml").write_text(
        '<PAMDataset><PAMRasterBand band="1"><NoDataValue>7</NoDataValue>'
        "<Description>nir</Description></PAMRasterBand></PAMDataset>"
    )
    chip = inspect_chip(tmp_path, row_of("a.tif"), SPEC)
    assert chip.header.nodata == (None,) * 4
    assert chip.header.descriptions == (None,) * 4
    np.testing.assert_array_equal(chip.pixels, pixels)


def test_a_small_file_that_declares_a_huge_image(tmp_path):
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", count=4, width=100_000, height=100_000, dtype="uint16",
        sparse_ok=True, tiled=True, bigtiff="yes",
    ):  # fmt: skip
        pass
    with pytest.raises(ChipError, match=r"(is 100000 x 100000 px|far more than)"):
        read_chip(tmp_path, row_of("a.tif"), SPEC)


def test_text_that_is_not_utf8_is_a_fault_of_the_chip(tmp_path, write_chip):
    content = write_chip(tmp_path / "a.tif", pixels_of(), descriptions=SPEC.bands).read_bytes()
    assert content.count(b">nir<") == 1
    (tmp_path / "b.tif").write_bytes(content.replace(b">nir<", b">\xff\xfe\xfd<"))
    with pytest.raises(ChipError, match=r"^b\.tif \(catalog line 7\): is truncated or damaged \('utf-8' codec"):
        inspect_chip(tmp_path, row_of("b.tif"), SPEC)
    with pytest.raises(ChipError, match=r"^b\.tif: is truncated or damaged \('utf-8' codec"):
        chip_header(tmp_path, "b.tif")


def test_nodata_that_no_pixel_can_hold_masks_nothing(tmp_path, write_chip):
    content = write_chip(tmp_path / "a.tif", pixels_of(), nodata=123).read_bytes()
    assert content.count(b"123\0") == 1
    for text in (b"inf\0", b"nan\0", b"1e9\0", b"0.5\0", b"x\0\0\0"):
        (tmp_path / "b.tif").write_bytes(content.replace(b"123\0", text))
        assert read_chip(tmp_path, row_of("b.tif"), SPEC)[1].all()


@pytest.mark.parametrize("size", [np.nan, np.inf, 0.0])
def test_a_chip_without_extent_has_no_place(tmp_path, write_chip, size):
    content = write_chip(tmp_path / "a.tif", pixels_of()).read_bytes()
    assert content.count(struct.pack("<2d", 5, 5)) == 1
    (tmp_path / "b.tif").write_bytes(content.replace(struct.pack("<2d", 5, 5), struct.pack("<2d", size, size)))
    header = inspect_chip(tmp_path, row_of("b.tif"), SPEC).header
    assert (header.bounds, header.crs) == (None, None)


def test_a_files_own_words_are_few_and_harmless_in_a_message(tmp_path, write_chip):
    path = write_chip(tmp_path / "a.tif", pixels_of(), descriptions=("nir", "\x9b2J", "x" * 100_000, "blue"))
    with pytest.raises(ChipError, match="its bands are described as nir, ") as caught:
        inspect_chip(tmp_path, row_of(path.name), SPEC)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_header_is_read_of_nothing_but_small_files(tmp_path):
    with (tmp_path / "a.tif").open("wb") as handle:
        handle.truncate(2**40)
    with pytest.raises(ChipError, match="has 1,048,576 MiB, far more than a chip can need"):
        chip_header(tmp_path, "a.tif")
    os.mkfifo(tmp_path / "b.tif")
    with pytest.raises(ChipError, match="is a named pipe, no regular file"):
        chip_header(tmp_path, "b.tif")


def test_bands_that_are_interleaved_are_decoded_together(tmp_path):
    for interleave, words in (("pixel", "has blocks of"), ("band", "has 200 bands")):
        with rasterio.open(
            tmp_path / "a.tif", "w", driver="GTiff", count=200, width=16, height=16, dtype="float64", tiled=True,
            blockxsize=256, blockysize=256 if interleave == "band" else 2048, interleave=interleave, sparse_ok=True,
        ):  # fmt: skip
            pass
        with pytest.raises(ChipError, match=words):
            read_chip(tmp_path, row_of("a.tif"), SPEC)


def test_label(tmp_path, write_chip):
    label = pixels_of("uint8", bands=1)
    label[0, 0, 0] = 0
    write_chip(tmp_path / "l.tif", label, nodata=0)
    np.testing.assert_array_equal(read_label(tmp_path, row_of("a.tif", label="l.tif"), "label", SPEC), label[0])
    assert read_label(tmp_path, row_of("a.tif", label=""), "label", SPEC) is None
    numbers = label.astype("float32")
    numbers[0, 0, 1] = np.nan
    write_chip(tmp_path / "l.tif", numbers, nodata=np.nan)
    np.testing.assert_array_equal(read_label(tmp_path, row_of("a.tif", label="l.tif"), "label", SPEC), numbers[0])
    write_chip(tmp_path / "l.tif", pixels_of("uint8", bands=2))
    with pytest.raises(ChipError, match="has 2 bands"):
        read_label(tmp_path, row_of("a.tif", label="l.tif"), "label", SPEC)


def test_header(tmp_path, write_chip):
    path = write_chip(tmp_path / "a.tif", pixels_of(), x=1000.0, y=2000.0, nodata=3, descriptions=SPEC.bands)
    header, sha256 = chip_header(tmp_path, path.name)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert header.bounds == (1000.0, 1920.0, 1080.0, 2000.0)
    assert (header.crs, header.dtype, header.nodata[0]) == ("EPSG:32614", "uint16", 3.0)
    write_chip(tmp_path / "b.tif", pixels_of(), crs=None)
    assert chip_header(tmp_path, "b.tif")[0].bounds is None


def test_real_quirks(real_data):
    folder = real_data / "quirks"
    nir, valid = read_chip(folder, row_of("nir_tagged_alpha_256.tif"), ChipSpec(SPEC.bands, 256, 0, None))
    assert valid.all()
    assert nir[3].std() > 5
    ten = tuple("abcdefghij")
    hls, _ = read_chip(folder, row_of("hls_10band_float32_nodata-9999_224.tif"), ChipSpec(ten, 224, 0, None))
    assert hls.dtype == np.float32
    spec = ChipSpec(SPEC.bands, 224, 0, None)
    for name in ("float64_4band_cog_epsg4326.tif", "landsat_swir_nir_red_green_uint8_epsg4326_nodata0.tif"):
        with pytest.raises(ChipError, match=r"data\.chip_size asks for 224"):
            read_chip(folder, row_of(name), spec)
    # NIR is 0 over open water while 0 is the declared nodata: a real pixel.
    prairie = real_data / "naip_prairie_5m_224/images"
    chips = [read_chip(prairie, row_of(path.name), spec) for path in prairie.glob("prairie_20140720*.tif")]
    assert sum((pixels[3][valid] == 0).sum() for pixels, valid in chips) > 1000
    assert all(valid.all() for _, valid in chips)
