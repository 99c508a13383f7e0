"""`earthprior.load_backbone`: a pretrained backbone from wherever it lies."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from earthprior import backbone
from earthprior.adapting import adapted
from earthprior.assembling import newest_checkpoint, of_checkpoint, of_results
from earthprior.backbone import Backbone
from earthprior.errors import EarthPriorError

RESULTS = "results/pretrain"
URI = re.compile(r"(runs|models):/+([^/]+)(/.*)?")
RUN_ID = re.compile(r"[0-9a-f]{32}")


def load_backbone(
    path_or_run: str | Path,
    bands: Sequence[str] | None = None,
    statistics: Mapping[str, Any] | None = None,
) -> Backbone:
    """A pretrained backbone: features, normalization, band names, and the noise level that serves features best.

    Args:
        path_or_run: One of
            a project's root, or its results/pretrain;
            a folder that `earthprior export` wrote, or the .safetensors file in it;
            a checkpoint, work/pretrain/<run>/ckpt-<step>.pt, or its folder, for the newest one;
            the id of an MLflow run, the name of a DVC experiment, runs:/ID, runs:/ID/FOLDER or models:/NAME/VERSION,
            where the working directory's project, or MLFLOW_TRACKING_URI, keeps it.
        bands: Names, for chips with other bands than the pretraining's; see `adapting.adapted`.
        statistics: Of bands that the pretraining did not know; likewise.

    Returns:
        The backbone on the CPU, in evaluation mode.

    Raises:
        EarthPriorError: Nothing is found there, files are damaged or do not belong together, or the bands do not fit.
    """
    found = _found(path_or_run)
    if bands is None and statistics is None:
        return found
    return adapted(found, found.bands if bands is None else bands, statistics)


def within(root: Path, named: str) -> Path | str:
    """What `load_backbone` takes, from what params name: a place in the project where there is one of that name."""
    place = root / named
    return place if place.exists() else named


def _found(path_or_run: str | Path) -> Backbone:
    if not isinstance(path_or_run, str | Path):
        raise EarthPriorError(
            f"load_backbone got {path_or_run!r}; give a folder, a file, an MLflow run or a DVC experiment"
        )
    text, path = str(path_or_run), Path(path_or_run)
    if URI.fullmatch(text):
        return _of_uri(text)
    if path.is_file():
        return _of_file(path)
    if path.is_dir():
        return _of_folder(path)
    if isinstance(path_or_run, Path) or "/" in text or path.suffix:
        raise EarthPriorError(f"{text} does not exist; give a folder, a file, an MLflow run or a DVC experiment")
    return _of_run(text)


def _of_file(path: Path) -> Backbone:
    if path.suffix == ".pt":
        return of_checkpoint(path)
    if path.suffix == ".safetensors" and path.name != "network.safetensors":
        return backbone.read(path)
    if path.name in ("network.safetensors", backbone.CONFIG):
        return _of_folder(path.parent)
    raise EarthPriorError(
        f"{path} is no backbone; give a .safetensors file of earthprior export, network.safetensors, or ckpt-<step>.pt"
    )


def _of_folder(folder: Path) -> Backbone:
    if (folder / backbone.WEIGHTS).is_file():
        return backbone.read(folder)
    for place in (folder, folder / RESULTS):
        if (place / "network.safetensors").is_file():
            return of_results(place, place.parent / "stats/stats.json", place.parent / "evaluate/serving.json")
    if checkpoint := newest_checkpoint(folder):
        return of_checkpoint(checkpoint)
    raise EarthPriorError(
        f"{folder} holds no pretrained backbone: no network.safetensors, no {RESULTS}/, no {backbone.WEIGHTS}, and no "
        "checkpoint; run: dvc repro pretrain"
    )


def run_of(text: str) -> str | None:
    """The run that runs:/ID names as a whole; None for any other text."""
    uri = URI.fullmatch(text)
    return uri[2] if uri and uri[1] == "runs" and not (uri[3] or "").strip("/") else None


def _of_uri(text: str) -> Backbone:
    if run := run_of(text):
        return _of_run(run)
    from earthprior import mlflow_read
    from earthprior.tracking_store import locate

    with tempfile.TemporaryDirectory() as scratch:
        folder = mlflow_read.download(locate(Path.cwd()), text, Path(scratch))
        if folder.is_file():
            raise EarthPriorError(f"{text} is a file; give the folder that earthprior export wrote")
        return _of_folder(folder)


def _of_run(name: str) -> Backbone:
    from earthprior import recorded

    with tempfile.TemporaryDirectory() as scratch:
        folder = recorded.find(Path.cwd(), name, Path(scratch)).folder
        if not (folder / "network.safetensors").is_file():
            raise EarthPriorError(f"run {name} kept no weights: name a training that was finished")
        return of_results(folder, folder / "stats.json", folder / "serving.json")
