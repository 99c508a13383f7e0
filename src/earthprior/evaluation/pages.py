"""From the results of an evaluation to its figures and its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from earthprior import figures
from earthprior.diffusion.gain import missing_levels
from earthprior.evaluation import probe_pages
from earthprior.evaluation.gallery import Gallery
from earthprior.evaluation.probing import Probing
from earthprior.evaluation.samples import Samples
from earthprior.params import Params
from earthprior.report import Number, Picture, Report, Section, count, levels_tables, signed, verdict
from earthprior.scoring import flat_scores

SHOWN_REAL = 8


@dataclass(frozen=True)
class Evaluated:
    """All that an evaluation found.

    Args:
        params: The whole of params.yaml.
        usage: The judged split.
        judged: How many of its chips were judged.
        available: How many it has.
        levels: One row per noise level, see `evaluation.denoising.levels_table`.
        numbers: See `evaluation.denoising.summary`.
        samples: Real and sampled crops.
        panels: Denoised chips.
        probing: Where features serve, and what probes say of them.
        gallery: Features in pictures.
        history: The training's, one row per epoch; may be empty.
        identity: What the run is made of, as (name, value).
        imported: Whether the weights were trained elsewhere.
    """

    params: Params
    usage: str
    judged: int
    available: int
    levels: pd.DataFrame
    numbers: dict[str, Any]
    samples: Samples
    panels: Sequence[figures.Panel]
    probing: Probing
    gallery: Gallery
    history: pd.DataFrame
    identity: Sequence[tuple[str, str]]
    imported: bool = False

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json; without a probe, or with an empty score, the entry is absent."""
        found: dict[str, Any] = {**self.numbers, "judged_chips": self.judged}
        if probes := self.probing.scores:
            found["probe"] = {
                probe: {name: flat_scores(scores) for name, scores in compared.items()}
                for probe, compared in probes.items()
            }
        return found


def draw_figures(evaluated: Evaluated, folder: Path) -> dict[str, Path]:
    """Draw every figure that there is data for.

    Returns:
        Paths by name: gain, levels, denoising, samples, histograms, ndvi, spectra, history, and those of
        `probe_pages.probe_figures`.
    """
    bands, drawn = evaluated.params.data.bands, evaluated.samples
    real, valids, sampled = list(drawn.real), list(drawn.valid), list(drawn.sampled)
    makers = {
        "gain": figures.gain_figure(evaluated.levels),
        "levels": figures.levels_figure(evaluated.levels),
        "denoising": figures.denoising_figure(evaluated.panels, bands) if evaluated.panels else None,
        "samples": figures.sample_figure(*_shown(real, valids), sampled, bands),
        "histograms": figures.histogram_figure(real, valids, sampled, bands),
        "ndvi": figures.ndvi_figure(real, valids, sampled, bands),
        "spectra": figures.spectrum_figure(real, valids, sampled, bands),
        "history": None if evaluated.history.empty else figures.history_figure(evaluated.history),
        **probe_pages.probe_figures(evaluated.probing, evaluated.gallery, bands),
    }
    paths = {name: folder / f"{name}.png" for name, figure in makers.items() if figure is not None}
    for name, path in paths.items():
        figures.save_png(makers[name], path)  # type: ignore[arg-type]
    return paths


def _shown(real: list[Any], valids: list[Any]) -> tuple[list[Any], list[Any]]:
    """Eight real chips, evenly spread: neighbours in a catalog often show the same place."""
    places = np.linspace(0, len(real) - 1, min(SHOWN_REAL, len(real))).round().astype(int)
    return [real[place] for place in places], [valids[place] for place in places]


def _recipe(params: Params) -> str:
    """What the network was made to say, in two words."""
    preconditioned = params.diffusion.precondition != "none"
    return f"precondition {params.diffusion.precondition}" if preconditioned else f"objective {params.objective}"


