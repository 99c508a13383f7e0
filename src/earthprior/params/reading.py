"""From the file params.yaml to checked records, with every fault in one message."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from earthprior.errors import ParamsError
from earthprior.params.downstream import DownstreamParams, downstream_fields
from earthprior.params.plain import MOST_BYTES, SHOWN, key_shown, plain, shown, tree_fault
from earthprior.params.search import ENTRY_KEYS
from earthprior.params.whole import Params, fields

Kind = TypeVar("Kind", bound=BaseModel)

MOST_FAULTS = 100
"""Told of one file, in full."""


def load(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        ParamsError: The file is missing, is no YAML mapping, or has faults; the message lists all of them.
    """
    return parse(read_mapping(path), path.name)


def load_downstream(path: Path, changes: Mapping[str, Any] | None = None) -> DownstreamParams:
    """Read and check downstream/params.yaml.

    Args:
        path: The file.
        changes: Values that stand in place of the file's, by dotted key.

    Raises:
        ParamsError: See `load`.
    """
    content = read_mapping(path)
    put(content, changes or {})
    return parse_downstream(content, f"{path.parent.name}/{path.name}")


def put(content: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Put values, by dotted key, in place of those of a plain mapping, whose sections are there."""
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (content[section] if section else content)[name] = value


def parse_downstream(content: Mapping[str, Any], source: str) -> DownstreamParams:
    """Check a plain mapping as `parse` does, for what stands in downstream/params.yaml.

    Raises:
        ParamsError: With every fault at once.
    """
    return _parsed(DownstreamParams, downstream_fields(), content, source)


def read_mapping(path: Path) -> dict[str, Any]:
    """The plain mapping of a YAML 1.2 file, unchecked.

    Raises:
        ParamsError: The file is missing, empty, too large, not UTF-8, not a mapping, or not YAML (with line and
            column), or has more values than any such file needs.
    """
    text = _read(path)
    try:
        # Before it is loaded: loading obeys merge keys, whose copies may fill any memory.
        fault = tree_fault(_yaml().compose(text))
        content = None if fault else _yaml().load(text)
    except (YAMLError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise ParamsError(f"{path.name} is not valid YAML: {_place_and_problem(error)}") from None
    if fault:
        raise ParamsError(f"{path.name} {fault}; write its values out")
    if not isinstance(content, dict):
        what = "empty" if content is None else f"a {type(content).__name__}, not a mapping of keys to values"
        raise ParamsError(f"{path.name} is {what}; restore it with: git checkout {path.name}")
    return content


def _place_and_problem(error: Exception) -> str:
    """One line of what a parser says in several, without its picture of the text."""
    if isinstance(error, MarkedYAMLError) and error.problem and (mark := error.problem_mark):
        # The parser's context is a sentence of its own, unless the problem is its second half.
        problem = f"{error.context}, {error.problem}" if error.problem.startswith("but ") else error.problem
        return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(problem.split())}"
    return " ".join(str(error).split())


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)


def _read(path: Path) -> str:
    """The text of a file that somebody wrote."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ParamsError(f"{path.name} is no regular file; write the parameters into one")
        with path.open("rb") as handle:
            content = handle.read(MOST_BYTES + 1)
    except FileNotFoundError:
        folder = path.parent.resolve().name
        raise ParamsError(f"{path.name} not found in {folder}/; run from the project's root") from None
    except OSError as error:
        raise ParamsError(f"{path.name} cannot be read: {error.strerror}; check what it is and its mode") from None
    if len(content) > MOST_BYTES:
        raise ParamsError(f"{path.name} has more than {MOST_BYTES:,} bytes; a file of parameters has a few thousand")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path.name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def parse(content: Mapping[str, Any], source: str) -> Params:
    """Check a plain mapping.

    Args:
        content: As read from YAML.
        source: The file's name, for the message.

    Raises:
        ParamsError: With every fault at once.
    """
    return _parsed(Params, fields(), content, source)


def _parsed(kind: type[Kind], known: Mapping[str, Any], content: Mapping[str, Any], source: str) -> Kind:
    try:
        return kind.model_validate(plain(content))
    except ValidationError as error:
        faults = error.errors(include_url=False)
    lines = [line for fault in faults[:MOST_FAULTS] for line in _describe(fault, source, known).splitlines()]
    count = len(lines) + max(0, len(faults) - MOST_FAULTS)
    more = [f"  and {len(faults) - MOST_FAULTS:,} more"] if len(faults) > MOST_FAULTS else []
    raise ParamsError("\n".join([f"{source} has {count:,} fault{'s' * (count > 1)}:", *lines, *more]))


def _describe(fault: Any, source: str, known_fields: Mapping[str, Any]) -> str:
    """One line for one pydantic fault: dotted key, value, what is allowed, nearest known key."""
    location = [str(part) for part in fault["loc"]]
    in_entry = location[:2] == ["tune", "space"] and len(location) > 4
    # Without what pydantic calls the kinds of value that a key may have.
    location = [part for part in location if part not in ("tuple[float, float]", "range", "choice")]
    key = ".".join(map(key_shown, location))
    if fault["type"] == "extra_forbidden":
        return f"  {key}: unknown key; {_nearest(location, fault['input'], in_entry, known_fields)}"
    if fault["type"] == "missing":
        restore = "an entry has low and high (with log, or step), or choices"
        return f"  {key}: missing; {restore if in_entry else f'add it (git checkout {source} restores the default)'}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in ("model_type", "dict_type", "model_attributes_type"):
        inner = [known.split(".")[-1] for known in known_fields if known.rpartition(".")[0] == key]
        if key.startswith("tune.space"):
            inner = list(ENTRY_KEYS) if key != "tune.space" else ["lr: {low: 0.0003, high: 0.01}"]
        message = f"a section of keys is needed: {', '.join(inner[:4])}{', ...' * (len(inner) > 4)}"
    if fault["type"] == "value_error" and isinstance(fault["input"], Mapping | BaseModel):
        return f"  {key}: {message}" if key else "\n".join(f"  {line}" for line in message.splitlines())
    return f"  {key}: {shown(fault['input'])} is not allowed; {message}"


def _nearest(location: Sequence[str], value: Any, in_entry: bool, fields: Mapping[str, Any]) -> str:
    """The known key that was meant, as a question, or that there is none."""
    key, last = ".".join(location), location[-1]
    if len(key) > SHOWN:
        return "remove it"
    if in_entry:
        near = difflib.get_close_matches(last, ENTRY_KEYS, n=1, cutoff=0.5)
        return f"did you mean {near[0]}?" if near else f"an entry knows {', '.join(ENTRY_KEYS)}"
    sections = list(dict.fromkeys(known.rpartition(".")[0] for known in fields if "." in known))
    if isinstance(value, Mapping) and len(location) == 1:
        near = difflib.get_close_matches(key, sections, n=1, cutoff=0.5)
        return f"did you mean the section {near[0]}?" if near else "remove it"
    # First a key that is merely in the wrong section, then one that is misspelt.
    near = [known for known in fields if known.split(".")[-1] == last][:1]
    near = near or difflib.get_close_matches(key, [*fields, *sections], n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "remove it"
