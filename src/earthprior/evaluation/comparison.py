"""Several runs beside each other: which params differ, what their curves say, and what keeps them from comparing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from earthprior.diffusion.gain import RHOS
from earthprior.errors import ParamsError
from earthprior.files import sha256_file
from earthprior.params import Params, active, evaluation, flatten, known_keys, parse

if TYPE_CHECKING:
    import pandas as pd

    from earthprior.recorded import RecordedRun

ABSENT = object()
"""Stands where a run does not have a key."""

OTHER_PIXELS = ("data.nodata", "data.on_bad_chip", "data.max_bad_fraction")
OTHER_WINDOWS = ("data.crop_px", "data.chip_size", "data.buffer")


@dataclass(frozen=True)
class Compared:
    """A run among others.

    Args:
        letter: What it is called where room is short.
        run: The run.
        params: The parameters that had an effect, flat under their dotted keys.
    """

    letter: str
    run: RecordedRun
    params: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Letter and title."""
        return f"{self.letter} {self.run.title}"

    @property
    def best(self) -> int | None:
        """Row of the history whose weights were kept: the first with the best mean gain."""
        gains = self._column("gain_db/mean")
        return None if np.isnan(gains).all() else int(np.nanargmax(gains))

    @property
    def levels(self) -> dict[float, float]:
        """Validation gain at the best epoch, dB, by noise-to-signal ratio."""
        if self.best is None:
            return {}
        gains = {rho: float(self._column(_level(rho))[self.best]) for rho in RHOS}
        return {rho: gain for rho, gain in gains.items() if math.isfinite(gain)}

    @property
    def reached(self) -> set[float]:
        """The noise levels that it was judged at, in validation or, without that, by the evaluate stage."""
        return set(self.levels) or {rho for rho in RHOS if _level(rho) in self.run.metrics}

    def _column(self, name: str) -> NDArray[np.float64]:
        """Of the history; NaN where it was not recorded."""
        history = self.run.history
        return history[name].to_numpy(float) if name in history else np.full(len(history), np.nan)

    def chips_seen(self) -> pd.Series | None:
        """Per epoch; None where steps or batch size are not known."""
        steps, batch_size = self.run.history.get("step"), self.params.get("batch_size")
        return None if steps is None or batch_size is None else steps * batch_size


def beside(runs: Sequence[RecordedRun], today: Params) -> list[Compared]:
    """The runs with their letters and the params that acted in them.

    Args:
        runs: In the order asked for.
        today: The workspace's params, which fill what an older run's file lacks.
    """
    return [Compared(chr(ord("A") + place), run, _acting(run.content, today)) for place, run in enumerate(runs)]


def _acting(content: Mapping[str, Any], today: Params) -> dict[str, Any]:
    """The active params of a file that may be older or newer than this code; keys that it lacks are not made up."""
    flat = {key: value for key, value in flatten(content) if key.split(".")[0] not in ("operation", "tune")}
    known = set(known_keys())
    filled = today.model_dump(mode="json", exclude={"tune"})
    for key in flat.keys() & known:
        section, _, name = key.rpartition(".")
        (filled[section] if section else filled)[name] = flat[key]
    try:
        params = parse(filled, "params.yaml")
    except ParamsError:
        # Written for other code: which of it acted cannot be told, so all of it is shown.
        return flat
    acting = {**active(params), **evaluation(params)}
    return {key: acting.get(key, flat[key]) for key in flat if key in acting or key not in known}


