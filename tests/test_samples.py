from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from earthprior.evaluation.samples import draw
from support import linear_schedule, make_batch


@pytest.mark.parametrize("sampler", ["dpm_solver", "ddim", "ddpm"])
def test_estimates_stay_in_the_normalized_range_where_asked(make_params, sampler):
    task = SimpleNamespace(schedule=linear_schedule(), denoiser=lambda batch: lambda xt, t: torch.full_like(xt, 7.0))
    real = make_batch(torch.rand(2, 3, 8, 8))

    def highest(clip, bounds):
        small = {"evaluate.sampler": sampler, "evaluate.steps": 5, "evaluate.samples": 3}
        params = make_params({**small, "evaluate.clip_sample": clip}).evaluate
        samples = draw(task, real, params, bounds=bounds)
        assert samples.sampled.shape == (3, 3, 8, 8)
        return float(samples.sampled.max())

    assert highest(True, (0.0, 1.0)) == pytest.approx(1, abs=0.01)
    assert highest(False, (0.0, 1.0)) == pytest.approx(7, abs=0.05)
    assert highest(True, None) == pytest.approx(7, abs=0.05), "an unbounded normalization has no range"
