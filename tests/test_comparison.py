"""evaluation/comparison.py: params that acted, means over common levels, and what keeps runs from comparing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from earthprior.evaluation.comparison import (
    ABSENT,
    Compared,
    beside,
    cautions,
    common_levels,
    differing,
    evaluated_gain,
    mean_gain,
    same_trainings,
)
from earthprior.params import Params
from kept_runs import RHOS, history, recorded


@pytest.fixture
def content_of(make_params: Callable[..., Params]) -> Callable[..., dict[str, Any]]:
    """A function from overrides, with double underscores for dots, to the mapping of a params.yaml."""
    return lambda **overrides: make_params(
        {key.replace("__", "."): value for key, value in overrides.items()}
    ).model_dump(mode="json")


@pytest.fixture
def compared(make_params: Callable[..., Params]) -> Callable[..., list[Compared]]:
    """A function from mappings, or pairs of mapping and changes of the record, to compared runs."""

    def made(*runs: Mapping[str, Any] | tuple[Mapping[str, Any], dict[str, Any]]) -> list[Compared]:
        pairs = [run if isinstance(run, tuple) else (run, {}) for run in runs]
        return beside(
            [recorded(f"run{i}", Path(), told, **kept) for i, (told, kept) in enumerate(pairs)], make_params()
        )

    return made


def test_params_without_effect_are_not_compared(compared: Any, content_of: Any) -> None:
    runs = compared(
        content_of(lr=0.01, sgd__momentum=0.1, operation__readers=3),
        content_of(lr=0.02, sgd__momentum=0.2, operation__readers=4),
    )
    assert differing(runs) == {"lr": [0.01, 0.02]}


def test_a_key_that_acts_in_one_run_only_is_absent_in_the_other(compared: Any, content_of: Any) -> None:
    found = differing(compared(content_of(optimizer="sgd"), content_of()))
    assert found["optimizer"] == ["sgd", "adamw"]
    assert found["sgd.momentum"] == [0.9, ABSENT]
    assert found["adamw.eps"] == [ABSENT, 1e-8]
    assert list(found).index("optimizer") < list(found).index("adamw.eps")


def test_files_of_other_times_are_compared_as_they_are(compared: Any, content_of: Any) -> None:
    old, new = content_of(), content_of(evaluate__steps=7)
    del old["grad_clip"], old["diffusion"]["weighting"]
    old["data"]["tiles"] = 3
    new["evaluate"]["steps"] = 9
    found = differing(compared(old, new))
    assert found == {
        "grad_clip": [ABSENT, 1.0],
        "diffusion.weighting": [ABSENT, "linear"],
        "evaluate.steps": [20, 9],
        "data.tiles": [3, ABSENT],
    }


def test_a_file_that_this_code_cannot_read_is_compared_whole(compared: Any, content_of: Any) -> None:
    strange = content_of() | {"loss_fn": "of yesterday"}
    found = differing(compared(strange, content_of()))
    assert found["loss_fn"] == ["of yesterday", "mse"]
    assert found["sgd.momentum"] == [0.9, ABSENT]
    assert not [key for key in found if key.startswith("operation.")]


def test_the_best_epoch_is_the_first_with_the_best_gain(compared: Any, content_of: Any) -> None:
    (run,) = compared((content_of(batch_size=8), {"history": history(0.1, 0.4, math.nan, 0.4)}))
    assert run.best == 1
    assert run.levels == dict.fromkeys(RHOS, 0.4)
    assert list(run.chips_seen()) == [32, 64, 96, 128]


def test_without_a_history_there_is_no_best(compared: Any, content_of: Any) -> None:
    runs = compared((content_of(), {"history": pd.DataFrame()}), (content_of(), {"history": history(math.nan)}))
    for run in runs:
        assert run.best is None
        assert run.levels == {}
    assert runs[0].chips_seen() is None
    assert common_levels(runs) == []
    assert mean_gain(runs[0], RHOS) is None
    assert cautions(runs) == []


def test_an_evaluation_stands_in_for_a_history(compared: Any, content_of: Any) -> None:
    metrics = {"gain_db/rho_0.1": 1.0, "gain_db/rho_0.5": 2.0, "gain_db/mean": 1.5}
    imported = (content_of(), {"history": pd.DataFrame(), "metrics": metrics})
    assert common_levels(compared(imported, imported)) == [0.1, 0.5]
    assert common_levels(compared(imported, content_of())) == [0.1, 0.5]


def test_means_are_over_common_levels_and_the_page_says_so(compared: Any, content_of: Any) -> None:
    lower = history(0.5, rhos=RHOS[:4])
    lower["gain_db/rho_0.05"] = 0.1
    runs = compared(
        (content_of(), {"metrics": {"gain_db/rho_0.05": 1.0, "gain_db/rho_0.1": 2.0, "gain_db/rho_5": 99.0}}),
        (content_of(), {"history": lower, "metrics": {"gain_db/rho_0.05": 1.0}}),
    )
    assert common_levels(runs) == [0.05, 0.1, 0.2, 0.5]
    gains = mean_gain(runs[1], common_levels(runs))
    assert gains is not None
    assert list(gains) == [pytest.approx((0.1 + 3 * 0.5) / 4)]
    assert evaluated_gain(runs[0], [0.05, 0.1]) == 1.5
    assert evaluated_gain(runs[1], [0.05, 0.1]) is None
    (told,) = cautions(runs)
    assert "B lacks rho 1, 2, 5" in told
    assert "A lacks" not in told
    assert "over rho 0.05, 0.1, 0.2, 0.5 only" in told


@pytest.mark.parametrize(
    ("changes", "kept", "told"),
    [
        ({}, {}, []),
        ({"lr": 0.5, "diffusion__noise_schedule": "cosine"}, {}, []),
        ({}, {"data_md5": "b" * 32}, ["A on aaaaaaaa; B on bbbbbbbb"]),
        ({}, {"data_md5": None}, ["B on one not recorded"]),
        ({"data__bands": ["nir", "red", "green", "blue"]}, {}, ["other bands"]),
        ({"normalization__stat_procedure": "lpb"}, {}, ["only the probe judges"]),
        ({"normalization__clip_val": 3.0}, {}, ["normalize differently"]),
        ({"data__crop_px": 8}, {}, ["different width"]),
    ],
)
def test_what_keeps_runs_from_comparing_is_said(
    changes: dict[str, Any], kept: dict[str, Any], told: list[str], compared: Any, content_of: Any
) -> None:
    found = cautions(compared(content_of(), (content_of(**changes), kept)))
    assert len(found) == len(told)
    assert all(words in sentence for words, sentence in zip(told, found, strict=True))


def test_two_names_of_one_training_are_found_out(compared: Any, content_of: Any) -> None:
    runs = compared(*[(content_of(), {"run_id": run_id}) for run_id in ("x", "y", "x", None, None)])
    assert same_trainings(runs) == ["A, C are one training: only what was evaluated can differ."]
    assert cautions(runs) == []
