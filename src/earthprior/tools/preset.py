"""`earthprior preset NAME`: lays presets/NAME.yaml over params.yaml, comments kept."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from earthprior import params
from earthprior.errors import ParamsError
from earthprior.params.editing import overlay, write


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
    text, changes = overlay(source, preset, f"params.yaml with preset {name}")
    target = source if out is None else out
    write(text, target)
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
