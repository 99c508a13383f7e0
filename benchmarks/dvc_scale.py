"""What do DVC's commands cost, in time, memory and disk, where data/ holds 100,000 chips?

    PYTHONPATH=src python benchmarks/dvc_scale.py FOLDER [--chips 100000] [--link hardlink] [--only add repro temp]

FOLDER is made, and removed again unless --keep is given; it holds a clone of this checkout's last commit, small real
GeoTIFFs, a remote, a second clone, and DVC's state, so that nothing outside is touched. The clone runs the real
pipeline with a network and a sampler so small that the stages' own time is little more than reading the chips.

Every process is measured by itself: "of it stages" is what the stages of dvc.yaml took, the rest is DVC's. CPU seconds
(user and system) are what neighbours on the machine disturb least. Memory is the largest process's peak. Disk is what
FOLDER grew by, a hard link counted once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.crs import CRS
from rasterio.io import MemoryFile
from rasterio.transform import from_origin

from earthprior.chips.landscapes.spectra import BANDS
from earthprior.chips.landscapes.synth import synth_chip
from earthprior.params.editing import overlay, write

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SIDE = 32
PIXEL_M = 5.0
SMALL: dict[str, Any] = {
    "data.chip_size": SIDE, "data.crop_px": 16, "data.crops_per_chip": 1, "threads": 1, "batch_size": 512,
    "val_batch_size": 512, "epochs": 1, "warmup_epochs": 0, "unet_film.channels": [8, 16],
    "unet_film.time_embedding_dim": 16, "evaluate.steps": 2, "evaluate.samples": 4,
}  # fmt: skip
"""Over params.yaml: a training of one pass over the chips, in which reading them is most of the work."""

MEASURE = """
import json, os, subprocess, sys, time
log, *command = sys.argv[1:]
began, peak = time.monotonic(), 0
process = subprocess.Popen(command)
while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
    try:
        status = open(f"/proc/{process.pid}/status").read()
        peak = max(peak, int(status.split("VmHWM:")[1].split()[0]))
    except (OSError, IndexError):
        pass
    time.sleep(0.05)
_, status, used = os.wait4(process.pid, 0)
row = {"command": command, "wall": time.monotonic() - began, "cpu": used.ru_utime + used.ru_stime, "kb": peak}
with open(log, "a") as handle:
    handle.write(json.dumps(row) + "\\n")
