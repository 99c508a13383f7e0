"""Which recipe learns most in the same short time? Each is a DVC experiment at one budget, and a row of one table.

Run it in a clone whose data/ holds the chips (`dvc add PATH -o data`, then `git commit`):

    python benchmarks/recipe.py --jobs 2 --out docs/recipe.csv
    python benchmarks/recipe.py --only wiener scalar --seeds 0 1 2 --jobs 2 --out docs/recipe.csv

Every experiment is `dvc exp run --temp -n recipe-NAME-sSEED` with the printed -S settings, so that one alone can be had
again by hand; what the table or git holds already is not run again. CPU minutes are those of the whole experiment:
training, validation, report and probe.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
from dvc.api import exp_show

BUDGET = {
    "threads": 1, "data.crop_px": 64, "data.crops_per_chip": 4, "epochs": 8, "evaluate.samples": 4,
}  # fmt: skip
"""For all: 64 px crops in batches of 16; on 416 training chips 832 steps, some five minutes of one CPU core."""

TUTORIAL = {
    "network": "unet_att_d", "objective": "eps", "diffusion.noise_schedule": "linear", "diffusion.precondition": "none",
    "diffusion.weighting": "uniform", "diffusion.timestep_sampling": "uniform",
    "normalization.normal_strategy": "min_max", "normalization.stat_procedure": "lab",
    "augmentation.flip": "false", "augmentation.rotation_degree": "null", "augmentation.contrast_range": "null",
    "augmentation.br_range": "null", "lr": 2e-4, "lr_schedule": "cosinewarm", "grad_clip": "null",
}  # fmt: skip
"""The eofm-tutorial as its code runs, where augmentations never act; but for random crops, and averaged weights, which
are judged for all."""

PROMISED = {
    "augmentation.rotation_degree": "[-180,-90,90,180]", "augmentation.scale_factor": "[0.75,1.5]",
    "augmentation.sigma_range": "[0.03,0.07]", "augmentation.br_range": "[-0.02,0.02]",
    "augmentation.contrast_range": "[0.9,1.2]", "augmentation.bshift_gamma_range": "[0.2,2.0]",
    "augmentation.patch_shift_px": 4,
}  # fmt: skip
"""The augmentations that its README announces."""

MODERN = {
    "network": "unet_film", "objective": "eps", "loss_fn": "mse", "lr": 1e-3, "optimizer": "adamw",
    "lr_schedule": "cosine", "grad_clip": 1.0, "diffusion.noise_schedule": "linear",
    "diffusion.shift_reference_px": "null", "normalization.normal_strategy": "z_value",
    "normalization.stat_procedure": "gpb", "augmentation.flip": "true",
    "augmentation.rotation_degree": "[0,90,180,270]", "augmentation.scale_factor": "null",
    "augmentation.contrast_range": "[0.9,1.1]", "augmentation.br_range": "[-0.02,0.02]",
}  # fmt: skip
"""What the others have in common, where they do not say otherwise."""

FILM = {
    **MODERN, "diffusion.precondition": "none", "diffusion.weighting": "uniform",
    "diffusion.timestep_sampling": "uniform",
}  # fmt: skip
"""The other network, trained to predict eps like the tutorial's."""

V_COSINE = {
    **FILM, "objective": "v", "diffusion.noise_schedule": "cosine", "diffusion.weighting": "min_snr",
    "diffusion.timestep_sampling": "stratified",
}  # fmt: skip

SCALAR = {
    **MODERN, "diffusion.precondition": "scalar", "diffusion.weighting": "linear",
    "diffusion.timestep_sampling": "log_snr",
}  # fmt: skip
WIENER = {**SCALAR, "diffusion.precondition": "wiener"}

RECIPES: dict[str, dict[str, Any]] = {
    "tutorial": TUTORIAL,
    "wiener": WIENER,
    "scalar": SCALAR,
    "film-eps": FILM,
    "film-v-cosine-min-snr": V_COSINE,
    "wiener-v-min-snr": {**V_COSINE, "diffusion.precondition": "wiener", "diffusion.noise_schedule": "linear"},
    "wiener-uniform-t": {**WIENER, "diffusion.timestep_sampling": "uniform"},
    "wiener-no-radiometry": {**WIENER, "augmentation.contrast_range": "null", "augmentation.br_range": "null"},
    "wiener-zoom": {**WIENER, "augmentation.scale_factor": "[0.8,1.25]"},
    "tutorial-time-at-all-levels": {**TUTORIAL, "unet_att_d.time_injection": "all"},
    "tutorial-augmented": {**TUTORIAL, **PROMISED},
    "film-eps-lab": {
        **FILM,
        "normalization.normal_strategy": "min_max",
        "normalization.stat_procedure": "lab",
    },
    "film-v-cosine-shift": {**V_COSINE, "diffusion.shift_reference_px": 32},
    "scalar-soft-min-snr": {
        **V_COSINE,
        "diffusion.precondition": "scalar",
        "diffusion.weighting": "soft_min_snr",
    },
    "wiener-importance": {**WIENER, "diffusion.timestep_sampling": "importance"},
    "wiener-lpb": {**WIENER, "normalization.stat_procedure": "lpb"},
    "wiener-att-d": {**WIENER, "network": "unet_att_d", "unet_att_d.time_injection": "all"},
    "wiener-charbonnier": {**WIENER, "loss_fn": "charbonnier"},
}
"""Name to settings; what none of them names is as committed in params.yaml."""

