"""The loop on scripted parts: what it asks of them in which order, and what it saves when it is ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator

from grpo_mlflow.config import Config, resolve
from grpo_mlflow.errors import Pruned, ServerFailed, UserError
from grpo_mlflow.generation import Sampling
from grpo_mlflow.model import loading
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runs import messages
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tasks import Task
from grpo_mlflow.tracking import NullTracker
from grpo_mlflow.training import state
from grpo_mlflow.training.checkpoint import CheckpointStore, read
from grpo_mlflow.training.evaluation import Evaluation
from grpo_mlflow.training.iteration import Iteration, track
from grpo_mlflow.training.learner import Learner, Sizes
from grpo_mlflow.training.observations import Watch
from grpo_mlflow.training.parts import Parts
from grpo_mlflow.training.progress import Progress
from grpo_mlflow.training.sources import Collected
from grpo_mlflow.training.trainer import Trainer
from grpo_mlflow.types import Completion, Group, Problem, Prompt, Split, Verdict
from tests.support.groups import fresh, make_groups

Events = list[tuple[object, ...]]


class One(Task):
    """Asks the same in every problem; every answer is right."""

    name = "one"

    def problem(self, split: Split, seed: int) -> Problem:
        return Problem(f"one/{seed}", seed, ({"role": "user", "content": "1"},))

    def verify(self, problem: Problem, text: str) -> Verdict:
        return Verdict(1.0, {}, True, text)

    def reference_answer(self, problem: Problem) -> str:
        return "1"


class Source:
    """Gives the same groups in each iteration; fails in `fails`, with `error`."""

    error: BaseException = ServerFailed("as asked")

    def __init__(self, events: Events, fails: int | None = None) -> None:
        self.events, self._fails, self._groups = events, fails, make_groups(2)

    def groups(self, version: int) -> Collected:
        self.events.append(("groups", version))
        if version == self._fails:
            raise self.error
        return Collected(self._groups, self._groups)

    def begin(self, version: int) -> None:
        self.events.append(("begin", version))

    def settle(self) -> None:
        self.events.append(("settle",))

    def stop(self) -> None:
        self.events.append(("stop",))

    def save(self, path: Path, version: int) -> None:
        self.events.append(("save",))

    def metrics(self) -> dict[str, float]:
        return {"met": 1.0}


class Evaluator:
    """Answers everything alike."""

    def __init__(self, events: Events) -> None:
        self.events = events

    def generate(
        self, prompts: Sequence[Prompt], k: int, sampling: Sampling, seed: int, key: tuple[str | int, ...]
    ) -> list[list[Completion]]:
        self.events.append(("evaluate",))
        return [[Completion((7, 2), "1", (-1.0, -1.0), "stop", 0)] * k for _ in prompts]

    def sync(self, version: int) -> None:
        self.events.append(("sync evaluator", version))

    def metrics(self) -> dict[str, float]:
        return {"met": 2.0}


class Updates(Learner):
    """Notes its updates, and makes them; `fails` names an iteration, and a side of its steps to fail on."""

    events: Events
    fails: tuple[int, str] | None = None

    def update(self, groups: Sequence[Group], seed: int, iteration: int) -> dict[str, float | None]:
        self.events.append(("update", iteration))
        if self.fails == (iteration, "before"):
            raise MemoryError("as asked")
        metrics = super().update(groups, seed, iteration)
        if self.fails == (iteration, "after"):
            raise MemoryError("as asked")
        return metrics


class Curves(NullTracker):
    """Keeps the curve of one metric."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__("", run_dir)
        self.met: list[tuple[int, float]] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.met += [(step, value) for name, value in values.items() if name == "perf/met"]


def config_of(*overrides: str) -> Config:
    words = ["train.iterations=2", "train.lr_warmup_steps=0", "eval.num_ids=2", "eval.replicates=4", "eval.interval=2"]
    words += ["data.problems_per_iteration=2", "data.rollouts_per_problem=4", "checkpoint.save_interval=1"]
    return resolve("tiny", [*words, "train.kl_coef=0", *overrides]).config


def parts_of(policy: Policy, folder: Path, events: Events, *overrides: str, fails: int | None = None) -> Parts:
    config, accelerator = config_of(*overrides), Accelerator(cpu=True)
    learner = Updates(policy, None, accelerator, config.train, Sizes(1.0, 16, 8, 2))
    learner.events = events
    return Parts(
        config=config,
        task=One(),
        policy=policy,
        source=Source(events, fails),
        evaluator=Evaluator(events) if config.eval.enabled else None,
        learner=learner,
        processes=Processes(accelerator),
        tracker=Curves(folder),
        store=CheckpointStore(folder / "checkpoints", 9),
        console=Console(quiet=True),
    )


