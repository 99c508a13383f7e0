"""What may stand in a file of parameters before its keys are looked at: plain values, few and short."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from datetime import date
from typing import Any

from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

MOST_BYTES = 2**20
"""Of a file that somebody wrote; params.yaml has a hundredth of it."""

DEEPEST, MOST_VALUES = 10, 10_000
"""Of a tree, every anchor counted wherever it is used: a few lines of YAML make trees without end."""

LONGEST_TEXT, LARGEST = 4096, 10**300
"""Of one value: characters, and the size of a whole number."""

SHOWN = 100
"""Characters of a key or a value in a message."""


class Strange:
    """Stands in the place of a value that no key takes, so that its key is told of like every other one.

    Args:
        what: How a message calls it.
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def __repr__(self) -> str:
        return self._what


def tree_fault(root: Node | None) -> str | None:
    """Why a YAML document is not worth making values of, or None.

    To be asked before that is done: merge keys copy what they name, nine lines of nine aliases a thousand million
    times.
    """
    sizes: dict[int, tuple[int, int]] = {}
    if root is None:
        return None
    count, depth = _size(root, sizes)
    if count <= MOST_VALUES and depth <= DEEPEST + 1:
        return None
    return (
        f"has more than {MOST_VALUES:,} values, or is nested more than {DEEPEST} deep (an anchor that holds itself, or "
        "anchors of anchors?)"
    )


def _size(node: Node, sizes: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values a node is when all aliases are followed, and how deep they go."""
    if id(node) in sizes:
        return sizes[id(node)]
    # What is met again before it is done holds itself.
    sizes[id(node)] = (MOST_VALUES + 1, DEEPEST + 2)
    inner: list[Node] = []
    if isinstance(node, MappingNode):
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, SequenceNode):
        inner = list(node.value)
    parts = [_size(part, sizes) for part in inner]
    found = (1 + sum(count for count, _ in parts), 1 + max((depth for _, depth in parts), default=0))
    sizes[id(node)] = found
    return found


def plain(value: Any, depth: int = 0) -> Any:
    """The value with `Strange` wherever something else stands than YAML's mappings, lists and plain scalars."""
    if isinstance(value, Mapping | list | tuple):
        if depth > DEEPEST:
            return Strange("what is nested so deep")
        if isinstance(value, Mapping):
            return {_key(key, depth): plain(inner, depth + 1) for key, inner in value.items()}
        return [plain(inner, depth + 1) for inner in value]
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int) and abs(value) > LARGEST:
        return Strange(f"a whole number of {value.bit_length():,} bits")
    if value is None or isinstance(value, bool | int | float):
        return value
    kinds = {set: "a set (which has no order)", bytes: "binary data", date: "a date (text needs quotes)"}
    return Strange(next((what for kind, what in kinds.items() if isinstance(value, kind)), "what is no plain value"))


def strange_in(value: Any) -> Strange | None:
    """The first of what `plain` found no plain value in."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    found = (strange_in(part) for part in inner)
    return value if isinstance(value, Strange) else next((part for part in found if part), None)


def _text(value: str) -> str | Strange:
    if len(value) > LONGEST_TEXT:
        return Strange(f"text of {len(value):,} characters")
    if "\0" in value:
        return Strange("text with a null character")
    if any("\ud800" <= character <= "\udfff" for character in value):
        return Strange("text with half a character (a surrogate)")
    return value


def _key(key: Any, depth: int) -> Any:
    """A key as messages can show it; one that is changed is none that is known."""
    known = plain(key, depth + 1)
    return key if known == key else key_shown(key if isinstance(key, str) else shown(key))


def key_shown(key: str) -> str:
    """A key in a message: of bounded length, nothing in it that a terminal would obey."""
    text = key if key.isprintable() else repr(key)[1:-1]
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = SHOWN
        self.maxlist = self.maxtuple = self.maxdict = 12
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) <= LARGEST else f"a whole number of {x.bit_length():,} bits"


def shown(value: Any) -> str:
    """A value in a message: as Python writes it, but of bounded length."""
    text = _Short().repr(value)
    return text if len(text) <= 3 * SHOWN else f"{text[: 3 * SHOWN]}..."
