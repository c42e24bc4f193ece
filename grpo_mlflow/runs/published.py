"""What MLflow knows of the checkpoints that a training run keeps: they are models, and the best may be registered."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from grpo_mlflow import tracking
from grpo_mlflow.config import Config, flatten
from grpo_mlflow.errors import ModelError, one_line
from grpo_mlflow.tracking import Kept, Tracker
from grpo_mlflow.tracking.models import AS
from grpo_mlflow.tracking.registry import WEIGHTS_TAG
from grpo_mlflow.training import evaluation
from grpo_mlflow.training.checkpoint import Checkpoint, CheckpointStore, digest_of_weights, name_of, reading

_TOLD = ("data.task", "model.train_id", "model.lora.rank", "train.lr", "train.iterations", "seed")
log = logging.getLogger(__name__)


def publish(config: Config, store: CheckpointStore, tracker: Tracker) -> None:
    """Make the best and the last checkpoint of a run that has ended models, and register the better one if asked to.

    Repeated, as after a resume, it changes nothing that is still true. Training has ended well by then, so
    a full disk or a damaged file is a warning.
    """
    try:
        _publish(config, store, tracker)
    except (OSError, ModelError) as error:
        log.warning("not all checkpoints that are kept became models of MLflow: %s", one_line(error))


def _publish(config: Config, store: CheckpointStore, tracker: Tracker) -> None:
    checkpoints = store.all()
    if not checkpoints:  # they are on another machine, where the run began
        return
    best, last = store.best(), checkpoints[-1]
    chosen = best or last
    tracker.models(tracker.run_id, kept(config, tracker.run_id, tracker.run_dir, {"best": best, "last": last}))
    if (name := config.tracking.register) is None:
        return
    address = f"models:/{name}@{tracking.CHAMPION}"
    about = f"{_verdict(config, chosen)}; the best checkpoint of its run. The newest version is {address}"
    tags = {
        "description": about,
        tracking.STUDY_TAG: tracker.run_id,
        WEIGHTS_TAG: digest_of_weights(chosen.path),
    }
    store.hold(chosen.path.name, f"models:/{name}")
    tracker.register(name, tracking.CHAMPION, tracker.run_id, f"checkpoints/{chosen.path.name}", tags)


def kept(
    config: Config, run_id: str, run_dir: Path, chosen: Mapping[str, Checkpoint | None], verdict: str | None = None
) -> list[Kept]:
    """Return checkpoints of a run by what they are chosen as, each once, with the figures of their evaluations.

    `verdict` says how good they are, where that is not what their run found.
    """
    found = {checkpoint.path.name: checkpoint for checkpoint in chosen.values() if checkpoint is not None}
    roles = {name: [role for role, each in chosen.items() if each and each.path.name == name] for name in found}
    return [
        Kept(
            checkpoint=name,
            name=_name(config, name),
            weights=digest_of_weights(checkpoint.path),
            step=checkpoint.iteration,
            params={**_params(config), "iteration": str(checkpoint.iteration)},
            tags={
                AS: ", ".join(roles[name]),
                tracking.NOTE: _note(verdict or _verdict(config, checkpoint), run_id, name),
            },
            metrics=_figures(run_dir / f"metrics/eval_{name}.json"),
        )
        for name, checkpoint in found.items()
    ]


def owner(source: str | Path) -> tuple[str, str] | None:
    """Return the run and the name of the checkpoint in a folder; None where it is none of a run."""
    state = Path(source) / "trainer" / "state.json"
    if not state.is_file():
        return None
    try:
        with reading(state):
            content = json.loads(state.read_text())
            run_id, iteration = content["run_id"], content["progress"]["iteration"]
    except ModelError:
        return None
    return (str(run_id), name_of(iteration)) if run_id else None  # the folder may have another name, as a download


def _name(config: Config, checkpoint: str) -> str:
    """Return what MLflow lists a model as; it takes no `/`, `:`, `.`, `%` or quotes in such a name."""
    words = (config.data.task, Path(config.model.train_id).name, checkpoint)
    return " ".join(re.sub(r"[^\w+-]+", "-", word).strip("-") for word in words)


def _verdict(config: Config, checkpoint: Checkpoint) -> str:
    score = "not evaluated" if checkpoint.score is None else f"pass@1 {checkpoint.score:.3f}"
    return f"{score} after {checkpoint.iteration} iterations of {config.data.task}"


def _note(verdict: str, run_id: str, checkpoint: str) -> str:
    """Return the description of a model: how good it is, and how it is used."""
    address = tracking.checkpoint_address(run_id, checkpoint)
    return (
        f"{verdict}\n\n"
        f"    mlflow models serve -m {address} --env-manager local\n\n"
        f"    mlflow.pyfunc.load_model('{address}').predict('a question')\n"
    )


def _params(config: Config) -> dict[str, str]:
    flat = flatten(config.model_dump(mode="json"))
    return {key: str(flat[key]) for key in _TOLD if flat[key] is not None}


def _figures(path: Path) -> dict[str, float]:
    """Return the metrics of an evaluation from the file that it has left; none where it was not evaluated here.

    Of a damaged file there are none either, with a warning: the run itself has them.
    """
    if not path.is_file():
        return {}
    try:
        with reading(path):
            figures = json.loads(path.read_text())
            return evaluation.named({key: value for key, value in figures.items() if key != "iteration"})
    except ModelError as error:
        log.warning("a model of MLflow stays without figures: %s", one_line(error))
        return {}
