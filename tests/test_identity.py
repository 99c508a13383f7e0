from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from earthprior import identity

PACKAGE = Path(identity.__file__).parent
DATA_DVC = "outs:\n- md5: 0123456789abcdef0123456789abcdef.dir\n  size: 123\n  nfiles: 81\n  hash: md5\n  path: data\n"


@pytest.mark.parametrize("inside", [".dvc/tmp/exps/tmpabc", ".dvc/tmp/exps/standalone/tmpabc", ".dvc/tmp/exps"])
def test_main_root_leaves_the_copy_of_an_experiment(tmp_path: Path, inside: str) -> None:
    (tmp_path / inside).mkdir(parents=True)
    assert identity.main_root(tmp_path / inside) == tmp_path.resolve()


@pytest.mark.parametrize("inside", ["", ".dvc/tmp", "dvc/tmp/exps"])
def test_main_root_is_the_root_elsewhere(tmp_path: Path, inside: str) -> None:
    (tmp_path / inside).mkdir(parents=True, exist_ok=True)
    assert identity.main_root(tmp_path / inside) == (tmp_path / inside).resolve()


def test_data_version(tmp_path: Path) -> None:
    assert identity.data_version(tmp_path) == (None, None)
    (tmp_path / "data.dvc").write_text(DATA_DVC)
    assert identity.data_version(tmp_path) == ("0123456789abcdef0123456789abcdef.dir", 81)


@pytest.mark.parametrize("text", ["", "outs: []", "outs:\n- path: data\n", "[1, 2", "outs:\n- 7\n", "\xff"])
def test_data_version_of_a_damaged_file_is_unknown(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.dvc").write_text(text, encoding="latin-1")
    assert identity.data_version(tmp_path) == (None, None)


def test_git_commit(tmp_path: Path) -> None:
    assert identity.git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert identity.git_commit(tmp_path) is None
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    commit = identity.git_commit(tmp_path)
    assert commit is not None
    assert len(commit) == 40


def test_fingerprint_follows_every_input_and_no_order() -> None:
    first = identity.fingerprint({"lr": 0.1, "data.bands": ["red", "nir"]}, "s")
    assert first == identity.fingerprint({"data.bands": ["red", "nir"], "lr": 0.1}, "s")
    assert len(first) == 12
    assert int(first, 16) >= 0
    others = [
        identity.fingerprint({"lr": 0.1, "data.bands": ["nir", "red"]}, "s"),
        identity.fingerprint({"lr": 0.2, "data.bands": ["red", "nir"]}, "s"),
        identity.fingerprint({"lr": 0.1, "data.bands": ["red", "nir"]}, "t"),
        identity.fingerprint({"lr": 0.1}, "s"),
    ]
    assert len({first, *others}) == 5
    with pytest.raises(ValueError, match="JSON"):
        identity.fingerprint({"lr": float("nan")}, "s")


def test_fingerprint_follows_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity.fingerprint({}, "s")
    monkeypatch.setattr(identity, "FORMAT_VERSION", identity.FORMAT_VERSION + 1)
    assert identity.fingerprint({}, "s") != before


MODULES = {
    "stages/pretrain.py": "from earthprior import build, tracking\nimport earthprior.losses as losses\nimport torch\n",
    "build.py": "def network():\n    from earthprior.networks.unet import UNet\n",
    "losses.py": "from earthprior.networks import NETWORKS\n",
    "networks/__init__.py": "NETWORKS = {}\n",
    "networks/unet.py": "class UNet: ...\n",
    "tracking.py": "import mlflow\n",
    "report.py": "x = 1\n",
    "torch.py": "x = 1\n",
}


def test_code_hash_names_what_changed(tmp_path: Path) -> None:
    package = tmp_path / "earthprior"
    for name, text in MODULES.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    before = identity.code_hash(package)
    assert set(before.files) == MODULES.keys() - {"tracking.py", "report.py", "torch.py"}
    (package / "report.py").write_text("x = 2\n")
    (package / "tracking.py").write_text("x = 2\n")
    assert identity.code_hash(package) == before
    (package / "losses.py").write_text("from earthprior import report\n")
    (package / "build.py").write_text("")
    after = identity.code_hash(package)
    assert after.digest != before.digest
    changed = ["build.py", "losses.py", "networks/__init__.py", "networks/unet.py", "report.py"]
    assert identity.changed_files(before.files, after.files) == changed


def test_code_hash_holds_what_trains() -> None:
    files = identity.code_hash().files
    names = ["losses.py", "params/learning.py", "randomness.py", "build.py", "diffusion/schedule.py"]
    assert {*names, "chips/augment.py", "training/loop.py", "networks/unet_film.py"} <= files.keys()
    assert not {"cli.py", "tracking.py", "identity.py", "report.py", "chips/landscapes/synth.py"} & files.keys()


@pytest.mark.parametrize("name", identity.WITHOUT_EFFECT_ON_WEIGHTS)
def test_what_is_left_out_of_the_code_hash_exists(name: str) -> None:
    # a renamed module must not slip in or out unseen
    assert (PACKAGE / name).exists()


def test_identity_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.dvc").write_text(DATA_DVC)
    monkeypatch.setenv("DVC_EXP_NAME", "wise-owl")
    tags = identity.identity_tags(tmp_path, "abc", identity.CodeHash({}, "f" * 64))
    assert tags["earthprior.fingerprint"] == "abc"
    assert tags["earthprior.code"] == "f" * 12
    assert tags["dvc.exp_name"] == "wise-owl"
    assert tags["dvc.data_md5"] == "0123456789abcdef0123456789abcdef.dir"
    assert tags["dvc.data_nfiles"] == "81"
    assert "git.commit" not in tags
    assert all(isinstance(value, str) and value for value in tags.values())


def test_process_alive_tells_a_process_from_its_successor() -> None:
    tags = identity.process_tags()
    assert identity.process_alive(tags)
    assert not identity.process_alive(tags | {"earthprior.process_start": "1000000000"})
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert not identity.process_alive(tags | {"earthprior.pid": str(child.pid)})


def test_environment_names_versions() -> None:
    facts = identity.environment()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["cpus"] >= 1
    assert "torch" in facts["packages"]


def test_the_recorded_environment_digests_what_trains() -> None:
    record = identity.recorded_environment({"device": "cpu"})
    assert record["setting"] == {"device": "cpu"}
    assert identity.environment().items() <= record.items()
    assert record["code"] == identity.code_hash().files
    assert "pytorch-optimizer" in record["packages"], "AdaBelief trains with it"


def test_identity_does_not_import_torch_or_mlflow() -> None:
    code = "import sys, earthprior.identity as i; i.environment(); print({'torch', 'mlflow'} & set(sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert answer.stdout.strip() == "set()"
