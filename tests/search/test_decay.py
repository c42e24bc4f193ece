"""How long a decaying learning rate keeps a trial from being judged, and what the study says about it."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from grpo_mlflow.config import Resolved, resolve
from grpo_mlflow.search import decay, records
from grpo_mlflow.search.paired import UNTRAINED, rates_key
from grpo_mlflow.search.space import Dimension, Space
from tests.support.small_studies import load, search, study_config

NOTHING = Space(())


def _resolved(*words: str) -> Resolved:
    return resolve("tiny", ["train.iterations=20", "eval.interval=2", "train.lr_warmup_steps=0", *words])


def _space(*schedules: str) -> Space:
    return Space((Dimension("train.lr_schedule", CategoricalDistribution(schedules), {}),))


def test_learning_rates_are_those_of_the_last_step_before_each_evaluation() -> None:
    assert decay.learning_rates(_resolved().config) == [1.0] * 10
    assert decay.learning_rates(_resolved("train.iterations=5").config) == [1.0] * 3  # at 2, 4 and 5
    linear = _resolved("train.lr_schedule=linear").config
    steps = linear.steps_per_iteration
    # After iteration i the last optimizer step was number i * steps - 1 of 20 * steps.
    expected = [1 - (i * steps - 1) / (20 * steps) for i in range(2, 21, 2)]
    assert decay.learning_rates(linear) == pytest.approx(expected)
    warm = _resolved(f"train.lr_warmup_steps={4 * steps}", "train.lr=0.5").config
    assert decay.learning_rates(warm) == pytest.approx([0.5] + [1.0] * 9)


def test_the_first_look_of_a_schedule() -> None:
    assert decay.first_look([1.0] * 10) == 3
    assert decay.first_look([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0]) == 5  # a warm-up
    assert decay.first_look([1 - look / 10 for look in range(10)]) == 8  # .3, and .1 at the end: .2 to lose
    assert decay.first_look([1.0, 0.9, 0.8, 0.7, 0.5]) == 4  # .8 would have .3 to lose


def test_too_few_looks_have_no_first_and_a_rate_that_rises_has_the_last() -> None:
    assert decay.first_look([1.0] * 2) is None
    assert decay.first_look([]) is None
    assert decay.first_look([0.2, 0.4, 0.6, 0.8, 1.0]) == 5  # the last look, at which nothing is pruned


def test_a_study_with_a_constant_rate_or_another_pruner_says_nothing() -> None:
    assert decay.note(_resolved(), NOTHING) is None
    assert decay.note(_resolved("train.lr_schedule=cosine", "search.pruner=median"), NOTHING) is None
    assert decay.note(_resolved(), Space((Dimension("train.lr", FloatDistribution(1e-4, 1e-3), {}),))) is None


def test_a_study_says_how_long_it_waits_for_a_decay() -> None:
    # .5 (1 + cos(pi 13 / 20)) is .273, and .083 after iteration 16.
    assert decay.note(_resolved("train.lr_schedule=cosine"), NOTHING) == (
        "search.pruner = paired: a trial is not pruned before iteration 16 of 20: until then its learning rate "
        "(cosine) may still bring gains that no curve shows"
    )


def test_a_space_that_varies_the_schedule_is_told_by_schedule() -> None:
    note = decay.note(_resolved("train.lr_schedule=cosine"), _space("constant", "cosine", "linear"))
    assert note is not None
    assert "a trial with train.lr_schedule = cosine is not pruned before iteration 16 of 20" in note
    assert "a trial with train.lr_schedule = linear is not pruned before iteration 16 of 20" in note
    assert "constant" not in note


def test_a_study_whose_trials_have_too_few_evaluations_says_so_once() -> None:
    note = decay.note(_resolved("eval.interval=10"), _space("constant", "cosine"))
    assert note == "search.pruner = paired: no trial is ever pruned: it has 2 evaluations; needed: 4"


def test_what_the_pruner_knows_of_a_trial_and_says_of_its_study(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ["train.iterations=8", "eval.interval=1", "train.lr_warmup_steps=0", "search.finalists=0"]
    space = "search.space=train.lr_schedule=[constant,linear]"
    resolved = study_config(store, tmp_path, "search.pruner=paired", "search.sampler=grid", space, *sizes)
    search(resolved)
    # Four optimizer steps an iteration: before evaluation i, the learning rate is 1 - (4 i - 1) / 32.
    kept = {one.params["train.lr_schedule"]: records.kept_at(one, decay.KEY) for one in load(resolved).trials}
    assert kept == {"constant": [1.0] * 8, "linear": pytest.approx([1 - (4 * i - 1) / 32 for i in range(1, 9)])}
    for one in load(resolved).trials:
        assert len(records.kept_at(one, UNTRAINED)) == len(records.kept_at(one, rates_key(1)))
    said = capsys.readouterr().out
    assert said.count("a trial with train.lr_schedule = linear is not pruned before iteration 6 of 8") == 1
