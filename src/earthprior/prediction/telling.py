"""What a person sees while many images are worked through: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from earthprior.chips.verdict import FIRST_LINE_SECONDS, LINE_EVERY_SECONDS, time_told


class Told:
    """Images, how fast they go, and how far the current one is, on stderr.

    Args:
        verb: Of the command.
        total: Images in all.
    """

    def __init__(self, verb: str, total: int) -> None:
        self._verb, self._total = verb, total
        self._done, self._skipped = 0, 0
        self._said: set[str] = set()
        self._began = self._last = time.monotonic()
        self._wait = FIRST_LINE_SECONDS
        self._bar = tqdm(total=total, desc=verb, unit=" images", file=sys.stderr, disable=None, mininterval=0.5)

    def __enter__(self) -> Told:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        """A line that stays."""
        tqdm.write(f"{self._verb}: {text}", file=sys.stderr)

    def once(self, text: str) -> None:
        """The same for what many images have in common."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def within(self, name: str, share: float) -> None:
        """How much of the current image is done, in [0, 1]."""
        self._bar.set_postfix_str(f"{name} {share:.0%}", refresh=False)
        if self._due():
            self._bar.refresh()
            if self._bar.disable:
                self.say(f"{self._done:,} of {self._total:,} images, {name} {share:.0%}")

    def done(self, skipped: bool = False) -> None:
        """One more image is done, or was done before."""
        self._done += 1
        self._skipped += skipped
        self._bar.update(1)
        worked = self._done - self._skipped
        if worked and self._done < self._total and self._due() and self._bar.disable:
            speed = worked / (time.monotonic() - self._began)
            left = (self._total - self._done) / speed
            self.say(f"{self._done:,} of {self._total:,} images, {speed:,.1f}/s, {time_told(left)} left")

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._wait:
            return False
        self._last, self._wait = now, LINE_EVERY_SECONDS
        return True
