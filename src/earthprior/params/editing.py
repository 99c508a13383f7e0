"""Changing values in params.yaml in place: comments and everything else stay, and nothing invalid comes out."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter

from earthprior.errors import ParamsError
from earthprior.files import write_atomic
from earthprior.params.plain import key_shown, shown, strange_in
from earthprior.params.plain import plain as plain_tree
from earthprior.params.reading import parse, read_mapping

LONGEST_SHOWN = 300
"""Of a value that is replaced."""


class _Representer(RoundTripRepresenter):
    """Writes null as `null`, not as nothing, so that untouched lines stay as they are."""


_Representer.add_representer(
    type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
)


def overlay(path: Path, values: Mapping[str, Any], source: str) -> tuple[str, list[str]]:
    """params.yaml with other values.

    Args:
        path: The file to start from, which stays as it is.
        values: By dotted key.
        source: What the result is called in a message.

    Returns:
        The new text, and a line `key: before -> after` for each value that differs.

    Raises:
        ParamsError: The file cannot be read, or the result is not valid.
    """
    read_mapping(path)
    return overlay_text(path.read_text(encoding="utf-8"), values, source)


def overlay_text(before: str, values: Mapping[str, Any], source: str) -> tuple[str, list[str]]:
    """`overlay` of a text that was read before.

    Raises:
        ParamsError: The result is not valid.
    """
    strange = {key: found for key, value in values.items() if (found := strange_in(plain_tree(value)))}
    if strange:
        faults = [f"  {key_shown(key)}: {found!r} is not allowed" for key, found in strange.items()]
        raise ParamsError("\n".join([f"{source} has {len(faults)} fault{'s' * (len(faults) > 1)}:", *faults]))
    yaml = _yaml()
    document: CommentedMap = yaml.load(before)
    changes = [change for key, value in values.items() if (change := _set(document, key, value))]
    text = io.StringIO()
    yaml.dump(document, text)
    parse(YAML(typ="safe", pure=True).load(text.getvalue()), source)
    return text.getvalue(), changes


def write(text: str, target: Path) -> None:
    """Write what `overlay` gave.

    Raises:
        ParamsError: The folder does not exist, or `target` is one itself.
    """
    if target.is_dir():
        raise ParamsError(f"{target} is a folder; name a file in it")
    if not target.parent.is_dir():
        raise ParamsError(f"{target}: its folder does not exist; create it, or choose another place for the file")
    write_atomic(target, text)


def plain(value: Any) -> str:
    """A value as YAML writes it on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(plain(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {plain(item)}' for key, item in value.items())}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, float) else shown(value) if isinstance(value, int) else str(value)


def override(key: str, value: Any) -> str:
    """`key=value` as `dvc exp run -S` takes it, exact to the last digit."""
    if isinstance(value, Mapping) and set(value) == {"low", "high"}:
        # DVC cannot put a mapping over a list; params.yaml takes a range as text, too.
        return f"{key}={plain(value['low'])}..{plain(value['high'])}"
    if isinstance(value, str) and not re.fullmatch(r"(?!(?i:null|true|false|nan|inf|none)$)[A-Za-z_][\w./-]*", value):
        # Quoted: DVC's parser would take it for several values, or for a number.
        return f"{key}='{value.replace(chr(39), chr(92) + chr(39))}'"
    return f"{key}={plain(value)}"


def _yaml() -> YAML:
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = 4096  # never wrap a line
    return yaml


def _set(document: CommentedMap, key: str, value: Any) -> str | None:
    """Change one value in place; says what changed, or None where the file had the value already."""
    *sections, last = key.split(".")
    node = document
    for section in sections:
        if not isinstance(node.get(section), CommentedMap):
            raise ParamsError(f"params.yaml: {section} is not a section of keys; git checkout params.yaml restores it")
        node = node[section]
    old = node.get(last)
    if last in node and old == value:
        return None
    before = _short(plain(old)) if last in node else "(absent)"
    if isinstance(value, list) and isinstance(old, CommentedSeq):
        _refill(old, value)
    elif isinstance(value, list):
        node[last] = CommentedSeq(value)
        node[last].fa.set_flow_style()
    elif isinstance(value, Mapping):
        node[last] = CommentedMap(value)
        node[last].fa.set_flow_style()
    else:
        node[last] = value
    return f"{key}: {before} -> {plain(value)}"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _refill(old: CommentedSeq, values: list[Any]) -> None:
    """Replace a list's items, keeping its style and what ruamel hangs on its last item: the comment that follows."""
    tail = old.ca.items.pop(len(old) - 1, None)
    old[:] = values
    if tail is not None and values:
        old.ca.items[len(values) - 1] = tail
