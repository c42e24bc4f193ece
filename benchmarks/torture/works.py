"""What is killed: a run of four iterations and a study of two trials, as their commands, begun and gone on with.

A third work is a run of two minutes, for stores that are away for one.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import mlflow

from benchmarks.torture import artifacts, slow
from grpo_mlflow import tasks
from grpo_mlflow.cli import command, optimize, train, upload
from grpo_mlflow.config import resolve
from grpo_mlflow.model import tiny
from grpo_mlflow.tasks.settings import task_settings

RUN = (
    *("--config", "tiny", "model.tiny.hidden_size=32", "model.tiny.layers=1", "model.tiny.heads=2"),
    *(
        "model.tiny.steps=150",
        "model.tiny.lr=3e-3",
        "model.device=cpu",
        "data.arithmetic.digits=1",
        "data.num_train_seeds=64",
    ),
    *("data.problems_per_iteration=4", "data.rollouts_per_problem=4", "train.iterations=4", "train.batch_size=16"),
    *("train.grad_accum_steps=1", "train.lr_warmup_steps=0", "train.lr=1e-3", "generation.max_new_tokens=4"),
    *("eval.num_ids=8", "eval.replicates=2", "eval.ks=[1,2]", "eval.interval=2"),
    *("checkpoint.save_interval=1", "checkpoint.keep_last=1"),
)
_STUDY = (
    *("search.space=train.lr=[1e-4,1e-3]", "search.sampler=grid", "search.n_trials=2", "search.pruner=none"),
    *("search.finalists=1", "search.confirm_num_ids=4", "search.confirm_replicates=2", "search.study_name=tortured"),
    *("search.storage=sqlite:///optuna.db", "search.k=1", "train.iterations=2", "eval.interval=1"),
)
SLOW_ITERATIONS = 120
_SLOW = (
    *("data.task=python:benchmarks.torture.slow:Slow", f"train.iterations={SLOW_ITERATIONS}", "eval.interval=40"),
    *("checkpoint.save_interval=10", "checkpoint.keep_last=2"),
)
_PAUSE = "0.25"  # of each of the four problems of an iteration
REMOTE, STORE = "remote", "sqlite:///mlflow.db"


def prepare(folder: Path) -> None:
    """Make the model, and an empty store to copy, once for all cases."""
    sys.path.insert(0, str(Path(__file__).parents[2]))  # where the slow task is found
    for words in (RUN, (*RUN, *_SLOW)):
        config = resolve(RUN[1], list(words[2:])).config
        tiny.ensure(config.model.tiny, tasks.of(config), task_settings(config))
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    if not (folder / "empty.db").exists():
        mlflow.MlflowClient(f"sqlite:///{folder.absolute()}/half-made.db").search_experiments()
        os.rename(folder / "half-made.db", folder / "empty.db")


def make(folder: Path, template: Path, work: str, address: str) -> None:
    """Make the folder of a case with an empty store, and where it has a server of artifacts, an experiment on that."""
    folder.mkdir(parents=True)
    shutil.copyfile(template / "empty.db", folder / "mlflow.db")
    os.chdir(folder)
    if work in ("remote", "spool"):
        client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
        client.create_experiment(REMOTE, f"{address}/{folder.name}")


def _words(work: str, uri: str) -> list[str]:
    words = [*RUN, f"tracking.uri={uri}"]
    if work == "slow":
        os.environ[slow.PAUSE] = _PAUSE
        return [*words, *_SLOW]
    if work == "study":
        return [*words, *_STUDY]
    return [*words, f"tracking.experiment={REMOTE}"] if work in ("remote", "spool") else words


def begin(work: str, uri: str = STORE) -> None:
    """Be the command that begins the work."""
    sys.argv[1:] = _words(work, uri)
    command.run(optimize.main if work == "study" else train.main)


def go_on(work: str, uri: str = STORE) -> None:
    """Be the command that goes on with it: the study's own again, or a resume of its run, or without one the first."""
    client = mlflow.MlflowClient(uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    found = client.search_runs(experiments, "tags.`grpo.kind` = 'train'", order_by=["attributes.start_time DESC"])
    if work == "study" or not found or (found[0].data.tags.get("grpo.ended") == "FAILED" and not _begun(found[0])):
        return begin(work, uri)
    sys.argv[1:] = [f"resume={found[0].info.run_id}", f"tracking.uri={uri}"]
    return command.run(train.main)


def send(uri: str) -> None:
    """Be the command that sends what was kept while MLflow was away."""
    sys.argv[1:] = ["--folder", ".", f"tracking.uri={uri}"]
    command.run(upload.main)


def _begun(run: mlflow.entities.Run) -> bool:
    """Return whether a run has got as far as to its config, without which it can only be ended."""
    root = Path(run.data.tags.get("grpo.folder", "/nowhere"))
    return (root / "config" / "resolved.yaml").exists()


def artifact_files(address: str, case: str) -> str:
    """Return the address of the list of all that a case has on the server."""
    return f"{address.removesuffix(artifacts.ROOT)}/?all={case}"
