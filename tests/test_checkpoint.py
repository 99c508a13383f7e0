from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from earthprior import files
from earthprior.errors import EarthPriorError, StorageError
from earthprior.files import read_json, sha256_file, write_json
from earthprior.training import checkpoint
from earthprior.training.checkpoint import CheckpointStore

CODE = {"training/loop.py": "aa", "losses.py": "bb"}


def store_in(folder: Path, **other: Any) -> CheckpointStore:
    return CheckpointStore(folder, **{"fingerprint": "f" * 12, "code": CODE, **other})


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((64,), float(step)), "history": [{"epoch": 1, "loss": 0.5}], "best": {}}


@pytest.fixture
def filled(tmp_path: Path) -> CheckpointStore:
    """A store with the checkpoints of steps 3 and 6."""
    store = store_in(tmp_path)
    for step in (3, 6):
        store.save(step, state_of(step))
    return store


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def blank(path: Path) -> None:
    path.write_bytes(b"")


def rewrite(manifest: Path, **changes: object) -> None:
    """Change a manifest as one who knows how would, its own hash included."""
    content = {**read_json(manifest), **changes}
    content.pop("manifest_sha256")
    write_json(manifest, {**content, "manifest_sha256": checkpoint._digest(content)})


def test_what_was_saved_comes_back(filled: CheckpointStore) -> None:
    latest = filled.load_latest()
    assert latest is not None
    step, state = latest
    assert step == state["step"] == 6
    assert torch.equal(state["weights"], torch.full((64,), 6.0))
    assert state["history"] == [{"epoch": 1, "loss": 0.5}]


def test_an_empty_store_has_no_state(tmp_path: Path) -> None:
    assert store_in(tmp_path / "new").load_latest() is None