REPRESENTATIONS = ("network", "context", "untrained", "pixels")
RHOS = ("0.05", "0.1", "0.2", "0.5", "1", "2", "5")


def settings(recipe: Mapping[str, Any], seed: int, budget: Mapping[str, Any]) -> list[str]:
    """The -S arguments of one experiment."""
    chosen = {**budget, **recipe, "seed": seed}
    return [argument for key, value in chosen.items() for argument in ("-S", f"{key}={value}")]


def run(name: str, arguments: Sequence[str], logs: Path) -> float | None:
    """One experiment; its CPU minutes, or None where it failed (its log says why)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (logs / f"{name}.log").open("w") as log:
        command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "-n", name, *arguments]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        # wait4, not wait: it counts the CPU time of the stages, too.
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    minutes = (used.ru_utime + used.ru_stime) / 60
    print(f"{name}: {'done' if process.returncode == 0 else 'FAILED'}, {minutes:.1f} CPU minutes", flush=True)
    return minutes if process.returncode == 0 else None


def measured() -> Iterator[dict[str, Any]]:
    """One row per finished experiment of ours, from what DVC keeps."""
    for found in exp_show():
        name = found.get("Experiment") or ""
        # One that runs shows the metrics of the commit that it began from.
        if name.startswith("recipe-") and not found.get("State") and found.get("gain_db.mean") is not None:
            recipe, seed = name.removeprefix("recipe-").rsplit("-s", 1)
            gains = {f"rho_{rho}": found.get(f"gain_db.rho_{rho}") for rho in RHOS}
            probes = {f"probe_{who}": found.get(f"probe.linear.{who}.average_precision") for who in REPRESENTATIONS}
            yield {"recipe": recipe, "seed": int(seed), "gain_db": found["gain_db.mean"], **gains, **probes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), help="Names of recipes; by default all.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="Experiments at a time, one thread each.")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="Another budget: epochs=1.")
    parser.add_argument("--out", type=Path, default=Path("recipe.csv"))
    parser.add_argument("--list", action="store_true", help="Print the commands and run nothing.")
    arguments = parser.parse_args()
    budget = BUDGET | dict(pair.split("=", 1) for pair in arguments.set)
    # Results of another budget are other rows, not finished ones of this budget.
    suffix = "-" + hashlib.sha256(" ".join(sorted(arguments.set)).encode()).hexdigest()[:4] if arguments.set else ""
    wanted = {
        f"recipe-{name}{suffix}-s{seed}": settings(RECIPES[name], seed, budget)
        for seed in arguments.seeds
        for name in arguments.only or RECIPES
    }
    if arguments.list:
        for name, chosen in wanted.items():
            print(f"dvc exp run --temp -n {name} {' '.join(chosen)}")
        return
    logs = Path(".dvc/tmp/recipe")
    logs.mkdir(parents=True, exist_ok=True)
    cost: dict[Any, float] = {}
    if arguments.out.exists():
        cost = dict(pd.read_csv(arguments.out).set_index(["recipe", "seed"])["cpu_minutes"])
    finished = [*cost, *((row["recipe"], row["seed"]) for row in measured())]
    done = {f"recipe-{recipe}-s{seed}" for recipe, seed in finished}
    writing = threading.Lock()

    def one(name: str) -> None:
        minutes = run(name, wanted[name], logs)
        with writing:
            if minutes is not None:
                recipe, seed = name.removeprefix("recipe-").rsplit("-s", 1)
                cost[recipe, int(seed)] = round(minutes, 2)
            write(arguments.out, cost)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(one, [name for name in wanted if name not in done]))
    write(arguments.out, cost)
    print(pd.read_csv(arguments.out).to_string(index=False))


def write(path: Path, cost: Mapping[tuple[str, int], float]) -> None:
    """Add what is finished to the table; rows of experiments that an earlier commit began are kept."""
    rows = [{**row, "cpu_minutes": cost.get((row["recipe"], row["seed"]))} for row in measured()]
    known = [pd.read_csv(path)] if path.exists() else []
    if rows or known:
        table = pd.concat([*known, pd.DataFrame(rows)]).drop_duplicates(["recipe", "seed"], keep="last")
        table.sort_values(["recipe", "seed"]).round(4).to_csv(path, index=False)


if __name__ == "__main__":
    main()