def test_each_part_is_asked_in_its_turn(policy: Policy, tmp_path: Path) -> None:
    events: Events = []
    parts = parts_of(policy, tmp_path, events)
    ended = Trainer(parts).run()
    evaluated = [("evaluate",)] * (2 if parts.config.eval.greedy else 1)
    assert events == [
        *[("settle",), ("sync evaluator", 0), *evaluated],
        *[("groups", 0), ("begin", 1), ("update", 0)],
        *[("settle",), ("save",)],
        *[("groups", 1), ("begin", 2), ("update", 1)],
        *[("settle",), ("sync evaluator", 2), *evaluated, ("settle",), ("save",)],
        ("stop",),
    ]
    assert (ended.iteration, ended.evaluated, ended.best_iteration) == (2, True, 0)
    assert isinstance(parts.tracker, Curves)
    assert parts.tracker.met == [(0, 3.0), (1, 3.0), (2, 3.0)]  # the source's and the evaluator's


def test_what_was_trained_is_saved_when_a_server_fails(policy: Policy, tmp_path: Path) -> None:
    events: Events = []
    parts = parts_of(policy, tmp_path, events, "eval.enabled=false", "checkpoint.save_interval=0", fails=1)
    with pytest.raises(ServerFailed):
        Trainer(parts).run()
    assert events == [
        *[("groups", 0), ("begin", 1), ("update", 0), ("groups", 1)],
        *[("stop",), ("save",), ("stop",)],  # what is sampled ahead is ended before it is saved
    ]
    (saved,) = parts.store.all()
    assert saved.iteration == 1

    resumed = parts_of(policy, tmp_path / "resumed", events, "eval.enabled=false", "checkpoint.save_interval=0")
    progress = state.restore(read(saved.path), resumed.learner)
    assert resumed.learner.step == parts.learner.step == 1
    assert (progress.iteration, progress.first_rates) == (1, ())
    del events[:]
    assert Trainer(resumed, progress).run().tokens == 2 * progress.tokens
    assert events == [("groups", 1), ("begin", 2), ("update", 1), ("settle",), ("save",), ("stop",)]


