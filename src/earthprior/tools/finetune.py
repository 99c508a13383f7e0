"""`earthprior finetune`: from labelled chips and a pretrained backbone to a network that makes maps.

Writes downstream/results/finetune/: model.safetensors, config.json, history.csv, environment.json, mlflow_run.json,
and, when the network was judged, metrics.json, report.html and figures/.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from earthprior import build, identity, under_dvc
from earthprior.downstream import finetuning, page
from earthprior.downstream.finetuning import Done, Finetuning, Work
from earthprior.downstream.saved import WEIGHTS
from earthprior.files import move_into, read_json, write_atomic, write_json
from earthprior.journal import Journal
from earthprior.loading import load_backbone, within
from earthprior.params import DownstreamParams
from earthprior.report import render
from earthprior.tracking import Tracker, open_tracker
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.course import Hooks, prepare_torch
from earthprior.training.distributed import only_writer, world
from earthprior.training.run import Home
from earthprior.training.stop import stop_requests

FOLDER = Path("downstream")
RESULTS = FOLDER / "results/finetune"
NETWORK = f"{RESULTS}/{WEIGHTS}"


def run(params: DownstreamParams, root: Path, accept_code: bool = False) -> None:
    """Finetune, or continue where an earlier process of the same run was stopped.

    Args:
        params: The whole of downstream/params.yaml, with what the command line changed.
        root: The project's root.
        accept_code: Continue although the code changed since the last checkpoint.

    Raises:
        EarthPriorError: There is no backbone, the catalog has no such labels, or another process trains this run.
        Interrupted: Asked to stop; the state is saved.
        StorageError: The disk is full or failing.
        DivergedError: Loss or gradient became non-finite.
    """
    prepare_torch(params.threads)
    pretrained = within(root, params.pretrained)
    backbone = load_backbone(pretrained)
    with world(build.device(params)) as (process, device), stop_requests() as stop:
        work = finetuning.prepare(params, root, backbone, device)
        folder = identity.main_root(root) / "work/finetune" / work.made.fingerprint
        home = Home(root, folder, root / RESULTS, root / FOLDER / "params.yaml")

        def open_run(tags: Mapping[str, str], journal: Journal) -> Tracker:
            name = f"finetune-{params.task}-{work.made.fingerprint[:6]}"
            values = {**work.made.values, "pretrained": str(params.pretrained), "train_chips": len(work.train)}
            return open_tracker(root, name, values, {**tags, **_pretraining(pretrained)}, journal)

        def done(store: CheckpointStore) -> None:
            if under_dvc.present():
                under_dvc.keep(folder, root, NETWORK)
            else:
                store.delete()

        hooks = Hooks(open_run, trained=lambda found: _judge(work, found, home), done=done)
        with only_writer(folder, process):
            if process.is_first:
                under_dvc.reopen(folder, root, NETWORK, "finetune", f"{FOLDER}/dvc.lock")
            process.wait()
            Finetuning(work, home, hooks, process).run(stop, accept_code)


def _pretraining(pretrained: Path | str) -> dict[str, str]:
    """The tag that leads to the run of the pretraining, where its results say which that is."""
    try:
        run_id = read_json(Path(pretrained) / "mlflow_run.json")["run_id"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return {"pretrain_run_id": str(run_id)} if run_id else {}


def _judge(work: Work, done: Done, home: Home) -> None:
    """Judge what was kept, and write it down: all aside first, and moved when complete."""
    print(f"finetune: judging on {len(work.judged):,} {work.usage} chips", file=sys.stderr, flush=True)
    found = page.judged(work, done)
    building = home.folder / "judged"
    shutil.rmtree(building, ignore_errors=True)
    pictures = page.draw(found, building / "figures")
    write_json(building / "metrics.json", found.metrics())
    write_atomic(building / "report.html", render(page.report(found, pictures, _identity(work, home))))
    names = ("figures", "metrics.json", "report.html")
    move_into(building, home.results, names)
    for name in names:
        done.tracker.log_artifact(home.results / name, "finetune")
    done.tracker.log({f"finetune/{name}": value for name, value in found.metrics().items()}, 0)
    for line in page.told(found):
        print(f"finetune: {line}", file=sys.stderr, flush=True)
    print(f"finetune: {home.shown(home.results)}/report.html tells more", file=sys.stderr, flush=True)


def _identity(work: Work, home: Home) -> list[tuple[str, str]]:
    """Who this run is, for the report's last table."""
    facts, environment = work.made.facts, identity.environment()
    known: dict[str, Any] = {
        "Git commit": identity.git_commit(home.root),
        "DVC experiment": identity.dvc_experiment(),
        "Fingerprint": work.made.fingerprint,
        "Pretrained weights, SHA-256": facts["pretrained"]["sha256"],
        "Fingerprint of the pretraining": facts["pretrained"]["fingerprint"],
        "Catalog SHA-256": facts["data"]["catalog_sha256"],
        "Train chips and labels, SHA-256": facts["data"]["train_sha256"],
        "Parameters": "; ".join(f"{name}: {value}" for name, value in work.made.values.items()),
        "Python": f"{environment['python']} on {environment['platform']}",
        "Processor": environment.get("gpu") or f"{environment['cpu']}, {environment['cpus']} cores",
        "Packages": ", ".join(f"{name} {version}" for name, version in environment["packages"].items()),
    }
    return [(name, str(value) if value is not None else "not known") for name, value in known.items()]


def check_params(params: DownstreamParams, root: Path) -> None:
    """Refuse to end well where downstream/params.yaml is no longer what dvc ran the stage with."""
    from earthprior.params import load_downstream

    under_dvc.check_params("finetune", params, root / FOLDER, load_downstream)
