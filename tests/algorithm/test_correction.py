"""The weights between sampler and trainer against a 2x3 example worked out by hand, and the laws behind them.

Two rollouts of three and two tokens; the sixth place is padding, where anything may stand.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from grpo_mlflow.algorithm import correction, losses
from grpo_mlflow.algorithm.correction import LARGEST, SUMS, Correction, Measures
from grpo_mlflow.algorithm.names import ImportanceSampling

MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
OLD = torch.tensor([[0.5, 0.6, 0.5], [0.2, 0.4, 1.0]], dtype=torch.float64).log()
RATIO = torch.tensor([[1.0, 1.5, 5.0], [0.1, 2.0, 1e9]], dtype=torch.float64)  # of rollouts: 7.5 and 0.2
BEHAVIOUR = OLD - RATIO.log()  # probabilities .5 .4 .1 and 2 (no probability, as none is asked for) .2
MODES: tuple[ImportanceSampling, ...] = get_args(ImportanceSampling)
EVERY_MODE = pytest.mark.parametrize("mode", MODES)


def weighed(
    mode: ImportanceSampling, cap: float | None = 2.0, floor: float | None = None, eps: float | None = None
) -> correction.Weights:
    return Correction(mode, cap, floor, eps)(OLD, BEHAVIOUR, MASK)


def of_tokens(values: Tensor) -> list[float]:
    found: list[float] = values[MASK == 1].tolist()
    return found


@pytest.mark.parametrize(
    ("mode", "cap", "floor", "expected"),
    [
        ("token_truncate", 2.0, None, [1.0, 1.5, 2.0, 0.1, 2.0]),
        ("token_truncate", 2.0, 0.5, [1.0, 1.5, 2.0, 0.5, 2.0]),
        ("token_truncate", None, 0.5, [1.0, 1.5, 5.0, 0.5, 2.0]),
        ("token_mask", 2.5, None, [1.0, 1.5, 0.0, 0.1, 2.0]),
        ("token_mask", 2.5, 0.5, [1.0, 1.5, 0.0, 0.0, 2.0]),
        ("token_mask", None, 1.2, [0.0, 1.5, 5.0, 0.0, 2.0]),
        ("sequence_truncate", 3.0, None, [3.0, 3.0, 3.0, 0.2, 0.2]),
        ("sequence_truncate", 10.0, 0.25, [7.5, 7.5, 7.5, 0.25, 0.25]),
        ("sequence_mask", 3.0, None, [0.0, 0.0, 0.0, 0.2, 0.2]),
        ("sequence_mask", 10.0, 0.25, [7.5, 7.5, 7.5, 0.0, 0.0]),
        ("none", 2.0, 0.5, [1.0] * 5),
    ],
)
def test_the_weights_of_each_mode(
    mode: ImportanceSampling, cap: float | None, floor: float | None, expected: list[float]
) -> None:
    found = weighed(mode, cap, floor)
    assert of_tokens(found.values) == pytest.approx(expected)
    raw = [7.5, 7.5, 7.5, 0.2, 0.2] if mode.startswith("sequence") else [1.0, 1.5, 5.0, 0.1, 2.0]
    outside = [(cap or math.inf) < r * (1 - 1e-9) or r * (1 + 1e-9) < (floor or 0.0) for r in raw]
    assert of_tokens(found.masked) == [each and mode.endswith("mask") for each in outside]
    # a ratio of exactly the cap has it for its weight either way
    truncated = [each and mode.endswith("truncate") for each in outside]
    assert of_tokens(found.truncated)[:4] == truncated[:4]


@EVERY_MODE
def test_ipo_masks_tokens_by_the_difference_of_their_probabilities(mode: ImportanceSampling) -> None:
    # .5 .6 .5 and .2 .4 against .5 .4 .1 and 2 .2: differences 0 .2 .4 and 1.8 .2
    plain, found = weighed(mode, 10.0), weighed(mode, 10.0, eps=0.3)
    assert of_tokens(found.masked) == [False, False, True, True, False]
    kept = [
        0.0 if gone else value for value, gone in zip(of_tokens(plain.values), of_tokens(found.masked), strict=True)
    ]
    assert of_tokens(found.values) == kept
    assert not (found.masked & found.truncated).any()


@EVERY_MODE
def test_where_both_agree_every_weight_is_1(mode: ImportanceSampling) -> None:
    found = Correction(mode, 1.0, 1.0 if mode == "token_mask" else None, 1e-6)(OLD, OLD.clone(), MASK)
    assert of_tokens(found.values) == [1.0] * 5
    assert not found.masked.any()
    assert not found.truncated.any()


@EVERY_MODE
def test_weights_are_finite_and_constants_whatever_the_sampler_says(mode: ImportanceSampling) -> None:
    old = OLD.float().requires_grad_()
    behaviour = torch.tensor([[-1e5, -math.inf, -1.0], [-200.0, -0.1, math.inf]])
    found = Correction(mode, None, 1e-3, None)(old, behaviour, MASK.float())
    assert not found.values.requires_grad
    assert torch.isfinite(found.values[MASK == 1]).all()
    assert torch.isfinite(found.values.square().sum())
    assert torch.isfinite(correction.measures(old, behaviour, MASK.float(), found).sums).all()


@EVERY_MODE
def test_the_gradient_of_the_weighed_loss_is_that_of_finite_differences(mode: ImportanceSampling) -> None:
    values = weighed(mode, 2.5, 0.15, eps=0.9).values
    advantages, weights = torch.tensor([2.0, -1.0]).double(), torch.tensor([1 / 6, 1 / 4]).double()

    def loss(policy: Tensor) -> Tensor:
        ratio = losses.log_ratio(policy, OLD, MASK, "token").exp()
        terms = losses.surrogate_terms(policy, ratio, advantages, 0.2, 0.2, "clip")
        return losses.weighted_sum(terms * values, weights, MASK)

    policy = (OLD + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(loss, (policy,), eps=1e-6, atol=1e-8)
    (slope,) = torch.autograd.grad(loss(policy), policy)
    expected = -values * weights[:, None] * advantages[:, None] * math.exp(0.01) * MASK
    torch.testing.assert_close(slope, expected)


def measured(rows: slice, mode: ImportanceSampling = "token_mask", **bounds: Any) -> Measures:
    old, behaviour, mask = OLD[rows], BEHAVIOUR[rows], MASK[rows]
    given = {"cap": 2.5, "floor": None, "eps": None, **bounds}
    return correction.measures(old, behaviour, mask, Correction(mode, **given)(old, behaviour, mask))


def summed(parts: list[Measures]) -> dict[str, float]:
    sums = torch.stack([part.sums for part in parts]).sum(dim=0) / 5
    largest = torch.stack([part.largest for part in parts]).amax(dim=0)
    named = dict(zip(SUMS, sums.tolist(), strict=True))
    return correction.metrics(named, dict(zip(LARGEST, largest.tolist(), strict=True)))


def test_the_metrics_by_hand() -> None:
    # ratios 1 1.5 5 .1 2, weights 1 1.5 0 .1 2
    logs = [math.log(r) for r in (1.0, 1.5, 5.0, 0.1, 2.0)]
    assert summed([measured(slice(None))]) == pytest.approx(
        {
            "sampler_ratio_mean": 9.6 / 5,
            "sampler_ratio_min": 0.1,
            "sampler_ratio_max": 5.0,
            "sampler_logp_difference_mean": sum(map(abs, logs)) / 5,
            "sampler_logp_difference_max": math.log(10.0),
            "sampler_kl": (9.6 - 5 - sum(logs)) / 5,
            "sampler_correction_mean": 4.6 / 5,
            "sampler_masked_frac": 1 / 5,
            "sampler_truncated_frac": 0.0,
            "sampler_ess": 4.6**2 / (5 * (1 + 2.25 + 0.01 + 4)),
        }
    )
    truncated = summed([measured(slice(None), "token_truncate", floor=0.5)])
    assert (truncated["sampler_truncated_frac"], truncated["sampler_masked_frac"]) == (2 / 5, 0.0)


@EVERY_MODE
def test_the_metrics_of_parts_are_those_of_the_whole(mode: ImportanceSampling) -> None:
    parts = [measured(rows, mode, eps=0.3) for rows in (slice(0, 1), slice(1, 2))]
    assert summed(parts) == pytest.approx(summed([measured(slice(None), mode, eps=0.3)]))


def test_the_effective_sample_size_is_1_for_equal_weights_and_0_for_none() -> None:
    assert summed([measured(slice(None), "none")])["sampler_ess"] == pytest.approx(1.0)
    assert summed([measured(slice(None), "sequence_mask", cap=1.0, floor=0.5)])["sampler_ess"] == 0.0


def test_the_estimate_of_the_kl_divergence_is_unbiased() -> None:
    sampler, trainer = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    found = 0.0
    for p, q in zip(sampler, trainer, strict=True):  # each token that may be drawn, by its chance
        old, behaviour, mask = (each.view(1, 1) for each in (q.log(), p.log(), torch.ones_like(p)))
        weights = Correction("none", None, None, None)(old, behaviour, mask)
        found += float(p * correction.measures(old, behaviour, mask, weights).sums[SUMS.index("kl")])
    assert found == pytest.approx(float((sampler * (sampler / trainer).log()).sum()), rel=1e-12)
