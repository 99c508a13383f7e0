"""Values as the tutorial's ssl_train.yaml writes them, into what params.yaml needs.

Each function takes what a YAML 1.2 reader makes of the text and raises ValueError with what is needed instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

PATCH_SHIFT_PX = 4
"""What `patch_shift: true` means: the tutorial names no number."""

MOST_BANDS = 1000
"""More channels than any sensor's are a slip."""

Convert = Callable[[Any], Any]


def number(value: Any) -> float:
    """A number, also as the text that a YAML 1.1 reader makes of 1e-6."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError("a number is needed")
    return value if isinstance(value, int) else found


def integer(value: Any) -> int:
    """A whole number."""
    found = number(value)
    if found != int(found):
        raise ValueError("a whole number is needed")
    return int(found)


def flag(value: Any) -> bool:
    """True or false, also in the words that only YAML 1.1 takes for them."""
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    found = words.get(str(value).lower())
    if found is None:
        raise ValueError("true or false is needed")
    return found


def word(value: Any) -> str:
    """A name, in small letters."""
    if not isinstance(value, str) or not value:
        raise ValueError("a word is needed")
    return value.lower()


def exact_word(value: Any) -> str:
    """A name as it is written."""
    word(value)
    return str(value)


def listed(convert: Convert) -> Convert:
    """A list of such values; a single one is a list of one."""

    def convert_list(value: Any) -> list[Any]:
        return [convert(item) for item in (value if isinstance(value, list) else [value])]

    return convert_list


def optional(convert: Convert) -> Convert:
    """Such a value, or null for none, an empty list or an empty text."""
    return lambda value: None if value in (None, [], "", [None]) else convert(value)


def span(value: Any) -> list[float]:
    """Two numbers."""
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("two numbers are needed: [lowest, highest]")
    return [number(item) for item in value]


def anything(value: Any) -> Any:
    """What is not carried over is not looked at."""
    return value


def optimizer(value: Any) -> str:
    """The optimizer's name."""
    if word(value) == "lbfgs":
        raise ValueError("it ends in an error there and does not exist here; adam, adamw, sgd and others do")
    return word(value)


def lr_schedule(value: Any) -> str:
    """The LR schedule's name; the empty name and null are none."""
    if value in (None, "", False) or word(value) in ("none", "off", "disable", "disabled", "no"):
        return "none"
    return word(value)


def file_name(value: Any) -> str:
    """The last part of a path."""
    return exact_word(value).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def noise_schedule(value: Any) -> str:
    """The noise schedule's name: what its code calls cosine has another one here."""
    return {"cosine": "clipped_cosine"}.get(word(value), word(value))


def view_shift(value: Any) -> int | None:
    """Pixels for `patch_shift`."""
    return PATCH_SHIFT_PX if flag(value) else None


def flips(value: Any) -> bool:
    """Whether `trans` names a mirror image."""
    return any("flip" in str(name) for name in (value if isinstance(value, list) else [value]))


def interval(value: Any) -> int | None:
    """Epochs between two checkpoints; there 0 harms nothing."""
    return integer(value or 0) or None


def betas(value: Any) -> list[float]:
    """Adam's two; null is Adam's default."""
    return [0.9, 0.999] if value is None else span(value)


def milestones(value: Any) -> list[int]:
    """Epochs in rising order."""
    return sorted(listed(integer)(value))


def named_bands(names: Sequence[str]) -> Convert:
    """Names for so many channels: `names` where the number fits."""

    def convert(value: Any) -> list[str]:
        count = integer(value)
        if not 1 <= count <= MOST_BANDS:
            raise ValueError(f"a number from 1 to {MOST_BANDS} is needed")
        if count == len(names):
            return list(names)
        return ["red", "green", "blue", "nir"] if count == 4 else [f"band_{n}" for n in range(1, count + 1)]

    return convert