sys.exit(os.waitstatus_to_exitcode(status) % 256)
"""
"""Runs a command and notes its wall and CPU seconds (with its children's) and its own peak of memory; a process of its
own, because a child's peak begins with that of the process it was forked from."""


@dataclass(frozen=True)
class Cost:
    """What one command took; of `dvc`, the stages included.

    Attributes:
        what: For the table.
        wall: Seconds.
        cpu: Seconds.
        mb: Peak memory of the process itself.
        stages: Of the stages that it ran, `what` being their name.
        disk_mb: What the folder grew by.
    """

    what: str
    wall: float
    cpu: float
    mb: float
    stages: tuple[Cost, ...] = ()
    disk_mb: float = 0.0


class Workshop:
    """The folder, and what has been measured in it.

    Args:
        folder: To be made, so that removing it again removes nothing else.

    Raises:
        FileExistsError: It exists.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.clone = folder, folder / "clone"
        self.cwd = folder
        self.costs: list[Cost] = []
        self._log = folder / "log.jsonl"
        shims = folder / "bin"
        shims.mkdir()
        (folder / "measure.py").write_text(MEASURE)
        # DVC starts the stages as `python`, found on PATH.
        shim = shims / "python"
        self._measuring = (sys.executable, "-S", "-E", str(folder / "measure.py"), str(self._log))
        shim.write_text(f'#!/bin/sh\nexec {" ".join(self._measuring)} {sys.executable} "$@"\n')
        shim.chmod(0o755)
        foreign = ("DVC_", "MLFLOW_", "GIT_", "PYTHONPATH")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.environment = {
            **kept,
            "PATH": os.pathsep.join([str(shims), str(BIN), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            "DVC_SITE_CACHE_DIR": str(folder / "state"),
            "DVC_GLOBAL_CONFIG_DIR": str(folder / "state"),
            "DVC_NO_ANALYTICS": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            **{f"GIT_{who}_{what}": "nobody" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        }

    def run(self, *command: str) -> None:
        """A command that is not measured."""
        subprocess.run(command, cwd=self.cwd, env=self.environment, check=True, stdout=sys.stderr)

    def measure(self, command: str, remark: str) -> None:
        """Run `dvc` and add a row to the table."""
        self._log.unlink(missing_ok=True)
        before = self._disk()
        print(f"--- dvc {command}", file=sys.stderr, flush=True)
        self.run(*self._measuring, str(BIN / "dvc"), *command.split())
        *stages, whole = [json.loads(line) for line in self._log.read_text().splitlines()]
        cost = Cost(
            f"`dvc {command}`{remark}", whole["wall"], whole["cpu"], whole["kb"] / 1024,
            tuple(Cost(row["command"][-1], row["wall"], row["cpu"], row["kb"] / 1024) for row in stages),
            self._disk() - before,
        )  # fmt: skip
        self.costs.append(cost)
        print(dvc_row(cost), file=sys.stderr, flush=True)

    def _disk(self) -> float:
        """MB (10^6 bytes) that the folder takes."""
        answer = subprocess.run(
            ["du", "-s", "--block-size=1", self.folder], capture_output=True, text=True, check=False
        ).stdout
        return int(answer.split()[0]) / 1e6


def main() -> None:
    """Measure and print."""
    options = arguments()
    shop = Workshop(options.folder.absolute())
    try:
        prepare(shop, options.chips, options.link)
        for name in options.only or STEPS:
            shop.cwd = shop.clone
            for step in STEPS[name]:
                shop.measure(*step) if isinstance(step, tuple) else step(shop)
    finally:
        print(report(shop.costs, options.chips))
        if not options.keep:
            shutil.rmtree(shop.folder)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="DVC's commands where data/ holds many chips.")
    parser.add_argument("folder", type=Path, help="a new folder, on the disk that is to be measured")
    parser.add_argument("--chips", type=int, default=100_000)
    parser.add_argument("--link", help="another cache.type than .dvc/config has: copy, hardlink, symlink")
    parser.add_argument(
        "--only", nargs="+", default=[], choices=list(STEPS), help="some of the steps, which build on those before them"
    )
    parser.add_argument("--keep", action="store_true", help="do not remove the folder")
    return parser.parse_args()


def prepare(shop: Workshop, chips: int, link: str | None) -> None:
    """The clone, with tiny params, a remote of its own, and chips that DVC does not know yet."""
    clone = shop.clone
    shop.run("git", "clone", "-q", str(ROOT), str(clone))
    shop.cwd = clone
    text, _ = overlay(clone / "params.yaml", SMALL, "params.yaml")
    write(text, clone / "params.yaml")
    shop.run("dvc", "remote", "add", "-q", "-d", "storage", str(shop.folder / "remote"))
    if link:
        shop.run("dvc", "config", "cache.type", link)
    (clone / "data.dvc").unlink()
    commit(shop)
    write_chips(clone / "data", chips)


def write_chips(folder: Path, count: int) -> None:
    """Small GeoTIFFs side by side on the ground, each with its own pixels, and their catalog; every fifth validates.

    A window of a synthetic landscape with noise of its own, laid into the bytes of one GeoTIFF, which GDAL would take
    minutes for.
    """
    landscapes = [synth_chip(0, index)[0] for index in range(16)]
    lines = ["image,usage"]
    for index, (name, content) in enumerate(chip_files(landscapes, count)):
        path = folder / name
        if index % 1000 == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(content)
        lines.append(f"{name},{'train' if index % 5 else 'validate'}")
    (folder / "catalog.csv").write_text("\n".join(lines) + "\n")


def chip_files(landscapes: Sequence[np.ndarray[Any, Any]], count: int) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each chip."""
    template, its_pixels, its_corner = geotiff()
    for index in range(count):
        rng = np.random.default_rng(index)
        landscape = landscapes[int(rng.integers(len(landscapes)))]
        top, left = rng.integers(landscape.shape[-1] - SIDE, size=2)
        window = landscape[:, top : top + SIDE, left : left + SIDE]
        pixels = np.maximum(window.astype(np.int32) + rng.integers(-20, 21, window.shape), 1).astype("<u2").tobytes()
        content = template.replace(its_pixels, pixels).replace(its_corner, struct.pack("<2d", *corner(index)))
        yield f"chips/{index // 1000:03d}/chip_{index:06d}.tif", content


def geotiff() -> tuple[bytes, bytes, bytes]:
    """An uncompressed GeoTIFF, and the bytes in it that are its pixels and its corner's coordinates."""
    pixels = np.random.default_rng(0).integers(1, 9999, (len(BANDS), SIDE, SIDE)).astype(np.uint16)
    place = (300_001.25, 8_000_002.75)
    profile = {
        "driver": "GTiff", "count": len(BANDS), "height": SIDE, "width": SIDE, "dtype": "uint16", "nodata": 0,
        "crs": CRS.from_epsg(32721), "transform": from_origin(*place, PIXEL_M, PIXEL_M), "interleave": "band",
        "blockysize": SIDE, "photometric": "MINISBLACK", "alpha": "UNSPECIFIED",
    }  # fmt: skip
    with MemoryFile() as memory:
        with memory.open(**profile) as dataset:
            dataset.write(pixels)
            dataset.descriptions = BANDS
        content = bytes(memory.getbuffer())
    return content, pixels.tobytes(), struct.pack("<2d", *place)


def corner(index: int) -> tuple[float, float]:
    """Left and top of a chip, m: a grid of 400 columns."""
    row, column = divmod(index, 400)
    return 200_000 + column * SIDE * PIXEL_M, 9_000_000 - row * SIDE * PIXEL_M


def commit(shop: Workshop) -> None:
    """A git commit of everything in the clone."""
    shop.run("git", "add", "-A")
    shop.run("git", "commit", "-q", "-m", "Measure")


def forget(shop: Workshop) -> None:
    """Without its database of file states, as on another machine, DVC hashes every chip again."""
    shutil.rmtree(shop.folder / "state")


def second_clone(shop: Workshop) -> None:
    """Go on in a colleague's clone, which has a cache of its own."""
    other = shop.folder / "other"
    shop.run("git", "clone", "-q", str(shop.clone), str(other))
    shop.cwd = other


def lose_chips(shop: Workshop) -> None:
    """As after a change to a commit with other chips."""
    shutil.rmtree(shop.clone / "data")


def one_more_chip(shop: Workshop) -> None:
    """One that DVC has not seen under this name."""
    chips = shop.clone / "data/chips/000"
    shutil.copyfile(chips / "chip_000001.tif", chips / f"more_{len(list(chips.iterdir()))}.tif")


STEPS: dict[str, Sequence[tuple[str, str] | Callable[[Workshop], None]]] = {
    "add": [("add data", ", first"), commit, ("add data", ", nothing new")],
    "repro": [("repro", ", first"), commit, ("repro", ", nothing to do")],
    "status": [("status", ""), ("data status", ""), forget, ("status", ", state lost")],
    "exp": [("exp run -S lr=3e-4", ""), ("exp run -S lr=0.001", ", seen before")],
    "temp": [("exp run --temp -S lr=1e-4", "")],
    "queue": [("exp run --queue -S lr=4e-4", ""), ("exp show --only-changed --csv", "")],
    "push": [("push", ", first"), ("push", ", nothing new")],
    "pull": [second_clone, ("pull", " in a second clone"), ("pull", " there, nothing new")],
    "checkout": [lose_chips, ("checkout data.dvc", ", data/ gone")],
    "one-more": [
        one_more_chip, ("add data/chips/000", ", one chip new"), one_more_chip, ("add data", ", one chip new"),
    ],
    "gc": [commit, ("gc --workspace --all-experiments --force", "")],
}  # fmt: skip
"""What is measured, in this order: commands of `dvc` with a remark, and what is done unmeasured between them."""


def dvc_row(cost: Cost) -> str:
    """A command's row: what DVC itself took is the whole less its stages."""
    wall, cpu = sum(stage.wall for stage in cost.stages), sum(stage.cpu for stage in cost.stages)
    ran = f"{wall:.0f}" if cost.stages else ""
    return f"| {cost.what} | {cost.wall:.1f} | {ran} | {cost.cpu - cpu:.1f} | {cost.mb:.0f} | {cost.disk_mb:+.0f} |"


def report(costs: Sequence[Cost], chips: int) -> str:
    """Two Markdown tables: DVC's commands, and the stages as they first met the chips."""
    lines = [
        f"{chips:,} chips, {os.cpu_count()} CPUs, load {os.getloadavg()[1]:.1f}",
        "",
        "| command | wall, s | of it stages, s | DVC's CPU, s | DVC's peak memory, MB | disk, MB |",
        "|---|---|---|---|---|---|",
        *[dvc_row(cost) for cost in costs],
    ]
    first = next((cost.stages for cost in costs if cost.stages), ())
    if first:
        lines += ["", "| stage | wall, s | CPU, s | peak memory, MB |", "|---|---|---|---|"]
        lines += [f"| {stage.what} | {stage.wall:.1f} | {stage.cpu:.1f} | {stage.mb:.0f} |" for stage in first]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
