"""stages/evaluate.py and evaluation/: complete outs, numbers that agree, and plain words where there are none."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from earthprior import identity, memory, naming, tracking
from earthprior.chips.catalog import ChipRow
from earthprior.chips.selection import Selection
from earthprior.diffusion.gain import linear_denoiser
from earthprior.errors import DeviceMemoryError, EarthPriorError
from earthprior.evaluation import denoising, pages
from earthprior.files import read_json, write_json
from earthprior.params import Params
from earthprior.stages import evaluate, pretrain, stats
from support import linear_schedule, make_batch, toy_linear
from tiny_training import TINY

BANDS = ("red", "green", "blue", "nir")
SMALL = {
    "threads": 1, "epochs": 1, "warmup_epochs": 0, "evaluate.samples": 3, "evaluate.steps": 3,
    "evaluate.probe_pixels": 64, "evaluate.probe_rhos": [0.1, 1.0],
}  # fmt: skip
OUTS = {"figures", "levels.csv", "metrics.json", "report.html", "serving.json"}
FIGURES = {
    "gain", "levels", "denoising", "samples", "histograms", "ndvi", "spectra", "history", "serving", "probes",
    "feature_maps", "neighbours",
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracking has its own tests; opening a store costs seconds."""
    monkeypatch.setattr(tracking, "import_mlflow", lambda: False)
    for name in ("DVC_STAGE", "DVC_EXP_NAME", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def cache() -> dict[str, Path]:
    return {}


@pytest.fixture
def params_of(make_params: Callable[..., Params]) -> Callable[..., Params]:
    return lambda **overrides: make_params(
        {**TINY, **SMALL} | {key.replace("__", "."): value for key, value in overrides.items()}
    )


@pytest.fixture
def evaluated(
    cache: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    make_chips: Callable[..., Path],
    params_of: Callable[..., Params],
) -> Path:
    """A root after all three stages; one of its training chips has no label."""
    if not cache:
        root = tmp_path_factory.mktemp("evaluated")
        folder = make_chips(root / "data", n=12, size=32, labels=True)
        with (folder / "catalog.csv").open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        rows[0]["label"] = ""
        with (folder / "catalog.csv").open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        params = params_of()
        for stage in (stats, pretrain, evaluate):
            stage.run(params, root)
        cache["root"] = root
    return cache["root"]


@pytest.fixture
def pretrained(evaluated: Path, tmp_path: Path) -> Path:
    """A root before evaluate, to do with as a test likes."""
    root = tmp_path / "project"
    shutil.copytree(evaluated, root, ignore=shutil.ignore_patterns("evaluate", "work"))
    return root


def test_all_outs_are_there_and_nothing_else(evaluated: Path) -> None:
    results = evaluated / "results/evaluate"
    assert {path.name for path in results.iterdir()} == OUTS
    assert {path.stem for path in (results / "figures").iterdir()} == FIGURES
    assert not (evaluated / "work/evaluate").exists()


def test_the_numbers_are_finite_and_agree_with_the_levels(evaluated: Path) -> None:
    numbers = read_json(evaluated / "results/evaluate/metrics.json")
    levels = pd.read_csv(evaluated / "results/evaluate/levels.csv")
    assert all(math.isfinite(value) for _, value in evaluate.flat(numbers))
    assert levels.notna().all().all()
    assert list(levels["rho"]) == sorted(levels["rho"])
    for rho, gain in zip(levels["rho"], levels["gain_db"], strict=True):
        assert numbers["gain_db"][f"rho_{rho:g}"] == pytest.approx(gain)
    assert numbers["gain_db"]["mean"] == pytest.approx(levels["gain_db"].mean())
    assert np.allclose(levels["gain_db"], 10 * np.log10(levels["eps_mse_linear"] / levels["eps_mse_network"]))
    assert np.allclose(levels["psnr_network"], levels[[f"psnr_network_{band}" for band in BANDS]].mean(axis=1))
    assert numbers["psnr"]["network"] == pytest.approx(levels["psnr_network"].mean())
    assert numbers["psnr"]["linear"] > numbers["psnr"]["mean"]
    assert numbers["judged_chips"] == 4


def test_the_probes_compare_four_representations(evaluated: Path) -> None:
    probes = read_json(evaluated / "results/evaluate/metrics.json")["probe"]
    assert set(probes) == {"linear", "mlp"}
    for numbers in probes.values():
        assert set(numbers) == {"network", "untrained", "context", "pixels"}
        for scores in numbers.values():
            assert set(scores) >= {"average_precision", "iou", "f1", "average_precision_low", "average_precision_high"}
            assert scores["average_precision_low"] <= scores["average_precision"] <= scores["average_precision_high"]
    # The labels follow the first band but for each chip's own median.
    assert probes["linear"]["pixels"]["average_precision"] > 0.8
    assert "1 chip without a usable label were skipped" in (evaluated / "results/evaluate/report.html").read_text()


def test_the_level_that_serves_is_the_best_on_validation_chips(evaluated: Path) -> None:
    found = read_json(evaluated / "results/evaluate/serving.json")
    assert found["fingerprint"] == read_json(evaluated / "results/pretrain/config.json")["fingerprint"]
    assert set(found) == {"fingerprint", "rho", "t", "side", "levels", "chosen_by", "score"}
    assert found["rho"] in (0.1, 1.0)
    assert 0.4 < found["score"] <= 1
    assert "validation" in found["chosen_by"]
    assert f"rho {found['rho']:g}, {found['side']}" in (evaluated / "results/evaluate/report.html").read_text()


def test_the_report_tells_who_the_run_is(evaluated: Path) -> None:
    html = (evaluated / "results/evaluate/report.html").read_text()
    config = read_json(evaluated / "results/pretrain/config.json")
    assert config["fingerprint"] in html
    assert read_json(evaluated / "results/stats/stats.json")["data"]["catalog_sha256"] in html
    assert "lr: 0.01" in html
    assert html.count("data:image/png;base64,") == len(FIGURES)


def test_the_same_command_gives_the_same_files(
    evaluated: Path, pretrained: Path, params_of: Callable[..., Params]
) -> None:
    (pretrained / "results/evaluate").mkdir()
    (pretrained / "results/evaluate/figures").mkdir()
    (pretrained / "results/evaluate/figures/old.png").write_bytes(b"")
    evaluate.run(params_of(), pretrained)
    for path in (evaluated / "results/evaluate").rglob("*"):
        other = pretrained / path.relative_to(evaluated)
        assert other.is_dir() if path.is_dir() else path.read_bytes() == other.read_bytes(), path.name
    assert not (pretrained / "results/evaluate/figures/old.png").exists()


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("crop_type", "has no column &#39;crop_type&#39;"),
        pytest.param("group", "labels of whole images", marks=pytest.mark.soak),
    ],
)
def test_without_label_rasters_there_are_no_probe_metrics(
    column: str, words: str, pretrained: Path, params_of: Callable[..., Params]
) -> None:
    evaluate.run(params_of(evaluate__label_column=column, evaluate__probe_rho=0.5), pretrained)
    assert "probe" not in read_json(pretrained / "results/evaluate/metrics.json")
    serving = read_json(pretrained / "results/evaluate/serving.json")
    assert (serving["rho"], serving["side"], serving["score"]) == (0.5, "decoder", None)
    assert serving["chosen_by"] == "evaluate.probe_rho"
    drawn = {path.stem for path in (pretrained / "results/evaluate/figures").iterdir()}
    assert drawn == FIGURES - {"serving", "probes"}
    html = (pretrained / "results/evaluate/report.html").read_text()
    assert "No probe" in html
    assert words in html


