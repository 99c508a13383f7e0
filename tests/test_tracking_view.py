"""The saved view: what MLflow's page reads of it."""

from __future__ import annotations

import base64
import json
import zlib

from earthprior import tracking_view
from earthprior.params import known_keys

# What an experiment's tag may hold in versions of MLflow before 3.15.
TAG_LENGTH = 5000


def saved() -> dict[str, object]:
    return json.loads(tracking_view.tags("7")["mlflow.sharedViewState.earthprior"])


def test_the_view_has_a_name_and_a_state_for_the_menu_and_for_versions_without_one() -> None:
    view = saved()
    assert view["name"] == "EarthPrior"
    assert isinstance(view["createdAt"], int)
    packed = str(view["state"])
    assert packed.startswith("deflate;")
    state = json.loads(zlib.decompress(base64.b64decode(packed.removeprefix("deflate;"))))
    assert state == {name: value for name, value in view.items() if name not in ("name", "createdAt", "state")}


def test_tags_fit() -> None:
    assert all(len(text) < TAG_LENGTH for text in tracking_view.tags("123456").values())


def test_every_column_and_chart_is_of_something_that_is_logged() -> None:
    view = saved()
    params = [name[len("params.`") : -1] for name in view["selectedColumns"] if name.startswith("params")]  # type: ignore[attr-defined]
    assert params
    assert set(params) <= set(known_keys())
    charts = view["compareRunCharts"]
    sections = {section["uuid"] for section in view["compareRunSections"]}  # type: ignore[attr-defined]
    assert {chart["metricSectionId"] for chart in charts} == sections  # type: ignore[attr-defined]
    assert len({chart["uuid"] for chart in charts}) == len(charts)  # type: ignore[attr-defined,arg-type]
    assert tracking_view.page("7").startswith("/#/experiments/7/runs?")
    assert "(#/experiments/7/runs?" in tracking_view.tags("7")["mlflow.note.content"]
