"""`earthprior bench` on a dozen tiny chips: what it leaves, and how it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from earthprior import tracking
from earthprior.bench import setting
from earthprior.bench.fits import Fitter
from earthprior.errors import DataError, DivergedError, ParamsError
from earthprior.tools import bench
from labelled import backbone_of, small

BENCH = {
    "budgets": [2, "all"], "seeds": [0, 1], "methods": ["finetune", "scratch", "probe", "untrained", "context"],
    "steps": 2, "lr": [0.003, 0.01], "l2": [0.01], "holdout": 2, "tuning_labels": 2, "pixels": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without MLflow."""
    before = torch.get_num_threads()
    monkeypatch.setattr(tracking, "import_mlflow", lambda: False)
    for name in ("DVC_STAGE", "WORLD_SIZE", "EARTHPRIOR_TUNE_JOB", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def root(tmp_path: Path, make_chips: Callable[..., Path], make_params: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_chips(tmp_path / "data", n=12, size=32, labels=True)
    backbone = backbone_of(make_params({"unet_film.attention": False, "unet_film.time_embedding_dim": 16}))
    monkeypatch.setattr(setting, "load_backbone", lambda place: backbone)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def params(**changes: Any) -> Any:
    return small(bench={**BENCH, **changes})


def table(root: Path) -> pd.DataFrame:
    (path,) = root.glob("work/bench/*/bench.csv")
    return pd.read_csv(path)


def lines(root: Path) -> list[str]:
    (path,) = root.glob("work/bench/*/bench.csv")
    return path.read_text().splitlines()


def test_a_bench_leaves_its_rows_and_a_page_and_is_not_done_twice(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run(params(), root, 1)
    rows = table(root)
    judged = rows[rows.purpose == "judged"]
    assert len(judged) == 5 * 2 * 2 - 2
    assert len(rows) - len(judged) == 2 * 2, "two learning rates of two methods"
    assert set(judged.labels) == {2, 6}, "8 train chips, of which 2 are held out"
    assert set(judged.judged_chips) == {4}
    assert judged.average_precision.between(0, 1).all()
    assert rows[rows.method.isin(["finetune", "scratch"])].steps.eq(2).all()
    assert not rows.duplicated(["purpose", "method", "budget", "seed", "lr"]).any()
    (page,) = root.glob("work/bench/*/report/report.html")
    assert "from scratch" in page.read_text().lower()
    said = capsys.readouterr()
    assert "22 fits; budgets are drawn from 6 labelled train chips" in said.err
    assert "With 6 labelled chips" in said.out
    monkeypatch.setattr(Fitter, "run", None)
    bench.run(params(), root, 1)
    assert table(root).astype(str).equals(rows.astype(str))
    with pytest.raises(TypeError):
        # Another seed is more of the same bench.
        bench.run(params(seeds=[0, 1, 2]), root, 1)


def test_a_killed_bench_goes_on_with_what_is_left(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, run = [], Fitter.run

    def killed(fitter: Fitter, fit: Any, value: float) -> Any:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(fit)
        return run(fitter, fit, value)

    monkeypatch.setattr(Fitter, "run", killed)
    few = params(methods=["finetune", "context"], seeds=[0])
    with pytest.raises(KeyboardInterrupt):
        bench.run(few, root, 1)
    before = lines(root)
    assert len(before) == 1 + 4
    monkeypatch.setattr(Fitter, "run", run)
    bench.run(few, root, 1)
    assert lines(root)[:5] == before
    whole = table(root)
    assert len(whole) == 2 + 4
    # The same as in one go.
    (path,) = root.glob("work/bench/*/bench.csv")
    path.unlink()
    bench.run(few, root, 1)
    own = [name for name in whole.columns if "seconds" not in name]
    assert table(root)[own].astype(str).equals(whole[own].astype(str))


def test_what_diverges_is_a_row_without_scores(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(*arguments: Any) -> Any:
        raise DivergedError("the loss is no number")

    monkeypatch.setattr(setting, "finetune", diverges)
    bench.run(params(methods=["scratch", "context"], seeds=[0]), root, 1)
    rows = table(root)
    assert rows[rows.method == "scratch"].average_precision.isna().all()
    assert rows[rows.method == "context"].average_precision.notna().all()


def test_other_settings_are_another_bench(root: Path) -> None:
    few = {"methods": ["context"], "seeds": [0]}
    bench.run(params(**few), root, 1)
    bench.run(params(**few, pixels=8), root, 1)
    assert len(list(root.glob("work/bench/*/bench.csv"))) == 2
    # A training of as many steps in other epochs warms up otherwise, and all levels are trained, whatever `train` says.
    changes: list[dict[str, Any]] = [{}, {"train": "head"}, {"train": "head", "lr_decay": 0.5}, {"epochs": 1}]
    names = [setting.prepare(small(bench=BENCH, **change), root, 1).name for change in changes]
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_two_processes_would_do_each_fit_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The second one finds the first one's claims, and does what is left.
    few = params(methods=["context", "probe"], seeds=[0])
    run, held = Fitter.run, []

    def other_in_between(fitter: Fitter, fit: Any, value: float) -> Any:
        if not held:
            held.append(fit)
            monkeypatch.setattr("earthprior.bench.work.time.sleep", stop)
            with pytest.raises(StopIteration):
                setting.prepare(few, root, 1).work(lambda: None)
        return run(fitter, fit, value)

    def stop(seconds: float) -> None:
        raise StopIteration

    monkeypatch.setattr(Fitter, "run", other_in_between)
    bench.run(few, root, 1)
    rows = table(root)
    assert len(rows) == 4
    assert not rows.duplicated(["method", "budget"]).any()
    assert rows.iloc[-1].method == held[0].method, "the claimed one came last"


def test_what_cannot_be_benched_is_refused(root: Path) -> None:
    with pytest.raises(ParamsError, match="no section bench"):
        bench.run(small(bench=None), root, 1)
    with pytest.raises(ParamsError, match="bench compares maps"):
        bench.run(small(bench=BENCH, task="regression", label_column="group"), root, 1)
    with pytest.raises(DataError, match=r"lower bench\.holdout"):
        bench.run(params(holdout=7), root, 1)
    with pytest.raises(ParamsError, match=r"bench\.steps 3 cannot be divided into 2 epochs"):
        bench.run(params(steps=3), root, 1)
    with pytest.raises(ParamsError, match="stands twice"):
        params(seeds=[1, 1])
