"""`earthprior check` finds before the first step whatever would stop a training, in one readable report."""

from __future__ import annotations

import csv
import gc
import hashlib
import http.server
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rasterio

from earthprior.chips import survey, verdict
from earthprior.chips.catalog import ChipRow
from earthprior.chips.finding import Finding
from earthprior.chips.problems import Problem, Tally
from earthprior.errors import DataError, EarthPriorError
from earthprior.stages import stats
from earthprior.tools import check

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checked(tmp_path, make_chips, make_params):
    """A function that writes chips, lets `spoil(folder)` change them, checks them, and returns the problems listed."""

    def run(spoil=None, overrides=None, **chips) -> list[dict[str, str]]:
        folder = make_chips(tmp_path / "data", **chips)
        if spoil:
            spoil(folder)
        check.run(make_params(overrides), tmp_path)
        return problems_of(tmp_path)

    return run


def problems_of(root: Path, name: str = "work/check/bad_chips.csv") -> list[dict[str, str]]:
    with (root / name).open() as handle:
        return list(csv.DictReader(handle))


def add_column(folder: Path, name: str, cell) -> None:
    """Give the catalog a column with cell(row) in each row."""
    with (folder / "catalog.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    with (folder / "catalog.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, [*rows[0], name])
        writer.writeheader()
        writer.writerows({**row, name: cell(row)} for row in rows)


def test_sound_chips(checked, tmp_path, capsys):
    assert checked(labels=True) == []
    assert re.search(r"check: 12 chips read in \d+ s; nothing to complain of\n$", capsys.readouterr().err)
    assert not (tmp_path / "results").exists()
    assert [path.name for path in (tmp_path / "work/check").iterdir()] == ["bad_chips.csv"]


def spoil_much(folder: Path) -> None:
    chips = folder / "chips"
    (chips / "chip_000.tif").unlink()
    (chips / "chip_001.tif").write_bytes((chips / "chip_001.tif").read_bytes()[:900])
    shutil.copy(chips / "chip_009.tif", chips / "chip_008.tif")
    shutil.copy(chips / "chip_009.tif", chips / "chip_010.tif")
    (chips / "chip_006.tif").write_text("version https://git-lfs.github.com/spec/v1\n")
    with (folder / "catalog.csv").open("a") as handle:
        handle.write("chips/new.tif,val,g99\n../chips/x.tif,train,g99\nchips/chip_003.tif,validate,g3\n")


def test_it_finds_what_stats_finds(checked, tmp_path, make_params):
    with pytest.raises(DataError) as caught:
        checked(spoil_much)
    with pytest.raises(DataError) as by_stats:
        stats.run(make_params(), tmp_path)
    ours, theirs = str(caught.value), str(by_stats.value)
    assert ours.replace("work/check", "results/stats") == theirs
    assert problems_of(tmp_path) == problems_of(tmp_path, "results/stats/bad_chips.csv")
    assert [row["line"] for row in problems_of(tmp_path) if row["severity"] == "error"] == [
        "14", "15", "16", "2", "3", "8", "11", "12",
    ]  # fmt: skip


def test_one_fault_of_all_chips_is_told_once(checked, tmp_path):
    with pytest.raises(DataError) as caught:
        checked(n=40, bands=3)
    lines = str(caught.value).splitlines()
    assert lines[0] == "42 errors in the data (all are in work/check/bad_chips.csv)."
    assert lines[1].startswith("  40 of 40 chips: has 3 bands, data.bands lists 4 (red, green, blue, nir). Write it")
    assert lines[2].endswith("chips/chip_002.tif (catalog line 4) and 37 more")
    assert len(lines) == 5
    assert [row["line"] for row in problems_of(tmp_path)][:40] == [str(line) for line in range(2, 42)]


def test_missing_chips_are_counted_before_any_is_read(checked, capsys):
    def spoil(folder):
        for number in (2, 7, 9):
            (folder / f"chips/chip_{number:03d}.tif").unlink()
        (folder.parent / "data.dvc").touch()

    with pytest.raises(DataError) as caught:
        checked(spoil)
    assert "check: 3 of 12 chips not there (catalog lines 4, 9, 11)" in capsys.readouterr().err
    assert "3 of 12 chips were not found: is the data there (dvc pull), is its disk mounted" in str(caught.value)
    restore = "Restore the file (git checkout data.dvc && dvc pull data), or drop the row"
    assert f"3 of 12 chips: not found. {restore}" in str(caught.value)


