"""The section `tune`: what `earthprior tune` searches, and how."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from earthprior.params.kinds import Bool, Epochs, Float, Int, NonNegativeInt, PositiveFloat, Section, Thousands
from earthprior.params.plain import key_shown, shown

COMBINATIONS = 10_000
"""Of the searched choices that decide which keys act: beyond so many, whether a key ever acts is not looked into."""

Scalar: TypeAlias = str | int | float | bool | None


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


When: TypeAlias = Mapping[str, Annotated[tuple[Scalar, ...], BeforeValidator(_listed), Field(min_length=1)]]
"""A dotted key and the value or values under which an entry is searched."""


class RangeSpace(Section):
    """Numbers from low to high, both included."""

    low: Float
    high: Float
    log: Bool = False
    step: PositiveFloat | None = None
    when: When = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> RangeSpace:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low above 0, not {self.low:g}")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step {self.step:g} is larger than the range; lower it")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude one another; drop one")
        return self

    @property
    def candidates(self) -> dict[str, Any]:
        """The values that the params must take, by what they are called in a message."""
        return {"low": self.low, "high": self.high} | ({"low + step": self.low + self.step} if self.step else {})


class ChoiceSpace(Section):
    """One of several values, of any kind that the key takes."""

    choices: Annotated[tuple[Any, ...], Field(min_length=2)]
    when: When = Field(default_factory=dict)

    @property
    def candidates(self) -> dict[str, Any]:
        """See `RangeSpace`."""
        return {f"choices[{index}]": value for index, value in enumerate(self.choices)}


ENTRY_KEYS = tuple(dict.fromkeys([*RangeSpace.model_fields, *ChoiceSpace.model_fields]))
"""What an entry of `space` may hold."""


def _kind(value: Any) -> str:
    """Choices where they are named, even if misspelt; else a range, of which a message then asks for low and high."""
    if isinstance(value, ChoiceSpace):
        return "choice"
    keys = [str(key) for key in value] if isinstance(value, Mapping) else []
    named = "choices" in keys or (not {"low", "high"} & {*keys} and difflib.get_close_matches("choices", keys))
    return "choice" if named else "range"


Space: TypeAlias = Annotated[
    Annotated[RangeSpace, Tag("range")] | Annotated[ChoiceSpace, Tag("choice")], Discriminator(_kind)
]


class TuneParams(Section):
    """A study."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,59}$")] | None
    storage: str | None
    trials: Thousands
    metric: Literal["gain", "probe", "both"]
    sampler: Literal["tpe", "random"]
    sampler_seed: Int
    startup_trials: NonNegativeInt
    pruner: Literal["median", "hyperband", "none"]
    pruning_warmup_epochs: NonNegativeInt
    epochs: Epochs | None
    space: Annotated[dict[str, Space], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> TuneParams:
        if self.storage is not None and re.search(
            r"://[^/@]*:[^/]*@|(?i:[?&](password|passwd|pwd|token)=)", self.storage
        ):
            # The fault does not repeat it.
            raise ValueError(
                "storage holds a password, and params.yaml is kept with every run; leave it to the database's own file "
                "of passwords (~/.pgpass, or ?read_default_file=~/.my.cnf)"
            )
        return self


# Beside the selectors (whole.SELECTORS): what decides whether other keys act.
DECIDING = (
    "sam.base_optimizer",
    "normalization.apply_normalization",
    "diffusion.precondition",
    "diffusion.weighting",
    "diffusion.noise_schedule",
)

STATISTICS = ("data.dir", "data.catalog", "data.image_columns", "data.bands", "data.chip_size", "data.nodata",
  "data.buffer", "data.on_bad_chip", "data.max_bad_fraction")  # fmt: skip
"""What the statistics are made of, which trials share."""


def ordered(space: Mapping[str, Any], selectors: Iterable[str]) -> list[str]:
    """The keys of a space, those first that decide whether others act."""
    first = [*selectors, *DECIDING]
    return sorted(space, key=lambda key: first.index(key) if key in first else len(first))


def faults(tune: TuneParams, fields: Mapping[str, Any], selectors: Iterable[str]) -> Iterator[str]:
    """What is wrong with a study, as far as it can be told without trying it.

    Args:
        tune: The section.
        fields: The type of each key of params.yaml, with its limits, by dotted key.
        selectors: Keys that choose sections.
    """
    if tune.metric != "gain" and tune.pruner != "none":
        yield (
            f"tune.pruner {tune.pruner} compares gains after each epoch, which is not what tune.metric {tune.metric} "
            "asks for; use none"
        )
    if tune.epochs is not None and "epochs" in tune.space:
        yield "tune.epochs is set and tune.space searches epochs, too; drop one"
    order = ordered(tune.space, selectors)
    for key, entry in tune.space.items():
        where = f"tune.space.{key_shown(key)}"
        if reason := _unsearchable(key, tune.metric, fields):
            yield f"{where}: {reason}"
            continue
        for name, value in entry.candidates.items():
            if fault := value_fault(value, fields[key]):
                yield f"{where}.{name}: {shown(value)} is not allowed; {fault}"
        if isinstance(entry, RangeSpace) and not is_number(fields[key]):
            yield f"{where}: low and high are for numbers; give its values as choices"
        choices = entry.choices if isinstance(entry, ChoiceSpace) else ()
        if any(value in choices[:place] for place, value in enumerate(choices)):
            yield f"{where}.choices: a value stands there twice; drop one"
        yield from _condition_faults(where, key, entry, tune, order)


def _condition_faults(
    where: str, key: str, entry: RangeSpace | ChoiceSpace, tune: TuneParams, order: list[str]
) -> Iterator[str]:
    """What is wrong with `when`."""
    for other, values in entry.when.items():
        if other not in order or order.index(other) >= order.index(key):
            named = key_shown(other)
            yield f"{where}.when: {named} is not drawn before {key}; list it above, in tune.space, if it can be"
            continue
        rival = tune.space[other]
        if not isinstance(rival, ChoiceSpace):
            yield f"{where}.when.{other}: {other} is searched in a range, whose values are never met; use choices"
        elif strange := [value for value in values if value not in rival.choices]:
            yield f"{where}.when.{other}: {shown(strange[0])} is none of its choices {shown(list(rival.choices))}"


def _unsearchable(key: str, metric: str, fields: Mapping[str, Any]) -> str | None:
    """Why a key cannot be searched; None where it can."""
    if key not in fields:
        near = [known for known in fields if known.split(".")[-1] == key.split(".")[-1]][:1]
        near = near or difflib.get_close_matches(key, list(fields), n=1, cutoff=0.5)
        return f"unknown key; did you mean {near[0]}?" if near else "unknown key; remove it"
    section = key.split(".")[0]
    if section in ("tune", "evaluate", "operation"):
        return f"{section} does not change what is trained; remove it"
    if key == "threads":
        return "threads are divided among the processes of --jobs; remove it"
    if key in STATISTICS:
        return "trials share the statistics that stats made with this key; make a study for each value"
    if metric != "probe" and (section == "normalization" or key == "data.crop_px"):
        return "gains under other normalizations or crop sizes do not compare; search it with tune.metric probe"
    return None


def never_acts(
    key: str,
    order: list[str],
    space: Mapping[str, Any],
    selectors: Iterable[str],
    active_with: Callable[[dict[str, Any]], Collection[str]],
) -> bool:
    """Whether a searched key acts under none of the searched choices.

    Args:
        key: The searched key.
        order: See `ordered`.
        space: The search space.
        selectors: Keys that choose sections.
        active_with: From values by dotted key to the keys that act.
    """
    controls = {*selectors, *DECIDING}
    earlier = order[: order.index(key)]
    deciding = [name for name in earlier if name in controls and isinstance(space[name], ChoiceSpace)]
    lists = [space[name].choices for name in deciding]
    for number, values in enumerate(itertools.product(*lists)):
        if number >= COMBINATIONS or key in active_with(dict(zip(deciding, values, strict=True))):
            return False
    return True


def value_fault(value: Any, kind: Any) -> str | None:
    """Why a key does not take a value, or None."""
    try:
        _adapter(kind).validate_python(int(value) if isinstance(value, float) and value.is_integer() else value)
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return None


def is_integer(kind: Any) -> bool:
    """Whether a key takes whole numbers only."""
    return "integer" in _types(kind) and "number" not in _types(kind)


def is_number(kind: Any) -> bool:
    """Whether a key takes numbers."""
    return bool({"integer", "number"} & _types(kind))


def _types(kind: Any) -> set[str]:
    schema = _adapter(kind).json_schema()
    return {cast(str, part.get("type", "")) for part in schema.get("anyOf", [schema])}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
