"""`earthprior export`: a backbone in a folder that stands alone, for other people's code."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

import earthprior
from earthprior import backbone, recorded
from earthprior.backbone import Backbone
from earthprior.errors import EarthPriorError
from earthprior.exporting import card
from earthprior.exporting.graphs import GRAPHS, write_graphs
from earthprior.exporting.single_file import NAME as LOADER
from earthprior.exporting.single_file import single_file
from earthprior.files import read_json, sweep, write_atomic, write_json
from earthprior.loading import load_backbone, run_of
from earthprior.recorded import RecordedRun
from earthprior.tracking_store import RunRef, locate


def run(root: Path, asked: str | None, out: Path | None, register: str | None) -> None:
    """Export a backbone, and say what was written.

    Args:
        root: The project's root.
        asked: What `load_backbone` takes; by default results/pretrain/.
        out: The folder; by default work/export/ and the run's fingerprint.
        register: Name of a model in MLflow's registry, whose next version it becomes; or None.

    Raises:
        EarthPriorError: There is no such backbone, the folder holds something else, or a graph differs from it.
    """
    found = load_backbone(root / "results/pretrain" if asked is None else asked)
    origin = _origin(found, root, asked)
    folder = out or root / "work/export" / str(found.description.get("fingerprint", "backbone"))
    _check_folder(folder)
    found.description.pop("graphs", None)
    write(found, folder, origin)
    graphs = write_graphs(found, folder)
    found.description["graphs"] = graphs
    write(found, folder, origin)
    write_atomic(folder / card.NAME, card.render(found, origin, graphs, folder.name))
    for name, told in graphs.items():
        print(f"export: {_told(name, told)}")
    if register is not None:
        from earthprior import mlflow_register

        made = mlflow_register.register(locate(root), folder, register, origin.get("mlflow_run"))
        print(f'export: registered; load it with: earthprior.load_backbone("models:/{made.name}/{made.version}")')
    print(f'export: {folder} is written; load it with: earthprior.load_backbone("{folder}"), or {LOADER} in it')


def write(found: Backbone, folder: Path, origin: Mapping[str, Any]) -> None:
    """Weights, config.json and the loader: what `backbone.read` needs, and what reads it elsewhere.

    Args:
        found: To be written.
        folder: Where; made when missing.
        origin: What is known of the run, kept in config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    write_atomic(folder / backbone.WEIGHTS, save(found.tensors(), metadata={"format": "pt"}))
    write_json(folder / backbone.CONFIG, {**found.description, "origin": dict(origin)})
    write_atomic(folder / LOADER, single_file())


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than an earlier export."""
    if folder.exists() and not folder.is_dir():
        raise EarthPriorError(f"{folder} is a file; choose another --out")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            known = "serving" in read_json(folder / backbone.CONFIG)
        except (OSError, ValueError, TypeError):
            known = False
        if not known:
            raise EarthPriorError(f"{folder} holds other files than an earlier export's; choose another --out")
        for name in (*GRAPHS, card.NAME):
            # What this export cannot write must not be taken for its own.
            (folder / name).unlink(missing_ok=True)


def _origin(found: Backbone, root: Path, asked: str | None) -> dict[str, Any]:
    """What is known of where the weights come from; of those that were exported before, what was known then."""
    with tempfile.TemporaryDirectory() as scratch:
        path = root if asked is None else Path(asked).resolve()
        if path.parts[-3:-1] == ("results", "pretrain"):
            path = path.parent
        if path.parts[-2:] == ("results", "pretrain"):
            path = path.parents[1]
        if (path / "results/pretrain").is_dir():
            kept = _facts(recorded.of_workspace(path, Path(scratch)))
            # What is checked out now need not be what trained.
            kept["git_commit_at_export"] = kept.pop("git_commit")
        elif run := run_of(str(asked)):
            kept = _facts(recorded.find(root, run, Path(scratch)))
        elif path.exists() or "/" in str(asked):
            kept = dict(found.description.get("origin", {}))
        else:
            kept = _facts(recorded.find(root, str(asked), Path(scratch)))
    return {**{key: value for key, value in kept.items() if value}, "earthprior": earthprior.__version__}


def _facts(run: RecordedRun) -> dict[str, Any]:
    stats = run.read("stats.json")
    ref = RunRef.read(run.folder / "mlflow_run.json")
    serving = run.read("serving.json").get("fingerprint")
    # Numbers of other weights than these are worse than none.
    metrics = dict(run.metrics) if serving in (None, run.read("config.json").get("fingerprint")) else {}
    return {
        "git_commit": run.commit,
        "data_md5": run.data_md5,
        "dvc_experiment": run.experiment,
        "mlflow_run": run.run_id or (ref.run_id if ref else None),
        "metrics": metrics,
        "chips": {name: stats["chips"][name] for name in ("train", "validate", "test")} if "chips" in stats else {},
        "dtypes": stats.get("dtypes", {}),
        "crs": stats.get("crs", {}),
    }


def _told(name: str, told: Mapping[str, Any]) -> str:
    if "left_out" in told:
        return f"{name} is left out, torch cannot write it: {told['left_out']}"
    return (
        f"{name} differs from the backbone by {told['max_abs_difference']:.1e} at most, where the largest value is "
        f"{told['largest_value']:.3g}; height and width: {told['height']} px"
    )