def report(evaluated: Evaluated, paths: dict[str, Path]) -> Report:
    """The page, from the results and the figures drawn of them."""
    params, gain = evaluated.params, evaluated.numbers["gain_db"]
    thinned = f" of {evaluated.available:,}, evenly spread," if evaluated.judged < evaluated.available else ""
    return Report(
        title=f"EarthPrior: {params.network}, {_recipe(params)}",
        subtitle=f"Judged on {count(evaluated.judged, f'{evaluated.usage} chip')}{thinned} in "
        f"{params.data.train_px} px crops; bands {', '.join(params.data.bands)}."
        + (" The same split chose the best epoch." if evaluated.usage == "validate" and not evaluated.imported else "")
        + _missing_levels(evaluated.levels),
        verdict=verdict(gain, evaluated.imported),
        below=gain["mean"] <= 0,
        numbers=_headline(evaluated),
        sections=[
            _denoising_section(evaluated, paths),
            _samples_section(evaluated, paths),
            *probe_pages.sections(evaluated.probing, evaluated.usage, paths),
            *_history_section(paths),
        ],
        identity=evaluated.identity,
    )


def _missing_levels(levels: pd.DataFrame) -> str:
    """Says which levels the mean lacks, because it then compares with such means only."""
    missing = missing_levels(levels["rho"])
    if not missing:
        return ""
    return (
        f" The noise schedule does not reach rho {', '.join(missing)} on chips of this spread, so the mean is over the "
        "other levels; compare it with runs over the same ones."
    )


def _headline(evaluated: Evaluated) -> list[Number]:
    numbers = evaluated.numbers
    return [
        Number("Denoising gain", f"{signed(numbers['gain_db']['mean'])} dB", "over the linear filter, which is 0 dB"),
        *(
            Number(name, f"{numbers[key]['network']:{pattern}}", f"linear filter {numbers[key]['linear']:{pattern}}")
            for name, key, pattern in (("PSNR, dB", "psnr", ".2f"), ("SSIM", "ssim", ".4f"))
            if {"network", "linear"} <= set(numbers.get(key, {}))
        ),
        *probe_pages.headline(evaluated.probing),
    ]


def _denoising_section(evaluated: Evaluated, paths: dict[str, Path]) -> Section:
    text = (
        "Each chip gets the same noise in every run, at noise-to-signal ratios rho from barely visible to "
        "overwhelming. The gain compares squared errors with those of a linear (Wiener) filter fitted on the training "
        "chips, measured by the same code: 0 dB is that filter, below 0 the network is worse than it. The training "
        "mean is what knowing nothing about the chip costs. PSNR and SSIM are in physical units, over valid pixels."
    )
    captions = {
        "gain": "Gain per noise level.",
        "levels": "Errors and similarity per noise level; all averaged over crops and bands.",
        "denoising": "The chip, with noise, cleaned by the filter, cleaned by the network, and both errors.",
    }
    tables = levels_tables(evaluated.levels, evaluated.numbers["per_band"])
    return Section("Denoising", [text], _pictures(paths, captions), tables)


def _samples_section(evaluated: Evaluated, paths: dict[str, Path]) -> Section:
    params, drawn = evaluated.params.evaluate, evaluated.samples
    text = (
        f"{count(len(drawn.sampled), 'chip')} drawn from the prior by {params.sampler} in {params.steps} steps (seed "
        f"{params.sampling_seed}), beside {count(len(drawn.real), f'real {evaluated.usage} chip')}. Where the network "
        "knows the imagery, sampled chips could be taken for real ones, and the curves below coincide."
    )
    captions = {
        "samples": "Real chips first, then sampled ones, all under the real chips' stretch.",
        "histograms": "Values per band.",
        "ndvi": "The vegetation index NDVI: a relation between bands.",
        "spectra": "Power over spatial frequency: texture, from coarse (left) to fine (right).",
    }
    return Section("Samples", [text], _pictures(paths, captions))


def _history_section(paths: dict[str, Path]) -> list[Section]:
    captions = {"history": "Averaged weights on the validation chips; the epoch with the best gain was kept."}
    return [Section("Training", (), _pictures(paths, captions))] if "history" in paths else []


def _pictures(paths: dict[str, Path], captions: dict[str, str]) -> list[Picture]:
    return [Picture(paths[name], name, caption) for name, caption in captions.items() if name in paths]
