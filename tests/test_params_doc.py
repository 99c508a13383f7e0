"""docs/params.md names every key that there is, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from earthprior import params

OURS, TUTORIALS = (Path(__file__).parents[1] / "docs/params.md").read_text().split("## The tutorial's `ssl_train.yaml`")


def rows(text: str) -> list[list[str]]:
    """The cells of a page's tables, without heads."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_key_has_one_row_in_the_files_order() -> None:
    assert [row[0].strip("`") for row in rows(OURS)] == list(params.known_keys())


@pytest.mark.parametrize("row", rows(TUTORIALS), ids=lambda row: row[0].strip("`"))
def test_what_became_of_a_tutorial_key(row: list[str]) -> None:
    assert len(row) == 3
    here = row[1]
    if here not in ("none", "not yet"):
        assert re.fullmatch(r"`([\w.]+)`", here)
        assert here.strip("`") in [*params.known_keys(), *params.Params.model_fields]


def test_both_tables_agree() -> None:
    theirs = {row[0].split()[0].strip("`"): row[1].strip("`") for row in rows(TUTORIALS)}
    pairs = [(ours.strip("`"), old[1]) for ours, _, origin in rows(OURS) if (old := re.match(r"`([\w.]+)`", origin))]
    assert len(pairs) > 35
    # Two keys of theirs serve two schedules of ours.
    assert [(ours, old) for ours, old in pairs if theirs[old] != ours] == [
        ("cosine.eta_min", "eta_min"),
        ("multistep.gamma", "gamma"),
    ]
