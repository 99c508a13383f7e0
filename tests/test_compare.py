"""`earthprior compare`: one escaped page that loads nothing, and one message for what makes no comparison."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from earthprior import recorded as records
from earthprior.errors import EarthPriorError
from earthprior.params import Params
from earthprior.recorded import RecordedRun
from earthprior.stages import stats
from earthprior.tools import compare
from kept_runs import history, recorded, with_weights
from tiny_training import TINY, Tiny

RUN_ID = "3f0e" + 7 * "abcd"
HOSTILE = "<script>alert('$x$')</script>{{ 7 * 7 }}"
METRICS = {
    "gain_db/mean": 0.3, "psnr/network": 30.5, "psnr/linear": 29.0, "ssim/network": 0.91, "judged_chips": 2.0,
    "probe/linear/network/accuracy": 0.81, "probe/linear/untrained/accuracy": 0.7,
    "probe/linear/context/accuracy": 0.6,
}  # fmt: skip


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, make_params: Callable[..., Params], tmp_path: Path) -> Callable[..., str]:
    """A function from recorded runs to the text of their page, on a workspace without chips."""

    def made(*runs: RecordedRun) -> str:
        monkeypatch.setattr(records, "find", lambda root, asked, into: {run.asked: run for run in runs}[asked])
        compare.run(make_params(), tmp_path, [run.asked for run in runs], 1, tmp_path / "page.html")
        return (tmp_path / "page.html").read_text()

    return made


@pytest.fixture
def content(make_params: Callable[..., Params]) -> dict[str, Any]:
    return make_params().model_dump(mode="json")


def cells(html: str) -> dict[str, list[str]]:
    """The rows of all tables, by their first cell."""
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(<td>.*?)</tr>", html)]
    return {first: rest for first, *rest in rows}


def test_the_page_shows_params_numbers_curves_and_who_the_runs_are(
    page: Any, content: dict[str, Any], tmp_path: Path
) -> None:
    html = page(
        recorded("slow", tmp_path, {**content, "lr": 1e-4}, metrics=METRICS, run_id=RUN_ID, commit="c0ffee"),
        recorded("fast", tmp_path, {**content, "batch_size": 8}, history=history(0.2, 0.5, 0.4), code="12ab"),
    )
    rows = cells(html)
    assert rows["lr"] == ["0.0001", "0.001"]
    assert rows["batch_size"] == ["4", "8"]
    assert "seed" not in rows
    assert rows["validation gain at the best epoch, dB"] == ["+0.30", "+0.50"]
    assert rows["best epoch"] == ["2 of 2", "2 of 3"]
    assert rows["chips seen"] == ["32", "96"]
    assert rows["PSNR, dB"] == ["30.50", "-"]
    assert rows["linear probe, accuracy"] == ["0.8100", "-"]
    assert rows["the same, untrained network"] == ["0.7000", "-"]
    assert rows["MLflow run"] == [RUN_ID, "-"]
    assert rows["code digest"] == ["-", "12ab"]
    assert "DVC experiment" not in rows
    assert "SSIM of the linear filter" not in rows
    assert "B has the best validation gain, +0.50 dB over the linear filter, 0.20 dB ahead of A. One training" in html
    assert "their gains compare directly" in html
    assert html.count("data:image/png;base64,") == 1
    assert "A is not shown: its network.safetensors" in html


def test_every_text_is_escaped_and_nothing_is_loaded(page: Any, content: dict[str, Any], tmp_path: Path) -> None:
    strange = {**content, "loss_fn": HOSTILE, HOSTILE: HOSTILE}
    html = page(recorded(HOSTILE, tmp_path, strange, commit=HOSTILE), recorded("fine", tmp_path, content))
    assert "<script" not in html
    assert "{{ 7 * 7 }}" in html
    assert not re.search(r"url\(|@import|https?:|<link|<iframe", html)


def test_runs_without_history_leave_words(page: Any, content: dict[str, Any], tmp_path: Path) -> None:
    runs = [recorded(name, tmp_path, content, history=pd.DataFrame()) for name in ("one", "two")]
    html = page(*runs)
    assert "No validation gain was recorded" in html
    assert "No training history is kept of A, B" in html
    assert "None: every parameter that acted is the same in all runs." in html
    assert "base64" not in html
    html = page(runs[0], recorded("three", tmp_path, content, history=history(-0.1)))
    assert "No training history is kept of A." in html
    assert "B has the best validation gain, -0.10 dB over the linear filter; of no other training is it known." in html
    assert 'class="verdict below"' in html


def test_equal_gains_are_called_equal(page: Any, content: dict[str, Any], tmp_path: Path) -> None:
    html = page(
        recorded("one", tmp_path, content, history=history(0.301)),
        recorded("two", tmp_path, content, history=history(0.304)),
        recorded("three", tmp_path, content, history=history(0.1), data_md5="b" * 32),
    )
    assert (
        "B has the best validation gain, +0.30 dB over the linear filter, and A equals it to 0.01 dB. But see below"
        in html
    )
    assert "<h1>EarthPrior: 3 runs</h1>" in html


def test_chips_are_denoised_by_each_run(
    monkeypatch: pytest.MonkeyPatch, make_chips: Any, make_params: Callable[..., Params], tmp_path: Path, capsys: Any
) -> None:
    root = tmp_path / "project"
    make_chips(root / "data", n=6, size=32)
    params = make_params({**TINY, "threads": 1, "unet_film.channels": [4, 8]})
    stats.run(params, root)
    tiny = Tiny(root, params)

    def find(root: Path, asked: str, into: Path) -> RecordedRun:
        return recorded(asked, with_weights(tiny, into), params.model_dump(mode="json"))

    monkeypatch.setattr(records, "find", find)
    compare.run(params, root, ["lucid/bets", RUN_ID], 1)
    path = root / "work/compare/lucid-bets-3f0eabcd.html"
    assert "work/compare/lucid-bets-3f0eabcd.html" in capsys.readouterr().out
    html = path.read_text()
    assert "1 validation chip, denoised" in html
    assert html.count("data:image/png;base64,") == 2


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["one"], "2 to 8 runs, and 1 are named"),
        ([f"run{number}" for number in range(9)], "and 9 are named"),
        (["one", "two", "one"], "run one is named twice"),
        (["one", "unknown"], "unknown is no run"),
    ],
)
def test_what_makes_no_comparison_is_one_message(
    asked: list[str], told: str, monkeypatch: pytest.MonkeyPatch, make_params: Callable[..., Params], tmp_path: Path
) -> None:
    def find(root: Path, name: str, into: Path) -> RecordedRun:
        if name == "unknown":
            raise EarthPriorError("unknown is no run")
        return recorded(name, into, {})

    monkeypatch.setattr(records, "find", find)
    with pytest.raises(EarthPriorError, match=told):
        compare.run(make_params(), tmp_path, asked, 1)
    assert not (tmp_path / "work").exists()
