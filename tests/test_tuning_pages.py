"""tuning/pages.py and what it is made of: true sentences about any study, and pages that show it."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from earthprior import params
from earthprior.figures.trials import Trial
from earthprior.tuning import findings
from earthprior.tuning.pages import write

ROOT = Path(__file__).parents[1]
LR = FloatDistribution(1e-4, 1e-1, log=True)
LOSS = CategoricalDistribution(("mse", "l1", "hybrid"))
HOSTILE = "<script>alert('x')</script>&\"{{ 7 * 7 }} $x$"


def study_of(metrics: Sequence[str] = ("gain, dB",)) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["maximize"] * len(metrics))
    study.set_user_attr("metrics", list(metrics))
    return study


def add(
    study: optuna.Study,
    values: Sequence[float] | None,
    drawn: dict[str, tuple[Any, BaseDistribution]],
    state: TrialState = TrialState.COMPLETE,
    curve: dict[int, float] | None = None,
    **said: Any,
) -> None:
    study.add_trial(
        optuna.trial.create_trial(
            state=state,
            values=values,
            params={name: value for name, (value, _) in drawn.items()},
            distributions={name: space for name, (_, space) in drawn.items()},
            intermediate_values=curve or {},
            user_attrs=said,
        )
    )


def searched(n: int, seed: int = 0) -> optuna.Study:
    """A study in which lr matters most and weight_decay not at all; some trials fail or are pruned."""
    rng, study = np.random.default_rng(seed), study_of()
    for number in range(n):
        lr, loss = float(10 ** rng.uniform(-4, -1)), str(rng.choice(LOSS.choices))
        settings: dict[str, tuple[Any, BaseDistribution]] = {
            "lr": (lr, LR),
            "loss_fn": (loss, LOSS),
            "weight_decay": (float(rng.uniform(0, 1)), FloatDistribution(0, 1)),
        }
        if loss == "hybrid":
            settings["loss_weights.alpha"] = (float(rng.uniform(0.5, 1)), FloatDistribution(0.5, 1))
        gain = 0.5 - 0.5 * (math.log10(lr) + 2.5) ** 2 + 0.1 * (loss == "l1")
        curve = {epoch: gain - 1 / epoch for epoch in range(1, 5)}
        if number % 10 == 7:
            add(study, None, settings, TrialState.FAIL, reason=f"the loss became NaN at step {number}; lower lr")
        elif number > 5 and gain < 0.2:
            reason = "pruned after epoch 2 of 4"
            add(study, None, settings, TrialState.PRUNED, {k: v for k, v in curve.items() if k < 3}, reason=reason)
        else:
            add(study, [gain - 0.25], settings, curve=curve, best_epoch=4, seconds=12.0, settings={"threads": 1})
    return study


def page(study: optuna.Study, folder: Path, **arguments: Any) -> str:
    path = write(study, folder, arguments.pop("name", "a study"), **arguments)
    content = path.read_text(encoding="utf-8")
    shown = re.sub(r"<style>.*?</style>|<img[^>]*>|<[^>]+>", " ", content, flags=re.DOTALL)
    text = " ".join(html.unescape(shown).split())
    assert not re.search(r"\b(nan|inf)\b|Traceback", text)
    assert len(pd.read_csv(folder / "trials.csv")) == len(study.trials)
    return text


def pictures(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "figures").glob("*.png")}


def test_a_study_is_told_and_drawn(tmp_path: Path) -> None:
    study = searched(40)
    best = study.best_trial
    tune = params.load(ROOT / "params.yaml").tune
    text = page(
        study, tmp_path, name=HOSTILE, commands={best.number: f"dvc exp run -n best {HOSTILE}", 1: "not this"},
        storage="postgresql://me:secret@host/db", tune=tune,
    )  # fmt: skip
    assert f"Trial {best.number} is the best of" in text
    assert f"gain {best.value:+.3f} dB" in text
    assert "lr made the greatest difference to the gain" in text
    assert "had it or it never changed: loss_weights.alpha" in text
    assert f"dvc exp run -n best {HOSTILE}" in text
    assert "not this" not in text
    assert f"lr {best.params['lr']!r} searched" in text
    assert "threads 1" in text
    assert "secret" not in text
    assert "Sampler tpe, seed 0" in text
    assert "<script" not in (tmp_path / "report.html").read_text()
    assert pictures(tmp_path) == {"history", "curves", "importances", "slices_1", "parallel"}
    table = pd.read_csv(tmp_path / "trials.csv")
    assert {"number", "state", "gain_db", "lr", "loss_weights.alpha", "seconds", "reason"} <= set(table)
    assert table.gain_db.idxmax() == best.number
    assert table.lr[3] == study.trials[3].params["lr"]


def test_reasons_that_differ_in_numbers_share_a_row(tmp_path: Path) -> None:
    text = page(searched(40), tmp_path)
    assert "4 failed the loss became NaN at step 7; lower lr 7, 17, 27, 37" in text


@pytest.mark.parametrize(
    ("states", "verdict"),
    [
        ([], "No trial has finished."),
        ([TrialState.FAIL] * 3, "No trial has finished: 3 failed."),
        ([TrialState.PRUNED, TrialState.RUNNING], "No trial has finished: 1 pruned. The study is not over: 1 running."),
        ([TrialState.WAITING], "No trial has finished. The study is not over: 1 waiting."),
        ([TrialState.COMPLETE], "Trial 0 is the best of 1 finished trial: gain -0.100 dB. No trial beats the linear"),
    ],
)
def test_little_is_told_of_little(states: list[TrialState], verdict: str, tmp_path: Path) -> None:
    study = study_of()
    for state in states:
        values = [-0.1] if state == TrialState.COMPLETE else None
        add(study, values, {"lr": (1e-3, LR)}, state, {1: math.nan} if state == TrialState.PRUNED else {})
    text = page(study, tmp_path)
    assert verdict in text
    assert "made the greatest difference" not in text
    assert "importances" not in pictures(tmp_path)


def test_two_objectives_have_a_front(tmp_path: Path) -> None:
    study = study_of(["gain, dB", "probe"])
    for lr, values in ((1e-2, (0.5, 0.6)), (1e-3, (0.4, 0.7)), (1e-4, (0.3, 0.5)), (2e-2, (-30.0, 0.1))):
        add(study, values, {"lr": (lr, LR), "loss_fn": ("mse", LOSS)})
    text = page(study, tmp_path, commands={0: "line zero", 1: "line one", 2: "line two"})
    assert "Of 4 finished trials 2 are beaten by no other in both objectives" in text
    assert "trial 0 has gain +0.500 dB and probe 0.6000; trial 1 has gain +0.400 dB and probe 0.7000" in text
    assert "line zero line one" in text
    assert "line two" not in text
    assert pictures(tmp_path) == {"history", "front", "slices_1", "slices_2", "parallel"}


def test_choices_of_any_kind_and_a_changed_space_are_drawn(tmp_path: Path) -> None:
    study = study_of()
    mixed = CategoricalDistribution((None, True, 0.5, 64, "null?", "[32, 48]", "$b$", HOSTILE))
    for place, choice in enumerate(mixed.choices * 2):
        space = FloatDistribution(0.1, 0.2 + place) if place < 8 else FloatDistribution(1e-6, 1.0, log=True)
        settings: dict[str, tuple[Any, BaseDistribution]] = {HOSTILE: (choice, mixed), "lr": (0.15, space)}
        settings["kind"] = ("a", CategoricalDistribution(("a", "b"))) if place < 4 else (0.3, FloatDistribution(0, 1))
        settings |= {"always": (1, FloatDistribution(1, 1))} if place != 5 else {}
        add(study, [place / 10], settings)
    text = page(study, tmp_path)
    assert HOSTILE in text
    assert "1e-06 to 7.2, log" in text
    assert "null, true, 0.5, 64, null?, [32, 48], $b$" in text
    (kind,) = [dial for dial in findings.dials_of(study.trials) if dial.name == "kind"]
    assert kind.choices == ("a", "b", "0.3")


def test_pictures_of_an_earlier_state_are_removed(tmp_path: Path) -> None:
    page(searched(20), tmp_path)
    assert "importances" in pictures(tmp_path)
    page(searched(3), tmp_path)
    assert "importances" not in pictures(tmp_path)


def test_pruned_trials_count_in_what_mattered() -> None:
    # every trial with the bad choice is pruned; among the finished ones that choice could not be seen to matter
    rng, study = np.random.default_rng(1), study_of()
    for number in range(30):
        bad, noise = number % 2 == 1, float(rng.uniform())
        settings: dict[str, tuple[Any, BaseDistribution]] = {
            "loss_fn": ("mse" if bad else ("l1", "hybrid")[number % 4 // 2], LOSS),
            "weight_decay": (noise, FloatDistribution(0, 1)),
        }
        gain = 0.4 + 0.02 * float(rng.normal()) - 0.3 * bad
        curve = {epoch: gain - 1 / epoch for epoch in range(1, 3 if bad else 5)}
        add(study, None if bad else [gain], settings, TrialState.PRUNED if bad else TrialState.COMPLETE, curve)
    found = findings.Findings.of(study)
    assert next(iter(found.shares["gain, dB"])) == "loss_fn"
    assert found.shares["gain, dB"]["loss_fn"] > 0.7


def test_a_pruned_trial_is_thought_on_as_the_others_went() -> None:
    trials = [
        Trial(0, "finished", (0.5,), curve={1: 0.1, 2: 0.5}),
        Trial(1, "finished", (0.3,), curve={1: 0.1, 2: 0.3}),
        Trial(2, "pruned", curve={1: -0.2}),
        Trial(3, "pruned", curve={7: -0.2}),
    ]
    assert findings.foreseen(trials, 0) == pytest.approx([0.5, 0.3, 0.1, -0.2])


def test_states_are_told_apart() -> None:
    study = study_of()
    add(study, None, {}, TrialState.FAIL)
    add(study, [0.2], {"lr": (1e-3, LR)}, continues=0)
    add(study, [0.2], {"lr": (1e-3, LR)}, same_as=1)
    add(study, [-math.inf], {"lr": (1e-1, LR)})
    found = findings.Findings.of(study)
    assert [trial.state for trial in found.trials] == ["continued", "finished", "finished", "failed"]
    assert [trial.number for trial in found.best] == [1]


def test_an_end_of_the_range_is_told(tmp_path: Path) -> None:
    study = study_of()
    for lr, gain in ((1e-3, 0.1), (9.9e-2, 0.3)):
        add(study, [gain], {"lr": (lr, LR)})
    text = page(study, tmp_path)
    assert "where the key allows it: lr = 0.099, searched from 0.0001 to 0.1" in text
    assert "Only one parameter was searched, lr" in text
