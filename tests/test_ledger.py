"""The ledger finds what a dictionary of everything would find, keeps it on disk, and leaves nothing behind."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from earthprior.chips import ledger as ledger_module
from earthprior.chips.catalog import USAGES
from earthprior.chips.ledger import Ledger
from earthprior.errors import StorageError


def repeats_of(keys: list[str]) -> list[tuple[int, int]]:
    """(position, first position) of every later occurrence."""
    first: dict[str, int] = {}
    return [(place, first[key]) for place, key in enumerate(keys) if first.setdefault(key, place) != place]


def test_repetitions_equal_a_dictionarys():
    noise = np.random.default_rng(0)
    # More than are handed over at once, so that some are found among those handed over before and some not.
    names = [f"{number}.tif" for number in noise.integers(0, 4000, 2500)]
    contents = [f"{number}" for number in noise.integers(0, 6000, 2500)]
    usages = noise.integers(0, len(USAGES), 2500).tolist()
    with Ledger() as ledger:
        for line, (name, usage, content) in enumerate(zip(names, usages, contents, strict=True)):
            ledger.add_row(line, usage, (name, f"nir/{name}"))
            ledger.add_content(line, content.encode())
        rows = list(ledger.repeated_rows())
        chips = list(ledger.same_content())
    assert [(found.line, found.first_line) for found in rows] == repeats_of(names)
    assert [(found.line, found.first_line) for found in chips] == repeats_of(contents)
    assert 300 < len(chips) < len(rows) < 2000
    for found in [*rows, *chips]:
        assert found.images == (names[found.line], f"nir/{names[found.line]}")
        assert found.first_images[0] == names[found.first_line]
        assert (found.usage, found.first_usage) == (usages[found.line], usages[found.first_line])


def test_places_and_likenesses_come_back(tmp_path):
    z = np.random.default_rng(0).standard_normal((1500, 6)).astype(np.float32)
    with Ledger() as ledger:
        for line in range(1500):
            ledger.add_row(line, line % 2, (f"{line}.tif",))
            ledger.add_likeness(line, z[line])
            # Each odd one shares a tenth of its ground with the even one before it.
            ledger.add_place(line, line % 2, "EPSG:32614", (line * 100 - line % 2 * 10, 0, line * 100 + 99.0, 100))
        assert ledger.overlapping() == 750
        partners = list(ledger.partners())
        assert partners == [(line, 1, [line - 1]) for line in range(1, 1500, 2)]
        assert ledger.row(7) == (1, ("7.tif",))
        found = list(ledger.likenesses())
    assert [line for line, _ in found] == list(range(1500))
    np.testing.assert_array_equal([z for _, z in found], z)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are read from /proc")
def test_it_is_on_disk_and_leaves_nothing(monkeypatch):
    def temporary() -> list[str]:
        links = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return [link for link in links if "etilqs_" in link]

    monkeypatch.setattr(ledger_module, "CACHE_KB", 100)
    before = temporary()
    with Ledger() as ledger:
        for line in range(5000):
            ledger.add_row(line, 0, (f"a/rather/long/name/of/a/chip/in/a/folder/{line:09d}.tif",))
        found = set(temporary()) - set(before)
        # Unlinked already: not even SIGKILL leaves a file.
        assert len(found) == 1
        assert all(link.endswith(" (deleted)") for link in found)
    assert temporary() == before


def test_a_full_disk_is_said_to_be_one(monkeypatch):
    class Full:
        def executemany(self, *_):
            raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(ledger_module, "AT_ONCE", 2)
    with Ledger() as ledger:
        ledger.add_row(1, 0, ("a.tif",))
        whole, ledger._database = ledger._database, Full()
        with pytest.raises(StorageError, match=r"database or disk is full.*SQLITE_TMPDIR=/path") as caught:
            ledger.add_row(2, 0, ("b.tif",))
        ledger._database = whole
    assert caught.value.exit_code == 4
