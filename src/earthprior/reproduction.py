"""A run beside the same run made again: whether their bits agree, and else which causes differ and what moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from earthprior.files import sha256_file
from earthprior.identity import changed_files
from earthprior.params import flatten
from earthprior.params.editing import plain
from earthprior.recorded import RecordedRun

OUTS = ("network.safetensors", "history.csv", "metrics.json")
NOT_IN_A_RESULT = ("operation", "evaluate", "tune")
HARDWARE = ("machine", "cpu", "cpus", "gpu", "cuda", "torch_threads", "platform", "setting")


@dataclass(frozen=True)
class Cause:
    """One of the things that a run's bits depend on.

    Attributes:
        kind: code, data, params, packages or hardware.
        differing: What of it differs, a short text each; None where the run did not record it.
    """

    kind: str
    differing: list[str] | None


@dataclass(frozen=True)
class Moved:
    """A number of both runs; None where one of them has none."""

    name: str
    then: float | None
    now: float | None


def compared_outs(then: RecordedRun, now: RecordedRun) -> dict[str, bool | None]:
    """Whether each out has the same bytes in both runs; None where the first kept none.

    One that only the first has is another: the run made again should have it.
    """
    return {name: _same(then.folder / name, now.folder / name) for name in OUTS}


def causes(then: RecordedRun, now: RecordedRun, package: Path, digest: str | None) -> list[Cause]:
    """What may explain a difference.

    Args:
        then: The run.
        now: The run made again.
        package: The package's folder that `now` ran.
        digest: Of that package's code, see `identity.code_hash`; compared where the run kept no file's digest.
    """
    had, has = then.read("environment.json"), now.read("environment.json")
    packages = {"python": had.get("python"), **had.get("packages", {})} if had else {}
    installed = {"python": has.get("python"), **has.get("packages", {})}
    return [
        Cause("code", _code(then, had.get("code"), package, digest)),
        Cause("data", _data(then, now)),
        Cause("params", _params(then, now)),
        Cause("packages", _between(packages, installed) if packages else None),
        Cause("hardware", _between(_hardware(had), _hardware(has)) if had else None),
    ]


def moved(then: RecordedRun, now: RecordedRun) -> list[Moved]:
    """The numbers of both: validation gain at the best epoch, then what evaluate found."""
    before, after = dict(_numbers(then)), dict(_numbers(now))
    return [Moved(name, before.get(name), after.get(name)) for name in before | after]


def _same(then: Path, now: Path) -> bool | None:
    if not then.is_file():
        return None
    return now.is_file() and sha256_file(then) == sha256_file(now)


def _code(then: RecordedRun, had: Mapping[str, str] | None, package: Path, digest: str | None) -> list[str] | None:
    if had:
        has = {name: sha256_file(package / name) for name in had if (package / name).is_file()}
        return [f"src/earthprior/{name}" for name in changed_files(had, has)]
    if then.code is None or digest is None:
        return None
    return (
        [] if digest.startswith(then.code) else [f"digest {then.code} -> {digest[:12]}; of which files, was not kept"]
    )


def _data(then: RecordedRun, now: RecordedRun) -> list[str] | None:
    had, has = then.read("config.json").get("data"), now.read("config.json").get("data", {})
    if not had:
        return _between({"md5": then.data_md5}, {"md5": now.data_md5}) if then.data_md5 else None
    names = {
        "md5": "md5 in data.dvc", "nfiles": "number of files", "catalog_sha256": "the catalog's SHA-256",
        "chips_sha256": "the chips' SHA-256",
    }  # fmt: skip
    found = _between({names.get(key, key): had[key] for key in had}, {names.get(key, key): has[key] for key in has})
    if not found and _same(then.folder / "stats.json", now.folder / "stats.json") is False:
        found = ["results/stats/stats.json, though it is of the same chips"]
    return found


def _params(then: RecordedRun, now: RecordedRun) -> list[str] | None:
    had, has = (dict(flatten(run.read("config.json").get("params", {}))) for run in (then, now))
    if not had:
        return None
    return _between(_acting(had), _acting(has))


def _acting(params: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in params.items() if key.split(".")[0] not in NOT_IN_A_RESULT}


def _hardware(environment: Mapping[str, Any]) -> dict[str, Any]:
    return dict(flatten({name: environment[name] for name in HARDWARE if name in environment}))


def _between(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name then -> now` for each value that differs."""
    return [
        f"{name} {plain(then[name]) if name in then else 'absent'} -> {plain(now[name]) if name in now else 'absent'}"
        for name in dict.fromkeys([*then, *now])
        if then.get(name) != now.get(name)
    ]


def _numbers(run: RecordedRun) -> Iterator[tuple[str, float]]:
    gains = run.history.get("gain_db/mean", pd.Series(dtype=float))
    if not gains.isna().all():
        best = run.history.iloc[int(gains.argmax())]
        yield "best epoch", float(best["epoch"])
        columns = [str(name) for name in run.history.columns if str(name).startswith("gain_db/")]
        yield "validation gain, dB: mean", float(best["gain_db/mean"])
        for name in columns:
            if name != "gain_db/mean":
                yield f"validation gain, dB: {name.removeprefix('gain_db/')}", float(best[name])
    yield from ((f"evaluate: {name}", value) for name, value in run.metrics.items())
