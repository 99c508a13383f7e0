"""The linear denoiser of a run: fitted on its training chips when it begins, and kept beside its state."""

from __future__ import annotations

import sys
from pathlib import Path

from earthprior.chips.normalize import Normalizer
from earthprior.chips.selection import Selection, linear_crops
from earthprior.diffusion import linear
from earthprior.diffusion.linear import LinearDenoiser
from earthprior.errors import DataError, EarthPriorError
from earthprior.params import Params
from earthprior.training.distributed import World
from earthprior.training.run import Home


def fit_linear(params: Params, selection: Selection, normalizer: Normalizer) -> LinearDenoiser:
    """The linear denoiser of the training chips, the same for every seed."""
    crops, average_d4 = linear_crops(params, selection, normalizer)
    return linear.fit(crops, average_d4)


def linear_of_run(
    wanted: str | None, params: Params, selection: Selection, normalizer: Normalizer, home: Home, place: World
) -> LinearDenoiser:
    """The linear denoiser of a run, from its folder, where the first process puts it.

    Args:
        wanted: Digest of the one that the run was begun with; without it, no filter that an earlier try left is
            trusted.
        params: Of the run.
        selection: Its chips.
        normalizer: Of the run.
        home: Where it is at home.
        place: This process among others.

    Raises:
        EarthPriorError: The file of a run that continues is damaged, and cannot be made again.
    """
    path = home.folder / "linear.safetensors"
    if place.is_first and (wanted is None or wanted != _digest_in(path)):
        if wanted is not None:
            print(f"warning: {path.name} is damaged or missing; it is fitted again", file=sys.stderr)
        fit_linear(params, selection, normalizer).save(path)
    place.wait()
    found = LinearDenoiser.load(path)
    if wanted not in (None, found.digest()):
        raise EarthPriorError(
            f"{home.shown(path)} was damaged, and fitted again it is another one: chips, threads, torch or the "
            f"machine changed since. Bring the file back, or delete {home.shown(home.folder)} to start afresh"
        )
    return found


def _digest_in(path: Path) -> str | None:
    try:
        return LinearDenoiser.load(path).digest()
    except (OSError, DataError):
        return None
