"""The model card: what the weights are, where they come from, what they were measured to do, and what they cannot."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from earthprior.backbone import Backbone

NAME = "MODEL_CARD.md"
PARTS = ("task", "network", "objective", "seed", "epochs", "batch_size", "lr", "optimizer", "data", "normalization",
         "augmentation", "diffusion")  # fmt: skip
"""Of params.yaml, beside the network's own section; all of it is in config.json."""


def render(backbone: Backbone, origin: Mapping[str, Any], graphs: Mapping[str, Any], folder: str) -> str:
    """The card as Markdown.

    Args:
        backbone: That is exported.
        origin: What is known of the run: "metrics" flat, "chips" by split, "data_md5", "git_commit", ...; see
            `tools.export`.
        graphs: What `write_graphs` told.
        folder: The name that it is exported under.
    """
    import jinja2

    description = backbone.description
    params = description.get("params", {})
    network = description["network"]
    side = description["serving"].get("side", "decoder")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701 (Markdown, of values that this program wrote)
    )
    return environment.get_template("card.md.j2").render(
        title=f"Backbone {folder}",
        folder=folder,
        params={"task": params.get("task", "diffusion")},
        network=network,
        bands=backbone.bands,
        widths=backbone.widths[side],
        graphs=graphs,
        facts=_facts(backbone, origin),
        statistics={name: description["normalization"]["statistics"]["per_band"][name] for name in backbone.bands},
        normalization=_normalization(description["normalization"]),
        adapted=backbone.adapted,
        metrics=_metrics(origin.get("metrics", {})),
        judged=_judged(origin),
        serving={"t": backbone.t, "rho": backbone.rho, "side": side},
        chosen=f"chosen by {description['serving'].get('chosen_by', 'evaluate.probe_rho')}",
        precondition=backbone.precondition,
        crop_px=backbone.crop_px,
        params_text=_yaml({key: params[key] for key in (*PARTS, network["name"]) if key in params}),
    )


def _facts(backbone: Backbone, origin: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Who these weights are, for a table; only what is known."""
    description = backbone.description
    chips = origin.get("chips") or {}
    known = {
        "Chips": ", ".join(f"{chips[usage]:,} {usage}" for usage in ("train", "validate", "test") if usage in chips),
        "Pixels that it saw at once": f"{backbone.crop_px} x {backbone.crop_px}",
        "Bands": ", ".join(backbone.bands),
        "Data type and reference systems": ", ".join([*origin.get("dtypes", {}), *origin.get("crs", {})]),
        "Data md5 (DVC)": origin.get("data_md5") or description.get("data", {}).get("md5"),
        "Catalog SHA-256": description.get("data", {}).get("catalog_sha256"),
        "Fingerprint of the training": description.get("fingerprint"),
        "Best epoch": description.get("best_epoch"),
        "Git commit": origin.get("git_commit"),
        "Git commit at the export": origin.get("git_commit_at_export"),
        "DVC experiment": origin.get("dvc_experiment"),
        "MLflow run": origin.get("mlflow_run"),
        "Weights": f"{sum(parameter.numel() for parameter in backbone.network.parameters()):,}",
    }
    return [(name, str(value).replace("|", "\\|")) for name, value in known.items() if value not in (None, "")]


def _normalization(section: Mapping[str, Any]) -> str:
    if not section["apply_normalization"]:
        return "the values as they are"
    words = {"gpb": "each band's", "gab": "all bands'", "lpb": "each chip's and band's own", "lab": "each chip's own"}
    what = "minimum and maximum" if section["normal_strategy"] == "min_max" else "mean and standard deviation"
    cut = f", cut at percentile {section['clip_percent']:g}" if section["clip_percent"] else ""
    return f"{words[section['stat_procedure']]} {what}{cut}"


def _judged(origin: Mapping[str, Any]) -> str:
    """Which chips the numbers are of, as far as it is known."""
    count, chips = origin.get("metrics", {}).get("judged_chips"), origin.get("chips", {})
    if count is None or not chips:
        return ""
    return f"{count:,.0f} {'test' if chips.get('test') else 'validate'} chips"


def _metrics(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """The headline numbers, with their intervals: no pixel counts, no numbers per band."""
    wanted = ("gain_db/", "probe/", "psnr/", "ssim/")
    ends = {f"{name}_{end}" for name in metrics for end in ("low", "high")}
    told = []
    for name, value in sorted(metrics.items()):
        if name.startswith(wanted) and name not in ends:
            low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
            interval = "" if low is None or high is None else f" ({low:.4g} to {high:.4g})"
            told.append((name, f"{value:.4g}{interval}"))
    return told


def _yaml(content: Mapping[str, Any]) -> str:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.width = 1000
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    yaml.dump(dict(content), text)
    return text.getvalue()
