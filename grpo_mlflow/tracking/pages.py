"""Addresses of pages of the MLflow UI: without `workflowType` in them they open its mode for traces, without runs."""

from __future__ import annotations

from urllib.parse import quote, urlencode

_MODE = {"workflowType": "machine_learning"}


def of_run(experiment_id: str, run_id: str) -> str:
    """Return where the overview of a run is, after the address of the UI."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?{urlencode(_MODE)}"


def of_model(name: str) -> str:
    """Return where a registered model is, after the address of the UI."""
    return f"#/models/{quote(name, safe='')}"


def of_view(experiment_id: str, key: str) -> str:
    """Return where a saved view (`views`) of an experiment is, after the address of the UI."""
    query = {**_MODE, "compareRunsMode": "CHART", "viewStateShareKey": key}
    return f"#/experiments/{experiment_id}/runs?{urlencode(query)}"