def test_dvc_is_no_remedy_for_a_folder_that_it_does_not_track(tmp_path, make_chips, make_params):
    (tmp_path / "data.dvc").touch()
    folder = make_chips(tmp_path / "elsewhere/data")
    for number in (2, 7):
        (folder / f"chips/chip_{number:03d}.tif").unlink()
    with pytest.raises(DataError) as caught:
        check.run(make_params(), tmp_path, folder)
    assert "2 of 12 chips: not found. Restore the file, or drop the row" in str(caught.value)
    assert "dvc" not in str(caught.value)


def test_a_file_is_no_folder(tmp_path, make_params):
    (tmp_path / "README.md").touch()
    with pytest.raises(DataError, match=r"README\.md is not a folder\. Name the folder that holds the catalog"):
        check.run(make_params(), tmp_path, tmp_path / "README.md")


def test_skipping_is_judged_as_stats_does(checked, make_params, tmp_path, capsys):
    found = checked(spoil_much_less, {"data.on_bad_chip": "skip", "data.max_bad_fraction": 0.1})
    assert [(row["severity"], row["what"][:21]) for row in found] == [("warning", "skipped: is truncated")]
    assert "1 to be skipped; no error, 1 warning" in capsys.readouterr().err
    strict = make_params({"data.on_bad_chip": "skip", "data.max_bad_fraction": 0.05})
    with pytest.raises(DataError, match=r"1 of 12 chips cannot be used \(8\.3%\), more than data\.max_bad_fraction"):
        check.run(strict, tmp_path)


def spoil_much_less(folder: Path) -> None:
    (folder / "chips/chip_001.tif").write_bytes((folder / "chips/chip_001.tif").read_bytes()[:900])


def test_fewer_chips_than_a_batch(checked):
    with pytest.raises(DataError, match=r"params\.yaml: batch_size 100 is more than an epoch has: 8 train chips x"):
        checked(overrides={"batch_size": 100, "data.crops_per_chip": 8})


def test_labels_are_looked_at(checked, write_chip):
    def spoil(folder):
        labels = folder / "labels"
        (labels / "chip_000.tif").unlink()
        write_chip(labels / "chip_001.tif", np.zeros((2, 32, 32), np.uint8), x=500_320.0)
        write_chip(labels / "chip_002.tif", np.zeros((1, 32, 32), np.uint8), x=0.0)
        write_chip(labels / "chip_003.tif", np.zeros((1, 16, 16), np.uint8), x=500_960.0)

    found = {row["line"]: row["what"] for row in checked(spoil, labels=True)}
    assert found["2"] == "label: not found"
    assert found["3"].startswith("label: has 2 bands")
    assert found["4"].startswith("label: lies elsewhere than chips/chip_002.tif")
    assert found["5"].startswith("label: is 16 x 16 px")
    assert len(found) == 4
    # Labels that are no rasters are nobody's fault.
    assert checked(lambda folder: add_column(folder, "label", lambda row: "water")) == []


def test_a_flipped_byte_is_found_by_its_hash(checked, tmp_path):
    def hashed(folder):
        add_column(folder, "sha256", lambda row: hashlib.sha256((folder / row["image"]).read_bytes()).hexdigest())

    def flipped(folder):
        hashed(folder)
        path = folder / "chips/chip_004.tif"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    assert checked(hashed) == []
    with pytest.raises(DataError, match=r"chip_004\.tif \(catalog line 6\): is not the file that the catalog was writ"):
        checked(flipped)
    (found,) = problems_of(tmp_path)
    actual = hashlib.sha256((tmp_path / "data/chips/chip_004.tif").read_bytes()).hexdigest()
    assert f"its SHA-256 is {actual}, the catalog says " in found["what"]


