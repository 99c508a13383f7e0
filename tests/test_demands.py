from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from earthprior import memory
from earthprior.errors import ParamsError
from earthprior.params import Params
from earthprior.training.demands import check_batch_size, check_memory


def test_a_batch_must_divide_into_parts_of_processes(make_params: Callable[..., Params]) -> None:
    params = make_params({"batch_size": 12, "accumulation_steps": 3})
    check_batch_size(params, 100, processes=4)
    message = "batch_size 12 cannot be shared out evenly to 8 processes of accumulation_steps 3; use a multiple of 24"
    with pytest.raises(ParamsError, match=message):
        check_batch_size(params, 100, processes=8)


def test_a_batch_in_parts_needs_the_memory_of_a_part(
    make_params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=10**9))
    large = {"batch_size": 2**16, "data.chip_size": 224, "data.crop_px": 16}
    with pytest.raises(ParamsError, match=r"batch_size 65,536 needs about 80\.\d GB of memory, .* has 1\.0 GB"):
        check_memory(make_params(large), 10**6, processes=1)
    check_memory(make_params({**large, "accumulation_steps": 2**10}), 10**6, processes=1)
    check_memory(make_params(large), 10**6, processes=2**10)
