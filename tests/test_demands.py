from __future__ import annotations

from collections.abc import Callable

import pytest

from earthprior.errors import ParamsError
from earthprior.params import Params
from earthprior.training.demands import check_batch_size


def test_a_batch_must_divide_into_parts_of_processes(make_params: Callable[..., Params]) -> None:
    params = make_params({"batch_size": 12, "accumulation_steps": 3})
    check_batch_size(params, 100, processes=4)
    message = "batch_size 12 cannot be shared out evenly to 8 processes of accumulation_steps 3; use a multiple of 24"
    with pytest.raises(ParamsError, match=message):
        check_batch_size(params, 100, processes=8)
