"""evaluation/comparison_panels.py: the same chips and noise for every run, and words for those left out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from earthprior import build
from earthprior.chips.crops import centre_crop
from earthprior.chips.selection import read_in_order
from earthprior.evaluation import denoising
from earthprior.evaluation.comparison import beside
from earthprior.evaluation.comparison_panels import FILTER, Drawing, draw
from earthprior.files import read_json, write_json
from earthprior.params import Params
from earthprior.recorded import RecordedRun
from earthprior.stages import stats
from kept_runs import recorded, with_weights
from tiny_training import TINY, Tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_chips: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("project")
    make_chips(root / "data", n=6, size=32)
    return root


@pytest.fixture
def tiny(root: Path, make_params: Callable[..., Params]) -> Callable[..., Tiny]:
    """A function from overrides, with double underscores for dots, to chips with their linear denoiser."""

    def made(**overrides: Any) -> Tiny:
        changed = {key.replace("__", "."): value for key, value in overrides.items()}
        params = make_params({**TINY, "unet_film.channels": [4, 8], **changed})
        if not (root / "results/stats/stats.json").is_file():
            stats.run(params, root)
        return Tiny(root, params)

    return made


@pytest.fixture
def kept(tmp_path: Path) -> Callable[..., RecordedRun]:
    """A function from a name and a Tiny to a run with weights."""

    def made(name: str, tiny: Tiny, **changes: Any) -> RecordedRun:
        return recorded(name, with_weights(tiny, tmp_path / name), tiny.params.model_dump(mode="json"), **changes)

    return made


def drawn(tiny: Tiny, *runs: RecordedRun, chips: int = 2) -> Drawing:
    return draw(beside(runs, tiny.params), tiny.params, tiny.root, chips)


def test_every_run_denoises_what_evaluate_shows(tiny: Any, kept: Any) -> None:
    first, second = tiny(), tiny(seed=5)
    runs = [kept("one", first), kept("two", second)]
    drawing = drawn(first, *runs)
    assert drawing.notes == []
    rows = first.selection.validate
    params, device = first.params, torch.device("cpu")
    normalizer = build.normalizer(params, read_json(first.root / "results/stats/stats.json"))
    ((whole, _),) = read_in_order(params, first.selection.folder, rows, normalizer, device, 2)
    for name, run in zip(("A one", "B two"), runs, strict=True):
        task, _ = build.pretrained_task(run.folder)
        task.eval()
        expected = denoising.panels(task, centre_crop(whole, 16), [row.images[0] for row in rows])
        found = [panel for chip in drawing.panels for panel in chip]
        assert [panel.title for panel in found] == [panel.title for panel in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert list(ours.estimates) == [FILTER, "A one", "B two"]
            assert np.array_equal(ours.estimates[name], theirs.estimates["network"])
            assert np.array_equal(ours.estimates[FILTER], theirs.estimates["linear"])
            assert np.array_equal(ours.noisy, theirs.noisy)
            assert np.array_equal(ours.valid, theirs.valid)
            assert np.allclose(ours.clean[:, ours.valid], theirs.clean[:, ours.valid], rtol=1e-5)
    first_panel = drawing.panels[0][0]
    assert not np.array_equal(first_panel.estimates["A one"], first_panel.estimates["B two"])


def test_runs_of_other_crops_meet_the_same_pixels(tiny: Any, kept: Any) -> None:
    # Odd among even: a middle that is off by one pixel would be seen as an error larger than the noise.
    runs = [tiny(data__crop_px=px) for px in (16, 21, 24)]
    drawing = drawn(runs[0], *(kept(f"run{i}", run) for i, run in enumerate(runs)), chips=1)
    assert drawing.notes == ["Shown are the middle 16 px of what each run sees (A 16 px, B 21 px, C 24 px)."]
    (panel, *_), = drawing.panels  # fmt: skip
    assert panel.clean.shape[-2:] == panel.valid.shape == (16, 16)
    rms = {}
    for name, estimate in panel.estimates.items():
        assert estimate is not None
        rms[name] = np.sqrt(np.mean((estimate - panel.clean)[:, panel.valid] ** 2))
    noise = np.sqrt(np.mean((panel.noisy - panel.clean)[:, panel.valid] ** 2))
    shifted = np.sqrt(np.mean((panel.clean[:, 1:] - panel.clean[:, :-1])[:, panel.valid[1:]] ** 2))
    assert noise < shifted
    assert max(rms.values()) < noise


def test_a_level_that_a_schedule_does_not_reach_is_left_out_for_it(tiny: Any, kept: Any) -> None:
    short = tiny(diffusion__timesteps=30, diffusion__beta_start=0.005, diffusion__beta_end=0.01)
    full = tiny()
    drawing = drawn(full, kept("short", short), kept("full", full), chips=1)
    (panels,) = drawing.panels
    answers = {panel.title.split("\n")[0]: panel.estimates for panel in panels}
    assert set(answers) == {"rho 0.1", "rho 0.5", "rho 2"}
    assert answers["rho 2"]["A short"] is None
    assert answers["rho 2"]["B full"] is not None
    assert answers["rho 2"][FILTER] is not None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("network.safetensors", "B is not shown: its network.safetensors is not kept."),
        ("stats.json", "B is not shown: its stats.json is not kept."),
    ],
)
def test_without_weights_a_run_is_left_out(name: str, told: str, tiny: Any, kept: Any) -> None:
    runs = [kept("one", tiny()), kept("two", tiny())]
    (runs[1].folder / name).unlink()
    drawing = drawn(tiny(), *runs, chips=1)
    assert drawing.notes == [told]
    assert list(drawing.panels[0][0].estimates) == [FILTER, "A one"]


def test_runs_that_cannot_see_these_chips_are_left_out(tiny: Any, kept: Any) -> None:
    runs = [kept(name, tiny()) for name in ("bands", "columns", "large", "old", "broken", "fits")]
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda params: params["data"].update(bands=["nir", "red", "green", "blue"]),
        lambda params: params["data"].update(image_columns=["image", "winter"]),
        lambda params: params["data"].update(crop_px=64, chip_size=64),
        lambda params: params.pop("grad_clip"),
        lambda params: params["unet_film"].update(channels=[8, 16]),
    ]
    for run, change in zip(runs, changes, strict=False):
        config = read_json(run.folder / "config.json")
        change(config["params"])
        write_json(run.folder / "config.json", config)
    drawing = drawn(tiny(), *runs, chips=1)
    told = {note.split(" ")[0]: note for note in drawing.notes}
    assert "data.bands are nir, red, green, blue; the workspace's are red, green, blue, nir" in told["A"]
    assert "data.image_columns are image, winter" in told["B"]
    assert "it sees 64 px, and the workspace's chips have 32 px" in told["C"]
    assert "cannot rebuild" in told["D"]
    assert "grad_clip" in told["D"]
    assert "does not fit config.json" in told["E"]
    assert len(told) == len(drawing.notes) == 5
    assert list(drawing.panels[0][0].estimates) == [FILTER, "F fits"]


def test_another_version_of_the_data_is_drawn_and_said(tiny: Any, kept: Any, tmp_path: Path) -> None:
    source = tiny()
    root = tmp_path / "project"
    shutil.copytree(source.root, root)
    path = root / "results/stats/stats.json"
    content = read_json(path)
    content["data"]["md5"] = "a" * 32
    write_json(path, content)
    runs = [kept("one", source), kept("two", source, data_md5="b" * 32), kept("three", source, data_md5=None)]
    drawing = draw(beside(runs, source.params), source.params, root, 1)
    assert len(drawing.panels[0][0].estimates) == 4
    (told,) = drawing.notes
    assert told.endswith("perhaps on these very chips: B.")


def test_without_chips_there_are_words_instead(tiny: Any, kept: Any, tmp_path: Path) -> None:
    source = tiny()
    drawing = draw(beside([kept("one", source)], source.params), source.params, tmp_path, 1)
    assert drawing.panels == []
    assert "results/stats/stats.json is missing; run: dvc repro stats" in drawing.notes[0]
