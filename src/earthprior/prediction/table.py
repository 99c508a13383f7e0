"""One prediction for each image: a table with all columns of the catalog."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from earthprior.chips.problems import ChipError, Tally
from earthprior.digests import digest, files_digest, tensors_digest
from earthprior.downstream.saved import Finetuned
from earthprior.errors import DataError
from earthprior.files import read_json, replacing, write_json
from earthprior.params.plain import shown
from earthprior.prediction.chips import WholeChips, warm_up, whole_chips
from earthprior.prediction.inputs import Image
from earthprior.prediction.mapping import Count
from earthprior.prediction.ranges import Ranges
from earthprior.prediction.telling import Told

TABLE, FACTS = "predictions.csv", "predictions.json"
CHIPS_AT_ONCE = 16


def tabulate(
    model: Finetuned,
    images: Sequence[Image],
    out: Path,
    nodata: tuple[float, ...] | None,
    force: bool,
    readers: int,
    device: torch.device,
    tally: Tally,
) -> Count:
    """Write `predictions.csv`: a row for each image that can be read, in their order.

    Args:
        model: For classification or regression, on the device.
        images: All of one catalog, or of none.
        out: The folder for it.
        nodata: Values that mark missing data, or None for the files' own.
        force: Make it again where it is there.
        readers: Threads.
        device: Of the model.
        tally: Gets the problems of images that could not be read.

    Raises:
        DataError: The catalog has a column of a prediction's name, or there are several catalogs of other columns.
    """
    if len({tuple(image.cells) for image in images}) > 1:
        raise DataError(
            "the images come from catalogs of different columns, or from none, and would share one table. Predict "
            "them into different folders (--out)"
        )
    made_of = digest({
        "model": tensors_digest(model.state_dict()), "nodata": nodata,
        "cells": digest({"rows": [dict(i.cells) for i in images]}),
        "files": files_digest(path for image in images for path in image.paths), "classes": model.classes,
    })  # fmt: skip
    if not force and _made_of(out) == made_of:
        return Count(kept=len(images))
    own = list(images[0].cells) if images[0].cells else ["image"]
    added = _columns(model)
    if set(own) & set(added):
        raise DataError(f"the catalog has a column {shown(sorted(set(own) & set(added))[0])} already. Rename it")
    count = Count()

    def failed(image: Image, error: ChipError) -> None:
        tally.add(error.problem)
        count.failed += 1
        told.done()

    warm_up(images[0], model.bands)
    with (
        Told("predict", len(images)) as told,
        Ranges(model.backbone, told.say) as ranges,
        replacing(out / TABLE) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as handle,
    ):
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow([*own, *added])
        for batch in whole_chips(images, model.bands, nodata, CHIPS_AT_ONCE, readers, failed, told.once):
            ranges.look(batch)
            for image, values in zip(batch.images, _predicted(model, batch, device), strict=True):
                writer.writerow([*(image.cells.values() or [image.files[0]]), *values])
                count.made += 1
                told.done()
    # With images that could not be read, the table is not what is asked for.
    whole = made_of if not count.failed else None
    write_json(out / FACTS, {"made_of": whole, "rows": count.made, "classes": model.classes, "kind": model.kind})
    return count


def _made_of(out: Path) -> str | None:
    """What the table that is there was made of, if it is whole: its facts are written last."""
    try:
        found = read_json(out / FACTS)["made_of"] if (out / TABLE).is_file() else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _columns(model: Finetuned) -> list[str]:
    name = f"predicted_{model.description['label_column']}"
    return [name, *(f"{name}_probability_{label}" for label in model.classes)]


@torch.no_grad()
def _predicted(model: Finetuned, batch: WholeChips, device: torch.device) -> Iterator[list[Any]]:
    """Per chip the class and its probabilities, or the number; empty cells for a chip without data."""
    valid = batch.valid.to(device)
    found = model.predict(model.normalize(batch.pixels.to(device), valid), valid[:, None]).cpu()
    for values, mask in zip(found, batch.valid, strict=True):
        if not mask.any():
            yield [""] * (1 + len(model.classes))
        elif model.kind == "regression":
            yield [f"{float(values[0]):.7g}"]
        else:
            yield [model.classes[int(values.argmax())], *(f"{float(value):.6f}" for value in values)]
