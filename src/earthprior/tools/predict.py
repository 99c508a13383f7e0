"""Tool `predict`: what a finetuned network says of scenes, folders of them, or a catalog's chips."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from earthprior import build
from earthprior.chips.problems import Tally
from earthprior.chips.verdict import counted
from earthprior.downstream.saved import Finetuned, load_finetuned
from earthprior.errors import DataError, HeldError, ParamsError
from earthprior.params import DownstreamParams
from earthprior.prediction.inputs import Catalog, Image, find
from earthprior.prediction.mapping import Wanted, map_all
from earthprior.prediction.scenes import Tiling
from earthprior.prediction.table import TABLE, tabulate
from earthprior.prediction.tiling import default_overlap

MODEL, OUT = Path("downstream/results/finetune"), Path("work/predict")


def run(
    params: DownstreamParams,
    root: Path,
    named: Sequence[Path],
    model_path: Path | None = None,
    out: Path | None = None,
    probabilities: bool = False,
    tile: int | None = None,
    overlap: int | None = None,
    force: bool = False,
) -> None:
    """Predict, as far as it was not done before.

    Args:
        params: Of the finetuning: where the catalog is, and how its files are read.
        root: The project's root.
        named: GeoTIFFs, folders, catalogs; the catalog of params where there is none.
        model_path: What `earthprior finetune` wrote; by default downstream/results/finetune.
        out: The folder for the results; by default work/predict.
        probabilities: Of every class, too, where maps are made.
        tile: Width and height of a tile, px; by default what the network was trained on.
        overlap: Of neighbouring tiles, px; by default half a tile.
        force: Make again what is there.

    Raises:
        DataError: Images could not be predicted; the others are.
        ParamsError: An option makes no sense.
        HeldError: Another process writes into the folder.
    """
    device = build.device(params)
    torch.set_num_threads(params.threads)
    model = load_finetuned(model_path or root / MODEL).to(device)
    out = out or root / OUT
    images = _images(params, root, named, out)
    tally = Tally()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            if model.kind == "segmentation":
                wanted = Wanted(out, probabilities, _tiling(params, model, tile, overlap), params.data.nodata, force)
                count = map_all(model, images, wanted, device, tally)
                where, what = out, "map"
            else:
                readers = params.operation.readers
                count = tabulate(model, images, out, params.data.nodata, force, readers, device, tally)
                where, what = out / TABLE, "prediction"
    except Timeout:
        raise HeldError(f"another process predicts into {out}; wait for it, or choose another folder (--out)") from None
    kept = f", {count.kept:,} made before" * bool(count.kept)
    failed = f", {count.failed:,} not possible" * bool(count.failed)
    print(f"predict: {counted(count.made, what)}{kept}{failed}; in {where}", file=sys.stderr)
    if tally.errors:
        headline = f"{counted(tally.errors, 'image')} could not be predicted:"
        raise DataError("\n".join([headline, *tally.lines("error", len(images))]))


def _images(params: DownstreamParams, root: Path, named: Sequence[Path], out: Path) -> list[Image]:
    if named:
        images = find(named, params.data.image_columns, out)
    else:
        images = list(Catalog(root / params.data.dir / params.data.catalog, params.data.image_columns).images())
    if not images:
        raise DataError("there is nothing to predict: the catalog has no rows")
    return images


def _tiling(params: DownstreamParams, model: Finetuned, tile: int | None, overlap: int | None) -> Tiling:
    px = tile or model.crop_px
    overlap_px = default_overlap(px) if overlap is None else overlap
    if overlap_px >= px:
        raise ParamsError(f"--overlap {overlap_px} leaves nothing of tiles of {px} px; choose less than --tile")
    local = model.backbone.description["normalization"]["stat_procedure"] in ("lab", "lpb")
    return Tiling(px, overlap_px, max(px, params.data.read_px) if local else px)
