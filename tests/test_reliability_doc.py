"""docs/reliability.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs/reliability.md").read_text()


def test_every_test_that_holds_a_promise_exists() -> None:
    named = re.findall(r"`(test_\w+)(?:::(test_\w+))?`", PAGE)
    assert len(named) > 40
    for file, test in named:
        path = TESTS / f"{file}.py"
        assert path.is_file(), file
        assert not test or f"def {test}(" in path.read_text(), f"{file}::{test}"


def test_every_promise_is_held_by_a_test() -> None:
    promises = [line for line in PAGE.splitlines() if re.match(r"\| R\d \|", line)]
    assert [line[2:4] for line in promises] == ["R1", "R2", "R3", "R4", "R5", "R6", "R7"]
    for line in promises:
        assert "`test_" in line.split(" | ")[2], line