def test_two_are_kept(filled: CheckpointStore) -> None:
    filled.save(9, state_of(9))
    assert filled.steps() == [6, 9]
    assert sorted(path.name for path in filled.folder.iterdir()) == [
        "ckpt-00000006.json", "ckpt-00000006.pt", "ckpt-00000009.json", "ckpt-00000009.pt",
    ]  # fmt: skip


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, blank, Path.unlink])
@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_a_damaged_newest_falls_back(
    filled: CheckpointStore, damage: Any, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(filled.folder / f"ckpt-00000006{suffix}")
    latest = store_in(filled.folder).load_latest()
    assert latest is not None
    assert latest[0] == 3
    warned = capsys.readouterr().err
    # A checkpoint without its manifest was never finished: that is no damage.
    expected = "" if (damage, suffix) == (Path.unlink, ".json") else "warning: ckpt-00000006.pt "
    assert warned.startswith(expected)
    assert warned.count("\n") == (1 if expected else 0)


def test_none_intact_is_an_error_that_names_the_folder(filled: CheckpointStore) -> None:
    for step in filled.steps():
        flip_a_byte(filled.folder / f"ckpt-{step:08d}.pt")
    with pytest.raises(EarthPriorError, match="no intact checkpoint") as caught:
        filled.load_latest()
    assert str(filled.folder) in str(caught.value)
    assert "ckpt-00000003.pt" in str(caught.value)
    assert "ckpt-00000006.pt" in str(caught.value)


def test_after_a_fall_back_damaged_later_ones_never_push_out_new_ones(filled: CheckpointStore) -> None:
    flip_a_byte(filled.folder / "ckpt-00000006.pt")
    store = store_in(filled.folder)
    assert (latest := store.load_latest()) is not None
    assert latest[0] == 3
    store.save(4, state_of(4))
    assert store.steps() == [3, 4]
    store.save(5, state_of(5))
    assert store.steps() == [4, 5]


def test_another_runs_checkpoint_is_not_taken(filled: CheckpointStore) -> None:
    with pytest.raises(EarthPriorError, match="belongs to run ffffffffffff, not 0123456789ab"):
        store_in(filled.folder, fingerprint="0123456789ab").load_latest()


def test_changed_code_is_refused_by_name(filled: CheckpointStore) -> None:
    changed = {**CODE, "losses.py": "cc", "new.py": "dd"}
    with pytest.raises(EarthPriorError, match=r"losses\.py, new\.py") as caught:
        store_in(filled.folder, code=changed).load_latest()
    assert "training/loop.py" not in str(caught.value)
    assert "--accept-code" in str(caught.value)


def test_changed_code_can_be_accepted(filled: CheckpointStore) -> None:
    latest = store_in(filled.folder, code={"losses.py": "cc"}, accept_code=True).load_latest()
    assert latest is not None
    assert latest[0] == 6


def test_another_torch_is_warned_of(filled: CheckpointStore, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = filled.folder / "ckpt-00000006.json"
    rewrite(manifest, setting={"torch": "1.0.0"})
    latest = filled.load_latest()
    assert latest is not None
    assert latest[0] == 6
    assert "torch 1.0.0" in capsys.readouterr().err


def test_a_full_disk_is_told_and_leaves_the_old_ones(filled: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in filled.folder.iterdir()}
    write_bytes = Path.write_bytes

    def half(path: Path, content: bytes) -> int:
        write_bytes(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(StorageError, match="step 9 not written") as caught:
        filled.save(9, state_of(9))
    assert caught.value.exit_code == 4
    assert str(filled.folder) in str(caught.value)
    assert {path.name: path.read_bytes() for path in filled.folder.iterdir()} == before


def test_a_full_disk_is_noticed_before_writing(filled: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(StorageError, match="1,000 are free"):
        filled.save(9, state_of(9))
    assert filled.steps() == [3, 6]


def test_a_manifest_that_cannot_be_written_takes_its_checkpoint_along(
    filled: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_manifest(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("earthprior.training.checkpoint.write_json", no_manifest)
    with pytest.raises(StorageError):
        filled.save(9, state_of(9))
    assert sorted(path.stem for path in filled.folder.glob("*.pt")) == ["ckpt-00000003", "ckpt-00000006"]


def test_a_folder_that_is_gone_is_a_storage_error_or_made_anew(filled: CheckpointStore) -> None:
    filled.delete()
    assert not filled.folder.exists()
    with pytest.raises(StorageError, match="step 9"):
        filled.save(9, state_of(9))


@pytest.mark.parametrize("moment", range(4))
def test_a_kill_at_any_rename_leaves_a_store_that_loads(
    filled: CheckpointStore, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill is an exception that nothing cleans up after: here os._exit is played by one that unlink ignores."""

    class Killed(BaseException):
        pass

    replace, unlink, count = os.replace, Path.unlink, 0

    def killing(call: Any) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count > moment:
                raise Killed
            return call(*arguments, **named)

        return wrapped

    monkeypatch.setattr(files.os, "replace", killing(replace))
    monkeypatch.setattr(Path, "unlink", killing(unlink))
    with pytest.raises(Killed):
        filled.save(9, state_of(9))
    monkeypatch.undo()
    store = store_in(filled.folder)
    latest = store.load_latest()
    assert latest is not None
    # Before the second rename, the manifest's, the checkpoint does not exist.
    assert latest[0] == (6 if moment < 2 else 9)
    store.sweep()
    assert {path.name for path in store.folder.iterdir()} == {
        f"ckpt-{step:08d}.{suffix}" for step in store.steps() for suffix in ("pt", "json")
    }


class Evil:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._marker}",)


def test_a_checkpoint_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = store_in(tmp_path / "run")
    store.save(3, state_of(3))
    path, marker = store.save(6, state_of(6)), tmp_path / "executed"
    torch.save({"step": 6, "weights": Evil(marker)}, path)
    manifest = path.with_suffix(".json")
    rewrite(manifest, sha256=sha256_file(path))
    latest = store.load_latest()
    assert latest is not None
    assert latest[0] == 3
    warned = capsys.readouterr().err
    assert "not opened" in warned
    assert "weights_only" not in warned, "torch's advice to load it all the same must not reach the user"
    assert not marker.exists()
    # The file would have run it: the test must be able to fail.
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_sources_never_load_pickles() -> None:
    package = Path(files.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "weights_only=False" not in text, path
        assert "pickle.load" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path


def test_stumps_are_swept_and_the_rest_stays(filled: CheckpointStore) -> None:
    for name in (".ckpt-00000009.pt.x1y2.tmp.pt", ".metrics.jsonl.ab.tmp.jsonl", "ckpt-00000009.pt"):
        (filled.folder / name).write_bytes(b"half")
    for name in ("linear.safetensors", "lock", "metrics.jsonl", "run.json"):
        (filled.folder / name).write_text("whole")
    store = store_in(filled.folder)
    assert (filled.folder / "ckpt-00000009.pt").exists(), "only the process that writes may sweep"
    store.sweep()
    assert sorted(path.name for path in filled.folder.iterdir()) == [
        "ckpt-00000003.json", "ckpt-00000003.pt", "ckpt-00000006.json", "ckpt-00000006.pt",
        "linear.safetensors", "lock", "metrics.jsonl", "run.json",
    ]  # fmt: skip


def test_the_manifest_says_whose_it_is(filled: CheckpointStore) -> None:
    manifest = json.loads((filled.folder / "ckpt-00000006.json").read_text())
    assert manifest["step"] == 6
    assert manifest["fingerprint"] == "f" * 12
    assert manifest["code"] == CODE
    assert manifest["setting"]["torch"] == torch.__version__
    assert manifest["sha256"] == sha256_file(filled.folder / "ckpt-00000006.pt")
