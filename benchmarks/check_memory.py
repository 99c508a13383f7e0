"""What `earthprior check` and the stage `stats` take on catalogs of a thousand to a million rows: memory stays flat.

Each row stacks two tiny GeoTIFFs, one of a hundred dates on one of many places, so that a million rows, all of them
different in content, need ten thousand files and 60 MB of disk.

    PYTHONPATH=src python benchmarks/check_memory.py /tmp/check --rows 1000 10000 100000

The folder is made and removed. The last column is the peak memory relative to that of the first row of the table.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
DATES = 100
CHIP_PX = 8
COMMANDS = ("check", "stats")


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
        wall_s: By the clock.
        cpu_s: All threads.
        peak_mb: Largest resident memory.
    """

    wall_s: float
    cpu_s: float
    peak_mb: float


def write_chips(folder: Path, rows: int) -> None:
    """A catalog of so many rows, every fifth place of it for validation."""
    places = -(-rows // DATES)
    noise = np.random.default_rng(0)
    for kind, count in (("date", DATES), ("place", places)):
        (folder / kind).mkdir(parents=True)
        profile = {
            "driver": "GTiff", "count": 1, "height": CHIP_PX, "width": CHIP_PX, "dtype": "uint16",
        }  # fmt: skip
        for number in range(count):
            if kind == "place":
                east, north = 500_000.0 + 100.0 * (number % 300), 5_000_000.0 + 100.0 * (number // 300)
                profile |= {"crs": "EPSG:32614", "transform": from_origin(east, north, 5.0, 5.0)}
            with rasterio.open(folder / kind / f"{number}.tif", "w", **profile) as target:
                target.write(noise.integers(1, 9999, (1, CHIP_PX, CHIP_PX), np.uint16))
    with (folder / "catalog.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(("red", "nir", "usage"))
        for row in range(rows):
            place, date = divmod(row, DATES)
            writer.writerow((f"place/{place}.tif", f"date/{date}.tif", "train" if place % 5 else "validate"))


def write_params(root: Path) -> None:
    """The committed params.yaml for these chips."""
    yaml = YAML()
    content = yaml.load((ROOT / "params.yaml").read_text())
    content["data"] |= {
        "image_columns": ["red", "nir"], "bands": ["red", "nir"], "chip_size": CHIP_PX, "crop_px": CHIP_PX,
    }  # fmt: skip
    with (root / "params.yaml").open("w") as handle:
        yaml.dump(content, handle)


def measure(command: str, root: Path) -> Cost:
    """Run a subcommand, and watch its memory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "earthprior", command], cwd=root, env=environment, stderr=subprocess.DEVNULL
    )
    # Not by getrusage: its peak begins with the memory of the process that forked the child, this one.
    peak_kb, status_path = 0, Path(f"/proc/{child.pid}/status")
    while not (done := os.wait4(child.pid, os.WNOHANG))[0]:
        for line in status_path.read_text().splitlines():
            if line.startswith("VmHWM"):
                peak_kb = int(line.split()[1])
        time.sleep(0.05)
    wall = time.perf_counter() - began
    if os.waitstatus_to_exitcode(done[1]):
        raise SystemExit(f"earthprior {command} failed in {root}")
    return Cost(wall, done[2].ru_utime + done[2].ru_stime, peak_kb / 1024)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    asked = parser.parse_args()
    print("| command | rows | wall, s | CPU, s | rows per CPU second | peak memory, MB | times the first |")
    print("|---|---|---|---|---|---|---|")
    first: dict[str, float] = {}
    for rows in asked.rows:
        root = asked.folder / str(rows)
        write_chips(root / "data", rows)
        write_params(root)
        for command in COMMANDS:
            cost = measure(command, root)
            ratio = cost.peak_mb / first.setdefault(command, cost.peak_mb)
            print(
                f"| `{command}` | {rows:,} | {cost.wall_s:.1f} | {cost.cpu_s:.1f} | {rows / cost.cpu_s:,.0f} "
                f"| {cost.peak_mb:.0f} | {ratio:.2f} |",
                flush=True,
            )
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
