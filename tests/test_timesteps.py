from __future__ import annotations

import pytest
import torch

from earthprior.diffusion.schedule import NoiseSchedule, with_zero_terminal_snr
from earthprior.errors import Interrupted
from earthprior.randomness import torch_generator
from earthprior.tasks.timesteps import HISTORY, UNIFORM_SHARE, TimestepSampler
from support import linear_schedule
from tiny_training import TINY, StopAt, Tiny, final_bits, resumed, train

WAYS = ("uniform", "stratified", "log_snr", "importance")
STD = torch.tensor(0.7)


def sampler(how, timesteps=1000, zero_terminal_snr=False):
    schedule = linear_schedule(timesteps)
    if zero_terminal_snr:
        schedule = NoiseSchedule(with_zero_terminal_snr(schedule.betas.double()), zero_terminal_snr=True)
    return TimestepSampler(how, schedule, STD)


def drawn(how, count, seed=0, **more):
    return sampler(how, **more).draw(count, torch_generator(seed))


def filled(timesteps=1000, loss=lambda t: 1 + t.float()):
    """An importance sampler that has seen every timestep HISTORY times."""
    made = sampler("importance", timesteps)
    for _ in range(HISTORY):
        made.record(torch.arange(timesteps), loss(torch.arange(timesteps)))
    return made


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("timesteps", [2, 3, 7, 1000])
@pytest.mark.parametrize("zero", [False, True])
def test_timesteps_lie_in_the_schedule_and_repeat_at_their_address(how, timesteps, zero):
    for count in (1, 5, 64):
        t, factors = drawn(how, count, timesteps=timesteps, zero_terminal_snr=zero)
        assert t.dtype == torch.int64
        assert t.shape == factors.shape == (count,)
        assert 0 <= int(t.min()) <= int(t.max()) < timesteps
        assert torch.equal(factors, torch.ones(count))
        assert torch.equal(t, drawn(how, count, timesteps=timesteps, zero_terminal_snr=zero)[0])
    torch.manual_seed(99)
    assert torch.equal(t, drawn(how, 64, timesteps=timesteps, zero_terminal_snr=zero)[0])


