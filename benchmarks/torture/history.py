"""What a run or a study has left, in a form that can be compared with that of an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import re
import urllib.request
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import optuna
from mlflow.entities import Run

from benchmarks.torture.works import artifact_files
from grpo_mlflow import tracking

_LEFT = re.compile(r"(^|/)\.(writing|replaced|making)-|\.part$|(^|/)(spool|refused)\.jsonl$")
_TIMED = ("perf/", "system/")  # their steps are compared, not their values
_OWN_TAGS = (
    *("grpo.folder", "grpo.host", "grpo.owner", "grpo.claim.", "grpo.note"),
    *("grpo.resumed_with", "grpo.evaluated_model", "grpo.evaluated_run"),
)
_OWN_PARAMS = ("tracking.uri",)
_RESULT = ("model.safetensors", "optimizer.safetensors")
_URI = "sqlite:///mlflow.db"


def read(folder: Path, address: str) -> dict[str, Any]:
    """Return what the case in a folder has left: its runs by name, what is wrong with them, its study."""
    client = tracking.connect(_URI)
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = sorted(client.search_runs(experiments), key=lambda run: run.info.start_time)
    names = {run.info.run_id: _name(run) for run in runs}
    wrong: list[str] = []
    found: dict[str, Any] = {}
    for run in runs:
        name, files = _name(run), _files(run, folder, address)
        if run.info.status == "RUNNING":
            wrong.append(f"{name} is left RUNNING")
        curves = _curves(client, run.info.run_id)
        wrong += [f"{name}: {key} has step {step} {n} times" for key, step, n in _doubled(curves)]
        wrong += _unreadable(name, files)
        if run.info.status == "FINISHED" or name not in found:
            found[name] = {"status": run.info.status, "curves": _compared(curves), "files": _kept(files)}
            found[name]["models"] = _models(client, run)
            found[name]["tags"] = _tags(run, {**names, str(folder): "."})
            found[name]["params"] = {k: v for k, v in run.data.params.items() if k not in _OWN_PARAMS}
            found[name]["result"] = {k: h for k, (h, _) in files.items() if k.endswith(_RESULT)}
    wrong += [f"{path} is left" for path in _left_over(folder)]
    return {"runs": found, "wrong": wrong, "study": _study(client, runs) if (folder / "optuna.db").exists() else {}}


def statuses(killed: int) -> list[tuple[str, str, str]]:
    """Return id, name and status of each run in the store of this folder.

    Args:
        killed: a process that could not end its runs; those that nobody has taken since are left out.
    """
    client = tracking.connect(_URI)
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = [run for run in client.search_runs(experiments) if _owner(run) != killed]
    return [(run.info.run_id, _name(run), run.info.status) for run in runs]


def _owner(run: Run) -> int:
    return int(json.loads(run.data.tags.get("grpo.owner", "{}")).get("pid", -1))


def differences(one: Mapping[str, Any], other: Mapping[str, Any], where: str = "") -> list[str]:
    """Return where two histories differ: `one` is that of the undisturbed run."""
    lines = []
    for key in sorted({*one, *other}, key=str):
        place = f"{where}/{key}"
        if key not in other or key not in one:
            lines.append(f"{place}: {'lost' if key in one else 'not in the undisturbed'}")
        elif isinstance(one[key], Mapping) and isinstance(other[key], Mapping):
            lines += differences(one[key], other[key], place)
        elif one[key] != other[key]:
            lines.append(f"{place}: {other[key]} instead of {one[key]}"[:400])
    return lines


def _name(run: Run) -> str:
    parent = "mlflow.parentRunId" in run.data.tags
    return str(run.info.run_name) if parent else str(run.data.tags.get("grpo.kind", "run"))


def _tags(run: Run, names: Mapping[str, str]) -> dict[str, str]:
    """Return what is said of a run, with other runs, and the folder, by their names."""
    found = {key: value for key, value in run.data.tags.items() if key.startswith(("grpo.", "optuna."))}
    for own, name in names.items():
        found = {key: value.replace(own, name) for key, value in found.items()}
    return {key: value for key, value in found.items() if not key.startswith(_OWN_TAGS)}


def _models(client: mlflow.MlflowClient, run: Run) -> list[str]:
    """Return the checkpoints of a run that are models, one as often as it is there."""
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    return sorted(f"{model.tags['grpo.checkpoint']} {model.status}" for model in found)


def _curves(client: mlflow.MlflowClient, run_id: str) -> dict[str, list[tuple[int, float]]]:
    keys = client.get_run(run_id).data.metrics
    return {key: sorted((p.step, p.value) for p in client.get_metric_history(run_id, key)) for key in keys}


def _doubled(curves: Mapping[str, list[tuple[int, float]]]) -> list[tuple[str, int, int]]:
    counted = {key: Counter(step for step, _ in points) for key, points in curves.items() if "system/" not in key}
    return [(key, step, n) for key, steps in counted.items() for step, n in steps.items() if n > 1]


def _compared(curves: Mapping[str, list[tuple[int, float]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, points in curves.items():
        timed = key.startswith(_TIMED)
        found[key] = [step for step, _ in points] if timed else [[step, value] for step, value in points]
    return found


def _files(run: Run, folder: Path, address: str) -> dict[str, tuple[str, str]]:
    """Return of each artifact of a run its hash, and its text if it is a manifest."""
    root = Path(run.info.artifact_uri.removeprefix("file://"))
    if run.info.artifact_uri.startswith("mlflow-artifacts:"):  # a real server keeps them beside its database
        root = folder / "served" / run.info.artifact_uri.removeprefix("mlflow-artifacts:/")
    if not run.info.artifact_uri.startswith("http"):
        paths = [path for path in root.rglob("*") if path.is_file()]
        return {str(path.relative_to(root)): (_sha256(path), _text(path)) for path in paths}
    with urllib.request.urlopen(artifact_files(address, folder.name)) as stream:
        every = json.load(stream)
    prefix = f"{run.info.run_id}/artifacts/"
    return {name.removeprefix(prefix): tuple(each) for name, each in every.items() if name.startswith(prefix)}


def _text(path: Path) -> str:
    return path.read_text() if path.name == "manifest.json" else ""


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _unreadable(name: str, files: Mapping[str, tuple[str, str]]) -> list[str]:
    """Compare the files of each checkpoint with its manifest; one without is as unreadable as one that differs."""
    wrong = []
    folders = {match[0] for file in files if (match := re.match(r"checkpoints/iter_\d+", file))}
    for folder in sorted(folders):
        text = files.get(f"{folder}/manifest.json", ("", ""))[1]
        if not text:
            wrong.append(f"{name}: {folder} has no manifest")
            continue
        listed = json.loads(text)["files"]
        wrong += [
            f"{name}: {folder}/{file} differs from its manifest"
            for file, entry in listed.items()
            if files.get(f"{folder}/{file}", ("", ""))[0] != entry["sha256"]
        ]
    return wrong


def _kept(files: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in files if not name.startswith("checkpoints/abandoned-"))


def _left_over(folder: Path) -> list[str]:
    paths = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(path for path in paths if _LEFT.search(path))


def _study(client: mlflow.MlflowClient, runs: list[Run]) -> dict[str, Any]:
    """Return the trials that have ended, and the champion by the name of its run."""
    names = {run.info.run_id: run.info.run_name for run in runs}
    study = optuna.load_study(study_name="tortured", storage="sqlite:///optuna.db")
    trials = {str(t.number): [t.state.name, t.values, t.params, t.intermediate_values] for t in study.trials}
    versions = client.search_model_versions("name = 'tortured'")
    try:
        champion = client.get_model_version_by_alias("tortured", "champion")
    except mlflow.MlflowException:
        return {"trials": json.loads(json.dumps(trials)), "champion": None, "versions": len(versions)}
    source = [names[champion.run_id], champion.source.rpartition("/")[2], sorted(champion.tags)]
    return {"trials": json.loads(json.dumps(trials)), "champion": source, "versions": len(versions)}
