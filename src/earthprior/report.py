"""A page of results as one HTML file: no network, no scripts, pictures inside, every text escaped by the template."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from earthprior.figures.style import DPI


@dataclass(frozen=True)
class Number:
    """A headline number."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG file, inlined when the page is rendered."""

    path: Path
    alt: str
    caption: str = ""

    @property
    def base64(self) -> str:
        """The file's bytes as text."""
        return base64.b64encode(self.path.read_bytes()).decode()

    @property
    def width_px(self) -> int:
        """Width on the page in CSS pixels, 96 to the inch, so that all figures' text has one size."""
        # The width in a PNG file is the big-endian integer at byte 16.
        return round(int.from_bytes(self.path.read_bytes()[16:20], "big") * 96 / DPI)


@dataclass(frozen=True)
class Table:
    """Rows of text under column names; the first column is left-aligned, all are where the cells are `words`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    words: bool = False


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in this order; `commands`, lines for a shell, follow the paragraphs."""

    title: str
    paragraphs: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """The whole page.

    Args:
        title: What was judged.
        subtitle: On which chips.
        verdict: The result in a sentence; none where it is empty.
        below: Whether that result is below the linear filter.
        numbers: The headline numbers; may be none.
        sections: In reading order.
        identity: What the run is made of, as (name, value); empty where the page is of no single run.
        identity_title: Its heading.
    """

    title: str
    subtitle: str
    verdict: str = ""
    below: bool = False
    numbers: Sequence[Number] = ()
    sections: Sequence[Section] = ()
    identity: Sequence[tuple[str, str]] = field(default_factory=tuple)
    identity_title: str = "This run"


def render(report: Report) -> str:
    """The page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # StrictUndefined: a field that the template misspells is an error here, not a gap on the page.
    environment = Environment(loader=PackageLoader("earthprior", "."), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2").render(report=report)


def verdict(gain_db: Mapping[str, float], imported: bool = False) -> str:
    """The denoising gain in plain words; it says so when the network is worse than the filter.

    Args:
        gain_db: By level name, and "mean".
        imported: Whether the weights were trained elsewhere, which makes other causes likely.
    """
    mean = gain_db["mean"]
    levels = {name.removeprefix("rho_"): gain for name, gain in gain_db.items() if name != "mean"}
    losing = [name for name, gain in levels.items() if gain < 0]
    share = 1 - 10 ** (-mean / 10)
    # What rounds to nothing is nothing to claim.
    if abs(mean) < 0.005:
        return "The network does not beat the linear filter: they are equal, to a hundredth of a dB, on average."
    if mean > 0:
        text = f"The network beats the linear filter by {mean:.2f} dB on average over noise levels"
        text += f" (a squared error about {share:.1%} smaller)."
        return text + (f" At rho {', '.join(losing)} it is worse than the filter." if losing else "")
    text = f"The network does not beat the linear filter: its gain is {mean:.2f} dB on average over noise levels"
    text += f" (a squared error {10 ** (-mean / 10):.3g} times as large)."
    text += " A filter that no gradient ever touched is better "
    text += "at every noise level." if len(losing) == len(levels) else f"at rho {', '.join(losing) or 'none'}."
    if imported:
        return text + " Were the weights trained with this normalization, band order, noise schedule and objective?"
    return text + " Train longer, or try other settings with dvc exp run."


SCORE_NAMES = {
    "average_precision": "average precision",
    "r2": "R2",
    "accuracy": "accuracy",
    "mean_iou": "mean IoU",
    "iou": "IoU",
    "f1": "F1",
    "mae": "mean absolute error",
}


def levels_tables(levels: pd.DataFrame, per_band: Mapping[str, Mapping[str, float]]) -> list[Table]:
    """The denoising results as tables: per noise level, and per band."""
    who = ("network", "linear", "mean")
    columns = [
        "rho",
        "t",
        "gain, dB",
        *(f"{metric}, {name}" for metric in ("eps-MSE", "PSNR dB", "SSIM") for name in who),
    ]
    rows = []
    for row in levels.to_dict("records"):
        cells = [f"{row['rho']:g}", f"{row['t']:.0f}", signed(row["gain_db"])]
        for metric, pattern in (("eps_mse", ".4f"), ("psnr", ".2f"), ("ssim", ".4f")):
            cells += [number(row[f"{metric}_{name}"], pattern) for name in who]
        rows.append(cells)
    bands = [
        [
            name,
            signed(band.get("gain_db")),
            number(band.get("psnr"), ".2f"),
            number(band.get("ssim"), ".4f"),
        ]
        for name, band in per_band.items()
    ]
    return [
        Table(columns, rows, "Per noise level, averaged over bands and crops"),
        Table(["band", "gain, dB", "PSNR, dB", "SSIM"], bands, "The network per band, averaged over noise levels"),
    ]


def count(number_of: int, thing: str) -> str:
    """A number and its noun: 1 chip, 1,200 chips."""
    return f"{number_of:,} {thing}{'' if number_of == 1 else 's'}"


def number(value: Any, pattern: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None or value != value else format(float(value), pattern)


def signed(value: Any, digits: int = 2) -> str:
    """A gain with its sign; one that rounds to nothing is not called negative."""
    shown = number(value, f"+.{digits}f")
    return f"+{0:.{digits}f}" if shown == f"-{0:.{digits}f}" else shown
