"""The benchmark of DVC at size makes chips that the pipeline takes, and the repository's DVC settings keep one copy."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from earthprior.chips.catalog import load_catalog
from earthprior.chips.problem_log import ProblemLog
from earthprior.chips.read import chip_header
from earthprior.chips.survey import survey
from earthprior.params import load
from earthprior.params.editing import overlay

ROOT = Path(__file__).parents[1]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dvc_scale", ROOT / "benchmarks/dvc_scale.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["dvc_scale"] = module
    spec.loader.exec_module(module)
    return module


dvc_scale = _load()


def test_chips_are_sound_and_their_own(tmp_path: Path) -> None:
    dvc_scale.write_chips(tmp_path / "data", 12)
    text, _ = overlay(ROOT / "params.yaml", dvc_scale.SMALL, "params.yaml")
    (tmp_path / "params.yaml").write_text(text)
    params = load(tmp_path / "params.yaml")
    catalog = load_catalog(params.data, tmp_path)

    with ProblemLog(tmp_path / "problems.csv") as log:
        survey(params.data, tmp_path, 1, log)

    # same pixels, shared ground or a missing band name would each be a problem
    assert (log.tally.errors, log.tally.warnings) == (0, 0)
    headers = [chip_header(catalog.dir, row.images[0]) for row in catalog.rows]
    assert len({sha256 for _, sha256 in headers}) == 12
    assert len({header.bounds for header, _ in headers}) == 12


def test_what_the_stages_took_is_not_dvcs() -> None:
    stages = tuple(dvc_scale.Cost(name, 10.0, 7.0, 900.0) for name in ("stats", "pretrain"))
    row = dvc_scale.dvc_row(dvc_scale.Cost("`dvc repro`", 25.0, 16.5, 300.0, stages, 12.0))
    assert row == "| `dvc repro` | 25.0 | 20 | 2.5 | 300 | +12 |"


def test_settings_keep_one_copy_of_a_chip(tmp_path: Path) -> None:
    shutil.copytree(ROOT / ".dvc", tmp_path / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    (tmp_path / "data").mkdir()
    chip = tmp_path / "data/chip.tif"
    chip.write_bytes(b"chip")
    try:
        os.link(chip, tmp_path / "link")
    except OSError:
        pytest.skip("no hard links here")
    (tmp_path / "link").unlink()
    state = str(tmp_path / "state")
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": state, "DVC_GLOBAL_CONFIG_DIR": state}
    git_free = {name: value for name, value in environment.items() if not name.startswith("GIT_")}

    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "add", "-q", "data"]):
        subprocess.run(command, cwd=tmp_path, env=git_free, check=True)

    (cached,) = [path for path in (tmp_path / ".dvc/cache").rglob("*") if path.is_file() and path.suffix != ".dir"]
    assert chip.stat().st_ino == cached.stat().st_ino