def test_weights_of_other_params_are_refused(pretrained: Path, params_of: Callable[..., Params]) -> None:
    with pytest.raises(EarthPriorError, match=r"lr: 0.01 -> 0.003.*dvc repro"):
        evaluate.run(params_of(lr=0.003), pretrained)


def test_weights_of_other_statistics_are_refused(pretrained: Path, params_of: Callable[..., Params]) -> None:
    path = pretrained / "results/stats/stats.json"
    write_json(path, read_json(path) | {"valid_fraction": 0.5})
    with pytest.raises(EarthPriorError, match=r"other statistics .*\(the same chips and catalog, but other"):
        evaluate.run(params_of(), pretrained)
    stats_now = read_json(path)
    write_json(path, stats_now | {"data": stats_now["data"] | {"md5": "0" * 32, "chips_sha256": "0" * 64}})
    with pytest.raises(EarthPriorError, match=r"\(other chips, other pixels\); run: dvc repro"):
        evaluate.run(params_of(), pretrained)


@pytest.mark.parametrize("missing", ["results/stats/stats.json", "results/pretrain/network.safetensors"])
def test_missing_inputs_are_named(missing: str, pretrained: Path, params_of: Callable[..., Params]) -> None:
    (pretrained / missing).unlink()
    with pytest.raises(EarthPriorError, match=rf"{Path(missing).name}.*dvc repro"):
        evaluate.run(params_of(), pretrained)


def test_a_fault_on_the_way_leaves_no_results(
    pretrained: Path, params_of: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pages, "report", fail)
    with pytest.raises(OSError, match="disk full"):
        evaluate.run(params_of(evaluate__label_column="none"), pretrained)
    assert not (pretrained / "results/evaluate").exists()


def test_out_of_memory_names_what_leaves_the_training_as_it_is(
    pretrained: Path, params_of: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any) -> None:
        torch.empty(1 << 50)

    monkeypatch.setattr(evaluate, "_denoise", short)
    with pytest.raises(
        DeviceMemoryError, match=r"lower evaluate\.samples \(3 now\) or evaluate\.probe_pixels"
    ) as caught:
        evaluate.run(params_of(), pretrained)
    assert caught.value.exit_code == 2
    assert "operation.device: cpu" not in str(caught.value), "which it is"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 22 * 10**9)
    gpu = memory.told_in_evaluation(params_of(), torch.device("cuda"))
    with pytest.raises(DeviceMemoryError, match=r"cuda, 24\.0 GB, .* set operation\.device: cpu"), gpu:
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert not (pretrained / "results/evaluate").exists()


