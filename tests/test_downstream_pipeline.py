"""downstream/dvc.yaml and downstream/params.yaml agree with the package and with each other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from earthprior.params import downstream_fields, load_downstream
from test_environment import ROOT, flat_keys, read_yaml, sources_of


def stage() -> Any:
    (name,) = read_yaml("downstream/dvc.yaml")["stages"].items()
    assert name[0] == "finetune"
    return name[1]


def test_it_runs_in_the_root_as_one_simple_command() -> None:
    assert stage()["cmd"] == "env PYTHONPATH=src python -m earthprior finetune"
    assert stage()["wdir"] == ".."


def test_dvc_itself_can_read_it(tmp_path: Path) -> None:
    """One file that dvc cannot read stops every command of it, also those about the other pipeline."""
    from dvc.repo import Repo

    (tmp_path / "downstream").mkdir()
    for name in ("dvc.yaml", "params.yaml", "downstream/dvc.yaml", "downstream/params.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    with Repo.init(str(tmp_path), no_scm=True) as repo:
        repo.index.check_graph()
        assert {stage.name for stage in repo.index.stages} == {"stats", "pretrain", "evaluate", "finetune"}


def test_it_depends_on_the_sources_it_runs() -> None:
    listed = [path for path in stage()["deps"] if path.startswith("src/")]
    assert not [path for path in listed if not (ROOT / path).exists()]
    needed = sources_of("finetune", "tools")
    assert not [
        source for source in needed if not any(source == path or source.startswith(f"{path}/") for path in listed)
    ], "missing in downstream/dvc.yaml"
    assert not [path for path in listed if not any(s == path or s.startswith(f"{path}/") for s in needed)], "not used"


def test_every_key_but_operation_reruns_it() -> None:
    ((file, listed),) = stage()["params"][0].items()
    assert file == "downstream/params.yaml"
    keys = set(flat_keys(read_yaml(file)))
    covered = {key for key in keys if key in listed or key.split(".")[0] in listed}
    others = {key for key in keys - covered if key.split(".")[0] not in ("operation", "bench")}
    assert not others
    assert not [key for key in listed if key not in {name.split(".")[0] for name in keys}]


def test_the_committed_file_has_every_key() -> None:
    params = load_downstream(ROOT / "downstream/params.yaml")
    assert params.steps == params.epochs * params.steps_per_epoch
    written = {key for key in flat_keys(read_yaml("downstream/params.yaml")) if not key.startswith("bench.")}
    assert written == {key for key in downstream_fields() if not key.startswith("bench")}


def test_every_key_is_explained() -> None:
    text = Path(ROOT / "docs/finetune.md").read_text()
    own = [key for key in downstream_fields() if "." not in key and not key.startswith("bench")]
    assert not [key for key in own if f"`{key}`" not in text]
