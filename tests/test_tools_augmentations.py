"""`earthprior augmentations` and its figure: every option has a column that shows it, and says whether it is on."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest

from earthprior import build
from earthprior.chips.selection import read_in_order, select
from earthprior.errors import EarthPriorError
from earthprior.figures import Stretch
from earthprior.figures.augmentation import Column, augmentation_figure
from earthprior.files import read_json
from earthprior.params import AugmentationParams
from earthprior.stages import stats
from earthprior.tools import augmentations

SIZES = {"data.chip_size": 32, "data.crop_px": 16}


@pytest.fixture(scope="module")
def root(make_chips, tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    make_chips(root / "data", nodata=0)
    return root


@pytest.fixture
def columns(root, make_params):
    """A function from overrides to the columns of four chips, by title."""

    def made(**overrides):
        params = make_params({**SIZES, **{f"augmentation.{key}": value for key, value in overrides.items()}})
        if not (root / "results/stats/stats.json").is_file():
            stats.run(params, root)
        content = read_json(root / "results/stats/stats.json")
        selection = select(params, root, content)
        normalizer = build.normalizer(params, content)
        ((batch, _),) = read_in_order(
            params, selection.folder, selection.train[:4], normalizer, build.device(params), 4
        )
        shown = augmentations.columns(batch, params)
        return batch, {
            f"{column.title} {column.detail}" if "all" in column.title else column.title: column for column in shown
        }

    return made


def test_every_option_has_a_column_that_changes_the_chips(columns):
    batch, shown = columns(patch_shift_px=4)
    plain = shown["as it is"]
    middle = (batch.x0 * batch.affine.scale + batch.affine.offset)[..., 8:24, 8:24].numpy()
    assert np.allclose(plain.chips, middle)
    assert np.array_equal(plain.valids, batch.valid[:, 0, 8:24, 8:24].numpy())
    assert set(AugmentationParams.model_fields) < set(shown)
    for title, column in shown.items():
        if title != "as it is":
            assert not np.array_equal(column.chips, plain.chips), title
    assert not np.array_equal(shown["all that are on first draw"].chips, shown["all that are on second draw"].chips)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("scale_factor", [0.8, 1.25], "0.8 to 1.25"),
        ("rotation_degree", [0, 45], "0, 45"),
        ("rotation_degree", {"low": -5, "high": 5}, "-5 to 5"),
        ("patch_shift_px", 3, "3"),
        ("flip", True, "on"),
        ("crop_strategy", "random", "random"),
    ],
)
def test_what_is_on_is_shown_with_its_setting(columns, key, value, said):
    column = columns(**{key: value})[1][key]
    assert column.active
    assert column.detail == said


def test_what_is_off_is_shown_all_the_same_and_says_so(columns):
    off = {**dict.fromkeys(AugmentationParams.model_fields), "flip": False, "crop_strategy": "center"}
    _, shown = columns(**off)
    for key in AugmentationParams.model_fields:
        assert not shown[key].active
        assert shown[key].detail.endswith("\noff in params")
    assert np.array_equal(shown["all that are on first draw"].chips, shown["as it is"].chips)


def test_the_rms_is_of_the_change_in_normalized_units(columns):
    _, shown = columns(br_range=[0.25, 0.25])
    assert shown["br_range"].notes == ["rms 0.25"] * 4
    assert shown["flip"].notes == [""] * 4


def test_the_verb_writes_a_picture_and_says_where(root, make_params, capsys, tmp_path):
    params = make_params(SIZES)
    stats.run(params, root)
    augmentations.run(params, root, 2)
    assert "work/augmentations.png" in capsys.readouterr().out
    assert (root / "work/augmentations.png").read_bytes().startswith(b"\x89PNG")
    other = make_params({**SIZES, "seed": 7})
    augmentations.run(other, root, 2, tmp_path / "one.png")
    assert str(tmp_path / "one.png") in capsys.readouterr().out
    assert (tmp_path / "one.png").read_bytes() == (root / "work/augmentations.png").read_bytes()


def test_without_statistics_it_says_what_to_run(make_params, tmp_path):
    with pytest.raises(EarthPriorError, match=r"stats\.json is missing; run: dvc repro stats"):
        augmentations.run(make_params(), tmp_path, 2)


def test_the_figure_has_a_row_per_chip_under_its_own_stretch():
    rng = np.random.default_rng(0)
    chips = [rng.normal(size=(3, 8, 8)), 100 + rng.normal(size=(3, 8, 8))]
    valids = [np.ones((8, 8), bool), np.tri(8, dtype=bool)]
    plain = Column("as it is", "the middle", True, chips, valids, ["", ""])
    noisy = Column("noise", "0.1\noff in params", False, [chip + 1 for chip in chips], valids, ["rms $1$", ""])
    stretches = [Stretch.of([chip], [valid]) for chip, valid in zip(chips, valids, strict=True)]
    names = ["short", "a_name_that_is_longer_than_a_picture_001"]
    figure = augmentation_figure([plain, noisy], names, stretches, ["red", "green", "blue"])
    pictures = [axes.images[0].get_array() for axes in figure.axes]
    assert len(pictures) == 4
    for row in range(2):
        expected = stretches[row].rgba(chips[row], valids[row], (0, 1, 2))
        assert np.allclose(pictures[2 * row], expected)
    texts = " ".join(text.get_text() for text in figure.findobj(mpl.text.Text))
    for said in ("noise\n0.1\noff in params", "true colour", "...than_a_picture_001", "Hatched: no data", r"rms \$1\$"):
        assert said in texts
    figure.canvas.draw()
