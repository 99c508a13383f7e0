"""What a run is called in MLflow: by what it has otherwise than the last commit."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from earthprior.errors import ParamsError
from earthprior.params import Params, active, evaluation, flatten, known_keys, parse
from earthprior.params.editing import plain

LENGTH = 64
"""Of the text of differences; MLflow's table shows about so much where its first column is widened."""


def differences(now: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """What differs, in the order of `now`, on a short line: `network=unet_att_d lr=0.0003 +3 more`.

    Args:
        now: Values by dotted key.
        baseline: What they are compared with; a key that is missing there differs.

    Returns:
        At least one difference, unless there is none.
    """
    found = [
        _cut(f"{_name(key)}={_short(value)}")
        for key, value in now.items()
        if key not in baseline or baseline[key] != value
    ]
    kept = found[:1]
    for text in found[1:]:
        if len(" ".join([*kept, text])) <= LENGTH:
            kept.append(text)
    more = len(found) - len(kept)
    return " ".join([*kept, *[f"+{more} more"] * (more > 0)])


def from_commit(params: Params, root: Path) -> str:
    """`differences` of the parameters that act from the params.yaml of the last commit; none outside git.

    Inside `dvc exp run --temp` the last commit is the one that the experiment started from, as it is in the workspace.
    """
    committed = _committed(root)
    return differences(active(params) | evaluation(params), committed) if committed else ""


def plain_name(params: Params, fingerprint: str) -> str:
    """Of a run that differs in nothing: unet_film-wiener-1a2b3c."""
    return f"{params.network}-{params.diffusion.precondition}-{fingerprint[:6]}"


def titled(title: str | None, differs: str) -> str | None:
    """`puffy-daks: lr=0.0003`, or one of both, or None."""
    return ": ".join(filter(None, [title, differs])) or None


def _name(key: str) -> str:
    """A key's last word where that says enough: no other key ends so, and it is one of the training."""
    section, _, word = key.rpartition(".")
    others = sum(known.rpartition(".")[2] == word for known in known_keys())
    return key if section == "evaluate" or others > 1 else word


def _short(value: Any) -> str:
    """As params.yaml spells it, with four digits, which tell one run from another, and without spaces."""
    return plain(_rounded(value)).replace(", ", ",").replace(": ", ":")


def _rounded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, float):
        value = float(f"{value:.4g}")
        return int(value) if value.is_integer() else value
    return value


def _cut(text: str) -> str:
    return text if len(text) <= LENGTH else f"{text[: LENGTH - 3]}..."


def _committed(root: Path) -> dict[str, Any]:
    """The params.yaml of the last commit by dotted key; empty where there is none that can be read."""
    command = ["git", "-C", str(root), "show", "HEAD:./params.yaml"]
    try:
        answer = subprocess.run(command, capture_output=True, timeout=10, check=True)
        content = YAML(typ="safe", pure=True).load(answer.stdout.decode())
    except (OSError, subprocess.SubprocessError, YAMLError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    # One that is older than this code may not pass: then its values as they are written.
    with suppress(ParamsError):
        content = parse(content, "params.yaml").model_dump(mode="json")
    return dict(flatten(content))
