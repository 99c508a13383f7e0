"""The stage `evaluate`: what the pretrained network is worth, in numbers, pictures and one report.

Writes results/evaluate/: metrics.json, levels.csv, serving.json, figures/*.png and report.html, all at the end. Judged
are the catalog's test chips where it has any, else the validation chips.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from earthprior import build, handover, identity, memory, naming, under_dvc
from earthprior.chips.batch import Batch
from earthprior.chips.catalog import ChipRow
from earthprior.chips.normalize import Normalizer
from earthprior.chips.selection import (
    JUDGED_CHIPS,
    Selection,
    grid_batches,
    middle_crops,
    read_stats,
    select,
    spread,
)
from earthprior.errors import EarthPriorError
from earthprior.evaluation import denoising, gallery, pages, probing, provenance, samples
from earthprior.evaluation.labelled import Material
from earthprior.files import move_into, write_atomic, write_csv, write_json
from earthprior.handover import flat
from earthprior.metrics import data_ranges
from earthprior.params import Params, active, evaluation
from earthprior.report import render
from earthprior.tasks.diffusion import DiffusionTask
from earthprior.tracking import Pretraining, RunRef, continue_or_open
from earthprior.tracking_view import BEST

PANEL_CHIPS = 2
REAL_CHIPS = 64


@dataclass(frozen=True)
class Judged:
    """The chips that the network is judged on.

    Args:
        usage: Their split.
        rows: Those used.
        available: How many the split has.
    """

    usage: str
    rows: list[ChipRow]
    available: int


def run(params: Params, root: Path) -> None:
    """Evaluate results/pretrain/.

    Args:
        params: The whole of params.yaml.
        root: The project's root, holding results/stats/ and results/pretrain/.

    Raises:
        EarthPriorError: Statistics or weights are missing, or are not those of params.yaml.
    """
    torch.set_num_threads(params.threads)
    pretrained = root / "results/pretrain"
    stats, stats_sha256 = read_stats(root)
    task, trained = build.pretrained_task(pretrained)
    config = handover.read_config(pretrained / "config.json")
    fingerprint = str(config["fingerprint"])
    _check_same_run(params, trained, config, stats, stats_sha256)
    if under_dvc.present():
        # Since dvc has come to this stage, it has the training's outs in dvc.lock.
        under_dvc.forget(identity.main_root(root) / "work/pretrain" / fingerprint)
    device = build.device(params)
    with memory.told_in_evaluation(params, device):
        evaluated = _evaluated(params, root, stats, task, device, config)
    _write(evaluated, root, fingerprint)
    _track(evaluated, root, fingerprint, pretrained)


def _evaluated(
    params: Params,
    root: Path,
    stats: Mapping[str, Any],
    task: DiffusionTask,
    device: torch.device,
    config: Mapping[str, Any],
) -> pages.Evaluated:
    """All numbers and pictures of the report."""
    pretrained = root / "results/pretrain"
    task = task.to(device).eval()
    samples_bytes = 4 * params.evaluate.samples * len(params.data.bands) * params.data.train_px**2
    memory.require({f"evaluate.samples {params.evaluate.samples:,}": 4 * samples_bytes})
    selection = select(params, root, stats)
    judged = judged_chips(selection)
    normalizer = build.normalizer(params, stats)

    # Each part may take minutes, and where no terminal is, no bar shows.
    _say(f"denoising {len(judged.rows):,} {judged.usage} chips at each noise level")
    table = _denoise(params, task, selection, judged, normalizer, device, stats)
    levels = denoising.levels_table(table, task.schedule, params.data.bands)
    _say(f"probing features for labels in column {params.evaluate.label_column}, if there are any")
    material = Material(params, selection, normalizer, device)
    tasks = {"network": task, "untrained": probing.untrained(params, task)}
    found = probing.probe(material, tasks, judged.rows)
    _say(f"sampling {params.evaluate.samples} chips, and drawing the report")
    return pages.Evaluated(
        params=params,
        usage=judged.usage,
        judged=len(judged.rows),
        available=judged.available,
        levels=levels,
        numbers=denoising.summary(levels, params.data.bands),
        samples=samples.draw(
            task,
            middle_crops(params, selection.folder, judged.rows, REAL_CHIPS, normalizer, device)[0],
            params.evaluate,
            lambda steps: tqdm(steps, desc="sample", unit="step", file=sys.stderr, disable=None),
            normalizer.range,
        ),
        panels=denoising.panels(
            task, *middle_crops(params, selection.folder, judged.rows, PANEL_CHIPS, normalizer, device)
        ),
        probing=found,
        gallery=gallery.gallery(material, tasks, found.serving),
        history=handover.read_history(pretrained / "history.csv"),
        identity=provenance.rows(root, params, stats, str(config["fingerprint"]), pretrained),
        imported=bool(config.get("imported")),
    )


def _say(what: str) -> None:
    print(f"evaluate: {what}", file=sys.stderr, flush=True)


def judged_chips(selection: Selection) -> Judged:
    """The test chips, or the validation chips where the catalog has none; evenly thinned where there are many."""
    usage, rows = ("test", selection.test) if selection.test else ("validate", selection.validate)
    return Judged(usage, spread(rows, JUDGED_CHIPS), len(rows))


def _check_same_run(
    params: Params, trained: Params, config: Mapping[str, Any], stats: Mapping[str, Any], stats_sha256: str
) -> None:
    """Refuse weights of other params or other statistics: the numbers would belong to neither."""
    wanted, have = active(params), active(trained)
    changed = [
        f"{key}: {have.get(key)} -> {wanted.get(key)}"
        for key in sorted(wanted.keys() | have.keys())
        if wanted.get(key) != have.get(key)
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise EarthPriorError(
            f"results/pretrain/ was trained with other params ({'; '.join(changed[:3])}{more}); run: dvc repro"
        )
    if identity.fingerprint(have | config["foreign_files"], stats_sha256) != config["fingerprint"]:
        then = config.get("data", {})
        names = {"md5": "chips", "catalog_sha256": "catalog", "chips_sha256": "pixels"}
        differs = [
            f"other {word}" for name, word in names.items() if name in then and then[name] != stats["data"].get(name)
        ]
        what = ", ".join(differs) or "the same chips and catalog, but other numbers"
        raise EarthPriorError(
            f"results/pretrain/ was trained on other statistics than results/stats/ has now ({what}); run: dvc repro"
        )


def _denoise(
    params: Params,
    task: DiffusionTask,
    selection: Selection,
    judged: Judged,
    normalizer: Normalizer,
    device: torch.device,
    stats: Mapping[str, Any],
) -> pd.DataFrame:
    """The denoising table of all crops of the judged chips."""

    def crops() -> Iterator[tuple[Batch, list[str]]]:
        chips = grid_batches(params, selection.folder, judged.rows, normalizer, device)
        shown = tqdm(
            chips, total=len(judged.rows), desc="denoise", unit="chip", file=sys.stderr, disable=None, mininterval=1.0
        )
        for batch, keys, _ in shown:
            for start in range(0, len(batch), params.val_batch_size):
                part = slice(start, start + params.val_batch_size)
                yield batch[part], keys[part]

    return denoising.judge(task, crops(), params.data.bands, data_ranges(stats))


def _write(evaluated: pages.Evaluated, root: Path, fingerprint: str) -> None:
    """All outs, built aside and moved to results/evaluate/ when complete."""
    building, results = root / "work/evaluate", root / "results/evaluate"
    shutil.rmtree(building, ignore_errors=True)
    pictures = pages.draw_figures(evaluated, building / "figures")
    write_csv(building / "levels.csv", evaluated.levels)
    write_json(building / "metrics.json", evaluated.metrics())
    write_json(building / "serving.json", evaluated.probing.serving.to_json(fingerprint))
    write_atomic(building / "report.html", render(pages.report(evaluated, pictures)))
    move_into(building, results, ("figures", "levels.csv", "metrics.json", "report.html", "serving.json"))


def _track(evaluated: pages.Evaluated, root: Path, fingerprint: str, pretrained: Path) -> None:
    """Bring the results to the run's row in MLflow."""
    history = evaluated.history
    last: dict[str, float] = {}
    if not history.empty:
        last = {f"val/{name}": float(history[name].iloc[-1]) for name in map(str, history.columns) if "/" in name}
        last[BEST] = float(history["gain_db/mean"].max())
    params = evaluated.params
    differs = naming.from_commit(params, root)
    tracker = continue_or_open(
        root,
        RunRef.read(pretrained / "mlflow_run.json"),
        None if differs else naming.plain_name(params, fingerprint),
        evaluation(params),
        identity.identity_tags(root, fingerprint),
        Pretraining(active(params), last),
        differs=differs,
    )
    with tracker:
        # Step 0: MLflow draws bars of it, one per run, instead of a curve of one point.
        tracker.log(dict(flat(evaluated.metrics())), 0)
        tracker.log_levels(evaluated.numbers["gain_db"])
        results = root / "results/evaluate"
        for name in ("metrics.json", "levels.csv", "report.html"):
            tracker.log_artifact(results / name, "evaluate")
        tracker.log_artifact(results / "figures", "evaluate")
        tracker.log_artifact(results / "serving.json", "weights")
        if (root / "dvc.lock").is_file():
            tracker.log_artifact(root / "dvc.lock")