def differing(runs: Sequence[Compared]) -> dict[str, list[Any]]:
    """The active params that are not the same in all runs: key -> a value per run, or ABSENT; in the file's order."""
    places = {key: place for place, key in enumerate(known_keys())}
    keys = sorted(dict.fromkeys(key for run in runs for key in run.params), key=lambda key: places.get(key, math.inf))
    values = {key: [run.params.get(key, ABSENT) for run in runs] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def common_levels(runs: Sequence[Compared]) -> list[float]:
    """The noise levels that every run was judged at which was judged at all."""
    judged = [run.reached for run in runs if run.reached]
    return sorted(set.intersection(*judged)) if judged else []


def mean_gain(run: Compared, rhos: Sequence[float]) -> pd.Series | None:
    """Validation gain per epoch, dB, averaged over some noise levels; None where it was not recorded."""
    columns = [_level(rho) for rho in rhos]
    if not columns or not set(columns) <= set(run.run.history):
        return None
    # One level that is not a number leaves no mean: that of the others would flatter.
    gains: pd.Series = run.run.history[columns].mean(axis=1, skipna=False)
    return gains


def evaluated_gain(run: Compared, rhos: Sequence[float]) -> float | None:
    """The evaluate stage's gain, dB, averaged over some noise levels; None where one of them is missing."""
    gains = [run.run.metrics.get(_level(rho)) for rho in rhos]
    found = [gain for gain in gains if gain is not None]
    return sum(found) / len(found) if found and len(found) == len(gains) else None


def same_trainings(runs: Sequence[Compared]) -> list[str]:
    """Which of the runs are one training under two names, a sentence for each such training."""
    return [
        f"{letters} are one training: only what was evaluated can differ."
        for training, letters in _split(runs, training_of).items()
        if training and "," in letters
    ]


def cautions(runs: Sequence[Compared]) -> list[str]:
    """What keeps the runs' numbers from comparing, a sentence each; none where they compare directly."""
    found = []
    versions = _split(runs, _chips)
    if len(versions) > 1:
        names = {letters: name[:8] if name else "one not recorded" for name, letters in versions.items()}
        told = "; ".join(f"{letters} on {name}" for letters, name in names.items())
        found.append(f"They were trained and validated on different versions of the chips ({told}).")
    if _apart(runs, ("data.bands", "data.image_columns")):
        found.append("They see other bands, so their gains are about other imagery.")
    if len(_split(runs, _local)) > 1:
        found.append(
            "Some normalize each chip by itself and some all chips alike: their errors are in different units, and "
            "only the probe judges between them."
        )
    elif _apart(runs, [key for run in runs for key in run.params if key.startswith("normalization.")]):
        found.append(
            "They normalize differently. Gains are measured in normalized units, where bands then weigh differently."
        )
    if _apart(runs, OTHER_PIXELS):
        found.append("They leave out other chips or other pixels (data.nodata, data.on_bad_chip).")
    if _apart(runs, ("precision",)):
        found.append("They calculate in different precision.")
    code = _split(runs, lambda run: str(sorted(run.run.read("environment.json").get("code", {}).items())) or None)
    if len(code) > 1:
        found.append(f"They were made by different code ({'; '.join(code.values())}); reproduce names the files.")
    if _apart(runs, OTHER_WINDOWS):
        found.append("They see crops of different width, and each is compared with a linear filter of its own width.")
    found += _missing(runs)
    return found


def _chips(run: Compared) -> str | None:
    """What the run's chips are: DVC's version, and the catalog, which says which of them validate."""
    catalog = run.run.read("config.json").get("data", {}).get("catalog_sha256")
    return " ".join(filter(None, [run.run.data_md5, catalog])) or None


def training_of(run: Compared) -> str | None:
    """What tells one training from another: its weights, or its MLflow run where they are not kept."""
    weights = run.run.folder / "network.safetensors"
    return sha256_file(weights) if weights.is_file() else run.run.run_id


def _missing(runs: Sequence[Compared]) -> list[str]:
    """Says which levels are left out of all means because some run has not reached them."""
    reached, common = set().union(*(run.reached for run in runs)), common_levels(runs)
    lacking = {run.letter: sorted(reached - run.reached) for run in runs if run.reached}
    told = [f"{letter} lacks rho {_listed(rhos)}" for letter, rhos in lacking.items() if rhos]
    if not told:
        return []
    means = f"over rho {_listed(common)} only" if common else "left out, for no level is common"
    sentence = f"Their noise schedules reach different noise levels ({'; '.join(told)}). Mean gains on this page are "
    return [f"{sentence}{means}; PSNR and SSIM are over each run's own levels and do not compare."]


def _listed(rhos: Sequence[float]) -> str:
    return ", ".join(f"{rho:g}" for rho in rhos)


def _local(run: Compared) -> bool:
    applied = run.params.get("normalization.apply_normalization", True)
    return bool(applied) and run.params.get("normalization.stat_procedure") in ("lab", "lpb")


def _apart(runs: Sequence[Compared], keys: Sequence[str]) -> bool:
    """Whether any two runs differ in one of the keys."""
    return any(run.params.get(key, ABSENT) != runs[0].params.get(key, ABSENT) for run in runs for key in keys)


def _split(runs: Sequence[Compared], what: Callable[[Compared], Any]) -> dict[Any, str]:
    """The runs' letters by a property of theirs."""
    groups: dict[Any, list[str]] = {}
    for run in runs:
        groups.setdefault(what(run), []).append(run.letter)
    return {value: ", ".join(letters) for value, letters in groups.items()}


def _level(rho: float) -> str:
    return f"gain_db/rho_{rho:g}"
