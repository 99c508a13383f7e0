"""One colour per class, the same in maps on disk and in pictures, told apart by colour-blind eyes.

Source: Okabe and Ito 2008, https://jfly.uni-koeln.de/color/, the first eight; what follows are darker and lighter ones
of the same hues, which only a large map needs.
"""

from __future__ import annotations

from collections.abc import Sequence

Colour = tuple[int, int, int]

OKABE_ITO: tuple[Colour, ...] = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0), (240, 228, 66), (86, 180, 233), (204, 121, 167),
    (40, 40, 40),
)  # fmt: skip

ABSENT, PRESENT = (224, 226, 230), (0, 158, 115)
"""Of two classes, the one that is looked for stands out."""

_LIKELY: tuple[tuple[Colour, tuple[str, ...]], ...] = (
    ((0, 114, 178), ("water", "river", "lake", "sea", "ocean")),
    ((0, 158, 115), ("tree", "forest", "wood")),
    ((240, 228, 66), ("crop", "field", "agri", "farm", "arable")),
    ((213, 94, 0), ("built", "urban", "building", "city", "impervious", "road")),
    ((230, 159, 0), ("bare", "soil", "sand", "barren", "rock")),
    ((86, 180, 233), ("wetland", "marsh", "ice", "snow", "cloud")),
    ((204, 121, 167), ("grass", "shrub", "meadow", "pasture")),
)
"""Colours that a reader of maps expects, by what occurs in a class's name."""


def class_colours(classes: Sequence[str | int]) -> list[Colour]:
    """A colour (red, green, blue), 0 to 255, per class.

    Args:
        classes: Names or numbers, in the order of the model's channels.
    """
    if len(classes) == 2:
        return [ABSENT, PRESENT]
    expected = [_expected(str(name)) for name in classes]
    taken = {colour for colour in expected if colour}
    free = iter([colour for colour in _endless(len(classes) + len(taken)) if colour not in taken])
    colours: list[Colour] = []
    for colour in expected:
        # The first class that a colour fits has it.
        colours.append(colour if colour and colour not in colours else next(free))
    return colours


def _expected(name: str) -> Colour | None:
    return next((colour for colour, words in _LIKELY if any(word in name.lower() for word in words)), None)


def _endless(count: int) -> list[Colour]:
    """At least `count` colours: the eight, then the same darker, lighter, and so on."""
    found: list[Colour] = []
    shade = 0
    while len(found) < count:
        # 1, then darker and lighter in turn, ever less apart.
        factor = 1 / (1 + (shade + 1) // 2 * 0.45)
        towards = 255 if shade % 2 == 0 and shade else 0
        found += [
            (
                round(towards + (red - towards) * factor),
                round(towards + (green - towards) * factor),
                round(towards + (blue - towards) * factor),
            )
            for red, green, blue in OKABE_ITO
        ]
        shade += 1
    return found
