"""Every picture of the project, in one style; matplotlib's objects only, no global state, no torch.

Functions take arrays and tables and return a `Figure`; `save_png` writes it.
"""

from earthprior.figures.curves import RunCurves, comparison_figure, gain_figure, history_figure, levels_figure
from earthprior.figures.denoising import Panel, denoising_figure
from earthprior.figures.distributions import histogram_figure, ndvi_figure, spectrum_figure
from earthprior.figures.features import FeatureMap, Shown, feature_maps_figure, neighbours_figure
from earthprior.figures.imagery import Stretch, chips_figure, sample_figure
from earthprior.figures.probes import scores_figure, serving_figure
from earthprior.figures.style import save_png

__all__ = [
    "FeatureMap",
    "Panel",
    "RunCurves",
    "Shown",
    "Stretch",
    "chips_figure",
    "comparison_figure",
    "denoising_figure",
    "feature_maps_figure",
    "gain_figure",
    "histogram_figure",
    "history_figure",
    "levels_figure",
    "ndvi_figure",
    "neighbours_figure",
    "sample_figure",
    "save_png",
    "scores_figure",
    "serving_figure",
    "spectrum_figure",
]
