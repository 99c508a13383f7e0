"""Every picture of the project, in one style; matplotlib's objects only, no global state, no torch.

Functions take arrays and tables and return a `Figure`; `save_png` writes it.
"""

from earthprior.figures.curves import RunCurves, comparison_figure, gain_figure, history_figure, levels_figure
from earthprior.figures.denoising import Panel, denoising_figure
from earthprior.figures.distributions import histogram_figure, ndvi_figure, spectrum_figure
from earthprior.figures.imagery import Stretch, chips_figure, sample_figure
from earthprior.figures.style import save_png

__all__ = [
    "Panel",
    "RunCurves",
    "Stretch",
    "chips_figure",
    "comparison_figure",
    "denoising_figure",
    "gain_figure",
    "histogram_figure",
    "history_figure",
    "levels_figure",
    "ndvi_figure",
    "sample_figure",
    "save_png",
    "spectrum_figure",
]
