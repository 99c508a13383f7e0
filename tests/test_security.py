"""docs/security.md, as far as a test can hold it: who is connected to, what is started, what is run, what is told."""

from __future__ import annotations

import csv
import logging
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import hostile
from earthprior.chips.problem_log import ProblemLog
from earthprior.chips.problems import Problem
from earthprior.params import Params
from earthprior.stages import evaluate, pretrain
from hostile_text import MARK

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
SECRET = "hunter2-hunter2"
PROGRAMS = {"git", "uname"}
"""Git for the commit, and what Python's own `platform` asks for the name of the processor."""

SMALL = {"epochs": 1, "warmup_epochs": 0, "evaluate__samples": 2, "evaluate__steps": 2, "evaluate__probe_pixels": 16,
         "evaluate__probe_rhos": [0.1]}  # fmt: skip


@pytest.mark.parametrize(
    "pattern",
    [
        r"weights_only\s*=\s*False", r"\bpickle\.(load|loads|Unpickler)\b", r"\bjoblib\b",
        r"(?m)^\s*(import|from) yaml\b",
        r"YAML\(typ=.unsafe", r"(?<![\w.])(eval|exec)\(", r"shell\s*=\s*True", r"\bos\.(system|popen)\b",
        r"allow_pickle\s*=\s*True", r"\b__import__\(", r"trust_remote_code\s*=\s*True", r"\bextractall\(",
        r"unpack_archive",
        r"\btempfile\.mktemp\b", r"verify\s*=\s*False",
    ],
)  # fmt: skip
def test_no_source_runs_what_it_reads(pattern: str) -> None:
    found = [f"{path.name}: {match[0]}" for path in SOURCES for match in re.finditer(pattern, path.read_text())]
    assert found == []


def test_no_page_is_made_without_escaping() -> None:
    makers = [path.name for path in SOURCES if re.search(r"\bEnvironment\(|jinja2", path.read_text())]
    # The model card is Markdown, of values that were checked when they were read, and no page that a browser is given.
    assert makers == ["card.py", "report.py"]
    assert "autoescape=True" in (ROOT / "src/earthprior/report.py").read_text()
    for template in (ROOT / "src").rglob("*.j2"):
        text = template.read_text()
        # What is called safe is no text of anybody's: a place where a long word may break.
        assert len(re.findall(r"\|\s*safe\b", text)) == text.count('<wbr>" | safe')
        assert not re.search(r"autoescape|<script", text)


def test_no_server_is_opened_to_others() -> None:
    files = [ROOT / name for name in ("README.md", "Makefile", "MLproject", "dvc.yaml", "params.yaml", ".ci/run")]
    files += [*(ROOT / "docs").glob("*.md"), *(ROOT / "presets").glob("*.yaml"), *SOURCES]
    for path in files:
        text = path.read_text()
        assert "disable-security-middleware" not in text or path.name == "security.md", path.name
        assert not re.search(r"(mlflow (ui|server)|optuna-dashboard)[^\n`]*--host", text), path.name
        assert "0.0.0.0" not in text or path.name == "security.md", path.name


def test_nothing_reports_to_anybody() -> None:
    # also where `dvc repro` is run by hand, without the Makefile's environment
    config = (ROOT / ".dvc/config").read_text()
    assert re.search(r"analytics = false", config)
    assert re.search(r"check_update = false", config)
    makefile = (ROOT / "Makefile").read_text()
    for name in ("DO_NOT_TRACK := 1", "MLFLOW_DISABLE_TELEMETRY := true", "DVC_NO_ANALYTICS := 1"):
        assert f"export {name}" in makefile


def test_params_yaml_holds_no_tags_and_no_anchors() -> None:
    for path in (ROOT / "params.yaml", *(ROOT / "presets").glob("*.yaml"), ROOT / "dvc.yaml"):
        events = list(YAML(typ="safe", pure=True).parse(path.read_text()))
        assert not [event for event in events if getattr(event, "anchor", None) or getattr(event, "tag", None)], (
            path.name
        )


def test_a_chip_is_no_formula_of_a_spreadsheet(tmp_path: Path) -> None:
    names = ("=cmd|' /C calc'!A0.tif", "+1.tif", "-1.tif", "@SUM(A1).tif", "a=b.tif")
    with ProblemLog(tmp_path / "bad_chips.csv") as log:
        log.extend(Problem("error", name, 2, "is empty", "Drop the row", skippable=True) for name in names)
        assert log.close(skip=True) == [2]
    with (tmp_path / "bad_chips.csv").open(newline="") as handle:
        files = [row["file"] for row in csv.DictReader(handle)]
    assert files == [*(f"'{name}" for name in names[:-1]), names[-1]]


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def programs(started: list[str]) -> set[str]:
    return {match[1] for line in started if (match := re.match(r"subprocess\.Popen \('([^']*)'", line))}


@pytest.mark.filterwarnings("ignore")
def test_a_run_speaks_to_its_tracking_store_alone_and_keeps_its_secrets(
    make_project: Callable[..., tuple[Path, Params]],
    closed_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    root, params = make_project(**SMALL, evaluate__label_column="none")
    (root / "data/chips/chip_000.tif.aux.xml").write_text("<PAMDataset><!-- http://127.0.0.1:9/ --></PAMDataset>")
    for name in ("DVC_STAGE", "DVC_EXP_NAME", "MLFLOW_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "GIT_ASKPASS_SECRET"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:{closed_port}/")
    with hostile.audited() as audit, caplog.at_level(logging.INFO):
        pretrain.run(params, root)
    assert audit.connected
    assert all(f"127.0.0.1', {closed_port}" in line or f":{closed_port}/" in line for line in audit.connected)
    assert programs(audit.started) <= PROGRAMS
    assert audit.unpickled == []

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    with hostile.audited() as audit, caplog.at_level(logging.INFO):
        evaluate.run(params, root)
    assert audit.connected == []
    assert programs(audit.started) <= PROGRAMS

    said = "".join(capfd.readouterr()) + caplog.text
    assert SECRET not in said
    told = [path for path in root.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert told == []
    assert not list(root.rglob(MARK))
