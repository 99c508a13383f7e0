from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from earthprior.training.distributed import World
from earthprior.training.order import batch_at
from tiny_training import Tiny

STEPS = 12
MakeTiny = Callable[..., Tiny]


def test_every_chip_is_visited_as_often_as_asked_in_every_epoch(make_tiny: MakeTiny) -> None:
    tiny = make_tiny(data__crops_per_chip=3, batch_size=6)
    trainer, batches = tiny.trainer(), tiny.order()
    assert (trainer.steps_per_epoch, trainer.total_steps) == (4, STEPS)
    assert len(batches) == STEPS
    assert {len(batch) for batch in batches} == {6}
    epochs = [sum(batches[first : first + 4], []) for first in range(0, STEPS, 4)]  # noqa: RUF017
    assert all(Counter(epoch) == dict.fromkeys(range(8), 3) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_what_does_not_fill_a_batch_is_left_out(make_tiny: MakeTiny) -> None:
    tiny = make_tiny(data__crops_per_chip=2, batch_size=5)
    assert tiny.trainer().steps_per_epoch == 3
    visits = Counter(index for batch in tiny.order()[:3] for index in batch)
    assert sum(visits.values()) == 15
    assert max(visits.values()) == 2


def test_the_order_depends_on_the_seed_and_is_the_same_from_any_step_on(make_tiny: MakeTiny) -> None:
    tiny = make_tiny()
    whole = tiny.order()
    for step in range(STEPS):
        assert tiny.order(first_step=step) == whole[step:]
        assert batch_at(tiny.params, len(tiny.selection.train), step) == whole[step]
    assert make_tiny(seed=1).order() != whole


def test_processes_share_out_what_one_would_read(tiny: Tiny) -> None:
    parts = [tiny.order(World(rank, 2)) for rank in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == tiny.order()


def test_parts_of_a_step_are_read_as_processes_would_read_them(make_tiny: MakeTiny) -> None:
    parts = make_tiny(batch_size=8, accumulation_steps=4).order()
    assert {len(part) for part in parts} == {2}
    assert [sum(parts[first : first + 4], []) for first in range(0, len(parts), 4)] == make_tiny(  # noqa: RUF017
        batch_size=8
    ).order()
    halved = make_tiny(batch_size=8, accumulation_steps=2)
    orders = [iter(halved.order(World(rank, 2))) for rank in range(2)]
    assert [next(orders[number // 2 % 2]) for number in range(len(parts))] == parts
