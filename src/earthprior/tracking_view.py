"""A saved view of MLflow's page of runs: the columns and charts by which runs are compared.

MLflow keeps saved views as tags of the experiment. One from another version takes what it knows of them.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

NAME, KEY = "EarthPrior", "earthprior"
BEST, JUDGED = "val/gain_db/best", "evaluate/gain_db/mean"
BY_LEVEL = "gain_db_by_rho_percent"
"""A curve over noise levels: its steps are 100 rho."""

CHIPS_SEEN, EPOCH = "time/chips_seen", "time/epoch"
"""What curves can be drawn over instead of optimizer steps, which are worth as much as their batches."""

PICTURES = "denoising"

_RUN_NAME = "attributes.`Run Name`"
_METRICS = (BEST, JUDGED, "evaluate/probe/linear/network/average_precision")
_PARAMS = ("network", "loss_fn", "lr", "batch_size", "epochs", "seed")


def page(experiment_id: str) -> str:
    """Where MLflow shows the experiment's runs in this view, after the server's address."""
    # Without the type the side bar offers what is for language models.
    return f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={KEY}"


def tags(experiment_id: str) -> dict[str, str]:
    """The tags that an experiment gets where it lacks them: the view, and a description that leads to it."""
    state = json.dumps(_state())
    packed = "deflate;" + base64.b64encode(zlib.compress(state.encode(), 9)).decode()
    # The menu of views shows `name`; versions before that menu read the state itself.
    view = json.dumps({**_state(), "name": NAME, "createdAt": 0, "state": packed})
    link = page(experiment_id).removeprefix("/")
    note = f"EarthPrior's runs, best gain first: [table]({link}), [charts]({link}&compareRunsMode=CHART)"
    return {f"mlflow.sharedViewState.{KEY}": view, "mlflow.note.content": note}


def _state() -> dict[str, Any]:
    columns = [f"metrics.`{name}`" for name in _METRICS] + [f"params.`{name}`" for name in _PARAMS]
    charts = [
        _line("val/gain_db/mean"),
        _line(f"evaluate/{BY_LEVEL}", xAxisScaleType="log", useGlobalXaxisKey=False),
        _line(f"val/{BY_LEVEL}", xAxisScaleType="log", useGlobalXaxisKey=False),
        _chart("BAR", metricKey=BEST),
        _chart("BAR", metricKey=JUDGED),
        _chart("IMAGE", "pictures", imageKeys=[PICTURES], step=0, showRunParams=False),
        _chart(
            "DIFFERENCE", "params", chartName="What differs", compareGroups=["Parameters"], showDifferencesOnly=True,
            showChangeFromBaseline=True, baselineColumnUuid="",
        ),
    ]  # fmt: skip
    sections = [
        _section("gain", "Gain", 3, 360),
        _section("pictures", "Pictures", 1, 520),
        _section("params", "What differs", 1, 400),
    ]
    return {
        "selectedColumns": columns,
        "columnOrder": [_RUN_NAME, *columns],
        "columnWidths": {_RUN_NAME: 420, **{f"metrics.`{name}`": 150 for name in _METRICS}},
        "orderByKey": f"metrics.`{BEST}`",
        "orderByAsc": False,
        "runsHiddenMode": "FIRST_20_RUNS",
        "isAccordionReordered": True,
        "compareRunSections": sections,
        "compareRunCharts": [chart | {"uuid": f"{NAME}-{number}"} for number, chart in enumerate(charts)],
        "globalLineChartConfig": {"xAxisKey": "metric", "selectedXAxisMetricKey": CHIPS_SEEN, "lineSmoothness": 0},
    }


def _section(key: str, name: str, columns: int, height_px: int) -> dict[str, Any]:
    shape = {"columns": columns, "cardHeight": height_px}
    return {"uuid": key, "name": name, "display": True, "isReordered": True, **shape}


def _chart(kind: str, section: str = "gain", **options: Any) -> dict[str, Any]:
    always = {"type": kind, "metricSectionId": section, "runsCountToCompare": 20}
    return {**always, "deleted": False, "isGenerated": False, **options}


def _line(metric: str, **options: Any) -> dict[str, Any]:
    defaults = {
        "selectedMetricKeys": [metric], "lineSmoothness": 0, "xAxisScaleType": "linear", "scaleType": "linear",
        "xAxisKey": "step", "selectedXAxisMetricKey": "", "yAxisKey": "metric", "yAxisExpressions": [], "range": {},
        "ignoreOutliers": False, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True,
    }  # fmt: skip
    return _chart("LINE") | {"metricKey": metric} | defaults | options
