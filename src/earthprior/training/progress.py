"""What a person sees while a run trains: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress

from tqdm import tqdm

from earthprior.training.headline import Headline

LINE_EVERY_SECONDS = 15.0


class Progress:
    """Steps, speed, time left, loss, lr and gradient norm, on stderr.

    Args:
        total_steps: Of the whole run.
        first_step: Where this process begins; larger than 0 when it continues a run.
        epochs: Of the whole run.
        enabled: False in processes that do not speak (other ranks).
    """

    def __init__(self, total_steps: int, first_step: int, epochs: int, enabled: bool = True) -> None:
        self._total, self._first, self._epochs = total_steps, first_step, epochs
        self._enabled = enabled
        self._chips = 0
        self._began = self._last_line = time.monotonic()
        # tqdm draws on terminals only; elsewhere (dvc, a batch system) lines are written instead.
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=None if enabled else True)

    @property
    def chips_per_second(self) -> float:
        """Over this process's time so far."""
        return self._chips / max(time.monotonic() - self._began, 1e-9)

    def step(self, step: int, epoch: int, chips: int, values: Mapping[str, float]) -> None:
        """One step is done."""
        self._chips += chips
        text = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        text = f"epoch {epoch}/{self._epochs}, {self.chips_per_second:.1f} chips/s, {text}"
        self._bar.update(1)
        self._bar.set_postfix_str(text, refresh=False)
        now = time.monotonic()
        if self._bar.disable and now - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = now
            left = (self._total - step) * (now - self._began) / max(step - self._first, 1)
            self.note(f"step {step:,}/{self._total:,}, {text}, {duration(left)} left")

    def epoch(self, epoch: int, train_loss: float, judged: Mapping[str, float], headline: Headline) -> None:
        """An epoch was judged."""
        self.note(
            f"epoch {epoch}/{self._epochs}: train loss {train_loss:.4g}, val loss {judged['loss']:.4g}, "
            f"{headline.pattern.format(judged[headline.name])}"
        )

    def note(self, text: str) -> None:
        """A line that stays; without a reader (a log on a full disk, a closed terminal) training goes on."""
        if self._enabled:
            with suppress(OSError):
                self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the terminal in order."""
        self._bar.close()


def duration(seconds: float) -> str:
    """For the eye: 3 min 07 s, 2 h 05 min."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
