"""Which side of a U-Net features are taken from."""

from __future__ import annotations

from earthprior.errors import ParamsError

SIDES = ("decoder", "encoder")


def check_side(side: str) -> None:
    """Refuses what is no side.

    Raises:
        ParamsError: It is none of SIDES.
    """
    if side not in SIDES:
        raise ParamsError(f"side: {side!r} is no side of a network - choose {' or '.join(SIDES)}")
