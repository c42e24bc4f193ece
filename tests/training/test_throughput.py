"""Useful work: what it counts, and that it does not count what need not be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grpo_mlflow.config import resolve
from grpo_mlflow.forward import tuning
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.training import throughput
from grpo_mlflow.training.batching import rows_of
from grpo_mlflow.training.scoring import Scorer
from grpo_mlflow.training.throughput import Costs, Meter
from grpo_mlflow.types import Group
from tests.support.groups import K, make_groups


def begin_with(tokens: tuple[int, ...], group: Group) -> Group:
    prompt = group.rollouts[0].prompt
    longer = replace(prompt, token_ids=(*tokens, *prompt.token_ids))
    return replace(group, rollouts=tuple(replace(rollout, prompt=longer) for rollout in group.rollouts))


def draw_twice(group: Group) -> Group:
    first, second, *others = group.rollouts
    return replace(group, rollouts=(first, replace(second, completion=first.completion), *others))


@pytest.mark.parametrize("beginning", [(), (7,) * 30])
@pytest.mark.parametrize("change", [lambda group: group, draw_twice])
def test_costs_are_those_that_torch_counts(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, beginning: tuple[int, ...], change: Callable[[Group], Group]
) -> None:
    # attention by its own kernel, which can be told from other products
    monkeypatch.setattr(tuning, "PLAIN_ATTENTION_SCORES", 0)
    groups, scorer = [change(begin_with(beginning, group)) for group in make_groups(5)], Scorer(policy, 1.0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        scorer.score(rows_of(groups))
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for name, flops in counted.items() if "attention" not in str(name))
    costs = replace(Costs.of(policy.model), pair=0.0)  # of attention torch counts padding and what is hidden
    assert products == pytest.approx(costs.forward(groups), rel=1e-6)


def test_sampling_counts_what_completions_begin_with_once() -> None:
    (group,) = make_groups(1)
    drawn = [(1, 2, 3), (5,), (1, 2, 4), (1, 2, 3)]
    rollouts = [
        replace(group.rollouts[0], completion=replace(group.rollouts[0].completion, token_ids=d)) for d in drawn
    ]
    group, prompt = replace(group, rollouts=tuple(rollouts)), len(group.rollouts[0].prompt.token_ids)
    # after the prompt 1, 12, 12: a pass for 1 and 2, a prediction from the prompt and from each of these
    counts = [
        Costs(*ones).forward([group], sampling=True) for ones in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    ]
    assert counts == [prompt + 2, 3, prompt**2 / 2 + (prompt + 1) + (prompt + 2)]
    # in the update the three different ones on their own
    counts = [Costs(*ones).forward([group]) for ones in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))]
    assert counts == [prompt + 2 + 2 + 0, 3 + 3 + 1]


def test_flat_groups_are_no_useful_update() -> None:
    meter = object.__new__(Meter)
    meter._device, meter._costs, meter._peak = torch.device("cpu"), Costs(2.0, 3.0, 0.0), 1e3
    meter._samples_here, meter._passes, meter._masks = True, 4, False
    groups = make_groups(4)
    half = make_groups(4, flat=(0, 2))
    phases = {"generate": 1.0, "update": 2.0}
    whole, part = (meter.metrics(given, given, phases, 4.0) for given in (groups, half))
    assert part["mfu_update"] == pytest.approx(4 * meter._costs.forward(half[i] for i in (1, 3)) / 2.0 / 1e3)
    assert part["mfu_update"] < whole["mfu_update"]
    assert part["mfu_generate"] == pytest.approx(meter._costs.forward(half, sampling=True) / 1e3)
    meter._masks = True
    kept = [tuple(r for r in half[i].rollouts if r.completion.finish_reason == "stop") for i in (1, 3)]
    assert 0 < sum(map(len, kept)) < 2 * K
    useful = meter._costs.forward(replace(half[i], rollouts=own) for i, own in zip((1, 3), kept, strict=True))
    assert meter.metrics(half, half, phases, 4.0)["mfu_update"] == pytest.approx(4 * useful / 2.0 / 1e3)
    meter._masks = False
    more = meter.metrics(half, [*half, *groups], phases, 4.0)  # with groups that were sampled and not trained on
    assert more["mfu_update"] == part["mfu_update"]
    assert more["mfu_generate"] == pytest.approx(part["mfu_generate"] + whole["mfu_generate"])
    assert part["share_generate"] + part["share_update"] + part["share_other"] == pytest.approx(1.0)


def test_the_update_counts_its_passes(policy: Policy) -> None:
    def passes(*overrides: str) -> int:
        return Meter(policy, resolve("tiny", list(overrides)).config, 1)._passes

    assert passes() == 3
    assert passes("train.kl_coef=0.1") == 4
    assert passes("train.epochs=2") == 7  # old log-probs, and two epochs


def test_measurements_are_plausible() -> None:
    assert throughput.gemm_peak(torch.device("cpu"), torch.float32) > 1e8
    assert throughput.peak_memory(torch.device("cpu")) > 50
