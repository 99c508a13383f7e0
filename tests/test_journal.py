from __future__ import annotations

import errno
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from earthprior.journal import Journal, Position


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "work" / "metrics.jsonl")


def record(step: int, **metrics: float) -> dict[str, Any]:
    return {"step": step, "time_ms": 1000 + step, "metrics": metrics or {"loss": step / 2}}


def steps(journal: Journal) -> list[int]:
    return [entry["step"] for entry in journal.read()]


def test_round_trip_with_non_finite_values_in_strict_json(journal: Journal) -> None:
    journal.append({"step": 3, "epoch": 1, "metrics": {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1}})
    (read,) = journal.read()
    assert math.isnan(read["metrics"].pop("a"))
    assert read == {"step": 3, "epoch": 1, "metrics": {"b": math.inf, "c": -math.inf, "d": 0.1}}

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    json.loads(journal.path.read_text(), parse_constant=refuse)


def test_no_file_is_an_empty_journal(journal: Journal) -> None:
    assert journal.read() == []
    journal.truncate_after(5)
    assert journal.read() == []
    assert not journal.path.exists()


def test_each_record_is_in_the_file_at_once(journal: Journal) -> None:
    for step in range(3):
        journal.append(record(step))
        assert journal.path.read_text().count("\n") == step + 1


@pytest.mark.parametrize("torn", [b'{"step": 2, "metr', b'{"step": 2}', b"\x00" * 70_000, b"\xff\xfe"])
def test_torn_last_line_is_ignored_then_removed(journal: Journal, torn: bytes) -> None:
    journal.append(record(0))
    journal.append(record(1))
    journal.close()
    with journal.path.open("ab") as handle:
        handle.write(torn)
    later = Journal(journal.path)
    assert steps(later) == [0, 1]
    later.append(record(2))
    assert steps(later) == [0, 1, 2]
    assert torn not in journal.path.read_bytes()


def test_file_of_one_torn_line(journal: Journal) -> None:
    journal.path.parent.mkdir()
    journal.path.write_bytes(b'{"st')
    journal.append(record(0))
    assert steps(journal) == [0]


@pytest.mark.parametrize(
    "damage", [b"garbage\n", b"[1]\n", b'{"metrics": {"a": "seven"}}\n', b"\xff\n", b'"x"\n', b"7\n"]
)
def test_damage_inside_is_skipped_with_a_warning(
    journal: Journal, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    journal.append(record(0))
    with journal.path.open("ab") as handle:
        handle.write(damage)
    journal.append(record(1))
    assert steps(journal) == [0, 1]
    assert "1 damaged" in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        "[]", "7", "null", '{"step": "x", "metrics": {}}', '{"step": 1.5}', '{"step": true}', '{"metrics": {"a": 1}}',
        '{"step": 1, "metrics": []}', '{"step": 1, "metrics": null}', '{"step": 1, "metrics": {"a": "high"}}',
        '{"step": 1, "metrics": {"a": [1]}}', '{"step": 1, "seconds": 1e999}', '{"step": 1, "time_ms": "now"}',
        '{"step": 1, "metrics": {"a": 1' + "0" * 400 + "}}", '{"step": ' + "[" * 100_000,
    ],
)  # fmt: skip
def test_a_line_that_no_record_is_harms_no_other(journal: Journal, line: str) -> None:
    journal.path.parent.mkdir()
    journal.path.write_text(f'{line}\n{{"step":1,"metrics":{{"loss":0.5}}}}\n')
    assert journal.read() == [{"step": 1, "metrics": {"loss": 0.5}}]
    journal.append({"step": 2, "metrics": {"loss": math.nan}})
    journal.truncate_after(1)
    assert journal.read() == [{"step": 1, "metrics": {"loss": 0.5}}]


def test_truncate_after_drops_later_steps(journal: Journal) -> None:
    for step in range(6):
        journal.append(record(step))
    journal.append({"event": "note"})
    journal.truncate_after(3)
    assert [entry.get("step") for entry in journal.read()] == [0, 1, 2, 3, None]
    journal.append(record(4))
    assert journal.read()[-1] == record(4)
    assert [path.name for path in journal.path.parent.iterdir()] == ["metrics.jsonl"]


def test_what_was_written_later_goes_whatever_step_it_is_of(journal: Journal) -> None:
    journal.append(record(5))
    journal.append({**record(2), "at": 8})
    journal.truncate_after(7)
    assert journal.read() == [record(5)]


def test_failed_truncation_keeps_the_file(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(3):
        journal.append(record(step))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            journal.truncate_after(0)
    assert steps(journal) == [0, 1, 2]
    journal.append(record(3))
    assert steps(journal) == [0, 1, 2, 3]


def test_reading_in_portions(journal: Journal) -> None:
    for step in range(5):
        journal.append(record(step))
    first, position = journal.read_from(Position(), limit=3)
    rest, position = journal.read_from(position, limit=3)
    assert [entry["step"] for entry in first + rest] == [0, 1, 2, 3, 4]
    assert journal.read_from(position, limit=3) == ([], position)
    journal.append(record(5))
    assert [entry["step"] for entry in journal.read_from(position, limit=3)[0]] == [5]


def test_a_rewrite_starts_readers_over(journal: Journal) -> None:
    for step in range(5):
        journal.append(record(step))
    _, position = journal.read_from(Position(), limit=None)
    journal.truncate_after(1)
    journal.append(record(2))
    assert [entry["step"] for entry in journal.read_from(position, limit=None)[0]] == [0, 1, 2]


def test_short_write_is_an_error_and_leaves_no_torn_line(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.append(record(0))
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:7]))
        with pytest.raises(OSError, match="7 of"):
            journal.append(record(1))
    assert steps(journal) == [0]
    journal.append(record(2))
    assert steps(journal) == [0, 1, 2]


def test_what_a_full_disk_did_not_take_is_written_when_it_can_be(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, line: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    journal.append(record(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for step in (1, 2, 3):
            with pytest.raises(OSError, match="No space left"):
                journal.append(record(step))
        assert steps(journal) == [0]
    journal.append(record(4))
    assert steps(journal) == [0, 1, 2, 3, 4]
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append(record(5))
    journal.close()
    assert steps(journal) == [0, 1, 2, 3, 4, 5], "the last chance is the end"


def test_a_journal_that_was_deleted_goes_on_in_a_new_file(journal: Journal) -> None:
    journal.append(record(0))
    _, position = journal.read_from(Position(), limit=None)
    journal.path.unlink()
    journal.append(record(1))
    assert [entry["step"] for entry in journal.read_from(position, limit=None)[0]] == [1]


def test_threads_do_not_mix_lines(journal: Journal) -> None:
    threads = [
        threading.Thread(target=lambda start: [journal.append(record(start + i)) for i in range(100)], args=(1000 * k,))
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(steps(journal)) == sorted(1000 * k + i for k in range(4) for i in range(100))
