"""Ten thousand hostile inputs: params files, catalogs, GeoTIFFs, and what stages leave for one another.

Each kind is read in a child process of its own, under a limit on memory, so that a crash of GDAL or torch is a row of
the table and not the end. What is neither taken nor refused in words, connects anywhere, starts a process, unpickles a
name or fills the memory is a violation; its input is kept. `make soak` runs this.

    PYTHONPATH=src python benchmarks/soak_inputs.py --count 10000 --seed 0
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import hostile

MOST_GROWTH_MIB = 512
"""What reading may add to a process; ADDRESS_SPACE, which the system holds it to, counts what is never used, too."""

ADDRESS_SPACE = 3 * 2**30
MOST_DEATHS = 5
COLUMNS = ("inputs", "accepted", "refused", "other", "deaths", "connections", "started", "unpickled", "MiB", "slowest")


def run(count: int, first_seed: int, kept: Path, kinds: dict[str, hostile.Kind]) -> bool:
    """Read `count` inputs in all, print the table, and say whether all went well."""
    whole = sum(kind.share for kind in kinds.values())
    rows: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="soak-inputs-") as temporary, hostile.Listener() as listener:
        folder = Path(temporary)
        hostile.prepare(folder)
        for name, kind in kinds.items():
            before = listener.connections
            wanted = max(1, round(count * kind.share / whole))
            rows[name] = _in_children(name, kind, wanted, first_seed, folder, listener.place, kept)
            time.sleep(0.1)  # for a connection that is on its way
            rows[name]["connections"] += listener.connections - before
            print(f"{name}: {rows[name]['inputs']} inputs", file=sys.stderr, flush=True)
    _print_table(rows)
    bad = ("other", "deaths", "connections", "started", "unpickled", "filled")
    faults = [f"{name}: {row[what]} {what}" for name, row in rows.items() for what in bad if row[what]]
    print("\n".join([*faults, f"their inputs are in {kept}"]) if faults else "no violation")
    return not faults


def _in_children(
    name: str, kind: hostile.Kind, wanted: int, first_seed: int, folder: Path, place: str, kept: Path
) -> Counter[str]:
    """Inputs of one kind, in a child that is followed by another where it dies."""
    row: Counter[str] = Counter()
    while row["inputs"] < wanted and row["deaths"] < MOST_DEATHS:
        told = folder / "told.json"
        told.write_text(json.dumps(row))
        arguments = (name, kind, wanted - row["inputs"], first_seed + row["deaths"], folder, place, kept, told)
        child = multiprocessing.get_context("fork").Process(target=_read_many, args=arguments)
        child.start()
        child.join()
        # By input, so that a child that died has told of all before.
        found = Counter(json.loads(told.read_text()))
        row = found
        if child.exitcode != 0:
            row["deaths"] += 1
            row["inputs"] += 1
            _keep(kept, name, f"death-{child.exitcode}", (folder / "current.bin").read_bytes())
    return row


def _read_many(
    name: str, kind: hostile.Kind, wanted: int, own_seed: int, folder: Path, place: str, kept: Path, told: Path
) -> None:
    """What a child does."""
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ADDRESS_SPACE,) * 2)
    row: Counter[str] = Counter(json.loads(told.read_text()))
    began = psutil.Process().memory_info().rss

    @seed(own_seed)
    @settings(
        max_examples=wanted,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64 - 1))
    def read(number: int) -> None:
        content = hostile.make(kind, number, folder, place)
        (folder / "current.bin").write_bytes(content)
        start = time.monotonic()
        with hostile.audited() as audit:
            try:
                row[hostile.feed(kind, folder, content)] += 1
            except BaseException as error:  # noqa: BLE001 - to be counted
                row["other"] += 1
                _keep(kept, name, f"{type(error).__name__}-{number}", content, traceback.format_exc())
        row["inputs"] += 1
        row["slowest"] = max(row["slowest"], round(1000 * (time.monotonic() - start)))
        for what in ("connected", "started", "unpickled"):
            if found := getattr(audit, what):
                row["connections" if what == "connected" else what] += len(found)
                _keep(kept, name, f"{what}-{number}", content, "\n".join(found))
        row["MiB"] = max(row["MiB"], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - began) >> 20)
        if row["MiB"] > MOST_GROWTH_MIB and not row["filled"]:
            row["filled"] = 1
            _keep(kept, name, f"filled-{number}", content)
        told.write_text(json.dumps(row))

    read()


def _keep(kept: Path, name: str, what: str, content: bytes, text: str = "") -> None:
    """Keep an input for another look."""
    kept.mkdir(parents=True, exist_ok=True)
    path = kept / f"{name.replace(' ', '_').replace(',', '')}-{what}.bin"
    path.write_bytes(content)
    if text:
        path.with_suffix(".txt").write_text(text)


def _print_table(rows: dict[str, Counter[str]]) -> None:
    """`MiB` is what reading added to the process at most, `slowest` the longest time of one input in ms."""
    total: Counter[str] = Counter()
    for row in rows.values():
        for column in COLUMNS[:-2]:
            total[column] += row[column]
    for column in COLUMNS[-2:]:
        total[column] = max(row[column] for row in rows.values())
    print(f"{'kind of input':24}" + "".join(f"{column:>12}" for column in COLUMNS))
    for name, row in {**rows, "all": total}.items():
        print(f"{name:24}" + "".join(f"{row[column]:>12,}" for column in COLUMNS))


def main(arguments: list[str], kinds: dict[str, hostile.Kind] = hostile.KINDS) -> int:
    """Parse, run, and give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other inputs")
    parser.add_argument("--kind", choices=list(kinds), action="append", help="only this kind; may be given again")
    parser.add_argument(
        "--keep", type=Path, default=Path("work/soak-inputs"), help="where inputs that go wrong are kept"
    )
    given_options: Any = parser.parse_args(arguments)
    chosen = {name: kinds[name] for name in given_options.kind or kinds}
    return 0 if run(given_options.count, given_options.seed, given_options.keep.absolute(), chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
