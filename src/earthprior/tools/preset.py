"""`earthprior preset NAME`: lays presets/NAME.yaml over params.yaml, comments kept."""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter

from earthprior import params
from earthprior.errors import ParamsError
from earthprior.files import write_atomic


class _Representer(RoundTripRepresenter):
    """Writes null as `null`, not as nothing, so that untouched lines stay as they are."""


_Representer.add_representer(
    type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
)


def run(name: str, root: Path, out: Path | None = None) -> None:
    """Lay a preset over params.yaml and print each value that changed.

    Nothing is written unless the result is a valid params.yaml.

    Args:
        name: Name of a file in presets/, without `.yaml`.
        root: The project's root, with params.yaml and presets/.
        out: Where to write; None means params.yaml itself.

    Raises:
        ParamsError: No such preset, a key in it that does not exist, or a result that is not valid.
    """
    source = root / "params.yaml"
    preset_path = _find(name, root / "presets")
    preset = dict(params.flatten(params.read_mapping(preset_path)))
    _check_keys(preset, preset_path.name)
    params.read_mapping(source)

    yaml = _yaml()
    document: CommentedMap = yaml.load(source.read_text(encoding="utf-8"))
    changes = [change for key, value in preset.items() if (change := _set(document, key, value))]
    text = io.StringIO()
    yaml.dump(document, text)
    params.parse(YAML(typ="safe", pure=True).load(text.getvalue()), f"params.yaml with preset {name}")

    target = source if out is None else out
    if not target.parent.is_dir():
        raise ParamsError(f"{target}: its folder does not exist; create it, or choose another place for the file")
    write_atomic(target, text.getvalue())
    print(f"preset {name} changed {len(changes)} of its {len(preset)} values, written to {target.name}")
    for change in changes:
        print(f"  {change}")


def _find(name: str, folder: Path) -> Path:
    known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name in known:
        return known[name]
    if not known:
        raise ParamsError(f"preset {name!r}: there is no presets/*.yaml; run from the project's root")
    raise ParamsError(f"preset {name!r} does not exist; choose one of: {', '.join(known)}")


def _check_keys(preset: Mapping[str, Any], file_name: str) -> None:
    known = list(params.known_keys())
    faults = []
    for key in preset:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            faults.append(f"  {key}: unknown key; " + (f"did you mean {near[0]}?" if near else "remove it"))
    if faults:
        raise ParamsError("\n".join([f"presets/{file_name} has {len(faults)} fault(s):", *faults]))


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
    before = _plain(old) if last in node else "(absent)"
    if isinstance(value, list) and isinstance(old, CommentedSeq):
        _refill(old, value)
    elif isinstance(value, list):
        node[last] = CommentedSeq(value)
        node[last].fa.set_flow_style()
    else:
        node[last] = value
    return f"{key}: {before} -> {_plain(value)}"


def _refill(old: CommentedSeq, values: list[Any]) -> None:
    """Replace a list's items, keeping its style and what ruamel hangs on its last item: the comment that follows."""
    tail = old.ca.items.pop(len(old) - 1, None)
    old[:] = values
    if tail is not None and values:
        old.ca.items[len(values) - 1] = tail


def _plain(value: Any) -> str:
    """A value as YAML writes it on one line."""
    if isinstance(value, list):
        return f"[{', '.join(_plain(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.12g}" if isinstance(value, float) else str(value)
