"""report.py: escaped, self-contained, and plain about bad results."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from earthprior import report
from earthprior.figures import save_png

HOSTILE = "<script>alert('x')</script>&\"{{ 7 * 7 }}"


@pytest.fixture
def page(tmp_path: Path) -> report.Report:
    figure = Figure(figsize=(2, 1), dpi=120)
    save_png(figure, tmp_path / "a.png")
    section = report.Section(
        HOSTILE,
        [HOSTILE],
        [report.Picture(tmp_path / "a.png", HOSTILE, HOSTILE)],
        [report.Table(["a", HOSTILE], [["1", HOSTILE]], HOSTILE)],
    )
    numbers = [report.Number(HOSTILE, HOSTILE, HOSTILE)]
    return report.Report(HOSTILE, HOSTILE, HOSTILE, True, numbers, [section], [("Git commit", HOSTILE)])


class Tags(HTMLParser):
    """Collects tags and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_every_text_is_escaped_and_none_is_a_template(page: report.Report) -> None:
    html = report.render(page)
    assert "<script" not in html
    assert "alert(" in html
    assert "{{ 7 * 7 }}" in html
    tags = Tags()
    tags.feed(html)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags.found}


def test_the_page_loads_nothing_from_anywhere(page: report.Report) -> None:
    tags = Tags()
    html = report.render(page)
    tags.feed(html)
    sources = [value for _, attributes in tags.found for name, value in attributes.items() if name in ("src", "href")]
    assert len(sources) == 1
    assert sources[0] is not None
    assert sources[0].startswith("data:image/png;base64,")
    assert not re.search(r"url\(|@import|https?:", html)


def test_a_page_of_no_single_run_has_no_verdict_numbers_or_identity() -> None:
    html = report.render(report.Report("Runs", "of today", sections=[report.Section("Curves", ["None."])]))
    assert "Curves" in html
    assert not re.search(r'class="(verdict|numbers|identity)', html)
    assert "This run" not in html


def test_pictures_are_as_wide_as_their_inches(page: report.Report) -> None:
    assert page.sections[0].pictures[0].width_px == 2 * 96


def test_a_gain_above_zero_is_praised_with_its_weak_levels() -> None:
    text = report.verdict({"rho_0.05": -0.01, "rho_1": 0.5, "mean": 0.245})
    assert "beats the linear filter by 0.24 dB" in text or "by 0.25 dB" in text
    assert "At rho 0.05 it is worse" in text
    assert "worse" not in report.verdict({"rho_1": 0.5, "mean": 0.5})


def test_a_gain_below_zero_is_said_plainly() -> None:
    text = report.verdict({"rho_0.05": -3.0, "rho_1": -3.0, "mean": -3.0})
    assert "does not beat the linear filter" in text
    assert "-3.00 dB" in text
    assert "2 times as large" in text
    assert "dvc exp run" in text
    assert "normalization" in report.verdict({"rho_1": -3.0, "mean": -3.0}, imported=True)
    assert "every noise level" in text
    assert "does not beat" in report.verdict({"rho_1": 0.0, "mean": 0.0})
    assert "does not beat" in report.verdict({"rho_1": 0.0014, "mean": 0.0014})


def test_missing_numbers_are_dashes() -> None:
    assert [report.signed(value) for value in (None, -0.004, -10.004, 0.1)] == ["-", "+0.00", "-10.00", "+0.10"]
    row = {"rho": 0.5, "t": 12, "gain_db": 0.25}
    for metric in ("eps_mse", "psnr", "ssim"):
        row |= {f"{metric}_{name}": float("nan") for name in ("network", "linear", "mean")}
    levels, bands = report.levels_tables(pd.DataFrame([row]), {"red": {"gain_db": -0.5}})
    assert levels.rows[0] == ["0.5", "12", "+0.25", *["-"] * 9]
    assert bands.rows[0] == ["red", "-0.50", "-", "-"]
