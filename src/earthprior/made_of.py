"""What a run's weights are made of, kept beside its state: so that another run can say what it has otherwise.

The fingerprint tells runs apart; it does not say by what.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from earthprior.files import read_json, write_json
from earthprior.identity import FORMAT_VERSION
from earthprior.params import flatten
from earthprior.params.editing import plain
from earthprior.under_dvc import DONE

RECORD = "made_of.json"
SHOWN = 3


@dataclass(frozen=True)
class _Other:
    """A run that was not finished."""

    folder: Path
    step: int
    differs: list[str]


def write(folder: Path, params: Mapping[str, Any], foreign: Mapping[str, str], stats: Mapping[str, Any]) -> None:
    """Keep in a run's folder what its fingerprint is made of.

    Args:
        folder: `work/<stage>/<fingerprint>`.
        params: Those that can change weights, flat (`params.active`).
        foreign: See `build.foreign_files`.
        stats: The content of stats.json.
    """
    content = {"format": FORMAT_VERSION, "params": dict(params), "foreign_files": dict(foreign), "stats": dict(stats)}
    # Rewritten it would be the same, and a disk may be full by now.
    if not (folder / RECORD).exists():
        write_json(folder / RECORD, content)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two records differ in, a phrase each: `lr 0.001 -> 0.0003`, `stats.json's chips.train 8 -> 9`.

    Keys that only one of them has, as the section of another network, are counted and not listed.
    """
    changed = list(_changed(before["params"], now["params"]))
    if alone := len(before["params"].keys() ^ now["params"].keys()):
        changed.append(f"{alone} keys that only one of both reads")
    changed += _changed({"the format": before["format"]}, {"the format": now["format"]})
    changed += [
        f"the file behind {key.removesuffix('.sha256')}"
        for key in before["foreign_files"].keys() & now["foreign_files"].keys()
        if before["foreign_files"][key] != now["foreign_files"][key]
    ]
    # What the numbers are of comes first.
    stats = sorted(_changed(dict(flatten(before["stats"])), dict(flatten(now["stats"]))), key=_rank)
    whose = "stats.json's " if "per_band" in now["stats"] else "its "
    return changed + [f"{whose}{text}" for text in stats]


def other_run(folder: Path, root: Path) -> str | None:
    """What to tell of the unfinished runs beside a run that begins; None where there are none.

    Args:
        folder: Of the run that begins, with its record.
        root: What the text's paths are relative to.
    """
    now = read_json(folder / RECORD)
    others = [other for path in sorted(folder.parent.iterdir()) if path != folder for other in _unfinished(path, now)]
    if not others:
        return None
    nearest = min(others, key=lambda other: (len(other.differs), -other.step))
    shown = str(nearest.folder.relative_to(root) if nearest.folder.is_relative_to(root) else nearest.folder)
    count = len(others) - 1
    more = f" ({count} more unfinished {'run lies' if count == 1 else 'runs lie'} beside it)" if count else ""
    if owner := _owner(nearest.folder):
        return f"{shown} is another run, which {owner} is training: {_listed(nearest.differs)}{more}"
    return (
        f"{shown} (stopped at step {nearest.step:,}) is another run: {_listed(nearest.differs)}. It is kept: put the "
        f"old back to continue it, or delete that folder{more}"
    )


def _unfinished(folder: Path, now: Mapping[str, Any]) -> Iterator[_Other]:
    """The run in a folder, if it can be continued or is being trained."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        steps = [int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(r"ckpt-(\d+)\.json", path.name))]
        if not (folder / DONE).exists() and (steps or _owner(folder)):
            differs = differences(read_json(folder / RECORD), now)
            yield _Other(folder, max(steps, default=0), differs)


def _owner(folder: Path) -> str | None:
    """Who holds a folder."""
    if not (folder / "lock").exists():
        return None
    try:
        with FileLock(folder / "lock", timeout=0):
            return None
    except Timeout:
        with suppress(OSError):
            return (folder / "owner").read_text(encoding="utf-8").rstrip(",")
        return "another process"


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key, value in now.items():
        if key in before and before[key] != value:
            yield f"{key} {_short(before[key])} -> {_short(value)}"


def _short(value: Any) -> str:
    text = plain(value)
    return f"{text[:8]}.." if re.fullmatch(r"[0-9a-f]{32,}(\.dir)?", text) else text


def _rank(text: str) -> int:
    return next(rank for rank, start in enumerate(("data.", "chips.", "per_band.", "")) if text.startswith(start))


def _listed(differs: Sequence[str]) -> str:
    more = f", and {len(differs) - SHOWN} more differences" if len(differs) > SHOWN else ""
    return (", ".join(differs[:SHOWN]) or "nothing that was recorded differs") + more
