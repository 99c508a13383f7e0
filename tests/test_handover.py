"""What stages leave for one another is used as it was written, or named as damaged with the command that mends it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from earthprior.errors import EarthPriorError
from earthprior.files import read_json, write_json
from earthprior.handover import read_config, read_history, read_metrics, read_stats
from earthprior.params import Params


@pytest.fixture
def stats(make_project: Callable[..., tuple[Path, Params]]) -> Path:
    return make_project()[0] / "results/stats/stats.json"


def put(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split("/")
    for section in sections:
        content = content[section]
    if value is ...:
        del content[last]
    else:
        content[last] = value


def test_stats_come_as_they_were_written(stats: Path) -> None:
    assert read_stats(stats) == read_json(stats)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data", ..., "data: Field required"),
        ("data/catalog_sha256", 7, "data.catalog_sha256: Input should be a valid string"),
        ("chips/skipped_lines", [1.5], "chips.skipped_lines.0: Input should be a valid integer"),
        ("chips/validate", ..., "chips.validate: Field required"),
        ("per_band/red", ..., "per_band lacks red"),
        ("per_band/red/std", "5", "per_band.red.std: Input should be a valid number"),
        ("per_band/red/std", -1.0, "per_band.red.std: Input should be greater than or equal to 0"),
        ("per_band/red/mean", float("nan"), "per_band.red.mean: Input should be a finite number"),
        ("per_band/red/percentiles/99.9", ..., "percentile 99.9 is missing"),
        ("all_bands/clipped/1/std", None, "all_bands.clipped.1.std: Input should be a valid number"),
        ("bands", [], "bands: List should have at least 1 item"),
    ],
)
def test_damaged_stats_are_named_with_the_place(stats: Path, key: str, value: Any, words: str) -> None:
    content = copy.deepcopy(read_json(stats))
    put(content, key, value)
    stats.write_text(json.dumps(content))
    with pytest.raises(EarthPriorError) as caught:
        read_stats(stats)
    assert str(caught.value).startswith("results/stats/stats.json is damaged (")
    assert words in str(caught.value)
    assert str(caught.value).endswith("; make it again: dvc repro -f stats")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{", b'{"bands": ' + b"[" * 100_000, b"\xff\xfe", b"1" * 5000]
)
@pytest.mark.parametrize("read", [read_stats, read_config, read_metrics])
def test_what_is_no_json_object(tmp_path: Path, read: Callable[[Path], Any], content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(EarthPriorError, match=r"a\.json is damaged \(") as caught:
        read(tmp_path / "a.json")
    assert len(str(caught.value)) < 500


def test_a_config_has_what_its_readers_need(tmp_path: Path) -> None:
    whole = {"params": {}, "fingerprint": "f" * 12, "foreign_files": {}, "imported": {"file": "a", "sha256": "b"}}
    write_json(tmp_path / "config.json", whole)
    assert read_config(tmp_path / "config.json") == whole
    for key, value in (("params", []), ("fingerprint", 3), ("foreign_files", {"a": 1}), ("imported", {"file": "a"})):
        write_json(tmp_path / "config.json", whole | {key: value})
        with pytest.raises(EarthPriorError, match=rf"config\.json is damaged \({key}.*dvc repro -f pretrain"):
            read_config(tmp_path / "config.json")


def test_a_history_is_a_table_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    assert read_history(path).empty
    path.write_text("epoch,gain_db/mean\n1,0.5\n2,\n")
    assert read_history(path)["epoch"].tolist() == [1, 2]
    path.write_text("epoch,gain_db/mean\n")
    assert read_history(path).empty
    for content in (b"", b"\0\xff", b"epoch\n1\n", b"epoch,gain_db/mean\n1,=cmd()\n", b'epoch,"gain_db/mean\n1,2\n'):
        path.write_bytes(content)
        with pytest.raises(EarthPriorError, match=r"history\.csv is damaged"):
            read_history(path)


def test_metrics_are_numbers(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.json") == {}
    write_json(tmp_path / "metrics.json", {"gain_db": {"mean": 0.5}, "judged_chips": 4})
    assert read_metrics(tmp_path / "metrics.json") == {"gain_db/mean": 0.5, "judged_chips": 4.0}
    for value in ('"high"', "[]", "1" + "0" * 400):
        (tmp_path / "metrics.json").write_text(f'{{"gain_db": {{"mean": {value}}}}}')
        with pytest.raises(EarthPriorError, match="something else than numbers"):
            read_metrics(tmp_path / "metrics.json")
