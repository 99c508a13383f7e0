"""Tool `embed`: a pretrained backbone's features of every chip of a catalog, as one Parquet file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from earthprior import build
from earthprior.backbone import Backbone
from earthprior.chips.problems import ChipError, Tally
from earthprior.chips.verdict import counted
from earthprior.digests import FilesDigest, digest, tensors_digest
from earthprior.errors import DataError
from earthprior.files import sha256_file
from earthprior.loading import load_backbone
from earthprior.params import Params
from earthprior.prediction.chips import warm_up, whole_chips
from earthprior.prediction.embedding import Embedder, is_vectors, made_of, schema_of, vectors_file
from earthprior.prediction.inputs import Catalog, Image
from earthprior.prediction.ranges import Ranges
from earthprior.prediction.telling import Told

if TYPE_CHECKING:
    import pyarrow as pa

OUT = Path("work/embed/features.parquet")
CHIPS_AT_ONCE = 16


def run(
    params: Params,
    root: Path,
    catalog_path: Path | None = None,
    backbone_path: str | Path | None = None,
    out: Path | None = None,
    force: bool = False,
) -> None:
    """Embed every chip, unless that was done before.

    Args:
        params: The whole of params.yaml.
        root: The project's root.
        catalog_path: A CSV file whose paths are relative to its folder; by default that of params.
        backbone_path: What `load_backbone` takes; by default results/pretrain.
        out: The Parquet file; by default work/embed/features.parquet.
        force: Make it again where it is there, and replace any other file.

    Raises:
        DataError: Chips could not be read; the file has the others.
    """
    device = build.device(params)
    torch.set_num_threads(params.threads)
    backbone = load_backbone(backbone_path or root / "results/pretrain").to(device)
    embedder = Embedder(backbone, device)
    catalog = Catalog(catalog_path or root / params.data.dir / params.data.catalog, params.data.image_columns)
    schema, out = schema_of(catalog.columns, embedder), out or root / OUT
    count, asked = _asked(params, catalog, backbone, embedder)
    if out.exists() and not force:
        if not is_vectors(out):
            raise DataError(f"{out} is no file of features. Choose another --out, or add --force to replace it")
        if made_of(out) == asked:
            print(f"embed: {out} was made before, of the same; --force makes it again", file=sys.stderr)
            return
    tally = Tally()
    with Told("embed", count) as told:
        _write(params, catalog, embedder, schema, out, asked, tally, told)
    numbers = len(embedder.names)
    print(f"embed: {counted(count - tally.errors, 'chip')}, {numbers:,} numbers each; in {out}", file=sys.stderr)
    if tally.errors:
        headline = f"{counted(tally.errors, 'chip')} could not be read, and {out} lacks them:"
        raise DataError("\n".join([headline, *tally.lines("error", count)]))


def _asked(params: Params, catalog: Catalog, backbone: Backbone, embedder: Embedder) -> tuple[int, str]:
    """How many chips there are, and all that their features depend on."""
    files, count = FilesDigest(), 0
    for image in catalog.images():
        count += 1
        for path in image.paths:
            files.add(path)
    if not count:
        raise DataError(f"{catalog.path.name} has no rows")
    return count, digest({
        "weights": tensors_digest(backbone.state_dict()), "facts": embedder.facts, "nodata": params.data.nodata,
        "catalog": sha256_file(catalog.path), "files": files.value(),
    })  # fmt: skip


def _write(
    params: Params,
    catalog: Catalog,
    embedder: Embedder,
    schema: pa.Schema,
    out: Path,
    asked: str,
    tally: Tally,
    told: Told,
) -> None:
    def failed(image: Image, error: ChipError) -> None:
        tally.add(error.problem)
        told.done()

    bands, nodata, readers = embedder.bands, params.data.nodata, params.operation.readers
    warm_up(next(catalog.images()), bands)
    with vectors_file(out, schema) as vectors, Ranges(embedder.backbone, told.say) as ranges:
        for batch in whole_chips(catalog.images(), bands, nodata, CHIPS_AT_ONCE, readers, failed, told.once):
            ranges.look(batch)
            vectors.append([list(image.cells.values()) for image in batch.images], embedder(batch))
            for _ in batch.images:
                told.done()
        vectors.close(asked if not tally.errors else None)
