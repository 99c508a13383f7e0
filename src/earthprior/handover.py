"""What one stage leaves for the next, looked through when it is read: damaged, it is one fault with a remedy.

DVC sees to it that the files belong together; but a copy may be cut short, and an editor may have been at work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from earthprior.errors import EarthPriorError
from earthprior.files import read_json
from earthprior.params.plain import key_shown

if TYPE_CHECKING:
    import pandas as pd


class _Kept(BaseModel):
    """Part of a file that this program wrote: the keys that are read, in exactly their types; there may be others."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Moments(_Kept):
    min: float
    max: float
    mean: float
    std: Annotated[float, Field(ge=0)]


class _Band(_Moments):
    percentiles: dict[str, float]
    clipped: dict[str, _Moments] = {}

    @model_validator(mode="after")
    def _check(self) -> _Band:
        if missing := {"0.1", "99.9"} - self.percentiles.keys():
            raise ValueError(f"percentile {min(missing)} is missing")
        return self


class _Data(_Kept):
    md5: str | None = None
    nfiles: int | None = None
    catalog_sha256: str


class _Chips(_Kept):
    train: int
    validate_: Annotated[int, Field(alias="validate")]
    test: int
    skipped_lines: list[int]


class _Stats(_Kept):
    data: _Data
    bands: Annotated[list[str], Field(min_length=1)]
    chips: _Chips
    per_band: dict[str, _Band]
    all_bands: _Band

    @model_validator(mode="after")
    def _check(self) -> _Stats:
        _check_bands(self.bands, self.per_band)
        return self


class _KeptBand(_Moments):
    clipped: dict[str, _Moments] = {}


class _KeptStatistics(_Kept):
    bands: Annotated[list[str], Field(min_length=1)]
    per_band: dict[str, _KeptBand]
    all_bands: _KeptBand

    @model_validator(mode="after")
    def _check(self) -> _KeptStatistics:
        _check_bands(self.bands, self.per_band)
        return self


class _Imported(_Kept):
    file: str
    sha256: str


class _Config(_Kept):
    params: dict[str, Any]
    fingerprint: str
    foreign_files: dict[str, str]
    best_epoch: int | None = None
    imported: _Imported | None = None
    statistics: _KeptStatistics | None = None


def _check_bands(bands: list[str], per_band: Mapping[str, Any]) -> None:
    if missing := [band for band in bands if band not in per_band]:
        raise ValueError(f"per_band lacks {key_shown(missing[0])}")


EVALUATED_SINCE: Mapping[str, Any] = {"image_label_column": None, "probe_rhos": [0.1]}
"""Keys of the section `evaluate` that the configurations of earlier versions lack; no weights depend on them."""


def read_stats(path: Path) -> dict[str, Any]:
    """The content of a stats.json.

    Raises:
        EarthPriorError: It cannot be read, or is not what the stage stats writes.
    """
    return _read(path, _Stats, "stats")


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config.json; its params are not checked yet, but complete where an earlier version wrote them.

    Raises:
        EarthPriorError: It cannot be read, or is not what the stage pretrain writes.
    """
    found = _read(path, _Config, "pretrain")
    judged = found["params"].get("evaluate")
    if isinstance(judged, dict):
        found["params"]["evaluate"] = {**EVALUATED_SINCE, **judged}
    return found


def read_history(path: Path) -> pd.DataFrame:
    """A history.csv, one row of numbers an epoch; without rows where there is no such file.

    Raises:
        EarthPriorError: It cannot be read, or is not what the stage pretrain writes.
    """
    import pandas as pd

    if not path.is_file():
        return pd.DataFrame()
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise _fault(path, _one_line(error), "pretrain") from None
    if missing := [name for name in ("epoch", "gain_db/mean") if name not in table.columns]:
        raise _fault(path, f"it has no column {missing[0]}", "pretrain")
    words = [str(name) for name in table.columns if not pd.api.types.is_numeric_dtype(table[name])]
    if words and len(table):
        raise _fault(path, f"column {key_shown(words[0])} holds something else than numbers", "pretrain")
    return table


def read_metrics(path: Path) -> dict[str, float]:
    """The numbers of a metrics.json under their paths, as `gain_db/mean`; none where there is no such file.

    Raises:
        EarthPriorError: It cannot be read, or holds something else than numbers.
    """
    if not path.is_file():
        return {}
    tree = _read(path, None, "evaluate")
    try:
        return dict(flat(tree))
    except (TypeError, ValueError, OverflowError):
        raise _fault(path, "it holds something else than numbers", "evaluate") from None


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a tree under their paths: gain_db/rho_0.5."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", float(value)


def _read(path: Path, kind: type[_Kept] | None, stage: str) -> dict[str, Any]:
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise _fault(path, "it is no JSON object", stage)
        if kind is not None:
            TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(key_shown(str(part)) for part in first["loc"])
        raise _fault(path, f"{where}: {first['msg'].removeprefix('Value error, ')}", stage) from None
    except (OSError, ValueError) as error:
        raise _fault(path, _one_line(error), stage) from None
    return content


def _one_line(error: Exception) -> str:
    return key_shown(" ".join(str(error).split()))


def _fault(path: Path, why: str, stage: str) -> EarthPriorError:
    shown = Path(*path.parts[-3:])
    return EarthPriorError(f"{shown} is damaged ({why}); make it again: dvc repro -f {stage}")
