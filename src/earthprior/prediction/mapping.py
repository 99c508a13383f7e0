"""Maps of many scenes and chips: each file complete or absent; a second call goes on where the first was stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from earthprior.chips.problems import ChipError, Tally, chip_error
from earthprior.chips.scene import open_scene, tags_of
from earthprior.digests import digest, files_digest, tensors_digest
from earthprior.downstream.saved import Finetuned
from earthprior.files import sweep
from earthprior.prediction.inputs import Image, check_apart_from_results
from earthprior.prediction.maps import TAG, Product, classes_product, probabilities_product, write_products
from earthprior.prediction.ranges import Ranges
from earthprior.prediction.scenes import Tiling
from earthprior.prediction.telling import Told


@dataclass(frozen=True)
class Wanted:
    """What is made of each image.

    Attributes:
        out: The folder for it.
        probabilities: Of every class, too.
        tiling: How images are cut.
        nodata: Values that mark missing data, or None for the files' own.
        force: Make again what is there already, and replace what was not made here.
    """

    out: Path
    probabilities: bool
    tiling: Tiling
    nodata: tuple[float, ...] | None
    force: bool


@dataclass
class Count:
    """Images by what became of them."""

    made: int = 0
    kept: int = 0
    failed: int = 0


def map_all(model: Finetuned, images: Sequence[Image], wanted: Wanted, device: torch.device, tally: Tally) -> Count:
    """Write the maps of all images.

    Args:
        model: For segmentation, on the device.
        images: One that comes twice is mapped once.
        wanted: What is made of each.
        device: Of the model.
        tally: Gets the problems of images that could not be mapped.

    Raises:
        ChipError: A map would replace an image.
    """
    images = list({image.stem: image for image in images}.values())
    made_by = tensors_digest(model.state_dict())
    check_apart_from_results(images, (path for image in images for path in _paths(image, wanted)))
    for folder in {path.parent for image in images for path in _paths(image, wanted)}:
        # What a killed call has left.
        sweep(folder)
    count = Count()
    with Told("predict", len(images)) as told, Ranges(model.backbone, told.say) as ranges:
        for image in images:
            products = _products(image, model, wanted, made_by)
            kept = not wanted.force and all(product.is_done for product in products)
            try:
                if not kept:
                    _check_replaceable(image, products, wanted.force)
                    _map(image, products, _Watched(model, ranges), wanted, device, told)
                    count.made += 1
            except ChipError as error:
                tally.add(error.problem)
                count.failed += 1
            count.kept += kept
            told.done(kept)
    return count


class _Watched:
    """A model, and what it is shown of one image.

    Args:
        model: Does the work.
        ranges: Judges the values.
    """

    def __init__(self, model: Finetuned, ranges: Ranges) -> None:
        self.model, self._ranges = model, ranges
        self._counted = torch.zeros(2)

    def normalize(self, raw: Tensor, valid: Tensor) -> Tensor:
        # Where it was counted: a GPU is not waited for until all is seen.
        self._counted = self._counted.to(raw.device) + self._ranges.count(raw, valid).to(raw.device).sum(0)
        return self.model.normalize(raw, valid)

    def predict(self, x0: Tensor) -> Tensor:
        return self.model.predict(x0)

    def tell(self, name: str) -> None:
        """Once all is seen."""
        self._ranges.tell(name, self._counted)


def _map(
    image: Image, products: Sequence[Product], watched: _Watched, wanted: Wanted, device: torch.device, told: Told
) -> None:
    model = watched.model
    with open_scene(image.folder, image.files, wanted.nodata, image.line) as scene:
        note = scene.choose(model.bands)
        if note:
            told.once(note)
        pixels, done = scene.grid.height * scene.grid.width, 0
        for count in write_products(products, scene, watched, wanted.tiling, len(model.classes), device):
            done += count
            told.within(image.files[0], done / pixels)
    watched.tell(image.files[0])


def _paths(image: Image, wanted: Wanted) -> list[Path]:
    names = [f"{image.stem}.tif", f"{image.stem}_probabilities.tif"]
    return [wanted.out / name for name in names[: 1 + wanted.probabilities]]


def _products(image: Image, model: Finetuned, wanted: Wanted, made_by: str) -> list[Product]:
    tiling = wanted.tiling
    made_of = digest({
        "model": made_by, "tiling": [tiling.px, tiling.overlap_px, tiling.around_px], "nodata": wanted.nodata,
        "files": files_digest(image.paths), "classes": model.classes,
    })  # fmt: skip
    make = (classes_product, probabilities_product)
    return [build(path, model.classes, made_of) for build, path in zip(make, _paths(image, wanted), strict=False)]


def _check_replaceable(image: Image, products: Sequence[Product], force: bool) -> None:
    """A file of the result's name that was not made here may be somebody's work."""
    for product in products:
        if product.path.exists() and not force and TAG not in tags_of(product.path):
            what = f"has no map: {product.path} is in its place, which was not made by this command"
            raise chip_error(image.files[0], image.line, what, "Move it away, choose another --out, or add --force")