def test_what_is_not_finite_is_counted_per_band(checked):
    def spoil(folder):
        path = folder / "chips/chip_004.tif"
        with rasterio.open(path, "r+") as target:
            pixels = target.read()
            pixels[1, :2, :3], pixels[3, 0, 0] = np.nan, np.inf
            target.write(pixels)

    (found,) = checked(spoil, dtype="float32")
    assert found["what"] == "pixels are NaN or infinite (6 in green, 1 in nir)"


def test_another_folder_and_catalog(tmp_path, make_chips, make_params):
    folder = make_chips(tmp_path / "elsewhere/chips of others")
    (folder / "catalog.csv").rename(folder / "list.csv")
    check.run(make_params(), tmp_path, folder, "list.csv", tmp_path / "found.csv", readers=3)
    assert problems_of(tmp_path, "found.csv") == []
    with pytest.raises(DataError, match=r"catalog\.csv not found in chips of others/"):
        check.run(make_params(), tmp_path, folder)
    assert not (tmp_path / "work/check/bad_chips.csv.partial").exists()


def test_interrupted(checked, tmp_path, monkeypatch, capsys):
    inspect = survey.inspect_row

    def interrupting(folder, row, *rest):
        if row.line == 11:
            signal.raise_signal(signal.SIGINT)
        return inspect(folder, row, *rest)

    monkeypatch.setattr(survey, "inspect_row", interrupting)
    with pytest.raises(KeyboardInterrupt):
        checked(spoil_much_less, {"operation.readers": 1})
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "check: 1 error and 0 warnings found so far are in work/check/bad_chips.csv.partial"
    (found,) = problems_of(tmp_path, "work/check/bad_chips.csv.partial")
    assert (found["severity"], found["line"]) == ("error", "3")
    assert not (tmp_path / "work/check/bad_chips.csv").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("chip-reader")]


def test_a_second_check_is_refused_until_the_first_is_gone_however_that_ends(checked, tmp_path, make_params):
    checked()
    path = tmp_path / "work/check/bad_chips.csv"
    first = f"""
import sys
from pathlib import Path
from earthprior.chips.problem_log import ProblemLog
from earthprior.chips.problems import Problem
with ProblemLog(Path({str(path)!r})) as log:
    log.add(Problem("error", "a.tif", 2, "is of the first", "Mend it", kind="of the first"))
    print("at it", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", first], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "at it\n"
        before = path.read_bytes()
        with pytest.raises(
            EarthPriorError, match=r"bad_chips\.csv\.partial in .*work/check is being written by another"
        ):
            check.run(make_params(), tmp_path)
        (found,) = problems_of(tmp_path, "work/check/bad_chips.csv.partial")
        assert found["what"] == "is of the first", "what the first has found is unharmed"
        assert path.read_bytes() == before
        check.run(make_params(), tmp_path, out=tmp_path / "work/check/other.csv")
    finally:
        process.kill()
        process.communicate()
    check.run(make_params(), tmp_path)
    assert sorted(path.name for path in (tmp_path / "work/check").iterdir()) == ["bad_chips.csv", "other.csv"]
    assert problems_of(tmp_path) == []


@pytest.fixture
def visitors():
    """A server's address, and the requests that reach it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    requests: list[str] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()
        thread.join()


def test_hostile_files_reach_no_server(checked, visitors, tmp_path):
    address, requests = visitors
    vrt = (
        '<VRTDataset rasterXSize="32" rasterYSize="32"><VRTRasterBand dataType="UInt16" band="1"><SimpleSource>'
        f'<SourceFilename relativeToVRT="0">/vsicurl/{address}/x.tif</SourceFilename></SimpleSource></VRTRasterBand>'
        "</VRTDataset>"
    )
    wms = f'<GDAL_WMS><Service name="TMS"><ServerUrl>{address}/${{z}}</ServerUrl></Service></GDAL_WMS>'

    def spoil(folder):
        chips = folder / "chips"
        (chips / "chip_000.tif").write_text(vrt)
        (chips / "chip_001.tif").write_text(wms)
        for suffix in (".ovr", ".msk", ".aux.xml"):
            (chips / f"chip_002.tif{suffix}").write_text(vrt)
        with (folder / "catalog.csv").open("a") as handle:
            for path in (f"{address}/a.tif", f"/vsicurl/{address}/b.tif", f"vrt://{address}/c.tif", "GTIFF_DIR:1:d.tif",
                         f"WMS:{address}", f"STACIT:{address}", f"chips//vsicurl/{address}/e.tif"):  # fmt: skip
                handle.write(f"{path},train,g\n")

    with pytest.raises(DataError):
        checked(spoil)
    found = [(row["line"], row["what"]) for row in problems_of(tmp_path) if row["severity"] == "error"]
    assert [line for line, _ in found] == ["14", "15", "16", "17", "18", "19", "2", "3", "20"]
    assert [what for _, what in found[6:]] == [
        "is not a GeoTIFF: it is a VRT, which only points to other files",
        "is not a GeoTIFF: it is the description of a web service",
        "not found",
    ]
    assert requests == []
    # The trap is a trap: GDAL, left to itself, walks into it.
    with pytest.raises(rasterio.errors.RasterioError), rasterio.open(tmp_path / "data/chips/chip_000.tif") as source:
        source.read()
    assert requests


