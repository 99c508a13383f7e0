"""What lies under a chip's name and is no chip: it is said what it is, with the way out, before GDAL sees a byte."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import rasterio

from earthprior.chips.catalog import ChipRow
from earthprior.chips.problems import ChipError
from earthprior.chips.read import ChipSpec, inspect_chip, read_chip

ROOT = Path(__file__).parents[1]
SPEC = ChipSpec(("red", "green", "blue"), chip_size=16, buffer=0, nodata=None)
PIXELS = np.random.default_rng(0).integers(1, 200, (3, 16, 16)).astype(np.uint8)


def row_of(*images: str, hashes: tuple[str, ...] = ()) -> ChipRow:
    return ChipRow(17, "train", images, {}, hashes)


def fault_of(folder: Path, image: str = "a.tif", spec: ChipSpec = SPEC) -> str:
    with pytest.raises(ChipError) as caught:
        inspect_chip(folder, row_of(image), spec)
    assert str(caught.value).startswith(f"{image} (catalog line 17): ")
    return caught.value.problem.what


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "is a Git LFS pointer"),
        (b"outs:\n- md5: a304afb96060aad90176268345e10355\n  path: a.tif\n", r"is a DVC pointer \(\.dvc\)"),
        (b'<VRTDataset rasterXSize="16" rasterYSize="16">', "is a VRT"),
        (b'<GDAL_WMS><Service name="TMS"><ServerUrl>http://x/</ServerUrl>', "is the description of a web service"),
        (b'<?xml version="1.0"?>\n<WMT_MS_Capabilities>', "is the description of a web service"),
        (b"<!DOCTYPE html><html>404", "is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "is XML"),
        (b'{"error": "quota"}', "is JSON"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "is a PNG"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "is a JPEG"),
        (b"PK\x03\x04" + bytes(50), "is a ZIP archive"),
        (b"\x1f\x8b\x08" + bytes(50), "is compressed by gzip"),
        (b"\x89HDF\r\n\x1a\n", "is HDF5"),
        (b"\x93NUMPY\x01\0", "is a NumPy array"),
        (bytes(500), "begins with zeros"),
        (b"ENVI\ndescription = {}\nsamples = 16\n", "text that begins with 'ENVI description"),
        (PIXELS.tobytes(), "begins with neither II nor MM"),
        (b"", r"is empty \(0 bytes\)"),
        (b"II*\0", "is truncated or damaged"),
        (b"MM\0*" + bytes(range(200)), "is truncated or damaged"),
        (b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**63), "is truncated or damaged"),
    ],
)
def test_it_is_said_what_it_is(tmp_path, content, words):
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ChipError, match=words):
        read_chip(tmp_path, row_of("a.tif"), SPEC)


def test_what_is_no_regular_file(tmp_path):
    (tmp_path / "a.tif").mkdir()
    assert fault_of(tmp_path) == "is a folder, no regular file"
    os.mkfifo(tmp_path / "b.tif")
    assert fault_of(tmp_path, "b.tif") == "is a named pipe, no regular file"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "c.tif"))
        assert fault_of(tmp_path, "c.tif") == "is a socket, no regular file"
    (tmp_path / "d.tif").symlink_to("/dev/zero")
    assert fault_of(tmp_path, "d.tif") == "is a device, no regular file"


def test_links(tmp_path, write_chip):
    write_chip(tmp_path / "cache/files/md5/ab/cdef", PIXELS)
    (tmp_path / "a.tif").symlink_to("cache/files/md5/ab/cdef")
    pixels, _ = read_chip(tmp_path, row_of("a.tif"), SPEC)
    np.testing.assert_array_equal(pixels, PIXELS)
    (tmp_path / "b.tif").symlink_to("gone")
    assert fault_of(tmp_path, "b.tif") == "is a link to gone, which does not exist"
    (tmp_path / "c.tif").symlink_to("c.tif")
    assert "Too many levels of symbolic links" in fault_of(tmp_path, "c.tif")
    assert "Not a directory" in fault_of(tmp_path, "a.tif/x.tif")
    assert "too long" in fault_of(tmp_path, "x" * 300 + ".tif")


def test_a_name_that_differs_in_case_is_named(tmp_path, write_chip):
    write_chip(tmp_path / "chips/A_1.TIF", PIXELS)
    if (tmp_path / "chips/a_1.tif").exists():
        pytest.skip("this file system does not tell case apart")
    assert fault_of(tmp_path, "chips/a_1.tif") == "not found, but A_1.TIF is there: the case differs"
    assert fault_of(tmp_path, "chips/b_1.tif") == "not found"


PROFILES = {
    "none": {}, "deflate": {"compress": "deflate"}, "lzw": {"compress": "lzw"}, "zstd": {"compress": "zstd"},
    "jpeg": {"compress": "jpeg", "photometric": "ycbcr"}, "webp": {"compress": "webp", "interleave": "pixel"},
    "packbits": {"compress": "packbits"}, "tiled": {"tiled": True, "blockxsize": 16, "blockysize": 16},
    "pixel": {"interleave": "pixel"}, "bigtiff": {"bigtiff": "yes"}, "big-endian": {"endianness": "big"},
    "cog": {"driver": "COG", "compress": "deflate"},
}  # fmt: skip


@pytest.mark.parametrize("codec", PROFILES)
def test_truncation_in_every_codec(tmp_path, codec):
    profile = {"driver": "GTiff", "count": 3, "height": 64, "width": 64, "dtype": "uint8", **PROFILES[codec]}
    noise = np.random.default_rng(0).normal(120, 30, (3, 64, 64)).clip(1, 255).astype(np.uint8)
    spec = ChipSpec(SPEC.bands, 64, 0, None)
    path = tmp_path / "a.tif"
    try:
        with rasterio.open(path, "w", **profile) as target:
            target.write(noise)
    except rasterio.errors.RasterioError:
        pytest.skip(f"this GDAL has no {codec}")
    whole = path.read_bytes()
    read_chip(tmp_path, row_of("a.tif"), spec)
    for share in (0.99, 0.9, 0.5, 0.1, 0.01):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ChipError, match=r"^a\.tif \(catalog line 17\): is truncated or damaged \(\w.*\)\. Copy"):
            read_chip(tmp_path, row_of("a.tif"), spec)


def test_only_a_hash_finds_a_flipped_byte(tmp_path, write_chip):
    path = write_chip(tmp_path / "a.tif", PIXELS)
    content = bytearray(path.read_bytes())
    sound = hashlib.sha256(content).hexdigest()
    inspect_chip(tmp_path, row_of("a.tif", hashes=(sound.upper(),)), SPEC)
    content[-1] ^= 4
    path.write_bytes(content)
    inspect_chip(tmp_path, row_of("a.tif"), SPEC)
    inspect_chip(tmp_path, row_of("a.tif", hashes=("",)), SPEC)
    with pytest.raises(ChipError) as caught:
        inspect_chip(tmp_path, row_of("a.tif", hashes=(sound,)), SPEC)
    assert sound in str(caught.value)
    assert hashlib.sha256(content).hexdigest() in str(caught.value)


def test_sidecars_are_not_looked_at(tmp_path, write_chip):
    path = write_chip(tmp_path / "a.tif", PIXELS)
    other = write_chip(tmp_path / "other.tif", PIXELS[:, ::-1, ::-1].copy())
    for suffix in (".ovr", ".msk"):
        shutil.copy(other, f"{path}{suffix}")
    Path(f"{path}.aux.xml").write_text("<PAMDataset><PAMRasterBand band='1'><NoDataValue>7</NoDataValue>")
    chip = inspect_chip(tmp_path, row_of("a.tif"), SPEC)
    np.testing.assert_array_equal(chip.pixels, PIXELS)
    assert chip.valid.all()


def tiff(strip: bytes, *extra: tuple[int, int, int, int], bands=3, compression=1, tile=0, width=16, next_ifd=0):
    """A little-endian TIFF of one strip or tile; `extra` are more entries of its directory."""
    entries = [
        (256, 4, 1, width), (257, 4, 1, width), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1),
        (277, 3, 1, bands), (284, 3, 1, 1), *extra,
    ]  # fmt: skip
    data = 8 + 2 + 12 * (len(entries) + (4 if tile else 3)) + 4
    if tile:
        entries += [(322, 4, 1, tile), (323, 4, 1, tile), (324, 4, 1, data), (325, 4, 1, len(strip))]
    else:
        entries += [(273, 4, 1, data), (278, 4, 1, width), (279, 4, 1, len(strip))]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + struct.pack("<I", next_ifd) + strip


def test_libtiffs_own_words_are_not_shown(tmp_path, monkeypatch):
    class Handler(logging.Handler):
        def emit(self, record):
            shown.append(record)

    shown = []
    # Not caplog, which also takes what is not handed on to the root logger.
    monkeypatch.setattr(logging.getLogger(), "handlers", [Handler()])
    # It warns of bands that are neither grey nor declared as extra ones, under the name of a memory file.
    (tmp_path / "a.tif").write_bytes(tiff(PIXELS.transpose(1, 2, 0).tobytes()))
    pixels, _ = read_chip(tmp_path, row_of("a.tif"), SPEC)
    np.testing.assert_array_equal(pixels, PIXELS)
    assert not shown


def bombs() -> dict[str, bytes]:
    squeeze = zlib.compressobj(1)
    zeros = b"".join(squeeze.compress(bytes(2**20)) for _ in range(600)) + squeeze.flush()
    sound = PIXELS.transpose(1, 2, 0).tobytes()
    return {
        "a strip that decodes to far more": tiff(zeros, compression=8),
        "a huge tile": tiff(zeros, compression=8, tile=30000),
        "a large tile": tiff(zeros, compression=8, tile=4096),
        "a huge image": tiff(b"\0", width=200_000),
        "the hugest image": tiff(b"\0", width=2**31 - 1),
        "as many bands as can be": tiff(b"\0", bands=65535),
        "a directory that follows itself": tiff(sound, next_ifd=8),
        "a tag of four billion letters": tiff(sound, (42112, 2, 2**32 - 16, 8)),
        "a tag of half a billion doubles": tiff(sound, (33550, 12, 2**29 - 1, 8)),
        "a quarter of a billion directories": tiff(sound, (330, 4, 2**28 - 1, 8), (34665, 4, 1, 8)),
    }


BOMBS = """
import json, sys
from pathlib import Path
from earthprior.chips.catalog import ChipRow
from earthprior.chips.problems import ChipError
from earthprior.chips.read import ChipSpec, inspect_chip
spec, told = ChipSpec(("red", "green", "blue"), 16, 0, None), {}
for path in sorted(Path(sys.argv[1]).glob("*.tif")):
    try:
        told[path.stem] = str(inspect_chip(path.parent, ChipRow(2, "train", (path.name,), {}), spec).pixels.shape)
    except ChipError as error:
        told[path.stem] = error.problem.what
# Not getrusage: it would tell the memory of the process that this one was forked from, where that is more.
(peak,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(json.dumps([told, int(peak) / 1024]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_bombs_need_little_memory(tmp_path):
    for name, content in bombs().items():
        (tmp_path / f"{name}.tif").write_bytes(content)
    with rasterio.open(
        tmp_path / "sparse.tif", "w", driver="GTiff", count=3, width=200_000, height=200_000, dtype="uint8",
        bigtiff="yes", sparse_ok=True, tiled=True, blockxsize=256, blockysize=256,
    ):  # fmt: skip
        pass
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", BOMBS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told, peak_mb = json.loads(done.stdout)
    assert len(told) == 11
    assert peak_mb < 500
    assert told["a huge tile"] == "has blocks of (30000, 30000) px"
    assert told["a large tile"] == "has blocks of (4096, 4096) px"
    assert told["a huge image"] == told["sparse"] == "is 200000 x 200000 px, data.chip_size asks for 16"
    assert told["as many bands as can be"].startswith("has 65535 bands")
    for name in ("a strip that decodes to far more", "a directory that follows itself"):
        assert told[name] == "(3, 16, 16)"
