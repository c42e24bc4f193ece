"""The models of a run before it is opened: which tokens count as possible, what is proven, what a recording asks."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from grpo_mlflow import runs
from grpo_mlflow.config import Resolved, resolve
from grpo_mlflow.runs import models
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tracking import artifact, connect
from grpo_mlflow.training.sources import open_recording
from tests.support import roomy

FEW = ["data.num_train_seeds=16", "data.problems_per_iteration=4", "data.rollouts_per_problem=2", "eval.num_ids=4"]
FEW += ["train.iterations=1", "train.batch_size=8", "train.grad_accum_steps=1", "generation.max_new_tokens=2"]
SERVER = ("generation.backend=vllm_server", "generation.base_url=http://127.0.0.1:9")


def settings(folder: Path, store: str, *words: str) -> Resolved:
    return resolve("tiny", [f"model.train_id={folder}", "model.device=cpu", f"tracking.uri={store}", *FEW, *words])


def load(resolved: Resolved) -> models.Models:
    config = resolved.config
    return models.load(config, None, Processes(Accelerator(cpu=True)), Console(quiet=True), open_recording(config))


def pretend(store: str, run_id: str, was: str, instead: str) -> None:
    """Change a line of the config that a run has stored."""
    path = artifact(connect(store), run_id, "config/resolved.yaml")
    text = path.read_text()
    assert text.count(was) == 1
    path.write_text(text.replace(was, instead))


# Which tokens are possible


def test_a_local_evaluation_beside_a_server_draws_known_tokens_only(tmp_path: Path, store: str) -> None:
    folder = roomy.save(tmp_path / "model", 1)
    found = load(settings(folder, store, *SERVER, "eval.backend=local", "train.kl_coef=0.1"))
    for policy in (found.actor, found.reference):
        assert policy is not None
        assert (policy.sampled, policy.priced) == (roomy.KNOWN, None)  # a server samples all that the model has


def test_recorded_rollouts_are_priced_as_what_sampled_them(tmp_path: Path, store: str) -> None:
    folder = roomy.save(tmp_path / "model", 1)
    live = runs.train(settings(folder, store, "eval.enabled=false"))
    recorded = settings(folder, store, f"data.source=runs:/{live.run_id}", "eval.enabled=false")
    assert load(recorded).actor.priced == roomy.KNOWN
    again = runs.train(recorded)
    of_again = f"data.source=runs:/{again.run_id}"
    pretend(store, live.run_id, "backend: local", "backend: vllm_server")
    for words in ((), SERVER):
        assert load(settings(folder, store, f"data.source=runs:/{live.run_id}", *words)).actor.priced is None
        assert (
            load(settings(folder, store, of_again, *words)).actor.priced is None
        )  # these rollouts are those of `live`
    pretend(store, live.run_id, "backend: vllm_server", "backend: local")
    assert load(settings(folder, store, of_again, *SERVER)).actor.priced == roomy.KNOWN
    pretend(store, again.run_id, f"runs:/{live.run_id}", f"runs:/{'0' * 32}")  # it is gone
    pretend(store, again.run_id, "backend: local", "backend: vllm_server")
    assert load(settings(folder, store, of_again)).actor.priced is None
