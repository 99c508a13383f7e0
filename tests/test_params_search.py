from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from earthprior.errors import ParamsError
from earthprior.params import Params, fields
from earthprior.params.search import is_integer, is_number, ordered

MakeParams = Callable[..., Params]


def fault(make_params: MakeParams, space: Mapping[str, Any], **tune: Any) -> str:
    with pytest.raises(ParamsError) as caught:
        make_params({"tune.space": space, **{f"tune.{key}": value for key, value in tune.items()}})
    return str(caught.value)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"learning_rate": {"low": 1, "high": 2}}, "tune.space.learning_rate: unknown key"),
        ({"noise_schedule": {"choices": ["linear", "cosine"]}}, "did you mean diffusion.noise_schedule?"),
        ({"lr": {"low": -1, "high": 2}}, "tune.space.lr.low: -1.0 is not allowed; Input should be greater than 0"),
        ({"lr": {"low": 2, "high": 1}}, "low 2 is not below high 1"),
        ({"weight_decay": {"low": 0, "high": 1, "log": True}}, "log needs low above 0, not 0"),
        ({"lr": {"low": 1, "high": 2, "log": True, "step": 0.1}}, "log and step exclude one another"),
        ({"lr": {"low": 1, "hihg": 2}}, "tune.space.lr.hihg: unknown key"),
        ({"lr": {"low": 1, "hihg": 2}}, "tune.space.lr.hihg: unknown key; did you mean high?"),
        ({"lr": {"low": 1}}, "tune.space.lr.high: missing; an entry has low and high (with log, or step), or choices"),
        ({"lr": {}}, "tune.space.lr.low: missing; an entry has low and high"),
        ({"loss_fn": {"choces": ["mse", "l1"]}}, "tune.space.loss_fn.choces: unknown key; did you mean choices?"),
        ({"loss_fn": {"choces": ["mse", "l1"]}}, "tune.space.loss_fn.choices: missing; an entry has"),
        ({"lr": {"choices": [0.1]}}, "tune.space.lr.choices"),
        ({"loss_fn": {"choices": ["mse", "l3"]}}, "tune.space.loss_fn.choices[1]: 'l3' is not allowed"),
        ({"loss_fn": {"low": 1, "high": 2}}, "low and high are for numbers"),
        ({"batch_size": {"low": 4, "high": 6.5}}, "tune.space.batch_size.high: 6.5 is not allowed"),
        ({"batch_size": {"low": 4, "high": 8, "step": 0.5}}, "tune.space.batch_size.low + step: 4.5 is not allowed"),
        ({"threads": {"low": 1, "high": 2}}, "divided among the processes"),
        ({"operation.readers": {"low": 1, "high": 2}}, "operation does not change what is trained"),
        ({"evaluate.steps": {"low": 1, "high": 2}}, "evaluate does not change what is trained"),
        ({"data.buffer": {"low": 1, "high": 2}}, "trials share the statistics"),
        ({"normalization.clip_percent": {"choices": [0.0, 1.0]}}, "search it with tune.metric probe"),
        ({"lr": {"low": 1, "high": 2, "when": {"loss_fn": "mse"}}}, "loss_fn is not drawn before lr"),
        (
            {"loss_fn": {"choices": ["mse", "l1"]}, "lr": {"low": 1, "high": 2, "when": {"loss_fn": "ssim"}}},
            "tune.space.lr.when.loss_fn: 'ssim' is none of its choices ['mse', 'l1']",
        ),
        ({}, "tune.space"),
        ({"lr": {"choices": [0.1, 0.2, 0.1]}}, "tune.space.lr.choices: a value stands there twice"),
        ({"lr": {"low": 1, "high": 2, "step": 3}}, "step 3 is larger than the range"),
        (
            {"lr": {"low": 1, "high": 2}, "seed": {"low": 1, "high": 2, "when": {"lr": 1}}},
            "lr is searched in a range, whose values are never met",
        ),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(
    make_params: MakeParams, space: Mapping[str, Any], message: str
) -> None:
    assert message in fault(make_params, space)


def test_all_faults_come_at_once(make_params: MakeParams) -> None:
    text = fault(make_params, {"lr": {"low": -1, "high": 2}, "loss_fn": {"choices": ["l3", "l4"]}}, epochs=None)
    assert text.startswith("params.yaml has 3 faults:")
    assert len(text.splitlines()) == 4


def test_a_pareto_study_cannot_prune(make_params: MakeParams) -> None:
    space = {"lr": {"low": 0.1, "high": 0.2}}
    assert "tune.pruner median compares gains after each epoch" in fault(make_params, space, metric="both")
    assert make_params({"tune.metric": "both", "tune.pruner": "none"}).tune is not None


def test_epochs_are_either_searched_or_set(make_params: MakeParams) -> None:
    assert "drop one" in fault(make_params, {"epochs": {"low": 1, "high": 5}}, epochs=3)


def test_a_probe_may_compare_normalizations(make_params: MakeParams) -> None:
    space = {"normalization.clip_percent": {"choices": [0.0, 1.0]}}
    assert make_params({"tune.metric": "probe", "tune.pruner": "none", "tune.space": space}).tune is not None


def test_params_without_a_study_are_whole(make_params: MakeParams) -> None:
    # config.json of a finished run has none
    content = make_params().model_dump(mode="json", exclude={"tune"})
    assert Params.model_validate(content).tune is None


def test_what_decides_comes_first() -> None:
    space = dict.fromkeys(["lr", "diffusion.weighting", "loss_weights.alpha", "loss_fn"])
    assert ordered(space, ["task", "loss_fn"]) == ["loss_fn", "diffusion.weighting", "lr", "loss_weights.alpha"]


def test_every_key_is_known_to_take_whole_numbers_or_not() -> None:
    kinds = fields()
    assert {key for key in ("batch_size", "epochs", "data.crop_px", "seed") if is_integer(kinds[key])} == {
        "batch_size", "epochs", "data.crop_px", "seed",
    }  # fmt: skip
    assert not is_integer(kinds["lr"])
    assert is_number(kinds["grad_clip"])
    assert not is_number(kinds["loss_fn"])
    for kind in kinds.values():
        is_number(kind)
