from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from earthprior import reproduction
from earthprior.files import sha256_file, write_json
from earthprior.recorded import RecordedRun
from earthprior.tools import reproduce

ENVIRONMENT: Mapping[str, Any] = {
    "python": "3.11.9", "cpu": "some processor", "cpus": 8, "torch_threads": 2, "packages": {"torch": "2.13.0"},
    "setting": {"device": "cpu", "precision": "torch.float32", "processes": "1"},
}  # fmt: skip
CONFIG: Mapping[str, Any] = {
    "params": {"lr": 0.001, "data": {"crop_px": 16, "bands": ["red", "nir"]}, "operation": {"readers": 4}},
    "data": {"md5": "a.dir", "nfiles": 9, "catalog_sha256": "b", "chips_sha256": "c"},
}


def a_run(folder: Path, gains: tuple[float, ...] = (0.1, 0.3, 0.2), **changes: Any) -> RecordedRun:
    """A run with all that is kept of one; changes by file name without its ending, None for a file that is missing."""
    folder.mkdir()
    package = folder / "package"
    package.mkdir()
    (package / "losses.py").write_text(changes.pop("source", "x = 1\n"))
    code = {"losses.py": sha256_file(package / "losses.py")}
    contents = {"environment": {**ENVIRONMENT, "code": code}, "config": CONFIG, "stats": {"x": 1}, **changes}
    for name, content in contents.items():
        if content is not None:
            write_json(folder / f"{name}.json", content)
    history = pd.DataFrame({"epoch": [1, 2, 3], "gain_db/rho_0.5": gains, "gain_db/mean": gains})
    history.to_csv(folder / "history.csv", index=False)
    (folder / "network.safetensors").write_bytes(repr(gains).encode())
    return RecordedRun("asked", "title", {}, "c" * 40, "a.dir", history, {"psnr/network": 30.0 + gains[1]}, folder)


def found(then: RecordedRun, now: RecordedRun, digest: str | None = None) -> dict[str, list[str] | None]:
    causes = reproduction.causes(then, now, now.folder / "package", digest)
    return {cause.kind: cause.differing for cause in causes}


def test_a_run_equals_itself(tmp_path: Path) -> None:
    then, now = a_run(tmp_path / "then"), a_run(tmp_path / "now")
    assert found(then, now) == {"code": [], "data": [], "params": [], "packages": [], "hardware": []}
    outs = reproduction.compared_outs(then, now)
    assert outs == {"network.safetensors": True, "history.csv": True, "metrics.json": None}


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"source": "x = 2\n"}, "code", ["src/earthprior/losses.py"]),
        (
            {"config": {**CONFIG, "data": {**CONFIG["data"], "md5": "z.dir", "nfiles": 8}}},
            "data",
            ["md5 in data.dvc a.dir -> z.dir", "number of files 9 -> 8"],
        ),
        ({"stats": {"x": 2}}, "data", ["results/stats/stats.json, though it is of the same chips"]),
        (
            {"config": {**CONFIG, "params": {"lr": 3e-4, "data": {"crop_px": 16, "bands": ["red"]}, "new": True}}},
            "params",
            ["lr 0.001 -> 0.0003", "data.bands [red, nir] -> [red]", "new absent -> true"],
        ),
        (
            {"environment": {**ENVIRONMENT, "python": "3.12.1", "packages": {"torch": "2.14.0", "new": "1"}}},
            "packages",
            ["python 3.11.9 -> 3.12.1", "torch 2.13.0 -> 2.14.0", "new absent -> 1"],
        ),
        (
            {
                "environment": {
                    **ENVIRONMENT, "cpu": "another", "torch_threads": 4, "gpu": "a GPU",
                    "setting": {**ENVIRONMENT["setting"], "device": "cuda"},
                }
            },
            "hardware",
            [
                "cpu some processor -> another", "torch_threads 2 -> 4", "setting.device cpu -> cuda",
                "gpu absent -> a GPU",
            ],
        ),
    ],
)  # fmt: skip
def test_each_cause_is_named_with_both_values(
    tmp_path: Path, changes: Mapping[str, Any], kind: str, told: list[str]
) -> None:
    causes = found(a_run(tmp_path / "then"), a_run(tmp_path / "now", **changes))
    differing = causes.pop(kind)
    assert differing is not None
    assert sorted(differing) == sorted(told)
    assert all(other == [] for other in causes.values())


