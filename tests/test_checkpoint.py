from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from earthprior import files
from earthprior.errors import EarthPriorError, StorageError
from earthprior.files import read_json, sha256_file, write_json
from earthprior.identity import FORMAT_VERSION
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


def test_after_a_fall_back_the_damaged_one_is_none_of_the_two_that_are_kept(filled: CheckpointStore) -> None:
    """Where the next checkpoint comes later than the damaged one did."""
    flip_a_byte(filled.folder / "ckpt-00000006.pt")
    store = store_in(filled.folder)
    store.load_latest()
    store.save(8, state_of(8))
    assert store.steps() == [3, 8]
    flip_a_byte(filled.folder / "ckpt-00000008.pt")
    assert (latest := store.load_latest()) is not None
    assert latest[0] == 3
    # written again it is as good as any
    store.save(8, state_of(8))
    store.save(9, state_of(9))
    assert store.steps() == [8, 9]


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
    with pytest.raises(StorageError, match=r"it needs 3.* kB, 1 kB are free; ckpt-00000006\.pt is kept"):
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


def test_a_folder_that_was_deleted_under_a_training_is_made_anew(
    filled: CheckpointStore, capsys: pytest.CaptureFixture[str]
) -> None:
    filled.delete()
    assert not filled.folder.exists()
    filled.save(9, state_of(9))
    assert filled.steps() == [9]
    assert f"warning: {filled.folder} was deleted" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_fails_is_told_with_what_mends_it(
    filled: CheckpointStore, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path, content: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("earthprior.training.checkpoint.write_atomic", failing)
    with pytest.raises(StorageError, match=r"ckpt-00000006\.pt is kept\. To mend it: \w+") as caught:
        filled.save(9, state_of(9))
    assert os.strerror(number) in str(caught.value)
    assert ("are free" in str(caught.value)) == (number == errno.EDQUOT)


LIMITED = """
import resource, sys
import torch
from pathlib import Path
from earthprior.errors import StorageError
from earthprior.training.checkpoint import CheckpointStore

store = CheckpointStore(Path(sys.argv[1]), "f" * 12, {})
store.save(3, {"step": 3, "weights": torch.zeros(64)})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    store.save(6, {"step": 6, "weights": torch.zeros(50_000)})
except StorageError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.save(9, {"step": 9, "weights": torch.zeros(50_000)})
print(store.steps(), sorted(path.name for path in store.folder.iterdir()))
"""


def run_with_path(program: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_limit_of_the_system_itself_leaves_the_old_ones(tmp_path: Path) -> None:
    """RLIMIT_FSIZE lets the file be begun and then refuses, as a disk does that fills up."""
    said, kept = run_with_path([sys.executable, "-c", LIMITED, str(tmp_path)]).splitlines()
    assert said.startswith("checkpoint of step 6 not written in ")
    assert "(File too large); ckpt-00000003.pt is kept. To mend it: a limit on the size of files" in said
    names = ["ckpt-00000003.json", "ckpt-00000003.pt", "ckpt-00000009.json", "ckpt-00000009.pt"]
    assert kept == f"[3, 9] {names}"


FULL = """
import sys
import torch
from pathlib import Path
from earthprior.errors import StorageError
from earthprior.training.checkpoint import CheckpointStore

folder = Path(sys.argv[1])
store = CheckpointStore(folder / "run", "f" * 12, {})
store.save(3, {"step": 3, "weights": torch.zeros(64)})
(folder / "other").write_bytes(bytes(800_000))
for floats in (100_000, 20_000):  # seen beforehand; and, since another process is faster, while writing
    try:
        if floats == 20_000:
            import shutil
            shutil.disk_usage = lambda path: type("Usage", (), {"free": 10**9})()
            (folder / "more").write_bytes(bytes(170_000))
        store.save(6, {"step": 6, "weights": torch.zeros(floats)})
    except StorageError as error:
        print(error)
    print(sorted(path.name for path in store.folder.iterdir()))
(folder / "other").unlink()
store.save(6, {"step": 6, "weights": torch.zeros(20_000)})
print(store.load_latest()[0])
"""


def test_a_disk_that_is_really_full_leaves_the_old_ones(tmp_path: Path) -> None:
    mounted = f"mount -t tmpfs -o size=1m none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mounted], capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    (tmp_path.parent / "full.py").write_text(FULL)
    program = f"{mounted} && {sys.executable} {tmp_path.parent / 'full.py'} {tmp_path}"
    first, kept, second, still, again = run_with_path(["unshare", "-rm", "sh", "-c", program]).splitlines()
    for said in (first, second):
        assert "(No space left on device): it needs " in said
        assert said.endswith("ckpt-00000003.pt is kept. To mend it: free some space")
    assert kept == still == "['ckpt-00000003.json', 'ckpt-00000003.pt']"
    assert again == "6"


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_a_bit_flipped_anywhere_falls_back_or_changes_nothing(filled: CheckpointStore, suffix: str) -> None:
    path = filled.folder / f"ckpt-00000006{suffix}"
    whole = path.read_bytes()
    places = range(0, len(whole), max(1, len(whole) // 60))
    fell_back = 0
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        latest = filled.load_latest()
        assert latest is not None
        step, state = latest
        assert torch.equal(state["weights"], torch.full((64,), float(step)))
        fell_back += step == 3
    # White space between the words of a manifest means nothing.
    assert fell_back > 0.8 * len(places)


def test_a_checkpoint_under_another_ones_name_is_not_taken(
    filled: CheckpointStore, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = filled.folder / "ckpt-00000006"
    for suffix in (".json", ".pt"):
        shutil.copy(filled.folder / f"ckpt-00000003{suffix}", f"{newest}{suffix}")
        latest = filled.load_latest()
        assert latest is not None
        assert latest[0] == 3
    warned = capsys.readouterr().err.splitlines()
    assert warned[0].startswith("warning: ckpt-00000006.pt is damaged (its SHA-256 is not the manifest's)")
    assert warned[1].startswith("warning: ckpt-00000006.pt is that of step 3 under another name")
    rewrite(newest.with_suffix(".json"), step=6)
    assert (latest := filled.load_latest()) is not None
    assert latest[0] == 3
    assert "holds the state of step 3" in capsys.readouterr().err


def test_another_format_is_refused_with_the_way_out(filled: CheckpointStore) -> None:
    rewrite(filled.folder / "ckpt-00000006.json", format=0)
    with pytest.raises(EarthPriorError, match=r"has format 0 of another version .* reads format 1") as caught:
        filled.load_latest()
    assert caught.value.exit_code == 2
    assert f"deleting {filled.folder}" in str(caught.value)


def test_checkpoints_that_lost_their_manifests_are_no_fresh_start(filled: CheckpointStore) -> None:
    for step in (3, 6):
        (filled.folder / f"ckpt-{step:08d}.json").unlink()
    with pytest.raises(EarthPriorError, match=r"ckpt-00000003\.pt, ckpt-00000006\.pt in .* cannot be trusted"):
        filled.load_latest(reached=6)
    (filled.folder / "ckpt-00000003.pt").unlink()
    with pytest.raises(EarthPriorError, match="Bring those back, or delete that folder"):
        filled.load_latest(reached=7)
    # What a kill within the very first checkpoint leaves: there is nothing newer.
    assert filled.load_latest(reached=6) is None


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


def test_stumps_are_swept_and_the_rest_stays(filled: CheckpointStore, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (".ckpt-00000009.pt.x1y2.tmp.pt", ".metrics.jsonl.ab.tmp.jsonl", "ckpt-00000009.pt"):
        (filled.folder / name).write_bytes(b"half")
    for name in ("linear.safetensors", "lock", "metrics.jsonl", "run.json"):
        (filled.folder / name).write_text("whole")
    store = store_in(filled.folder)
    assert (filled.folder / "ckpt-00000009.pt").exists(), "only the process that writes may sweep"
    store.sweep()
    said = "removed ckpt-00000009.pt and 2 temporary files of an earlier process, which had not finished writing them\n"
    assert capsys.readouterr().err == said
    store.sweep()
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in filled.folder.iterdir()) == [
        "ckpt-00000003.json", "ckpt-00000003.pt", "ckpt-00000006.json", "ckpt-00000006.pt",
        "linear.safetensors", "lock", "metrics.jsonl", "run.json",
    ]  # fmt: skip


def test_the_manifest_says_whose_it_is(filled: CheckpointStore) -> None:
    manifest = json.loads((filled.folder / "ckpt-00000006.json").read_text())
    assert manifest["step"] == 6
    assert manifest["format"] == FORMAT_VERSION
    assert manifest["fingerprint"] == "f" * 12
    assert manifest["code"] == CODE
    assert manifest["setting"]["torch"] == torch.__version__
    assert manifest["sha256"] == sha256_file(filled.folder / "ckpt-00000006.pt")
