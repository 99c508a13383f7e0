"""figures/: the right bands under the right stretch, gaps shown as gaps, files complete, and no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from earthprior import figures
from earthprior.figures.distributions import radial_spectrum
from earthprior.figures.imagery import Stretch, views

BANDS = ("red", "green", "blue", "nir")
RNG = np.random.default_rng(0)


def chips(count: int = 3, bands: int = 4, size: int = 16) -> tuple[list[np.ndarray], list[np.ndarray]]:
    pixels = [RNG.integers(1, 4000, (bands, size, size)).astype(np.uint16) for _ in range(count)]
    return pixels, [np.ones((size, size), bool) for _ in range(count)]


def text_of(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(mpl.text.Text))


def levels() -> pd.DataFrame:
    table = pd.DataFrame({"rho": [0.1, 1.0, 5.0], "gain_db": [-0.2, 0.3, 0.1]})
    for metric in ("eps_mse", "psnr", "ssim"):
        for index, denoiser in enumerate(("network", "linear", "mean")):
            table[f"{metric}_{denoiser}"] = [0.5, 0.2 + index, 0.1]
    return table


def test_views_go_by_name_and_not_by_place() -> None:
    assert views(["NIR", "Blue", "green", "red"]) == {"true colour": (3, 2, 1), "colour infrared": (0, 3, 2)}
    assert list(views(["nir", "red", "green"])) == ["colour infrared"]
    assert views(["swir", "vv"]) == {"band swir in grey": (0,)}


def test_the_stretch_ignores_what_lies_under_nodata() -> None:
    (chip,), (valid,) = chips(1)
    valid[:4] = False
    before = Stretch.of([chip], [valid])
    chip[:, :4] = 65535
    after = Stretch.of([chip], [valid])
    assert np.array_equal(before.low, after.low)
    assert np.array_equal(before.high, after.high)
    assert np.allclose(before.low, np.percentile(chip[:, 4:].reshape(4, -1), 2, axis=1), rtol=1e-5)


def test_pixels_are_mapped_linearly_and_gaps_are_transparent() -> None:
    chip = np.array([[[0, 5, 10]], [[0, 10, 20]]], np.float32)
    valid = np.array([[True, True, False]])
    image = Stretch(np.array([0.0, 0.0]), np.array([10.0, 20.0])).rgba(chip, valid, (1, 0, 0))
    assert image.shape == (1, 3, 4)
    assert np.allclose(image[0, :2], [[0, 0, 0, 1], [0.5, 0.5, 0.5, 1]])
    assert image[0, 2, 3] == 0


def test_constant_empty_and_nan_chips_do_not_break_the_stretch() -> None:
    for chip, valid in (
        (np.full((1, 4, 4), 7.0), np.ones((4, 4), bool)),
        (np.zeros((1, 4, 4)), np.zeros((4, 4), bool)),
        (np.full((1, 4, 4), np.nan), np.zeros((4, 4), bool)),
    ):
        assert np.isfinite(Stretch.of([chip], [valid]).rgba(chip, valid, (0,))).all()


def test_chips_are_shown_in_both_views_with_their_names() -> None:
    pixels, valids = chips(3)
    valids[1][:5] = False
    figure = figures.chips_figure(pixels, valids, BANDS, ["a/chip_1.tif", "$x$_2.tif", "c.tif"])
    assert sum(len(axes.images) for axes in figure.axes) == 6
    shown = text_of(figure)
    assert "true colour" in shown
    assert "colour infrared" in shown
    assert "chip_1" in shown
    assert "Hatched" in shown


def test_bands_without_roles_are_grey_and_the_caption_says_so() -> None:
    pixels, valids = chips(2, bands=2)
    figure = figures.chips_figure(pixels, valids, ["swir", "vv"], ["a", "b"])
    assert sum(len(axes.images) for axes in figure.axes) == 2
    assert "swir in grey" in text_of(figure)
    image = figure.axes[0].images[0].get_array()
    assert np.array_equal(image[..., 0], image[..., 2])


def test_samples_are_shown_under_the_stretch_of_the_real_chips() -> None:
    pixels, valids = chips(2)
    twice = [chip.astype(float) * 2 for chip in pixels]
    figure = figures.sample_figure(pixels, valids, twice, BANDS)
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    expected = Stretch.of(pixels, valids).rgba(twice[0], valids[0], (0, 1, 2))
    assert any(np.allclose(image, expected) for image in images)


def test_samples_stand_alone_where_no_real_pixel_is_valid() -> None:
    pixels, valids = chips(2)
    nowhere = [valid & False for valid in valids]
    figure = figures.sample_figure(pixels, nowhere, pixels, BANDS)
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    expected = Stretch.of(pixels, valids).rgba(pixels[0], valids[0], (0, 1, 2))
    assert any(np.allclose(image, expected) for image in images)
    assert "of the sampled" in text_of(figure)
    drawn = figures.histogram_figure(pixels, nowhere, pixels, BANDS).axes[0]
    assert drawn.get_xlim()[1] > 3000


def test_denoising_panels_share_the_clean_chips_stretch_and_one_error_scale() -> None:
    (clean,), (valid,) = chips(1)
    valid[:2] = False
    panel = figures.Panel(
        "rho 1\na.tif", clean, clean + 900.0, {"linear": clean + 300.0, "network": clean + 150.0}, valid
    )
    figure = figures.denoising_figure([panel], BANDS)
    row = [axes.images[0] for axes in figure.axes]
    assert len(row) == 6
    stretch = Stretch.of([clean], [valid])
    assert np.allclose(row[1].get_array(), stretch.rgba(clean + 900.0, valid, (0, 1, 2)))
    assert row[4].get_clim() == row[5].get_clim()
    linear, network = (np.ma.mean(row[place].get_array()) for place in (4, 5))
    assert linear == pytest.approx(2 * network)


def test_errors_of_many_denoisers_stand_below_them_under_one_scale() -> None:
    (clean,), (valid,) = chips(1)
    names = ["linear filter", "A a_run_whose_name_is_longer_than_its_column", "B $1$"]
    first = dict(zip(names, (clean + 300.0, clean + 100.0, clean + 200.0), strict=True))
    panels = [
        figures.Panel("rho 1", clean, clean + 900.0, first, valid),
        figures.Panel("rho 5", clean, clean + 900.0, {**first, names[2]: None}, valid),
    ]
    figure = figures.denoising_figure(panels, BANDS)
    images = [axes.images[0] if axes.images else None for axes in figure.axes]
    assert [image is not None for image in images] == [True] * 5 + [False] * 2 + [True] * 7 + [False] * 3 + [
        True
    ] * 2 + [False]
    linear, first_run, second_run = images[7:10]
    assert linear.get_clim() == first_run.get_clim() == second_run.get_clim()
    assert np.ma.mean(linear.get_array()) == pytest.approx(3 * np.ma.mean(first_run.get_array()))
    shown = text_of(figure)
    assert shown.count("level not\nreached") == 1
    assert figure.get_figwidth() < 10.7
    assert "B \\$1\\$" in shown
    figure.canvas.draw()


def test_power_of_white_noise_is_its_variance_at_every_frequency() -> None:
    frequency, power = radial_spectrum(np.random.default_rng(1).normal(0, 3, (200, 32, 32)))
    assert frequency[0] > 0
    assert frequency[-1] == 0.5
    assert np.allclose(power[1:], 9, rtol=0.1)


def test_a_wave_is_found_at_its_frequency() -> None:
    wave = np.sin(2 * np.pi * 0.25 * np.arange(64))[None, None] * np.ones((1, 64, 1))
    frequency, power = radial_spectrum(wave)
    assert frequency[power.argmax()] == pytest.approx(0.25)


def test_ndvi_and_spectra_are_left_out_where_they_make_no_sense() -> None:
    pixels, valids = chips(2)
    assert figures.ndvi_figure(pixels, valids, pixels, ["red", "green", "blue", "swir"]) is None
    assert figures.ndvi_figure(pixels, valids, pixels, BANDS) is not None
    assert figures.spectrum_figure(pixels, [valid & False for valid in valids], pixels, BANDS) is None


def test_histograms_count_valid_pixels_only() -> None:
    pixels, valids = chips(1)
    valids[0][:8] = False
    assert "128 real valid pixels" in text_of(figures.histogram_figure(pixels, valids, pixels, BANDS))


def test_curves_show_what_there_is() -> None:
    gain = figures.gain_figure(levels())
    assert "-0.20" in text_of(gain)
    assert "+0.30" in text_of(gain)
    table = figures.levels_figure(levels())
    assert [len(axes.lines) for axes in table.axes] == [3, 3, 3]
    assert table.axes[0].get_yscale() == "log"
    for axes in table.axes:
        network, linear, _ = axes.lines
        assert network.get_zorder() > linear.get_zorder(), "on top where the gain is small"
        assert linear.get_markersize() > network.get_markersize(), "and the filter is seen beneath"
    history = pd.DataFrame({"epoch": [1, 2], "train_loss": [2.0, 1.0], "loss": [2.0, 1.5], "gain_db/mean": [-1, 0.5]})
    assert "not recorded" in text_of(figures.history_figure(history))
    assert "not recorded" not in text_of(figures.history_figure(history.assign(lr=1e-3)))


def curves(epochs: int, low: float = 0.0) -> figures.RunCurves:
    steps = 10 * np.arange(1, epochs + 1)
    history = pd.DataFrame({"step": steps, "chips": 8 * steps, "gain": low + 0.1 * np.arange(epochs), "lr": 1e-3})
    return figures.RunCurves(f"run of $\\epochs$ {epochs}", history, epochs - 1, {0.1: 0.2, 5.0: low})


def test_up_to_eight_runs_lie_over_each_other_and_can_be_told_apart() -> None:
    nothing = figures.RunCurves("empty", pd.DataFrame(), None, {})
    runs = [*(curves(epochs) for epochs in (1, 2, 3, 40, 400, 5, 6)), nothing]
    figure = figures.comparison_figure(runs)
    steps, chips_seen, levels, rate = figure.axes
    assert len(levels.lines) == 8 + 1
    assert [len(axes.lines) for axes in (steps, chips_seen, rate)] == [2 * 7 + 1, 2 * 7 + 1, 7]
    assert np.array_equal(chips_seen.lines[4].get_xdata(), [80, 160, 240])
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in levels.lines[:8]}
    assert len({colour for colour, _, _ in looks}) == len({marker for _, _, marker in looks}) == 8
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 8
    figure.canvas.draw()
    # Curves cannot lie under a legend that stands above all axes.
    top = max(axes.get_tightbbox().y1 for axes in figure.axes)
    assert legend.get_window_extent().y0 >= top


def test_a_run_far_below_does_not_press_the_others_flat() -> None:
    figure = figures.comparison_figure([curves(3), curves(40, low=-30.0)])
    figure.canvas.draw()
    gain = figure.axes[0]
    heights = gain.transAxes.inverted().transform(gain.transData.transform([(0, -30.0), (0, 0.0), (0, 0.2)]))[:, 1]
    assert 0 < heights[0] < heights[1] < 1
    assert heights[2] - heights[1] > 0.03
    assert "logarithmic" in text_of(figure)
    near = figures.comparison_figure([curves(3), curves(3, low=-1.0)])
    assert near.axes[0].get_yscale() == "linear"
    assert "logarithmic" not in text_of(near)
    figures.comparison_figure([figures.RunCurves("none", pd.DataFrame(), None, {})] * 2).canvas.draw()


def test_png_is_written_whole_and_the_same_each_time(tmp_path: Path) -> None:
    pixels, valids = chips(2)
    for name in ("a.png", "b.png"):
        figures.save_png(figures.chips_figure(pixels, valids, ["$a$", "b_{", "c", "d"], ["$", "$$"]), tmp_path / name)
    first = (tmp_path / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert first == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_the_callers_matplotlib_settings_stay() -> None:
    before = dict(mpl.rcParams)
    figures.gain_figure(levels())
    assert dict(mpl.rcParams) == before


def test_figures_need_neither_torch_nor_pyplot() -> None:
    code = "import sys, earthprior.figures; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    source = str(Path(figures.__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": source}, check=False).returncode == 0