def test_a_line_now_and_then(checked, monkeypatch, capsys):
    monkeypatch.setattr(verdict, "FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr(verdict, "LINE_EVERY_SECONDS", 0.0)
    with pytest.raises(DataError):
        checked(spoil_much_less)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("check: 12 chips, 0.1 MB, read by ")
    assert said[2].startswith("check: 2 of 12 chips, ")
    assert said[2].endswith(" left; 1 error, 0 warnings so far")
    assert len(said) == 12


def test_a_catalog_that_changes_meanwhile(checked, tmp_path, monkeypatch):
    inspect = survey.inspect_row

    def changing(folder, row, *rest):
        if row.line == 5:
            with (folder / "catalog.csv").open("a") as handle:
                handle.write("\n")
        return inspect(folder, row, *rest)

    monkeypatch.setattr(survey, "inspect_row", changing)
    with pytest.raises(DataError, match=r"catalog\.csv changed while its chips were read"):
        checked()


def test_nothing_is_kept_of_the_rows_before(checked, monkeypatch):
    inspect, alive, before = survey.inspect_row, {}, {}

    def counted():
        # Other tests of this process keep rows of their own.
        gc.collect()
        found = Counter(type(one) for one in gc.get_objects())
        return {kind: found[kind] - before.get(kind, 0) for kind in (ChipRow, Problem, Finding)}

    def spoil(folder):
        with (folder / "catalog.csv").open("a") as handle:
            handle.writelines(f"chips/gone_{row}.tif,train,g{row}\n" for row in range(1500))
        before.update(counted())

    def counting(folder, row, *rest):
        if row.line == 1500:
            alive.update(counted())
        return inspect(folder, row, *rest)

    monkeypatch.setattr(survey, "inspect_row", counting)
    with pytest.raises(DataError, match="1,500 of 1,512 chips: not found"):
        checked(spoil)
    # What the readers have in hand, and the first few problems for the screen.
    assert alive[ChipRow] < 40
    assert alive[Problem] < 40
    assert alive[Finding] < 10


def test_memory_does_not_grow_with_problems_or_kinds():
    tally = Tally(Problem("error", f"{n}.tif", n, f"fault {n}", "mend it", skippable=True) for n in range(5000))
    assert tally.errors == 5000
    lines = tally.lines("error", 5000)
    assert len(lines) == 21
    assert lines[-1] == "  ... and 4,980 more"
    assert len(tally._kinds) == 500
    told = tally.skipping()
    assert (told.errors, told.warnings) == (0, 5000)
    assert told.lines("warning")[0] == "  0.tif: skipped: fault 0. mend it"


def test_exit_codes(tmp_path, make_chips):
    """As a program: 0 or 2, with its last word."""
    from tiny_project import SMALL, edit_params

    make_chips(tmp_path / "data", n=12)
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    edit_params(tmp_path / "params.yaml", SMALL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "earthprior", "check"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    sound = run()
    assert (sound.returncode, sound.stderr.splitlines()[-1][-24:]) == (0, "; nothing to complain of")
    (tmp_path / "data/chips/chip_000.tif").unlink()
    missing = run()
    assert missing.returncode == 2
    assert "chips/chip_000.tif (catalog line 2): not found" in missing.stderr
    assert "Traceback" not in missing.stderr
