from __future__ import annotations

import errno
import os
import stat

import pandas as pd
import pytest

from earthprior.files import read_json, replacing, sha256_file, sweep, write_atomic, write_csv, write_json


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_text_and_bytes_come_back_and_folders_are_made(tmp_path):
    write_atomic(tmp_path / "a/b/text.txt", "grün\n")
    write_atomic(tmp_path / "a/b/data.bin", b"\x00\xff")
    assert (tmp_path / "a/b/text.txt").read_bytes() == "grün\n".encode()
    assert (tmp_path / "a/b/data.bin").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("call", ["Path.write_bytes", "tempfile.mkstemp"])
def test_a_disk_that_fails_is_told_with_the_file_that_was_wanted(tmp_path, monkeypatch, call):
    def failing(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # as a write does, which knows no name

    monkeypatch.setattr(f"earthprior.files.{call}", failing)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_atomic(tmp_path / "stats.json", b"{}")
    assert caught.value.filename == str(tmp_path / "stats.json")
    assert names(tmp_path) == []


def test_a_folder_in_the_way_is_named_and_not_the_temporary_file(tmp_path):
    (tmp_path / "stats.json").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_atomic(tmp_path / "stats.json", b"{}")
    assert caught.value.filename == str(tmp_path / "stats.json")
    assert names(tmp_path) == ["stats.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failing_write_keeps_the_old_content_and_leaves_nothing_behind(tmp_path, error):
    path = tmp_path / "weights.safetensors"
    path.write_text("old")

    def write():
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["weights.safetensors"]


def test_a_failing_rename_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken/inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomic(tmp_path / "taken", "content")
    assert names(tmp_path) == ["taken"]


def test_the_old_file_stays_readable_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "state.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent, "a rename across file systems is a copy"
        assert temporary.suffix == path.suffix, "some writers choose the format by the suffix"
    assert path.read_text() == "new"


def test_a_link_into_a_cache_is_replaced_not_written_through(tmp_path):
    cached = tmp_path / "cached"
    cached.write_text("must stay")
    (tmp_path / "out").symlink_to(cached)
    write_atomic(tmp_path / "out", "new")
    assert cached.read_text() == "must stay"
    assert not (tmp_path / "out").is_symlink()


def test_results_can_be_read_by_others(tmp_path):
    write_atomic(tmp_path / "report.html", "x")
    assert stat.S_IMODE((tmp_path / "report.html").stat().st_mode) == 0o644


def test_equal_json_gives_equal_bytes_and_comes_back(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [0.1, None, "ü"]})
    write_json(tmp_path / "b.json", {"a": [0.1, None, "ü"], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"a": [0.1, None, "ü"], "b": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path, value):
    write_json(tmp_path / "metrics.json", {"a": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "metrics.json", {"a": value})
    assert read_json(tmp_path / "metrics.json") == {"a": 1}
    assert names(tmp_path) == ["metrics.json"]


def test_a_table_comes_back(tmp_path):
    table = pd.DataFrame({"epoch": [1, 2], "gain_db/mean": [0.1, -1e-9]})
    write_csv(tmp_path / "history.csv", table)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "history.csv"), table)


def test_what_kills_left_is_swept_and_the_rest_stays(tmp_path):
    for name in (".stats.json.x1.tmp.json", ".network.safetensors.y2.tmp.safetensors", "stats.json", ".gitignore"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert names(tmp_path) == [".gitignore", "stats.json"]
    sweep(tmp_path / "nowhere")


def test_sha256_is_of_the_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
