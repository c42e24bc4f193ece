"""Saved views of an experiment, which MLflow keeps in its tags: which runs, columns and charts the UI shows.

A view is the JSON of the UI's own state, which MLflow documents nowhere: it was read from what version 3.17 saves. What
another version does not know it passes over, and shows its default instead.
"""

from __future__ import annotations

import base64
import json
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PREFIX = "mlflow.sharedViewState."
_LONGEST = 20_000  # characters of a tag of an experiment
Section = tuple[str, Sequence[Mapping[str, Any]]]
"""A heading, and the charts below it."""


@dataclass(frozen=True, slots=True)
class View:
    """A view by its name.

    Attributes:
        key: names it in addresses; letters, digits and dashes.
        filter: which runs, as MLflow's search takes it.
        order: the column that they are sorted by, the greatest first.
        columns: those shown beside the names, in order.
        sections: the charts. Every metric without one has a chart of its own after them, but for those of `hidden`.
    """

    key: str
    name: str
    filter: str
    order: str
    columns: Sequence[str]
    sections: Sequence[Section]
    hidden: Sequence[str] = ()

    def tag(self) -> tuple[str, str]:
        """Return the name of its tag, and the state in it."""
        return f"{PREFIX}{self.key}", json.dumps(self._state(), separators=(",", ":"), sort_keys=True)

    def _state(self) -> dict[str, Any]:
        sections, charts = [], []
        for place, (heading, inside) in enumerate(self.sections):
            uuid = f"{self.key}-{place}"
            sections.append({"uuid": uuid, "name": heading, **_SECTION})
            charts += [{**_CHART, **chart, "metricSectionId": uuid} for chart in inside]
        last = sections[-1]["uuid"] if sections else ""
        gone = [{**line(metric), **_CHART, "deleted": True, "isGenerated": True} for metric in self.hidden]
        charts += [{**chart, "metricSectionId": last} for chart in gone]
        for place, chart in enumerate(charts):
            chart["uuid"] = f"{self.key}-chart-{place}"
        return {
            **_STATE,
            "searchFilter": self.filter,
            "orderByKey": self.order,
            "selectedColumns": [*self.columns],
            "compareRunCharts": charts,
            "compareRunSections": sections,
        }


_SECTION = {"display": True, "isReordered": True, "deleted": False, "isGenerated": False}
_CHART = {"runsCountToCompare": 20, "deleted": False, "isGenerated": False, "displayName": ""}
_STATE: Mapping[str, Any] = {
    "orderByAsc": False,
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "datasetsFilter": [],
    "modelVersionFilter": "All Runs",
    "columnOrder": [],
    "columnWidths": {},
    "runsExpanded": {},
    "runsPinned": [],
    "runsHidden": [],
    "runsVisibilityMap": {},
    "runsHiddenMode": "FIRST_20_RUNS",
    "viewMaximized": False,
    "runListHidden": False,
    "isAccordionReordered": True,
    "groupBy": None,
    "groupsExpanded": {},
    "autoRefreshEnabled": True,
    "useGroupedValuesInCharts": True,
    "hideEmptyCharts": True,
    "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
}


def line(*metrics: str, log: bool = False) -> dict[str, Any]:
    """Return a chart of metrics over the iterations; `log` makes its vertical axis logarithmic."""
    return {
        "type": "LINE",
        "metricKey": metrics[0],
        "selectedMetricKeys": [*metrics],
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "log" if log else "linear",
        "lineSmoothness": 0,
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": False,
        "ignoreOutliers": False,
        "selectedXAxisMetricKey": "",
        "range": {},
    }


def scatter(param: str, metric: str) -> dict[str, Any]:
    """Return a chart of a metric against a parameter: one point per run."""
    return {
        "type": "SCATTER",
        "xaxis": {"key": param, "type": "PARAM"},
        "yaxis": {"key": metric, "type": "METRIC"},
    }


def parallel(params: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """Return a chart of parallel axes: one line per run."""
    return {"type": "PARALLEL", "selectedParams": [*params], "selectedMetrics": [*metrics], "showAllRuns": False}


def bar(metric: str) -> dict[str, Any]:
    """Return a chart of the last value of a metric: one bar per run."""
    return {"type": "BAR", "metricKey": metric}


def metric(key: str) -> str:
    """Return a metric as a column."""
    return f"metrics.`{key}`"


def param(key: str) -> str:
    """Return a parameter as a column."""
    return f"params.`{key}`"


def attribute(key: str) -> str:
    """Return an attribute as a column, such as `Dataset`."""
    return f"attributes.`{key}`"


def key_of(text: str) -> str:
    """Return a text as the key of a view."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()


def packed(name: str, state: str, known: str | None) -> str | None:
    """Return the value of a view's tag; None where the `known` one has the state already, or it is too large.

    What somebody saves in the UI under another name has another tag, so it is theirs to keep.
    """
    then = _unpacked(known)
    if then is not None and then.get("state") == state:
        return None
    now = int(time.time() * 1000)
    began = then["createdAt"] if then is not None else now
    value = json.dumps({"name": name, "createdAt": began, "updatedAt": now, "state": _deflated(state)})
    return value if len(value) <= _LONGEST else None


def _deflated(text: str) -> str:
    return "deflate;" + base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _unpacked(value: str | None) -> dict[str, Any] | None:
    if value is None:
        return None
    try:
        found = json.loads(value)
        state = zlib.decompress(base64.b64decode(found["state"].removeprefix("deflate;"))).decode()
        return {**found, "state": state, "createdAt": int(found["createdAt"])}
    except (ValueError, TypeError, KeyError, AttributeError, zlib.error):  # not written by us
        return None
