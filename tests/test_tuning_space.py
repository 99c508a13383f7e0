from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
import pytest

from earthprior.errors import ParamsError
from earthprior.params import Params
from earthprior.params.search import RangeSpace
from earthprior.tuning.space import differences, held_values, own_values, searched, shared, study_name, suggest

MakeParams = Callable[..., Params]
LOSS = {"choices": ["mse", "hybrid_light"]}
ALPHA = {"low": 0.5, "high": 1.0}


def drawn(params: Params, **fixed: Any) -> dict[str, Any]:
    tune = searched(params)
    return suggest(optuna.trial.FixedTrial(fixed), params, tune)  # type: ignore[arg-type]


def test_a_key_is_searched_where_it_acts(make_params: MakeParams) -> None:
    # the order of the file does not matter: what decides is drawn first
    params = make_params({"tune.space": {"loss_weights.alpha": ALPHA, "loss_fn": LOSS}})
    assert drawn(params, loss_fn="mse") == {"loss_fn": "mse"}
    assert drawn(params, loss_fn="hybrid_light", **{"loss_weights.alpha": 0.6}) == {
        "loss_fn": "hybrid_light", "loss_weights.alpha": 0.6,
    }  # fmt: skip


def test_a_condition_of_ones_own_narrows_further(make_params: MakeParams) -> None:
    when = {"loss_fn": ["hybrid_light"]}
    params = make_params({"tune.space": {"loss_fn": LOSS, "lr": {"low": 0.1, "high": 0.2, "when": when}}})
    assert drawn(params, loss_fn="mse") == {"loss_fn": "mse"}
    assert drawn(params, loss_fn="hybrid_light", lr=0.15) == {"loss_fn": "hybrid_light", "lr": 0.15}


def test_whole_numbers_and_lists_keep_their_kind(make_params: MakeParams) -> None:
    space = {"batch_size": {"low": 4, "high": 8, "step": 4}, "unet_film.channels": {"choices": [[8, 16], [8]]}}
    values = drawn(make_params({"tune.space": space}), batch_size=8, **{"unet_film.channels": "[8, 16]"})
    assert values == {"batch_size": 8, "unet_film.channels": [8, 16]}
    assert isinstance(values["batch_size"], int)


def test_a_key_that_can_never_act_is_refused(make_params: MakeParams) -> None:
    params = make_params({"loss_fn": "mse", "tune.space": {"loss_weights.alpha": ALPHA}})
    with pytest.raises(ParamsError, match=r"loss_weights\.alpha acts under none of the searched choices"):
        searched(params)
    assert searched(make_params({"loss_fn": "hybrid_light", "tune.space": {"loss_weights.alpha": ALPHA}}))


def test_params_without_the_section_say_so(make_params: MakeParams) -> None:
    with pytest.raises(ParamsError, match="no section tune"):
        searched(make_params().model_copy(update={"tune": None}))


def common(params: Params, stats: str = "0" * 64) -> dict[str, Any]:
    return shared(params, searched(params), stats)


def test_a_study_is_named_by_what_its_trials_share(make_params: MakeParams) -> None:
    def name(overrides: dict[str, Any], stats: str = "0" * 64) -> str:
        params = make_params(
            {"tune.space": {"lr": {"low": 0.1, "high": 0.2}, "loss_fn": LOSS}, "tune.pruner": "none", **overrides}
        )
        return study_name(searched(params), common(params, stats))

    first = name({})
    assert first.startswith("lr-loss_fn-")
    same = ({"lr": 0.5}, {"loss_fn": "hybrid_light"}, {"operation.readers": 7}, {"threads": 5}, {"tune.trials": 3},
      {"sgd.momentum": 0.1}, {"evaluate.steps": 3}, {"tune.sampler": "random"})  # fmt: skip
    assert {name(overrides) for overrides in same} == {first}
    # loss_weights act under a searched choice
    others = ({"seed": 5}, {"epochs": 9}, {"tune.epochs": 9}, {"loss_weights.alpha": 0.1}, {"tune.metric": "probe"})
    assert first not in {name(overrides) for overrides in others}
    assert name({}, "1" * 64) != first
    assert name({"tune.study": "mine"}) == "mine"


def test_applying_a_trial_does_not_begin_another_study(make_params: MakeParams) -> None:
    space = {"optimizer": {"choices": ["adamw", "sam"]}, "sam.base_optimizer": {"choices": ["adamw", "sgd"]}}
    before = make_params({"tune.space": space})
    after = make_params({"tune.space": space, "optimizer": "sam", "sam.base_optimizer": "sgd"})
    assert common(before) == common(after)
    assert "sgd.momentum" in common(before)


def test_what_a_condition_keeps_out_is_held(make_params: MakeParams) -> None:
    space = {"loss_fn": LOSS, "lr": {"low": 0.1, "high": 0.2, "when": {"loss_fn": "hybrid_light"}}}
    params = make_params({"lr": 0.05, "tune.space": space})
    assert held_values(params, searched(params), {"loss_fn": "mse"}) == {"lr": 0.05}
    assert held_values(params, searched(params), {"loss_fn": "hybrid_light", "lr": 0.1}) == {}


def test_many_choices_are_looked_through_at_once(make_params: MakeParams) -> None:
    names = ("adam.eps", "adamw.eps", "nadam.eps", "adamax.eps", "radam.eps", "rmsprop.eps", "adagrad.eps", "lr")
    space: dict[str, Any] = {name: {"choices": [n / 100 for n in range(1, 9)]} for name in names}
    optimizers = ["adam", "adamw", "nadam", "adamax", "radam", "rmsprop", "adagrad"]
    assert searched(make_params({"tune.space": {"optimizer": {"choices": optimizers}, **space}}))
    with pytest.raises(ParamsError, match="acts under none"):
        searched(make_params({"tune.space": {**space, "optimizer": {"choices": optimizers[1:]}}}))


def test_differences_are_told_by_key(make_params: MakeParams) -> None:
    before, now = common(make_params()), common(make_params({"seed": 5}))
    assert differences(before, now) == ["seed: 0 -> 5"]
    assert differences(before, before) == []


def test_the_committed_space_is_searchable(make_params: MakeParams) -> None:
    tune = searched(make_params())
    assert isinstance(tune.space["lr"], RangeSpace)
    assert tune.space["lr"].log
    assert {"lr", "diffusion.noise_schedule", "loss_weights.alpha"} <= set(tune.space)


@pytest.mark.parametrize(
    ("space", "values"),
    [
        ({"lr": {"low": 0.001, "high": 0.1}, "loss_fn": LOSS}, {"lr": 0.05, "loss_fn": "mse"}),
        # what does not act under the own values is left out
        ({"loss_fn": LOSS, "loss_weights.alpha": ALPHA}, {"loss_fn": "mse"}),
        ({"unet_film.channels": {"choices": [[8, 16], [8]]}}, {"unet_film.channels": "[8, 16]"}),
        ({"lr": {"low": 0.001, "high": 0.01}}, {}),
        ({"lr": {"low": 0.02, "high": 0.1, "step": 0.04}}, {}),
        ({"lr": {"low": 0.01, "high": 0.09, "step": 0.04}}, {"lr": 0.05}),
        ({"loss_fn": {"choices": ["l1", "ssim"]}, "lr": {"low": 0.001, "high": 0.1}}, {}),
    ],
)
def test_a_search_begins_with_the_own_values_where_the_space_has_them(
    make_params: MakeParams, space: dict[str, Any], values: dict[str, Any]
) -> None:
    params = make_params({"lr": 0.05, "loss_fn": "mse", "tune.space": space})
    assert own_values(params, searched(params)) == values