def test_params_that_change_no_result_are_left_out(tmp_path: Path) -> None:
    params = {**CONFIG["params"], "operation": {"readers": 1}, "evaluate": {"steps": 3}}
    now = a_run(tmp_path / "now", config={**CONFIG, "params": params})
    assert found(a_run(tmp_path / "then"), now)["params"] == []


def test_what_was_not_recorded_is_said_to_be_so(tmp_path: Path) -> None:
    then = a_run(tmp_path / "then", environment=None, config=None)
    now = a_run(tmp_path / "now")
    assert found(then, now) == {"code": None, "data": [], "params": None, "packages": None, "hardware": None}
    # an older run kept the beginning of its code's digest
    digested = RecordedRun(**{**vars(then), "code": "abcdef012345"})
    assert found(digested, now, "abcdef0123456789")["code"] == []
    assert found(digested, now, "9" * 64)["code"] == [
        "digest abcdef012345 -> 999999999999; of which files, was not kept"
    ]


def test_a_missing_out_is_another(tmp_path: Path) -> None:
    then, now = a_run(tmp_path / "then"), a_run(tmp_path / "now")
    (now.folder / "history.csv").unlink()
    (now.folder / "network.safetensors").write_bytes(b"other")
    assert not any(reproduction.compared_outs(then, now).values())
    assert None not in [reproduction.compared_outs(then, now)[name] for name in ("history.csv", "network.safetensors")]


def test_numbers_move_from_best_epoch_to_best_epoch(tmp_path: Path) -> None:
    then, now = a_run(tmp_path / "then"), a_run(tmp_path / "now", gains=(0.1, 0.2, 0.4))
    numbers = {number.name: (number.then, number.now) for number in reproduction.moved(then, now)}
    assert numbers == {
        "best epoch": (2.0, 3.0),
        "validation gain, dB: mean": (0.3, 0.4),
        "validation gain, dB: rho_0.5": (0.3, 0.4),
        "evaluate: psnr/network": (30.3, 30.2),
    }
    without = RecordedRun(**{**vars(now), "metrics": {}, "history": pd.DataFrame()})
    assert reproduction.moved(then, without)[0] == reproduction.Moved("best epoch", 2.0, None)


@pytest.mark.parametrize(
    ("causes", "verdict"),
    [
        ({"code": ["a.py"]}, "code differs"),
        ({"code": ["a.py"], "hardware": ["cpu"], "packages": None}, "code and hardware differ (packages not recorded)"),
        ({"packages": None, "hardware": None}, "nothing that was recorded differs, but packages, hardware were not"),
        ({"code": [], "data": []}, "nothing that was recorded differs"),
    ],
)
def test_the_verdict_is_one_line(causes: Mapping[str, list[str] | None], verdict: str) -> None:
    said = reproduce._blame([reproduction.Cause(kind, differing) for kind, differing in causes.items()])
    assert said.startswith(verdict)
    assert "\n" not in said


def test_the_table_holds_what_moved(capsys: pytest.CaptureFixture[str]) -> None:
    moved = reproduction.Moved
    reproduce._print_moved([moved("a", 1.0, 1.5), moved("b", 2.0, 2.0), moved("evaluate: c", 1e-9, None)])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        [],
        ["then", "now", "difference"],
        ["a", "1", "1.5", "+0.5"],
        ["evaluate:", "c", "1e-09", "nan", "+nan"],
        ["1", "other", "numbers", "are", "the", "same"],
    ]
