"""The update: what the gradient may not depend on, and what one step must do."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from grpo_mlflow.errors import UserError
from grpo_mlflow.forward.padded import completion_logprobs
from tests.support.groups import ALL_TERMS, K, fresh, make_groups
from tests.support.updates import gradient, learner, measured


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
def test_the_gradient_ignores_micro_batches_padding_and_order(aggregation: str, surrogate: str) -> None:
    groups = make_groups(6, flat=(1, 4))
    settings = {**ALL_TERMS, "aggregation": aggregation, "surrogate": surrogate}
    expected = gradient(groups, batch_size=100, **settings)
    assert expected.norm() > 0.01
    shuffled = random.Random(5).sample(groups, len(groups))
    for tokens in (1, 20, 40, 1000):
        found = gradient(groups, batch_size=16, max_tokens_per_batch=tokens, **settings)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for size in (1, 3, 5, 16):
        torch.testing.assert_close(gradient(groups, batch_size=size, **settings), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(gradient(shuffled, batch_size=size, **settings), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_the_gradient_is_that_of_the_formula(aggregation: str) -> None:
    """The whole step in float64 by a plain loop over tokens, flat groups in the denominators only."""
    groups = make_groups(3, flat=(1,))
    found = gradient(groups, aggregation=aggregation, batch_size=100, **ALL_TERMS)
    policy, reference = fresh(), fresh(seed=4)
    for model in (policy.model, reference.model):
        model.double()
    rollouts = [(g, r, a) for g in groups for r, a in zip(g.rollouts, g.advantages, strict=True)]
    lengths = [len(r.completion.token_ids) for _, r, _ in rollouts]
    loss = torch.zeros((), dtype=torch.float64)
    for (group, rollout, advantage), length in zip(rollouts, lengths, strict=True):
        if group.is_flat:
            continue
        weight = {
            "grpo": 1 / (len(rollouts) * length),
            "dapo": 1 / sum(lengths),
            "bnpo": 1 / sum(lengths),  # one micro-batch holds all
            "dr_grpo": 1 / (len(rollouts) * 16),
        }[aggregation]
        ids = [*rollout.prompt.token_ids, *rollout.completion.token_ids]
        start = len(rollout.prompt.token_ids)
        logits = policy.model(input_ids=torch.tensor([ids])).logits[0] / 0.8
        frozen = reference.model(input_ids=torch.tensor([ids])).logits[0].detach() / 0.8
        for place in range(start, len(ids)):
            row, ref = logits[place - 1].log_softmax(-1), frozen[place - 1].log_softmax(-1)
            logprob, ref_logprob = row[ids[place]], ref[ids[place]]
            behaviour = rollout.completion.behaviour_logprobs[place - start]
            correction = min(math.exp(logprob.item() - behaviour), 2.0)
            ratio = (logprob - logprob.detach()).exp()
            kl = (ref_logprob - logprob).exp() - 1 - (ref_logprob - logprob)
            entropy = -(row.exp() * row).sum()
            loss = loss + weight * (-ratio * advantage * correction + 0.3 * kl - 0.05 * entropy)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]).float()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_bnpo_averages_its_micro_batches() -> None:
    groups = make_groups(2)
    rows = sorted(
        (len(r.prompt.token_ids) + len(r.completion.token_ids), i)
        for i, r in enumerate(r for g in groups for r in g.rollouts)
    )
    halves = [[i for _, i in rows[:4]], [i for _, i in rows[4:]]]

    def alone(chosen: list[int]) -> torch.Tensor:
        """The same rollouts with the advantage of all others set to zero, weighted as one batch of all."""
        kept = [
            replace(g, advantages=tuple(a if n * K + j in chosen else 0.0 for j, a in enumerate(g.advantages)))
            for n, g in enumerate(groups)
        ]
        return gradient(kept, aggregation="dapo", batch_size=100)

    lengths = [len(r.completion.token_ids) for g in groups for r in g.rollouts]
    expected = sum(
        (alone(half) * sum(lengths) / sum(lengths[i] for i in half) / 2 for half in halves),
        start=torch.zeros(()),
    )
    found = gradient(groups, aggregation="bnpo", batch_size=4)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert not torch.allclose(found, gradient(groups, aggregation="bnpo", batch_size=100), atol=1e-5)


def test_only_flat_groups_give_an_exactly_zero_gradient() -> None:
    groups = make_groups(3, flat=(0, 1, 2))
    assert not gradient(groups, **ALL_TERMS).any()
    policy = fresh()
    made = learner(policy, 12)
    metrics = made.update(groups, 0, 0)
    assert metrics["grad_norm"] == 0
    assert metrics["loss_total"] == 0
    taught = learner(fresh(), 12).update(make_groups(3), 0, 0)
    assert metrics.keys() == taught.keys()
    undefined = {name for name, value in metrics.items() if value is None}  # nothing was measured
    assert undefined == {
        *("kl_divergence", "entropy_mean", "sampler_ratio_mean", "sampler_ratio_min", "sampler_ratio_max"),
        *("sampler_kl", "sampler_logp_difference_mean", "sampler_logp_difference_max", "sampler_correction_mean"),
        *("sampler_ess", "sampler_masked_frac", "sampler_truncated_frac"),
        *("ratio_mean", "ratio_std", "ratio_clip_frac", "clip_low_frac", "clip_high_frac"),
    }
    assert made.step == 1


def test_a_step_on_flat_groups_alone_is_one_of_adam_with_the_gradient_zero() -> None:
    policy = fresh()
    made = learner(policy, 12, lr=1e-2)
    made.update(make_groups(3), 0, 0)
    states = [dict(made.optimizer.state[p]) for p in policy.model.parameters()]
    before = [p.detach().clone() for p in policy.model.parameters()]
    moments = [(s["exp_avg"].clone(), s["exp_avg_sq"].clone()) for s in states]
    made.update(make_groups(3, flat=(0, 1, 2)), 0, 1)
    (group,) = made.optimizer.param_groups
    beta, gamma = group["betas"]
    for now, was, (mean, square) in zip(policy.model.parameters(), before, moments, strict=True):
        mean, root = beta * mean / (1 - beta**2), (gamma * square / (1 - gamma**2)).sqrt()
        expected = was * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * mean / (root + group["eps"])
        torch.testing.assert_close(now.detach(), expected, atol=1e-7, rtol=1e-5)


def test_an_update_makes_good_completions_likelier_and_bad_ones_less_likely() -> None:
    groups, policy = make_groups(4), fresh()

    def scores() -> list[float]:
        found = []
        for group in groups:
            for rollout in group.rollouts:
                ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.completion.token_ids]])
                width, start = len(rollout.completion.token_ids), torch.tensor([len(rollout.prompt.token_ids)])
                found.append(completion_logprobs(policy.model, ids, start, width, 0.8)[0].mean().item())
        return found

    before = scores()
    made = learner(policy, 16, lr=1e-2)
    for iteration in range(5):
        made.update(groups, 0, iteration)
    changes = [after - was for after, was in zip(scores(), before, strict=True)]
    advantages = [a for g in groups for a in g.advantages]
    assert min(c for c, a in zip(changes, advantages, strict=True) if a > 0.5) > 0
    assert sum(c * a for c, a in zip(changes, advantages, strict=True)) > 0


def test_a_model_that_cannot_share_prompts_learns_the_same_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    groups, gradients = make_groups(4, flat=(1,)), []
    for attention in ("sdpa", "eager"):
        policy, reference = fresh(), fresh(seed=4)
        for model in (policy.model, reference.model):
            model.set_attn_implementation(attention)
        made = learner(policy, 16, reference, grad_clip=None, batch_size=3, **ALL_TERMS)
        made.update(groups, 0, 0)
        moments = [entry["exp_avg"] for entry in made.optimizer.state_dict()["state"].values()]
        gradients.append(torch.cat([moment.flatten() for moment in moments]) / 0.1)
    assert len(caplog.records) == 1
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_steps_and_epochs_are_counted_and_the_ratio_moves_only_after_the_first() -> None:
    groups = make_groups(4)
    one = learner(fresh(), 16)
    first = measured(one, groups)
    assert (one.step, first["ratio_std"], first["ratio_clip_frac"]) == (1, 0.0, 0.0)
    assert first["ratio_mean"] == 1.0
    many = learner(fresh(), 8, epochs=3, lr=1e-2, clip_low=0.01, clip_high=0.02)
    metrics = measured(many, groups)
    assert many.step == 6
    assert metrics["ratio_std"] > 0.01
    assert metrics["ratio_clip_frac"] == pytest.approx(metrics["clip_low_frac"] + metrics["clip_high_frac"])
    assert metrics["ratio_clip_frac"] > 0


def test_kl_is_zero_against_itself_and_adapts_the_coefficient() -> None:
    groups = make_groups(4)
    made = learner(fresh(), 16, reference=fresh(), kl_coef=0.1, kl_target=0.5, kl_horizon=1.0)
    metrics = measured(made, groups)
    assert metrics["kl_divergence"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["kl_coef"] == 0.1
    assert made.kl_coef == pytest.approx(0.08)  # far below the target: a fifth less
    away = learner(fresh(), 16, reference=fresh(seed=9), kl_coef=0.1, kl_target=1e-4, kl_horizon=1.0)
    metrics = measured(away, groups)
    assert metrics["loss_kl"] > 0
    assert away.kl_coef == pytest.approx(0.12)


def test_the_sampler_correction_reads_the_behaviour_logprobs() -> None:
    groups = make_groups(4)
    policy = fresh()
    capped = measured(learner(policy, 16, lr=1e-9), groups)
    assert capped["sampler_correction_mean"] <= 2.0
    assert capped["sampler_ratio_mean"] != pytest.approx(1.0, abs=1e-3)
    off = measured(learner(fresh(), 16, lr=1e-9, importance_sampling_mode="none"), groups)
    assert off["sampler_correction_mean"] == 1.0
    assert off["sampler_ratio_mean"] == pytest.approx(capped["sampler_ratio_mean"])


MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.mark.parametrize("mode", MODES)
def test_the_correction_and_its_measures_ignore_micro_batches_and_order(mode: str) -> None:
    groups = make_groups(6, flat=(1, 4))
    # the behaviour log-probs are up to 1 above the trainer's: the weights are on both sides of the floor
    settings = {**ALL_TERMS, "importance_sampling_mode": mode, "importance_sampling_floor": 0.6, "ipo_eps": 0.004}
    expected = gradient(groups, batch_size=100, **settings)
    assert expected.norm() > 0.001
    whole = measured(learner(fresh(), 24, fresh(seed=4), batch_size=100, **settings), groups)
    assert 0 < whole["sampler_masked_frac"] < 1
    assert (whole["sampler_truncated_frac"] > 0) == mode.endswith("truncate")
    assert 0 < whole["sampler_ess"] < 1
    assert whole["sampler_ratio_min"] < whole["sampler_ratio_mean"] < whole["sampler_ratio_max"]
    shuffled = random.Random(5).sample(groups, len(groups))
    for size in (1, 5):
        torch.testing.assert_close(gradient(shuffled, batch_size=size, **settings), expected, atol=1e-6, rtol=0)
        parts = measured(learner(fresh(), 24, fresh(seed=4), batch_size=size, **settings), shuffled)
        names = [name for name in whole if name.startswith("sampler_")]
        assert {n: parts[n] for n in names} == pytest.approx({n: whole[n] for n in names}, rel=1e-4)


def test_the_weights_are_those_of_the_policy_before_the_first_step() -> None:
    groups = make_groups(4)
    settings: dict[str, Any] = {"importance_sampling_mode": "sequence_truncate", "importance_sampling_floor": 0.1}
    one = measured(learner(fresh(), 16, **settings), groups)
    many = measured(learner(fresh(), 4, epochs=2, lr=1e-2, **settings), groups)
    names = [name for name in one if name.startswith("sampler_")]
    assert many["ratio_std"] > 0.01
    assert {n: many[n] for n in names} == pytest.approx({n: one[n] for n in names}, rel=1e-4)


def test_losses_add_up_and_gradients_are_clipped() -> None:
    groups = make_groups(4)
    made = learner(fresh(), 16, reference=fresh(seed=9), grad_clip=1e-6, lr=1e-3, **ALL_TERMS)
    metrics = measured(made, groups)
    assert metrics["loss_total"] == pytest.approx(metrics["loss_pg"] + metrics["loss_kl"] + metrics["loss_entropy"])
    assert metrics["grad_norm"] > 0.01  # the norm before clipping
    moments = [entry["exp_avg"] for entry in made.optimizer.state_dict()["state"].values()]
    assert torch.cat([m.flatten() for m in moments]).norm() == pytest.approx(1e-7, rel=1e-3)


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights() -> None:
    policy = fresh()
    groups = make_groups(2)
    broken = replace(groups[0], advantages=(float("inf"), 0.0, 0.0, 0.0))
    before = [p.clone() for p in policy.model.parameters()]
    with pytest.raises(UserError, match="not finite"):
        learner(policy, 8).update([broken, groups[1]], 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
