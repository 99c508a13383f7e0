"""Where the numbers of a report come from: code, data, parameters, machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from earthprior import identity
from earthprior.handover import read_config
from earthprior.params import Params, active, evaluation
from earthprior.tracking import RunRef


def rows(
    root: Path, params: Params, stats: Mapping[str, Any], fingerprint: str, pretrained: Path
) -> list[tuple[str, str]]:
    """Who this run is, for the report's last table."""
    facts = identity.environment()
    ref = RunRef.read(pretrained / "mlflow_run.json")
    config = read_config(pretrained / "config.json")
    chips = ", ".join(f"{stats['chips'][usage]:,} {usage}" for usage in ("train", "validate", "test"))
    known = {
        "Git commit": identity.git_commit(root),
        "DVC experiment": identity.dvc_experiment(),
        "Data md5 (data.dvc)": stats["data"].get("md5"),
        "Catalog SHA-256": stats["data"].get("catalog_sha256"),
        "Chips": f"{chips}; {params.data.chip_size} px, bands {', '.join(params.data.bands)}",
        "Fingerprint of the training": fingerprint,
        **_origin(config),
        "MLflow run of the training": f"{ref.run_id} in experiment {ref.experiment}" if ref and ref.run_id else None,
        **_grouped({**active(params), **evaluation(params)}),
        "Python": f"{facts['python']} on {facts['platform']}",
        "Processor": facts.get("gpu") or f"{facts['cpu']}, {facts['cpus']} cores, {facts.get('torch_threads')} threads",
        "Packages": ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
    }
    return [(name, str(value) if value is not None else "not known") for name, value in known.items()]


def _origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """Where the weights come from: the best epoch of a training, or somebody else's file."""
    imported = config.get("imported")
    if imported:
        return {"Weights": f"imported from {imported['file']}, SHA-256 {imported['sha256']}; not trained here"}
    return {"Best epoch": config.get("best_epoch")}


def _grouped(flat_params: Mapping[str, Any]) -> dict[str, str]:
    """Flat parameters as one line per section of params.yaml."""
    groups: dict[str, list[str]] = {}
    for key, value in flat_params.items():
        section, _, name = key.rpartition(".")
        groups.setdefault(f"Parameters, {section}" if section else "Parameters", []).append(f"{name}: {value}")
    return {name: "; ".join(lines) for name, lines in groups.items()}