ALONE = ("eval.enabled=false", "checkpoint.save_interval=0")  # nothing but the end, or an error, saves


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights after two iterations."""
    parts = parts_of(fresh(), tmp_path_factory.mktemp("undisturbed"), [], *ALONE)
    Trainer(parts).run()
    weights: dict[str, torch.Tensor] = parts.policy.model.state_dict()
    return weights


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), KeyError("a bug"), UserError("a store"), SystemExit(3), None]
)
def test_any_error_leaves_the_last_version_and_a_resume_ends_as_if_it_had_not_been(
    error: BaseException | None, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    parts = parts_of(fresh(), tmp_path, [], *ALONE, fails=1 if error else None)
    assert isinstance(parts.source, Source)
    assert isinstance(parts.learner, Updates)
    if error:
        parts.source.error = error
    else:  # in the update, but before its first step
        parts.learner.fails = 1, "before"
    with pytest.raises(type(error) if error else MemoryError):
        Trainer(parts).run()
    (saved,) = parts.store.all()
    assert saved.iteration == 1

    resumed = parts_of(loading.measured(config_of(), saved.path, torch.device("cpu")), tmp_path / "resumed", [], *ALONE)
    Trainer(resumed, state.restore(read(saved.path), resumed.learner)).run()
    found = resumed.policy.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in undisturbed.items())


def test_weights_between_two_versions_are_not_saved(tmp_path: Path) -> None:
    parts = parts_of(fresh(), tmp_path, [], *ALONE)
    assert isinstance(parts.learner, Updates)
    parts.learner.fails = 1, "after"
    with pytest.raises(MemoryError):
        Trainer(parts).run()
    assert parts.store.all() == []


def test_a_resume_at_the_end_deletes_what_a_kill_while_deleting_has_left(tmp_path: Path) -> None:
    class Removing(Curves):
        """Notes what is deleted from the store, and what is said of the last and the best."""

        def remove(self, name: str) -> None:
            events.append(("remove", name, (tmp_path / name).exists()))

        def tags(self, values: Mapping[str, str]) -> None:
            events.append(("tags", values["grpo.last_checkpoint"], values["grpo.best_checkpoint"]))

    parts = parts_of(fresh(), tmp_path, [], "eval.enabled=false")
    Trainer(parts).run()  # keeps both, as one that was killed before it could delete the first
    (_, last) = parts.store.all()
    events: Events = []
    again = parts_of(loading.measured(config_of(), last.path, torch.device("cpu")), tmp_path, [], "eval.enabled=false")
    again = replace(again, store=CheckpointStore(tmp_path / "checkpoints", 1), tracker=Removing(tmp_path))
    Trainer(again, state.restore(read(last.path), again.learner)).run()
    assert [saved.iteration for saved in again.store.all()] == [2]
    assert events == [("remove", "checkpoints/iter_001", True), ("tags", "iter_002", "")]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Pruned()])
def test_what_nobody_wants_is_not_saved(error: BaseException, tmp_path: Path) -> None:
    parts = parts_of(fresh(), tmp_path, [], *ALONE, fails=1)
    assert isinstance(parts.source, Source)
    parts.source.error = error
    with pytest.raises(type(error)):
        Trainer(parts).run()
    assert parts.store.all() == []


def test_an_iteration_whose_figures_cannot_be_written_is_kept(tmp_path: Path) -> None:
    class Unwritable(Curves):
        def text(self, name: str, content: str) -> None:
            if name == "metrics/train_iter_001.json":
                raise OSError("as asked")

    parts = replace(parts_of(fresh(), tmp_path, [], *ALONE, "train.iterations=3"), tracker=Unwritable(tmp_path))
    with pytest.raises(OSError, match="as asked"):
        Trainer(parts).run()
    assert [saved.iteration for saved in parts.store.all()] == [2]


def test_where_saving_fails_too_the_first_error_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Full(CheckpointStore):
        def save(self, iteration: int, score: float | None, write: Callable[[Path], None]) -> Path:
            raise OSError("the disk is full")

    parts = parts_of(fresh(), tmp_path, [], *ALONE, fails=1)
    with pytest.raises(ServerFailed, match="as asked"):
        Trainer(replace(parts, store=Full(tmp_path, 1), console=Console())).run()
    assert capsys.readouterr().err == "warning: iteration 1 could not be saved: the disk is full\n"


def test_a_known_evaluation_of_the_first_version_is_not_made_again(policy: Policy, tmp_path: Path) -> None:
    baseline: list[Evaluation] = []
    Trainer(parts_of(policy, tmp_path / "a", []), on_evaluation=lambda _, found: baseline.append(found)).run()
    events: Events = []
    heard: list[int] = []
    trainer = Trainer(
        parts_of(policy, tmp_path / "b", events),
        on_evaluation=lambda progress, _: heard.append(progress.iteration),
        baseline=baseline[0],
    )
    trainer.run()
    assert heard == [0, 2]
    assert ("sync evaluator", 0) not in events
    assert events[0] == ("groups", 0)


def test_progress_keeps_the_first_rates_and_the_earliest_best() -> None:
    class Rates(Evaluation):
        def success_rates(self, k: int = 1) -> list[float]:
            return list(self.ks)

    def after(progress: Progress, *rates: int) -> Progress:
        return progress.after_iteration(10, 2.0).after_evaluation(Rates((), rates), 0.5)

    first = after(Progress(), 0, 1)
    second = after(first, 1, 1)
    third = after(second, 1, 1)
    assert third.first_rates == (0, 1)
    assert third.last_rates == (1, 1)
    assert (third.best_score, third.best_iteration) == (1.0, 2)
    assert (second.best_score, second.best_trained_score, second.best_trained_iteration) == (1.0, 1.0, 2)
    assert (third.best_trained_score, third.best_trained_iteration) == (1.0, 2)
    assert (third.iteration, third.tokens, third.seconds) == (3, 30, 7.5)
    assert third.evaluated
    assert not third.after_iteration(1, 1.0).evaluated


def test_the_best_of_what_was_trained_is_kept_although_nothing_beats_the_model_before_training(
    policy: Policy, tmp_path: Path
) -> None:
    events: Events = []

    class Fading(One):
        """Every update takes the answer of one of three problems away."""

        def problem(self, split: Split, seed: int) -> Problem:
            return replace(super().problem(split, seed), messages=({"role": "user", "content": f"{seed % 3}"},))

        def verify(self, problem: Problem, text: str) -> Verdict:
            right = problem.seed % 3 >= sum(event[0] == "update" for event in events)
            return Verdict(float(right), {}, right, text)

    words = ("eval.interval=1", "eval.num_ids=3", "checkpoint.save_interval=0", "train.iterations=3")
    parts = replace(parts_of(policy, tmp_path, events, *words), task=Fading())
    ended = Trainer(parts).run()
    assert (ended.best_score, ended.best_iteration) == (1.0, 0)
    assert [(saved.iteration, saved.score) for saved in parts.store.all()] == [(1, 2 / 3), (3, 0.0)]


def test_rates_of_seeds_that_repeat_a_problem_are_left_out() -> None:
    """As an earlier version has written them: one of every seed."""
    progress = Progress(first_rates=(0.0, 0.25, 0.25, 0.5), last_rates=(0.5, 0.75, 0.5, 1.0))
    once = progress.at([0, 1, 3])
    assert (once.first_rates, once.last_rates) == ((0.0, 0.25, 0.5), (0.5, 0.75, 1.0))
    assert once.at([0, 1, 3]) == once
    assert Progress().at([0, 1]) == Progress()


def test_a_run_that_only_got_worse_names_the_model_before_training_the_best(policy: Policy, tmp_path: Path) -> None:
    class Worse(Task):
        """Answers are right until the first update."""

        name = "worse"

        def problem(self, split: Split, seed: int) -> Problem:
            return Problem(f"worse/{seed}", seed, ({"role": "user", "content": "1"},), {"seed": seed})

        def verify(self, problem: Problem, text: str) -> Verdict:
            right = ("update", 0) not in events
            return Verdict(float(right), {}, right, text)

        def reference_answer(self, problem: Problem) -> str:
            return "1"

    class Tags(NullTracker):
        kept: ClassVar[dict[str, str]] = {}

        def tags(self, values: Mapping[str, str]) -> None:
            self.kept.update(values)

    events: Events = []
    parts = replace(parts_of(policy, tmp_path, events, "eval.num_ids=12"), task=Worse(), tracker=Tags("", tmp_path))
    ended = Trainer(parts).run()
    assert (ended.best_iteration, ended.best_score) == (0, 1.0)
    assert list(ended.watch.told) == ["worse"]
    best = Tags.kept["grpo.best_checkpoint"]
    assert Tags.kept == {
        **{"grpo.last_checkpoint": "iter_002", "grpo.best_checkpoint": best, "grpo.best_beats_start": "false"},
    }
    assert (tmp_path / "checkpoints" / best).is_dir()
    text = messages.conclude(parts.config, ended, parts.tracker)
    assert "best              1.000 at iteration 0 (the model before training; no checkpoint is better)" in text
    assert "change            -1.000 [-1.000, -0.471]: worse, beyond the noise of problems" in text
    assert "look at           iteration 2: pass@1 is 1.000 [0.471, 1.000] below that of the model before" in text


def test_what_was_told_is_not_told_again_after_a_resume(policy: Policy, tmp_path: Path) -> None:
    parts = parts_of(policy, tmp_path, [])
    told = Watch({"kl": "iteration 0: it runs away"}, {"flat": 2})
    state_of = Progress(watch=told)
    assert Progress.from_json(json.loads(json.dumps(asdict(state_of)))) == state_of
    before = {key: value for key, value in asdict(Progress()).items() if key != "watch"}
    assert Progress.from_json(before) == Progress()  # of a checkpoint that an older version wrote
    assert Trainer(parts, state_of).run().watch.told == told.told


def test_an_iteration_of_flat_groups_has_every_key_and_no_nan(policy: Policy, tmp_path: Path) -> None:
    kept: dict[str, object] = {}

    class Files(NullTracker):
        def text(self, name: str, content: str) -> None:
            kept[name] = json.loads(content, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

        def metrics(self, values: Mapping[str, float], step: int) -> None:
            kept[f"curves {step} {sorted(values)[0].split('/')[0]}"] = values

    groups = make_groups(2, flat=(0, 1))
    learner = parts_of(policy, tmp_path, []).learner
    metrics = learner.update(groups, 0, 0)
    del metrics["tokens_trained"]
    collected = Collected(groups, groups)
    metrics |= collected.metrics() | {"bad": float("nan"), "large": float("inf")}
    done = Iteration(3, collected, metrics, 0.0, {"generate": 1.0, "update": 1.0}, 2.0)
    track(Files("", tmp_path), done, {"mfu": 0.5}, keep_rollouts=False)
    content, curves = kept["metrics/train_iter_003.json"], kept["curves 3 perf"]
    assert isinstance(content, dict)
    assert isinstance(curves, dict)
    assert content.keys() == {"iteration", "mfu", *metrics}
    nothing = {"entropy_mean", "kl_divergence", "sampler_ratio_mean", "ratio_mean", "bad", "large"}
    assert nothing <= {name for name, value in content.items() if value is None}
    assert curves.keys() == {"perf/mfu"} | {f"train/{name}" for name in metrics if content[name] is not None}
    assert "  entropy -  " in done.line()