def test_everything_is_reported_to_the_tracker(
    pretrained: Path, params_of: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, Any] = {"artifacts": []}

    class Recorder:
        def __enter__(self) -> Recorder:
            return self

        def __exit__(self, *error: object) -> None:
            calls["closed"] = error[0] is None

        def log(self, metrics: dict[str, float], step: int) -> None:
            calls.update(metrics=metrics, step=step)

        def log_levels(self, gain_db: dict[str, float]) -> None:
            calls.update(levels=gain_db)

        def log_artifact(self, path: Path, folder: str = "") -> None:
            assert path.exists()
            calls["artifacts"].append(path.name)

    def opened(root: Path, ref: Any, name: Any, params: Any, tags: Any, pretraining: Any, differs: str) -> Recorder:
        calls.update(name=name, differs=differs, params=params, tags=tags, pretraining=pretraining)
        return Recorder()

    monkeypatch.setattr(evaluate, "continue_or_open", opened)
    monkeypatch.setattr(naming, "from_commit", lambda params, root: "")
    evaluate.run(params_of(evaluate__label_column="none"), pretrained)
    history = pd.read_csv(pretrained / "results/pretrain/history.csv")
    assert calls["step"] == 0, "of a later step MLflow draws a curve of one point"
    gains = read_json(pretrained / "results/evaluate/metrics.json")["gain_db"]
    assert calls["metrics"]["gain_db/mean"] == gains["mean"]
    assert calls["levels"] == gains
    assert calls["name"].startswith("unet_film-wiener-")
    assert set(calls["artifacts"]) == OUTS
    assert calls["params"]["evaluate.steps"] == 3
    assert calls["pretraining"].params["lr"] == 0.01
    assert calls["pretraining"].metrics["val/gain_db/mean"] == pytest.approx(history["gain_db/mean"].iloc[-1])
    assert calls["pretraining"].metrics["val/gain_db/best"] == history["gain_db/mean"].max()
    assert (
        calls["tags"]["earthprior.fingerprint"] == read_json(pretrained / "results/pretrain/config.json")["fingerprint"]
    )
    assert calls["closed"]


def rows(usage: str, count: int) -> list[ChipRow]:
    return [ChipRow(line + 2, usage, (f"{usage}_{line}.tif",), {}) for line in range(count)]


def test_test_chips_are_judged_where_there_are_any_and_many_are_thinned() -> None:
    validate, test = rows("validate", 2000), rows("test", 3)
    assert evaluate.judged_chips(Selection(Path(), [], validate, test)) == evaluate.Judged("test", test, 3)
    judged = evaluate.judged_chips(Selection(Path(), [], validate, []))
    assert (judged.usage, judged.available, len(judged.rows)) == ("validate", 2000, evaluate.JUDGED_CHIPS)
    assert judged.rows[0] == validate[0]
    assert judged.rows[-1] == validate[-1]
    assert len({row.line for row in judged.rows}) == len(judged.rows)


def test_a_network_that_is_the_linear_filter_gains_nothing() -> None:
    schedule, linear = linear_schedule(), toy_linear()
    denoise = linear_denoiser(linear, schedule)
    task: Any = SimpleNamespace(linear=linear, schedule=schedule, denoiser=lambda batch: denoise)
    batch = make_batch(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)))
    batch.valid[2] = False
    table = denoising.judge(task, [(batch, ["a", "b", "c"])], BANDS, torch.ones(4))
    levels = denoising.levels_table(table, schedule, BANDS)
    assert (levels["gain_db"] == 0).all()
    numbers = denoising.summary(levels, BANDS)
    assert numbers["gain_db"]["mean"] == 0
    assert all(band["gain_db"] == 0 for band in numbers["per_band"].values())
    for row in levels.to_dict("records"):
        ratio = float(schedule.alpha[row["t"]] / schedule.sigma[row["t"]])
        own = table[(table["rho"] == row["rho"]) & (table["denoiser"] == "network")]
        assert row["eps_mse_network"] == pytest.approx(
            ratio**2 * own[[f"mse/{b}" for b in BANDS]].to_numpy()[:2].mean()
        )
        assert row["eps_mse_network_nir"] == pytest.approx(ratio**2 * own["mse/nir"].iloc[:2].mean())


def test_what_is_not_finite_is_absent() -> None:
    assert denoising.finite({"a": {"b": math.nan}, "c": math.inf, "d": {"e": 1.0, "f": math.nan}, "n": 3}) == {
        "d": {"e": 1.0},
        "n": 3,
    }


def test_the_code_of_the_evaluation_does_not_count_for_resuming_a_training() -> None:
    counted = identity.code_hash().files
    assert not [name for name in counted if name.startswith(("evaluation/", "figures/"))]
    judging = {"probe.py", "probe_models.py", "ranking.py", "report.py", "representations.py", "scoring.py"}
    assert not judging & set(counted)
