"""evaluation/: where features serve, labels of whole images, and the pictures of features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from earthprior.chips.batch import Batch
from earthprior.chips.catalog import ChipRow
from earthprior.chips.geotiff import Header
from earthprior.chips.normalize import denormalize
from earthprior.evaluation import choosing, gallery, probe_pages, probing, serving
from earthprior.evaluation.image_labels import ImageSplits, answers, read_images
from earthprior.evaluation.labelled import LabelledSplits, Material, read_labelled
from earthprior.evaluation.probing import Probing
from earthprior.evaluation.serving import Serving
from earthprior.params import Params
from earthprior.probe import ProbeResult
from earthprior.probe_models import linear
from earthprior.scoring import Score
from support import linear_schedule
from tiny_training import TINY, Tiny

RHOS = [0.1, 1.0, 1.00001]
"""The last two share a timestep."""


class Knowing:
    """Features of which one block at one noise level knows the labels, and the others hardly do."""

    widths = (2, 2)

    def __init__(self, rho: float, side: str, level: int) -> None:
        self.schedule, self.linear = linear_schedule(), SimpleNamespace(std=torch.tensor(1.0))
        self._knowing = (rho, side, level)
        self.asked: list[tuple[float, str]] = []

    def features(self, batch: Batch, rho: float, side: str = "decoder") -> list[Tensor]:
        self.asked.append((rho, side))
        band = denormalize(batch.x0, batch.affine)[:, :1] / 1000
        noise = torch.randn((1, 2, *band.shape[-2:]), generator=torch.Generator().manual_seed(1)).expand(
            len(band), -1, -1, -1
        )
        pyramid = [noise, F.avg_pool2d(noise, 2)]
        if self._knowing[:2] == (rho, side):
            place = self._knowing[2]
            pyramid[place] = F.avg_pool2d(band, 2**place).repeat(1, 2, 1, 1)
        return pyramid


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_chips: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("probing")
    make_chips(root / "data", n=12, size=32, labels=True)
    return root


@pytest.fixture
def material(root: Path, make_params: Callable[..., Params]) -> Material:
    params = make_params({**TINY, "evaluate.probe_rhos": RHOS})
    tiny = Tiny(root, params)
    return Material(params, tiny.selection, tiny.normalizer, torch.device("cpu"))


@pytest.mark.parametrize("where", [(0.1, "decoder", 0), (1.0, "encoder", 0), (1.0, "decoder", 1)])
def test_the_side_that_knows_serves_whole(where: tuple[float, str, int], material: Material) -> None:
    task: Any = Knowing(*where)
    splits = read_labelled(material, material.selection.validate, 100)
    assert isinstance(splits, LabelledSplits)
    assert splits.choose is splits.judged
    tried = choosing.try_pixels(material, task, splits)
    # Two noise levels; decoder levels 0, 1 and both, encoder level 0 and both: the bottom is the same on both sides.
    assert [(one.side, one.levels) for one in tried] == 2 * [
        ("decoder", (0,)), ("decoder", (1,)), ("decoder", (0, 1)), ("encoder", (0,)), ("encoder", (0, 1)),
    ]  # fmt: skip
    best = serving.chosen(tried, "labels")
    assert best is not None
    assert (best.rho, best.side) == where[:2]
    # A backbone serves all levels of a side; which of them knows is for information.
    assert best.levels == (0, 1)
    alone = {one.levels: one.score or 0 for one in tried if (one.rho, one.side) == where[:2] and len(one.levels) == 1}
    assert max(alone, key=alone.__getitem__) == where[2:]
    assert best.score is not None
    assert best.score > 0.7
    others = [one.score for one in tried if (one.rho, one.side) != where[:2]]
    assert max(score or 0 for score in others) < 0.65


def test_without_labels_the_default_serves(material: Material) -> None:
    task: Any = Knowing(0.1, "decoder", 0)
    assert serving.chosen([], "labels") is None
    assert serving.chosen([replace(serving.default(material.params, task), score=math.nan)], "labels") is None
    found = serving.default(material.params, task)
    assert (found.rho, found.side, found.levels, found.score) == (0.1, "decoder", (0, 1), None)
    assert found.to_json("ab")["fingerprint"] == "ab"
    assert found.to_json("ab")["levels"] == [0, 1]


def with_cells(material: Material, cell: Callable[[int], str]) -> Material:
    """A column `kind` in every row."""

    def told(rows: Sequence[ChipRow]) -> list[ChipRow]:
        return [replace(row, values={**row.values, "kind": cell(row.line)}) for row in rows]

    selection = replace(
        material.selection, train=told(material.selection.train), validate=told(material.selection.validate)
    )
    evaluate = material.params.evaluate.model_copy(update={"image_label_column": "kind"})
    return replace(material, selection=selection, params=material.params.model_copy(update={"evaluate": evaluate}))


@pytest.mark.parametrize(
    ("cell", "kind", "classes"),
    [
        (lambda line: "ab"[line % 2], "classification", ["a", "b"]),
        (lambda line: str(line // 4 % 3), "classification", ["0", "1", "2"]),
        (lambda line: str(line / 2), "regression", []),
        (lambda line: ["", "1", "2"][line // 4 % 3], "classification", ["1", "2"]),
    ],
)
def test_what_labels_of_images_are(
    cell: Callable[[int], str], kind: str, classes: list[str], material: Material
) -> None:
    material = with_cells(material, cell)
    found = read_images(material, material.selection.validate)
    assert isinstance(found, ImageSplits)
    assert (found.kind, found.classes) == (kind, classes)
    empty = sum(not cell(row.line) for row in material.selection.train)
    assert found.fit.left_out == empty
    assert len(found.fit.rows) == len(found.fit.truths) == 8 - empty


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (lambda line: "", "is empty"),
        (lambda line: f"masks/{line}.tif", "belong into evaluate.label_column"),
        (lambda line: "same", "1 classes"),
    ],
)
def test_why_labels_of_images_are_of_no_use(cell: Callable[[int], str], words: str, material: Material) -> None:
    material = with_cells(material, cell)
    assert words in str(read_images(material, material.selection.validate))


def test_a_class_without_a_training_chip_is_left_out(material: Material) -> None:
    lines = [row.line for row in material.selection.validate]
    given = with_cells(material, lambda line: "new" if line == lines[0] else "ab"[line % 2])
    found = read_images(given, given.selection.validate)
    assert isinstance(found, ImageSplits)
    assert found.judged.left_out == 1
    strange = with_cells(material, lambda line: "new" if line in lines else "ab"[line % 2])
    assert "no judged chip" in str(read_images(strange, strange.selection.validate))
    answer, _ = answers(linear, replace(found, classes=["a", "b", "c"]), np.array([0, 2, 0, 2]), np.eye(4), np.eye(4))
    assert answer.shape == (4, 3)
    assert (answer[:, 1] == 0).all()


def test_images_choose_where_there_are_no_rasters(material: Material) -> None:
    task: Any = Knowing(1.0, "decoder", 0)
    means = {}
    for batch, rows in material.read([*material.selection.train, *material.selection.validate]):
        means |= {
            row.line: float(chip.mean())
            for row, chip in zip(rows, denormalize(batch.x0, batch.affine)[:, 0], strict=True)
        }
    given = with_cells(material, lambda line: f"{means[line]:.3f}")
    evaluate = given.params.evaluate.model_copy(update={"label_column": "none"})
    given = replace(given, params=given.params.model_copy(update={"evaluate": evaluate}))
    found = probing.probe(given, {"network": task, "untrained": task}, given.selection.validate)
    assert found.pixels.reason
    assert set(found.images.scores) == {"ridge", "knn"}
    assert set(found.images.scores["ridge"]) == {"network", "untrained", "statistics"}
    assert (found.serving.rho, found.serving.side) == (1.0, "decoder")
    assert found.images.scores["ridge"]["network"]["r2"].value > 0.8
    assert set(found.scores) == {"image_ridge", "image_knn"}


def test_colours_are_those_of_the_features_and_do_not_flip() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(500, 5)) @ generator.normal(size=(5, 5)) * [1, 100, 1, 1, 0]
    components = gallery.Components.of(values)
    colours = components.colours(values)
    assert colours.shape == (500, 3)
    assert colours.min() == 0
    assert colours.max() == 1
    assert np.abs(np.corrcoef(colours.T) - np.eye(3)).max() < 0.1
    assert np.allclose(components.colours(values[:7]), colours[:7])
    assert np.allclose(gallery.Components.of(values[::-1].copy()).colours(values), colours, atol=1e-6)
    # A network with a single feature has a single colour.
    assert gallery.Components.of(values[:, :1]).colours(values[:, :1]).shape == (500, 3)


def test_chips_of_the_same_place_are_seen() -> None:
    def header(left: float, crs: str | None = "EPSG:32614", bounds: bool = True) -> Header:
        return Header(32, 32, "uint8", (None,), (None,), crs, (left, 0.0, left + 10, 10.0) if bounds else None)

    assert gallery.overlap(header(0), header(9))
    assert not gallery.overlap(header(0), header(10))
    assert not gallery.overlap(header(0), header(9.995))
    assert not gallery.overlap(header(0), header(0, "EPSG:32615"))
    assert not gallery.overlap(header(0), header(0, bounds=False))


def test_neighbours_are_alike_and_elsewhere(material: Material, root: Path) -> None:
    task: Any = Knowing(0.1, "decoder", 0)
    found = gallery.gallery(material, {"network": task, "untrained": task}, serving.default(material.params, task))
    assert len(found.maps) == 4
    assert {one.maps["network"].shape for one in found.maps} == {(32, 32, 3)}
    assert len(found.neighbours) == 4
    assert all(len(row) == 6 for row in found.neighbours)
    assert all("same place" not in shown.title for row in found.neighbours for shown in row)
    alike = gallery.similarity(np.array([[0.0, 1], [0, 1.1], [1, 0], [5, 5]]))
    assert np.allclose(np.diag(alike), 1)
    assert alike[0].argsort()[-2] == 1


def scored(network: float, untrained: float, context: float) -> ProbeResult:
    found = {"network": network, "untrained": untrained, "context": context, "pixels": 0.1}
    facts = {
        "fit_pixels": 1000, "fit_chips": 10, "judged_pixels": 500, "judged_chips": 1, "classes": 2,
        "positive_share": 0.07, "chips_without_label": 3,
    }  # fmt: skip
    scores = {name: {"average_precision": Score(value, math.nan, math.nan)} for name, value in found.items()}
    return ProbeResult(None, {"linear": scores}, facts)


def pages_of(pixels: ProbeResult, **changes: Any) -> Mapping[str, Any]:
    where = Serving(0.1, 3, "decoder", (0, 1), "evaluate.probe_rho")
    none = ProbeResult(reason="no column holds labels of whole images (evaluate.image_label_column)")
    found = probe_pages.sections(Probing(where, (), pixels, changes.get("images", none)), "validate", {})
    return {section.title: section for section in found}


def test_the_page_says_who_won_and_how_many_were_skipped() -> None:
    won = pages_of(scored(0.5, 0.3, 0.4))["Are the features worth anything? Probes of pixels"]
    assert "beat the untrained network's and raw pixels with local context." in won.paragraphs[1]
    assert "3 chips without a usable label were skipped" in won.paragraphs[0]
    assert "1 validate chip " in won.paragraphs[0]
    assert [row[0] for row in won.tables[0].rows] == list(probing.REPRESENTATIONS.values())[:4]
    lost = pages_of(scored(0.3, 0.3, 0.4))["Are the features worth anything? Probes of pixels"]
    assert "do not beat the untrained network's or raw pixels" in lost.paragraphs[1]


def test_no_probe_says_why_and_shows_no_number() -> None:
    found = pages_of(ProbeResult(reason="the catalog has no column 'label'"))
    section = found["Are the features worth anything? Probes of pixels"]
    assert section.tables == ()
    assert "the catalog has no column 'label'" in section.paragraphs[0]
    assert (
        "No labels choose, so features are taken at rho 0.1, decoder levels 0 to 1"
        in (found["Where features are taken"].paragraphs[0])
    )
    assert "Probes of whole images" not in found