@pytest.mark.parametrize("how", ["stratified", "importance"])
def test_stratified_draws_have_one_in_each_slice(how):
    for seed in range(10):
        t, _ = drawn(how, 8, seed)
        assert (t // 125).tolist() == list(range(8))
    assert not torch.equal(drawn(how, 8, 0)[0], drawn(how, 8, 1)[0])
    assert torch.bincount(drawn(how, 20_000)[0], minlength=1000).tolist() == pytest.approx([20] * 1000, abs=2)


def test_pure_noise_is_drawn_as_often_as_any_timestep():
    made = sampler("log_snr", 50, zero_terminal_snr=True)
    t = torch.cat([made.draw(10, torch_generator(seed))[0] for seed in range(500)])
    assert int((t == 49).sum()) == pytest.approx(100, abs=30)
    assert int((drawn("log_snr", 5000)[0] == 999).sum()) == 0


def test_importance_draws_where_the_loss_is():
    """p is the root mean square loss, apart from the share of uniform draws."""
    made = filled(timesteps=100)
    t, factors = made.draw(100_000, torch_generator(0))
    loss = 1 + torch.arange(100).double()
    p = UNIFORM_SHARE / 100 + (1 - UNIFORM_SHARE) * loss / loss.sum()
    torch.testing.assert_close(torch.bincount(t, minlength=100) / 1e5, p.float(), rtol=0.02, atol=1e-5)
    torch.testing.assert_close(factors, (1 / (100 * p[t])).float())


def test_importance_takes_the_root_of_the_mean_square():
    made = sampler("importance", 2)
    for losses in [[1.0, 0.0]] * 5 + [[1.0, 2.0]] * 5:
        made.record(torch.tensor([0, 1]), torch.tensor(losses))
    _, factors = made.draw(1, torch_generator(0))
    wanted = torch.tensor([1, 2**0.5]).double()
    p = UNIFORM_SHARE / 2 + (1 - UNIFORM_SHARE) * wanted / wanted.sum()
    assert float(factors) == pytest.approx(1 / (2 * float(p[made.draw(1, torch_generator(0))[0]])))


def test_importance_leaves_the_expected_loss_what_it_is_and_lowers_its_variance():
    made, uniform = filled(loss=lambda t: torch.exp(-t / 100)), sampler("uniform")

    def totals(of):
        found = []
        for seed in range(2000):
            t, factors = of.draw(1, torch_generator(seed))
            found.append(float(factors * torch.exp(-t / 100)))
        return torch.tensor(found)

    expected = float(torch.exp(-torch.arange(1000) / 100).mean())
    assert float(totals(made).mean()) == pytest.approx(expected, rel=0.02)
    assert float(totals(made).std()) < 0.2 * float(totals(uniform).std())


def test_importance_waits_until_every_bin_has_its_history():
    made = sampler("importance", 100)
    for count in range(HISTORY):
        assert torch.equal(made.draw(50, torch_generator(count))[1], torch.ones(50))
        seen = torch.arange(100) if count < HISTORY - 1 else torch.arange(99)
        made.record(seen, 1 + seen.float())
    assert torch.equal(made.draw(50, torch_generator(0))[1], torch.ones(50))
    made.record(torch.tensor([99]), torch.tensor([100.0]))
    assert not torch.equal(made.draw(50, torch_generator(0))[1], torch.ones(50))


def test_the_history_holds_the_latest_losses_of_each_bin_in_order():
    made = sampler("importance", 1000)
    assert made.history.shape == (100, HISTORY)
    expected: list[list[float]] = [[] for _ in range(100)]
    for step in range(40):
        t = torch.randint(0, 100, (30,), generator=torch_generator(step))
        losses = torch.rand(30, generator=torch_generator(step, "loss"))
        made.record(t, losses)
        for place, loss in zip(t.tolist(), losses.tolist(), strict=True):
            expected[place // 10].append(loss)
    for row, losses in zip(made.history.tolist(), expected, strict=True):
        assert row == pytest.approx(([-1.0] * HISTORY + losses)[-HISTORY:])
    assert [len(losses) > HISTORY for losses in expected] == [True] * 10 + [False] * 90


@pytest.mark.parametrize("timesteps", [2, 3, 101, 150, 1999])
def test_bins_cover_schedules_of_any_length(timesteps):
    made = filled(timesteps, lambda t: torch.ones(len(t)))
    assert bool((made.history == 1).all())
    t, factors = made.draw(10 * timesteps, torch_generator(0))
    torch.testing.assert_close(factors, torch.ones(10 * timesteps))
    assert len(t.unique()) == timesteps


def test_losses_of_zero_do_not_stop_it():
    made = filled(10, lambda t: torch.zeros(len(t)))
    t, factors = made.draw(20, torch_generator(0))
    assert len(t.unique()) == 10
    torch.testing.assert_close(factors, torch.ones(20))


def test_evaluation_mode_is_stratified_without_factors():
    made = filled().eval()
    t, factors = made.draw(40, torch_generator(0))
    assert torch.equal(factors, torch.ones(40))
    assert torch.equal(t, drawn("stratified", 40)[0])


def test_the_history_is_state_and_comes_back_bit_by_bit():
    made, again = filled(loss=lambda t: torch.rand(len(t), generator=torch_generator(1))), sampler("importance")
    assert list(made.state_dict()) == ["history"]
    again.load_state_dict(made.state_dict())
    for one, other in zip(made.draw(99, torch_generator(3)), again.draw(99, torch_generator(3)), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(made.draw(99, torch_generator(3))[0], drawn("importance", 99, 3)[0])


@pytest.mark.parametrize("how", ["uniform", "stratified", "log_snr"])
def test_other_ways_keep_nothing(how):
    made = sampler(how)
    made.record(torch.tensor([3]), torch.tensor([1.0]))
    assert made.state_dict() == {}


def test_a_training_killed_and_resumed_ends_with_the_same_bits(make_params, make_chips, tmp_path):
    four = {"diffusion.timesteps": 4, "diffusion.beta_start": 0.0385, "diffusion.beta_end": 0.6, "evaluate.steps": 2}
    params = make_params({**TINY, **four, "diffusion.timestep_sampling": "importance", "data.dir": "."})
    tiny = Tiny(make_chips(tmp_path / "data"), params)
    whole = tiny.trainer()
    expected = final_bits(whole, train(whole, tmp_path / "whole"))
    history = whole.task.timestep_sampler.history
    assert bool((history >= 0).all()), "the last of the 12 steps drew by it"
    first = tiny.trainer()
    with pytest.raises(Interrupted):
        train(first, tmp_path / "halves", stop=StopAt(first, 11))
    second = resumed(tiny, tmp_path / "halves")
    assert not bool((second.task.timestep_sampler.history == -1).all())
    assert final_bits(second, train(second, tmp_path / "halves")) == expected
