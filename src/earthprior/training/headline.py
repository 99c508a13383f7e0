"""The number that a validation is summed up in: it selects the weights, and the higher it is, the better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Headline:
    """What a training is judged by.

    Attributes:
        name: Of the number among those of a validation.
        best: The name of its highest value so far.
        noun: What it is called in a sentence.
        pattern: Says it, with its value.
    """

    name: str
    best: str
    noun: str
    pattern: str


GAIN = Headline("gain_db/mean", "gain_db/best", "gain", "gain over the linear filter {:+.3f} dB")
"""Of tasks that denoise."""
