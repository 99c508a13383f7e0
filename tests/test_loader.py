"""Batches come in the order asked for, however many threads read them, and faults name their chip."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from earthprior.chips import content
from earthprior.chips import readers as readers_module
from earthprior.chips.catalog import load_catalog
from earthprior.chips.loader import load_batches
from earthprior.chips.problems import ChipError
from earthprior.chips.read import ChipSpec, read_chip
from earthprior.chips.readers import Readers, ordered_map
from earthprior.errors import StorageError
from earthprior.tools import check

ORDER = [[3, 1, 0], [7, 7, 2, 5], [4], [6, 0]]


@pytest.fixture
def chips(tmp_path, make_chips, make_params):
    def make(**options):
        make_chips(tmp_path / "chips", **options)
        data = make_params({"data.dir": "chips"}).data
        return load_catalog(data, tmp_path), ChipSpec.from_params(data)

    return make


def reader_threads() -> int:
    return sum(thread.name.startswith("chip-reader") for thread in threading.enumerate())


@pytest.mark.parametrize(("readers", "ahead"), [(1, 1), (3, 2), (8, 4)])
def test_order_and_content(chips, readers, ahead):
    catalog, spec = chips(nodata=0)
    seen = 0
    for batch, wanted in zip(
        load_batches(catalog.dir, catalog.rows, ORDER, spec, readers=readers, ahead=ahead), ORDER, strict=True
    ):
        seen += 1
        assert batch.rows == [catalog.rows[index] for index in wanted]
        assert batch.pixels.dtype == torch.uint16
        assert len(batch) == len(wanted) == len(batch.pixels) == len(batch.valid)
        # The threads have time to spoil the buffer, if they could.
        time.sleep(0.02)
        for slot, index in enumerate(wanted):
            pixels, valid = read_chip(catalog.dir, catalog.rows[index], spec)
            np.testing.assert_array_equal(batch.pixels[slot].numpy(), pixels)
            np.testing.assert_array_equal(batch.valid[slot].numpy(), valid)
            assert not valid.all()
    assert seen == len(ORDER)
    assert reader_threads() == 0


@pytest.mark.parametrize(
    ("dtype", "wanted"), [("uint8", torch.uint8), ("int16", torch.int16), ("float64", torch.float32)]
)
def test_dtypes(chips, dtype, wanted):
    catalog, spec = chips(n=3, dtype=dtype)
    (batch,) = load_batches(catalog.dir, catalog.rows, [[0, 1]], spec)
    assert batch.pixels.dtype == wanted
    pixels, _ = read_chip(catalog.dir, catalog.rows[1], spec)
    np.testing.assert_allclose(batch.pixels[1].numpy(), pixels, rtol=1e-6)


def test_order_is_taken_lazily_and_buffers_are_reused(chips):
    catalog, spec = chips()
    taken = []

    def endless():
        step = 0
        while True:
            taken.append(step)
            yield [step % 12]
            step += 1

    batches = load_batches(catalog.dir, catalog.rows, endless(), spec, readers=2, ahead=2)
    places = {next(batches).pixels.data_ptr() for _ in range(12)}
    assert len(places) <= 3
    assert len(taken) <= 12 + 4
    assert reader_threads() == 2
    batches.close()
    assert reader_threads() == 0


def test_empty_order(chips):
    catalog, spec = chips(n=3)
    assert list(load_batches(catalog.dir, catalog.rows, [], spec)) == []


def test_a_broken_chip_is_named_after_the_batches_before_it(chips):
    catalog, spec = chips()
    path = catalog.dir / catalog.rows[5].images[0]
    path.write_bytes(path.read_bytes()[:500])
    batches = load_batches(catalog.dir, catalog.rows, ORDER, spec, readers=4)
    next(batches)
    words = (
        r"chips/chip_005\.tif \(catalog line 7\): is truncated or damaged .*It was sound when results/stats/ was made"
    )
    with pytest.raises(ChipError, match=words):
        next(batches)
    assert reader_threads() == 0


def test_a_chip_of_another_dtype_is_named(chips, write_chip):
    catalog, spec = chips()
    write_chip(catalog.dir / catalog.rows[2].images[0], np.ones((4, 32, 32), np.uint8))
    with pytest.raises(ChipError, match=r"chip_002\.tif .*has dtype uint8, the chips before it uint16"):
        list(load_batches(catalog.dir, catalog.rows, ORDER, spec))


def test_a_read_that_hangs_is_named():
    release = threading.Event()
    with Readers(2, limit_seconds=0.2) as pool:
        future = pool.submit("slow.tif", release.wait)
        with pytest.raises(StorageError, match=r"reading slow\.tif takes more than") as caught:
            pool.result(future)
        assert caught.value.exit_code == 4
        release.set()


@pytest.mark.parametrize("reads", [0, 1, 5])
def test_any_read_may_hang_the_first_one_too(chips, make_params, monkeypatch, reads):
    catalog, spec = chips()
    monkeypatch.setattr(readers_module, "LIMIT_SECONDS", 0.3)
    monkeypatch.setattr(readers_module, "END_SECONDS", 0.1)
    release, read, count = threading.Event(), content.Path.read_bytes, itertools.count()

    def hanging(path):
        if next(count) >= reads:
            release.wait(20)
        return read(path)

    monkeypatch.setattr(content.Path, "read_bytes", hanging)
    for begin in (
        lambda: list(load_batches(catalog.dir, catalog.rows, ORDER, spec)),
        lambda: check.run(make_params({"data.dir": "chips"}), catalog.dir.parent),
    ):
        count = itertools.count()
        with pytest.raises(StorageError, match=r"reading chips/chip_0\d\d\.tif.* takes more than 0 seconds"):
            begin()
    release.set()


def test_a_timeout_of_the_task_itself_is_no_hang():
    def fail():
        raise TimeoutError("from the disk")

    with Readers(1) as pool, pytest.raises(TimeoutError, match="from the disk"):
        pool.result(pool.submit("a", fail))


def test_ordered_map_keeps_order_and_bounds_work():
    started = []

    def task(item):
        started.append(item)
        time.sleep(0.002 * (item % 3))
        return item * item

    results = ordered_map(task, range(100), str, threads=3, ahead=2)
    assert next(results) == 0
    assert len(started) <= 3 * 2 + 1
    assert list(results) == [item * item for item in range(1, 100)]
