"""Do sampled chips look like real ones in numbers: values, NDVI, and power over spatial frequency."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from earthprior.figures.imagery import Array
from earthprior.figures.style import REAL, SAMPLED, axes_grid, caption, legend_above, new_figure, plain, styled

BINS = 80

COLUMNS = 4


def histogram_figure(
    real: Sequence[Array], valids: Sequence[Array], sampled: Sequence[Array], bands: Sequence[str]
) -> Figure:
    """Densities of values per band, real against sampled.

    Args:
        real: Chips (C, H, W), physical units.
        valids: Masks (H, W).
        sampled: Chips (C, H, W), physical units.
        bands: Names in band order.
    """
    ours = np.concatenate([chip.reshape(len(bands), -1) for chip in sampled], axis=1)
    theirs = np.concatenate([chip[:, valid] for chip, valid in zip(real, valids, strict=True)], axis=1)
    with styled():
        figure, cells = _band_grid(len(bands))
        for axes, name, real_values, our_values in zip(cells, bands, theirs, ours, strict=False):
            _pair_of_histograms(axes, real_values, our_values)
            axes.set_title(plain(name))
            axes.set_xlabel("physical units")
        legend_above(cells[min(len(bands), COLUMNS) - 1])
        caption(figure, f"Density of {theirs.shape[1]:,} real valid pixels and {ours.shape[1]:,} sampled ones.")
    return figure


def ndvi_figure(
    real: Sequence[Array], valids: Sequence[Array], sampled: Sequence[Array], bands: Sequence[str]
) -> Figure | None:
    """Density of NDVI = (nir - red) / (nir + red), real against sampled; None without those two bands."""
    names = [band.lower() for band in bands]
    if not {"red", "nir"} <= set(names):
        return None
    red, nir = names.index("red"), names.index("nir")
    theirs = np.concatenate(
        [_ndvi(chip[:, valid], red, nir) for chip, valid in zip(real, valids, strict=True)] or [np.zeros(0)]
    )
    ours = np.concatenate([_ndvi(chip.reshape(len(bands), -1), red, nir) for chip in sampled] or [np.zeros(0)])
    with styled():
        figure = new_figure(5.2, 2.9)
        axes = figure.subplots()
        _pair_of_histograms(axes, theirs, ours, (-1.0, 1.0))
        axes.set_title("NDVI")
        axes.set_xlabel("(nir - red) / (nir + red)")
        legend_above(axes)
    return figure


def spectrum_figure(
    real: Sequence[Array], valids: Sequence[Array], sampled: Sequence[Array], bands: Sequence[str]
) -> Figure | None:
    """Radially averaged power per band over spatial frequency, real against sampled, on log axes.

    Only wholly valid real chips are used: a gap would put its own edges in the spectrum. None where there are none.
    """
    whole = [chip for chip, valid in zip(real, valids, strict=True) if np.all(valid)]
    if not whole or not len(sampled):
        return None
    with styled():
        figure, cells = _band_grid(len(bands))
        for place, (axes, name) in enumerate(zip(cells, bands, strict=False)):
            for chips, colour, label in ((whole, REAL, "real"), (sampled, SAMPLED, "sampled")):
                frequency, power = radial_spectrum(np.stack([chip[place] for chip in chips]))
                axes.loglog(frequency, power, color=colour, label=label)
            axes.set_title(plain(name))
            axes.set_xlabel("cycles per pixel")
            axes.xaxis.set_major_locator(FixedLocator([0.01, 0.02, 0.05, 0.1, 0.2, 0.5]))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_formatter(NullFormatter())
        cells[0].legend(loc="lower left")
        cells[0].set_ylabel("power")
        caption(
            figure, f"Mean over {len(whole):,} wholly valid real chips and {len(sampled):,} sampled ones, Hann window."
        )
    return figure


def radial_spectrum(images: Array) -> tuple[Array, Array]:
    """Power averaged over images and over rings of equal spatial frequency.

    Args:
        images: (N, H, W); each image's mean is removed and a Hann window applied, since chips do not wrap around.

    Returns:
        Frequencies (K,) in cycles per pixel in (0, 0.5], and power (K,); white noise of variance s gives s everywhere.
    """
    height, width = images.shape[1:]
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    centred = images - images.mean(axis=(1, 2), keepdims=True)
    power = np.abs(np.fft.fft2(centred * window)) ** 2 / np.sum(window**2)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    rings = min(height, width) // 2
    ring = np.rint(radius * 2 * rings).astype(int)
    inside = (ring >= 1) & (ring <= rings)
    count = np.bincount(ring[inside], minlength=rings + 1)[1:]
    total = np.bincount(ring[inside], weights=power.mean(axis=0)[inside], minlength=rings + 1)[1:]
    filled = count > 0
    return (np.arange(1, rings + 1) / (2 * rings))[filled], total[filled] / count[filled]


def _band_grid(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = new_figure(max(2.75 * columns, 3.4), 2.5 * rows + 0.25)
    cells = [axes for row in axes_grid(figure, rows, columns) for axes in row]
    for axes in cells[count:]:
        axes.set_axis_off()
    return figure, cells


def _pair_of_histograms(axes: Axes, real: Array, sampled: Array, limits: tuple[float, float] | None = None) -> None:
    """Real as a filled area, sampled as a line; the range is that of the real pixels, if any, with a margin."""
    if limits is None:
        low, high = np.percentile(real if real.size else sampled, [0.1, 99.9])
        margin = 0.12 * max(float(high - low), 1e-12)
        limits = (float(low) - margin, float(high) + margin)
    # Densities are of all pixels, also those outside the range, so that the two stay comparable.
    for values, options in ((real, {"fill": True, "color": REAL, "alpha": 0.35, "label": "real", "lw": 0}),
                            (sampled, {"color": SAMPLED, "label": "sampled", "lw": 1.7})):  # fmt: skip
        counts, edges = np.histogram(values, BINS, limits)
        axes.stairs(counts / max(1, values.size) / np.diff(edges), edges, **options)  # type: ignore[arg-type]
    axes.set_yticks([])
    axes.set_ylim(bottom=0)
    axes.grid(False)
    axes.spines["left"].set_visible(False)


def _ndvi(pixels: Array, red: int, nir: int) -> Array:
    """NDVI of pixels (C, N) whose two bands have a positive sum."""
    a, b = pixels[nir].astype(np.float64), pixels[red].astype(np.float64)
    usable = a + b > 0
    return np.asarray((a - b)[usable] / (a + b)[usable])
