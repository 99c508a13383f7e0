"""`earthprior import-config ssl_train.yaml`: a tutorial's configuration as a params.yaml, and what became of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from earthprior import params
from earthprior.errors import ParamsError
from earthprior.params.editing import overlay, write
from earthprior.tools.tutorial_keys import HALLMARKS
from earthprior.tools.tutorial_translation import LEFT, Translation

BLOCK = "Train_Validate"
HEAD = ("theirs", "value", "here", "value", "note")


def run(config: Path, root: Path, out: Path | None = None, as_run: bool = False) -> None:
    """Lay a tutorial's configuration over params.yaml and print what became of each key.

    Nothing is written unless the result is a valid params.yaml.

    Args:
        config: The tutorial's ssl_train.yaml.
        root: The project's root, with params.yaml.
        out: Where to write; None means params.yaml itself.
        as_run: Leave off what never had an effect there, so that training does what the tutorial's code did.

    Raises:
        ParamsError: The file cannot be read, is none of the tutorial's, has values that are not what their key needs,
            or the result is not valid.
    """
    if not config.exists():
        raise ParamsError(f"{config.name} does not exist; give the path of the tutorial's ssl_train.yaml")
    content = params.read_mapping(config)
    block = _block(content, config.name)
    translation = Translation(dict(_leaves(block)), params.load(root / "params.yaml"), as_run)
    translation.translate()
    if block is not content:
        others = [str(key) for key in content if key != BLOCK]
        translation.rows[LEFT] += [(key, "", "", "", f"another block than {BLOCK}") for key in others]
    if translation.faults:
        raise ParamsError("\n".join([f"{config.name} has {len(translation.faults)} fault(s):", *translation.faults]))
    text, changes = _overlay(root / "params.yaml", translation, config.name)
    target = root / "params.yaml" if out is None else out
    write(text, target)
    print(_table(translation.rows))
    print(f"\n{config.name} changed {len(changes)} of {len(translation.values)} values, written to {target.name}")


def _block(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The keys under BLOCK, or all where they stand alone.

    Raises:
        ParamsError: This is another file than the tutorial's.
    """
    if BLOCK in content:
        block = content[BLOCK]
        if not isinstance(block, Mapping) or not block:
            raise ParamsError(f"{name}: {BLOCK} is not a block of keys; see the tutorial's configs/ssl_train.yaml")
        return block
    if not any(key in content for key in HALLMARKS):
        ours = [key for key in content if key in params.Params.model_fields]
        looks = (
            "looks like DVC's dvc.yaml"
            if "stages" in content
            else "looks like a params.yaml or a preset (which `earthprior preset NAME` lays over it)"
            if ours
            else f"begins with {next(iter(content), 'nothing')}"
        )
        raise ParamsError(
            f"{name} is no configuration of the tutorial: it has neither {BLOCK} nor keys such as "
            f"{', '.join(HALLMARKS[:3])}, and {looks}; give the path of the tutorial's ssl_train.yaml"
        )
    return content


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _overlay(path: Path, translation: Translation, name: str) -> tuple[str, list[str]]:
    """As `overlay`; a fault also says which of their keys it came from."""
    try:
        return overlay(path, translation.values, f"params.yaml with {name}")
    except ParamsError as error:
        lines = []
        for line in str(error).splitlines():
            origins = [origin for ours, origin in translation.origins.items() if _names(line, ours)]
            lines.append(f"{line} (from {', '.join(origins)})" if origins else line)
        raise ParamsError("\n".join(lines)) from None


def _names(fault: str, key: str) -> bool:
    """Whether a line about a fault speaks of one of our keys: in full, or by its last part after its section."""
    section, _, last = key.rpartition(".")
    in_section = section and fault.strip().startswith(f"{section}: ")
    return bool(re.search(rf"(?<![\w.]){re.escape(last if in_section else key)}(?!\w)", fault))


def _table(rows: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """Columns in line over all groups, each group under its name."""
    everything = [HEAD, *(row for group in rows.values() for row in group)]
    widths = [max(len(row[column]) for row in everything) for column in range(len(HEAD) - 1)]

    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)]
        return "  ".join([*cells, row[-1]]).rstrip()

    lines = [line(HEAD)]
    for group, found in rows.items():
        if found:
            lines += ["", group, *(line(row) for row in found)]
    return "\n".join(lines)
