"""From the file params.yaml to checked records, with every fault in one message."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from earthprior.errors import ParamsError
from earthprior.params.whole import Params, fields


def load(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        ParamsError: The file is missing, is no YAML mapping, or has faults; the message lists all of them.
    """
    return parse(read_mapping(path), path.name)


def read_mapping(path: Path) -> dict[str, Any]:
    """The plain mapping of a YAML 1.2 file, unchecked.

    Raises:
        ParamsError: The file is missing, empty, not UTF-8, not a mapping, or not YAML (with line and column).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent.resolve().name
        raise ParamsError(f"{path.name} not found in {folder}/; run from the project's root") from None
    except OSError as error:
        raise ParamsError(f"{path.name} cannot be read: {error.strerror}; check what it is and its mode") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path.name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    try:
        content = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, LookupError, RecursionError) as error:
        raise ParamsError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        what = "empty" if content is None else f"a {type(content).__name__}, not a mapping of keys to values"
        raise ParamsError(f"{path.name} is {what}; restore it with: git checkout {path.name}")
    return content


def parse(content: Mapping[str, Any], source: str) -> Params:
    """Check a plain mapping.

    Args:
        content: As read from YAML.
        source: The file's name, for the message.

    Raises:
        ParamsError: With every fault at once.
    """
    try:
        return Params.model_validate(dict(content))
    except ValidationError as error:
        faults = [line for fault in error.errors() for line in _describe(fault, source).splitlines()]
    raise ParamsError("\n".join([f"{source} has {len(faults)} fault{'s' * (len(faults) > 1)}:", *faults]))


def _describe(fault: Any, source: str) -> str:
    """One line for one pydantic fault: dotted key, value, what is allowed, nearest known key."""
    # Without what pydantic calls the kinds of value that a key may have.
    location = [str(part) for part in fault["loc"] if part not in ("tuple[float, float]", "range", "choice")]
    key = ".".join(location)
    if fault["type"] == "extra_forbidden":
        # First a key that is merely in the wrong section, then one that is misspelt.
        near = [known for known in fields() if known.split(".")[-1] == location[-1]][:1]
        near = near or difflib.get_close_matches(key, list(fields()), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "remove it"
        return f"  {key}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"  {key}: missing; add it (git checkout {source} restores the default)"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" and isinstance(fault["input"], Mapping | BaseModel):
        return f"  {key}: {message}" if key else "\n".join(f"  {line}" for line in message.splitlines())
    return f"  {key}: {fault['input']!r} is not allowed; {message}"
