"""How a bench is planned, kept, and read: without any network."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from earthprior.bench import pages, pixels
from earthprior.bench.findings import answers, differences, headline, points
from earthprior.bench.fits import Fitter
from earthprior.bench.holdout import hold_out, places
from earthprior.bench.plan import JUDGED, METHODS, TUNING, Fit, at_the_edge, chosen, plan, ready, trials
from earthprior.bench.table import Row, Table
from earthprior.chips.catalog import ChipRow
from earthprior.errors import DataError, EarthPriorError
from earthprior.figures.labels import LOOKS, NAMES
from earthprior.params import load_downstream
from earthprior.params.bench import BenchParams
from earthprior.representations import at_pixels
from earthprior.scoring import Score

METRICS = ("average_precision", "iou", "f1")


def section(**changes: Any) -> BenchParams:
    values: dict[str, Any] = {
        "budgets": [4, 16, 64, "all"], "seeds": [0, 1, 2], "methods": list(METHODS), "steps": 8, "lr": [0.1, 0.2, 0.4],
        "l2": [0.01, 1.0], "holdout": 6, "tuning_labels": 16, "pixels": 32,
    }  # fmt: skip
    return BenchParams.model_validate({**values, **changes})


def row(fit: Fit, value: float, score: float, labels: int = 0) -> Row:
    scores = {name: Score(score, score - 0.1, score + 0.1) for name in METRICS}
    dial = fit.value if fit.value is not None else value
    return Row(fit, dial, labels or fit.budget or 100, 8, 5, scores, 1.0, 0.5, "c0de")


def finished(
    tmp_path: Path, curve: dict[str, list[float]], bench: BenchParams | None = None
) -> tuple[Table, list[Fit]]:
    """A table of all fits of a plan, with given scores per method and budget."""
    bench = bench or section()
    fits, table = plan(bench, 100), Table(tmp_path / "bench.csv", "b" * 12, METRICS)
    places_of = {4: 0, 16: 1, 64: 2, None: 3}
    for fit in fits:
        value = fit.value if fit.value is not None else chosen(fit, bench, 100, table.scores())
        assert value is not None, "what chooses a dial comes before what uses it"
        table.append(row(fit, value, curve.get(fit.method, [0.1] * 4)[places_of[fit.budget]] + 0.01 * fit.seed))
    return table, fits


def test_a_plan_begins_with_what_is_of_use_alone() -> None:
    judged = [fit for fit in plan(section(), 100) if fit.purpose == JUDGED]
    assert [fit.seed for fit in judged] == sorted(fit.seed for fit in judged)
    first = [fit for fit in judged if fit.seed == 0]
    assert [fit.budget for fit in first] == [b for b in (4, 16, 64, None) for _ in METHODS]
    assert len(judged) == 3 * 4 * 6 - 2 * 2, "with all chips, a fit of one solution is done once"


def test_budgets_beyond_what_there_is_are_one() -> None:
    budgets = {fit.budget for fit in plan(section(), 50) if fit.purpose == JUDGED}
    assert budgets == {4, 16, None}
    assert {fit.budget for fit in plan(section(budgets=[4, 16]), 50) if fit.purpose == JUDGED} == {4, 16}


def test_every_method_is_tuned_by_the_same_procedure_and_never_on_judged_chips() -> None:
    bench = section(tuning_labels=None)
    for fit in (fit for fit in plan(bench, 100) if fit.purpose == JUDGED):
        tried = trials(fit, bench, 100)
        assert [one.value for one in tried] == sorted(getattr(bench, METHODS[fit.method].dial))
        assert {(one.purpose, one.budget, one.seed) for one in tried} == {(TUNING, fit.budget, 0)}
    assert {one.budget for one in trials(Fit(JUDGED, "scratch", 4, 2), section(), 100)} == {16}
    assert trials(Fit(JUDGED, "scratch", 4, 2), section(lr=[0.3]), 100) == []
    assert chosen(Fit(JUDGED, "scratch", 4, 2), section(lr=[0.3]), 100, {}) == 0.3


def test_the_best_value_tried_is_used_by_all_seeds_and_one_that_diverged_never() -> None:
    bench, fit = section(), Fit(JUDGED, "finetune", 64, 2)
    tried = trials(fit, bench, 100)
    scores = dict(zip(tried, (0.3, math.nan, 0.5), strict=True))
    assert chosen(fit, bench, 100, scores) == 0.4
    assert chosen(fit, bench, 100, dict(zip(tried, (0.5, 0.5, math.nan), strict=True))) == 0.1, "of equals the smallest"
    assert chosen(fit, bench, 100, dict(list(scores.items())[:2])) is None
    assert at_the_edge(bench, "finetune", 0.4)
    assert not at_the_edge(bench, "finetune", 0.2)
    assert not at_the_edge(bench, "probe", 1.0), "of two values both are edges"


def test_what_is_ready_waits_for_what_chooses_it() -> None:
    bench = section(methods=["scratch"], budgets=[4], seeds=[0])
    fits, scores = plan(bench, 100), {}
    while left := list(ready(fits, bench, 100, scores)):
        assert (left[0].purpose == JUDGED) == (len(scores) == 3)
        scores[left[0]] = 0.5
    assert set(scores) == set(fits)


def test_rows_come_back_as_they_were_and_never_twice(tmp_path: Path) -> None:
    table, fits = finished(tmp_path, {})
    rows = table.rows()
    assert [one.fit for one in rows] == fits
    before = table.path.read_bytes()
    assert not table.append(row(fits[3], 0.5, 0.9))
    assert table.path.read_bytes() == before
    undone = Row(Fit(JUDGED, "scratch", 7, 0), 0.1, 7, 8, 5, dict.fromkeys(METRICS, Score(*[math.nan] * 3)), 1, 1, "c")
    assert table.append(undone)
    again = Table(table.path, "b" * 12, METRICS).rows()
    assert again[:-1] == rows
    assert math.isnan(again[-1].scores["iou"].value)
    # Seeds or budgets may be added: what is there counts.
    wider = plan(section(seeds=[0, 1, 2, 3]), 100)
    assert {fit.seed for fit in wider if fit not in table.scores()} == {3}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace("iou", "dice"), "other columns"),
        (lambda text: text.replace("b" * 12, "a" * 12), "another bench ('aaaaaaaaaaaa', line 2)"),
        (lambda text: text[:-40], "cells instead of"),
        (lambda text: text.replace("tuning,finetune,16", "tuning,finetune,many"), "cannot be read in line 2"),
        (lambda text: text.replace("finetune", "magic"), "cannot be read in line 2"),
        (lambda text: "", "other columns"),
    ],
)
def test_a_table_that_is_not_this_benchs_is_refused(tmp_path: Path, damage: Any, said: str) -> None:
    table, _ = finished(tmp_path, {})
    table.path.write_text(damage(table.path.read_text()))
    with pytest.raises(EarthPriorError) as refused:
        table.append(row(Fit(JUDGED, "scratch", 4, 9), 0.1, 0.2))
    assert said in str(refused.value)
    assert "move it away" in str(refused.value)


def test_how_many_labels_scratch_needs_is_read_off_its_curve(tmp_path: Path) -> None:
    curve = {"finetune": [0.2, 0.4, 0.5, 0.7], "scratch": [0.1, 0.2, 0.6, 0.65], "probe": [0.15, 0.2, 0.3, 0.3]}
    table, fits = finished(tmp_path, curve)
    found = points(table.rows(), "average_precision", set(fits))
    assert [point.method for point in found if point.labels == 4] == list(METHODS)
    at = {answer.pretrained.labels: answer for answer in answers(found)}
    assert at[16].needed == pytest.approx(32), "half way from 16 to 64, in powers of two"
    assert at[4].needed == pytest.approx(16)
    assert at[100].needed is None
    assert headline(list(at.values())) is at[16]
    pairs = {(one.few, one.more): one.mean for one in differences(found)}
    assert pairs[16, 64] == pytest.approx(-0.2)
    assert pairs[16, 16] == pytest.approx(0.2)
    said = pages.verdict(at[16], "average_precision")
    assert "0.410" in said
    assert "it takes about 32 to reach that, 2.0 times as many" in said
    assert "do not reach that" in pages.verdict(at[100], "average_precision")


def test_draws_that_only_some_fits_have_do_not_answer(tmp_path: Path) -> None:
    table, fits = finished(tmp_path, {"finetune": [0.2, 0.4, 0.5, 0.7], "scratch": [0.1, 0.2, 0.6, 0.65]})
    part = [one for one in table.rows() if one.fit.seed == 0 or (one.fit.method, one.fit.budget) == ("finetune", 16)]
    answer = headline(answers(points(part, "average_precision", set(fits))))
    assert answer is not None
    assert answer.pretrained.values == {0: pytest.approx(0.4)}
    assert answer.needed == pytest.approx(32)


def test_pretraining_that_saves_nothing_is_said_to_save_nothing(tmp_path: Path) -> None:
    table, fits = finished(tmp_path, {"finetune": [0.1, 0.2, 0.3, 0.4], "scratch": [0.3, 0.4, 0.5, 0.6]})
    found = points(table.rows(), "average_precision", set(fits))
    answer = headline(answers(found))
    assert answer is not None
    assert answer.at_least
    assert "saves no labels" in pages.verdict(answer, "average_precision")
    table, fits = finished(tmp_path / "b", {"finetune": [0.1, 0.2, 0.3, 0.4], "scratch": [0.1, 0.3, 0.5, 0.6]})
    answer = headline(answers(points(table.rows(), "average_precision", set(fits))))
    assert "saves no labels" in pages.verdict(answer, "average_precision")


def test_the_page_tells_what_is_there(tmp_path: Path) -> None:
    bench = section()
    table, fits = finished(tmp_path, {"finetune": [0.2, 0.4, 0.5, 0.7], "scratch": [0.1, 0.2, 0.6, 0.65]})
    about = pages.About("5 test chips", 100, 6, METRICS, [("Backbone", "<b>")], "earthprior bench")
    half = [one for one in table.rows() if one.fit.seed == 0]
    for rows, said in ((table.rows(), "5 test chips"), (half, "fits are still to be done"), ([], "still to be done")):
        page = pages.write(tmp_path / "report", rows, fits, bench, about).read_text()
        assert said in page
        assert "<b>" not in page.split("<main>")[1].split("&lt;b&gt;")[0]
    assert list((tmp_path / "report/figures").glob("*.png"))
    told = dict(pages.metrics(table.rows(), fits, about))
    assert told["bench/finetune/average_precision_at_16"] == (0, pytest.approx(0.41))
    assert told["bench/labels_needed_from_scratch/average_precision"] == (16, pytest.approx(32))


def test_every_method_has_a_look() -> None:
    assert set(LOOKS) == set(NAMES) == set(METHODS)


def rows_of(groups: str) -> list[ChipRow]:
    return [ChipRow(n + 2, "train", (f"chips/{n}.tif",), {"group": g}) for n, g in enumerate(groups)]


def test_held_out_chips_share_no_place_with_the_others() -> None:
    rows = rows_of("aabbccddeeff")
    held, rest = hold_out(rows, places(Path(), rows), 4, 4)
    assert len(held) == 4
    assert not {row.values["group"] for row in held} & {row.values["group"] for row in rest}
    assert sorted(row.line for row in [*held, *rest]) == [row.line for row in rows]
    # A place that would leave too few stays.
    held, rest = hold_out(rows_of("aaaaaaaab"), list("aaaaaaaab"), 1, 8)
    assert [row.values["group"] for row in held] == ["b"]
    with pytest.raises(DataError, match=r"12 labelled train chips in 6 places .* lower bench.holdout"):
        hold_out(rows, places(Path(), rows), 9, 4)


def test_without_groups_places_are_where_files_lie(tmp_path: Path, make_chips: Any) -> None:
    make_chips(tmp_path, n=6)
    rows = [ChipRow(n + 2, "train", (f"chips/chip_{n:03d}.tif",), {}) for n in range(6)]
    assert len(set(places(tmp_path, rows))) == 6, "make_chips puts them apart"
    twice = [*rows, ChipRow(9, "train", rows[0].images, {})]
    assert len(set(places(tmp_path, twice))) == 6


@pytest.mark.parametrize("fit", [pixels.linear, pixels.perceptron])
def test_a_classifier_learns_and_gives_absent_classes_nothing(fit: Any) -> None:
    draws = np.random.default_rng(0)
    values = (draws.standard_normal((600, 3)) * [1, 100, 0] + [5, 0, 3]).astype(np.float32)
    classes = np.where(values[:, 0] > 5, 2, 0).astype(np.int64)
    found = fit(values, classes, 3, 1e-3, 0)(values)
    assert found.shape == (600, 3)
    assert np.allclose(found.sum(1), 1, atol=1e-5)
    assert (found[:, 1] == 0).all()
    assert np.mean(found.argmax(1) == classes) > 0.95
    only = fit(values, np.full(600, 1), 3, 1e-3, 0)(values[:4])
    assert (only == [0, 1, 0]).all()


def test_context_is_of_valid_pixels_alone_where_maps_are_made_too(monkeypatch: pytest.MonkeyPatch) -> None:
    valid = torch.ones(1, 12, 12, dtype=torch.bool)
    valid[:, :, 6:] = False
    raw = torch.full((1, 1, 12, 12), 100.0).masked_fill(~valid[:, None], 0)
    ground: Any = SimpleNamespace(classes=[0, 1], chips=lambda rows: [(rows[0], raw, valid, np.where(valid[0], 1, -1))])
    # The pixel itself, and the mean of 5 px around it.
    monkeypatch.setattr(pixels, "linear", lambda *arguments: lambda asked: asked[:, :2])
    chips = [ChipRow(2, "train", ("a.tif",), {})]
    mapper = Fitter(ground, section(), lambda *_: None, "c0de", METRICS)._pixels("context", chips, 1.0, 0)  # type: ignore[arg-type, return-value]
    found = mapper.fn(raw.masked_fill(~valid[:, None], math.nan))
    assert found[..., :6].allclose(torch.tensor(100.0))
    assert found.isfinite().all()


def test_pixels_are_drawn_from_labelled_ones_by_the_chips_path() -> None:
    label = np.full((4, 4), -1)
    label[1], label[2] = 0, 1
    assert pixels.draw("a", label, 100).tolist() == [[row, column] for row in (1, 2) for column in range(4)]
    first, second = (pixels.draw("a", label, 3).tolist() for _ in range(2))
    assert first == second
    assert len(first) == 3
    assert first != pixels.draw("b", label, 3).tolist()


@pytest.mark.parametrize("classes", [2, 3])
def test_a_map_of_a_pyramid_is_what_its_pixels_say(classes: int) -> None:
    pyramid = [torch.randn(1, 2, 8, 8), torch.randn(1, 3, 4, 4), torch.randn(1, 1, 2, 2)]
    every = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    values = at_pixels([level[0] for level in pyramid], every, 8).numpy()
    fitted = pixels.linear(values, np.arange(64) % 2, classes, 1e-3, 0)
    expected = torch.from_numpy(fitted(values)).T.reshape(classes, 8, 8)
    assert torch.allclose(fitted.of_pyramid(pyramid)[0], expected, atol=1e-5)


def test_every_key_and_method_is_explained() -> None:
    text = (Path(__file__).parents[1] / "docs/downstream.md").read_text()
    assert not [name for name in [*BenchParams.model_fields, *METHODS] if f"| `{name}` |" not in text]


def test_the_committed_section_can_be_run() -> None:
    params = load_downstream(Path(__file__).parents[1] / "downstream/params.yaml")
    assert params.bench is not None
    assert set(params.bench.methods) == set(METHODS)
    assert not [key for key in params.active() if key.startswith("bench")]
