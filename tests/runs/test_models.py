"""The models of a run before it is opened: which tokens count as possible, what is proven, what a recording asks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from grpo_mlflow import runs
from grpo_mlflow.config import Resolved, resolve
from grpo_mlflow.errors import ConfigError, ModelError
from grpo_mlflow.runs import models, preflight
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tracking import artifact, connect
from grpo_mlflow.training.sources import open_recording
from grpo_mlflow.types import Problem
from tests.support import broken, roomy
from tests.support.llama_family import DYNAMIC
from tests.support.posing import Repeated

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


# What is proven


def test_a_study_proves_its_reference_too(tmp_path: Path, store: str) -> None:
    folder, other = (roomy.save(tmp_path / name, 1) for name in ("model", "other"))
    broken.edited("config.json", rope_parameters=DYNAMIC, max_position_embeddings=32)(other)
    words = ("generation.max_new_tokens=40", "eval.enabled=false", f"model.ref_id={other}")
    resolved = settings(folder, store, *words, "train.kl_coef=0.1")
    for prove in (load, lambda resolved: models.require(resolved.config, Console(quiet=True))):
        with pytest.raises(ModelError, match=f"model '{other}': in texts of .* stretched"):
            prove(resolved)
    models.require(settings(folder, store, *words, "train.kl_coef=0").config, Console(quiet=True))


# What a recording asks


class Untrained(Repeated):
    """Has no training problem that a template could render."""

    def problem(self, split: str, seed: int) -> Problem:
        if split == "train" and seed > 0:  # which each task of one's own is tried with
            raise AssertionError("a run on recorded rollouts makes no training problems")
        return super().problem(split, seed)


NO_TRAINING = ("data.task=python:tests.runs.test_models:Untrained", "eval.replicates=2")


def record(folder: Path, store: str, change: Callable[[Any], object] = lambda _: None) -> str:
    """Return the source of a run whose recorded groups were changed."""
    live = runs.train(settings(folder, store, "eval.enabled=false"))
    path = artifact(connect(store), live.run_id, "rollouts/iter_000.jsonl")
    groups = [json.loads(line) for line in path.read_text().splitlines()]
    change(groups)
    path.write_text("".join(json.dumps(group) + "\n" for group in groups))
    return f"data.source=runs:/{live.run_id}"


def test_a_run_on_a_recording_meets_its_problems_and_no_others(tmp_path: Path, store: str) -> None:
    folder = roomy.save(tmp_path / "model", 1)
    source = record(folder, store)
    for evaluated in ("eval.enabled=true", "eval.enabled=false"):
        resolved = settings(folder, store, source, evaluated, *NO_TRAINING)
        models.require(resolved.config, Console(quiet=True))
        runs.train(resolved)


def test_tokens_of_a_recording_that_have_no_embedding_are_refused(tmp_path: Path, store: str) -> None:
    def change(groups: Any) -> None:
        groups[2]["rollouts"][1]["token_ids"][0] = 999

    folder = roomy.save(tmp_path / "model", 1)
    resolved = settings(folder, store, record(folder, store, change))
    for prove in (load, lambda resolved: models.require(resolved.config, Console(quiet=True))):
        with pytest.raises(
            ModelError, match=r"data.source = 'runs:/.*: a rollout of arithmetic/train/\d+ has token 999"
        ):
            prove(resolved)


def test_rollouts_of_a_recording_that_are_too_long_are_refused(tmp_path: Path, store: str) -> None:
    folder = roomy.save(tmp_path / "model", 1)
    source = record(folder, store, lambda groups: groups[0]["prompt_token_ids"].extend([5] * 200))
    broken.edited("config.json", max_position_embeddings=128)(folder)
    with pytest.raises(
        ConfigError, match=r"data.source = 'runs:/.*: .*arithmetic/train/\d+ has \d+ tokens.* 128 posit"
    ):
        load(settings(folder, store, source))


# Arguments of the template


@pytest.mark.parametrize("trains", [True, False])
def test_only_problems_of_the_command_show_idle_arguments(tmp_path: Path, trains: bool) -> None:
    found = roomy.load(tmp_path / "model", 1)
    seen: list[str] = []

    class Seen(Repeated):
        def problem(self, split: str, seed: int) -> Problem:
            seen.append(split)
            return super().problem(split, seed)

    config = resolve("tiny", []).config
    assert preflight.idle_arguments(config, Seen(), found, trains=trains) is None
    assert seen == []  # there are no arguments
    asked = replace(found, template_settings={"enable_thinkin": False})
    assert "enable_thinkin" in str(preflight.idle_arguments(config, Seen(), asked, trains=trains))
    assert {*seen} == {"train" if trains else "eval"}
