from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from earthprior.errors import EarthPriorError, Interrupted
from tiny_training import StopAt, Tiny, resumed, train

MakeTiny = Callable[..., Tiny]


def test_a_checkpoint_of_another_network_is_refused_in_words(make_tiny: MakeTiny, tmp_path: Path) -> None:
    trainer = make_tiny().trainer()
    with pytest.raises(Interrupted):
        train(trainer, tmp_path, stop=StopAt(trainer, 2))
    with pytest.raises(EarthPriorError, match="does not fit the network") as caught:
        resumed(make_tiny(unet_film__channels=[8, 24]), tmp_path)
    said = str(caught.value)
    assert "(16,), not (24,)" in said
    assert re.search(r"; and \d+ more\)\. Restore the code", said)
    assert said.count(", not (") == 5
    assert "\n" not in said
    assert len(said) < 600
