from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from earthprior.figures import save_png
from earthprior.figures.maps import FALSE_ALARM, MAX_PANELS, MISSED, WRONG, MapPanel, maps_figure
from earthprior.palette import ABSENT, PRESENT, class_colours

BANDS = ("red", "green", "blue", "nir")


def some_panel(classes: int, labelled: bool = True, title: str = "chips/a.tif") -> MapPanel:
    noise = np.random.default_rng(classes)
    probabilities = noise.random((classes, 8, 8))
    label = noise.integers(0, classes, (8, 8))
    label[0, 0] = -1
    valid = np.ones((8, 8), bool)
    valid[7, 7] = False
    chip = noise.integers(0, 200, (4, 8, 8)).astype(np.uint8)
    return MapPanel(title, chip, valid, label if labelled else None, probabilities / probabilities.sum(0))


def images(figure: Any) -> list[Any]:
    """Of the axes, row by row."""
    return [axes.images[0].get_array() if axes.images else None for axes in figure.axes]


def heads(figure: Any) -> list[str]:
    return [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]


def test_two_classes_show_a_probability_and_three_kinds_of_pixels() -> None:
    panel = some_panel(2)
    figure = maps_figure([panel], ["other", "tree"], BANDS)
    assert heads(figure) == ["true colour", "colour infrared", "label", "map", "probability of tree", "errors"]
    _, _, label, found, probability, errors = images(figure)
    guess = panel.probabilities.argmax(0)
    assert panel.label is not None
    for truth, guessed, colour in [(0, 0, ABSENT), (1, 1, PRESENT), (0, 1, FALSE_ALARM), (1, 0, MISSED)]:
        where = (panel.label == truth) & (guess == guessed) & panel.valid
        assert where.any()
        np.testing.assert_allclose(errors[where][:, :3], np.array([colour] * where.sum()) / 255)
    assert label[0, 0, 3] == errors[0, 0, 3] == 0  # without a label
    assert found[0, 0, 3] == 1
    assert label[7, 7, 3] == found[7, 7, 3] == errors[7, 7, 3] == 0  # without data
    assert probability.mask[7, 7]
    np.testing.assert_allclose(probability[~probability.mask], panel.probabilities[1][panel.valid])


def test_many_classes_show_where_they_are_wrong_under_one_legend() -> None:
    names = ["water", "crops", "forest", "bare"]
    panel = some_panel(4)
    figure = maps_figure([panel, some_panel(4, labelled=False)], names, BANDS)
    assert heads(figure)[:5] == ["true colour", "colour infrared", "label", "map", "errors"]
    _, _, label, found, errors = images(figure)[:5]
    assert panel.label is not None
    colours = np.array(class_colours(names)) / 255
    shown = panel.valid & (panel.label >= 0)
    np.testing.assert_allclose(label[shown][:, :3], colours[panel.label[shown]])
    np.testing.assert_allclose(found[panel.valid][:, :3], colours[panel.probabilities.argmax(0)[panel.valid]])
    wrong = shown & (panel.probabilities.argmax(0) != panel.label)
    np.testing.assert_allclose(errors[wrong][:, :3], np.array([WRONG] * wrong.sum()) / 255)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    second = figure.axes[5:]
    assert "no label" in [text.get_text() for text in second[2].texts]
    assert not second[4].images


def test_without_labels_there_is_no_column_of_them() -> None:
    figure = maps_figure([some_panel(3, labelled=False)], [1, 2, 7], ("a", "b", "c", "d"))
    assert heads(figure) == ["band a in grey", "map"]
    assert len(figure.legends) == 1


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_any_number_of_classes_and_any_name_is_drawn(classes: int, tmp_path: Path) -> None:
    names = [f"class $_{place} with a long name" for place in range(classes)]
    panels = [some_panel(classes, title="chips/$a$_" + "x" * 80 + ".tif")] * (MAX_PANELS + 2)
    figure = maps_figure(panels, names, BANDS)
    assert len(figure.axes) == MAX_PANELS * (6 if classes == 2 else 5)
    save_png(figure, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 1000


def test_chips_of_several_sizes_and_without_data_are_drawn(tmp_path: Path) -> None:
    odd = MapPanel("odd", np.zeros((4, 5, 9)), np.zeros((5, 9), bool), np.full((5, 9), -1), np.full((2, 5, 9), 0.5))
    save_png(maps_figure([some_panel(2), odd], [0, 1], BANDS), tmp_path / "maps.png")
