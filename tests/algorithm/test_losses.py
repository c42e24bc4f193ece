"""Every loss variant against a 2x3 example worked out by hand, and the laws behind it.

Two rollouts of three and two tokens; the sixth place is padding.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from grpo_mlflow.algorithm import losses
from grpo_mlflow.algorithm.names import Aggregation, KLEstimator, RatioLevel, Surrogate

MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
ADVANTAGES = torch.tensor([2.0, -1.0], dtype=torch.float64)
RATIO = [[0.5, 1.0, 1.6], [0.5, 1.1, 1.6]]
LOW, HIGH = 0.2, 0.4  # the ratio is kept within 0.8 and 1.4


def _t(values: list[list[float]], grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def _same(result: Tensor | None, expected: list[list[float]] | list[float]) -> None:
    assert result is not None
    torch.testing.assert_close(result.detach().double(), torch.tensor(expected, dtype=torch.float64))


def test_token_ratio() -> None:
    policy, old = _t([[-1.0, -0.5, -2.0], [-0.1, -1.5, -0.7]]), _t([[-1.2, -0.5, -1.6], [-0.4, -1.0, -9.0]])
    _same(losses.log_ratio(policy, old, MASK, "token"), [[0.2, 0.0, -0.4], [0.3, -0.5, 0.0]])


def test_sequence_ratio_is_the_mean_over_real_tokens() -> None:
    policy, old = _t([[-1.0, -0.5, -2.0], [-0.1, -1.5, -0.7]]), _t([[-1.2, -0.5, -1.6], [-0.4, -1.0, -9.0]])
    third, tenth = -0.2 / 3, -0.1  # (0.2 + 0.0 - 0.4) / 3 and (0.3 - 0.5) / 2
    _same(losses.log_ratio(policy, old, MASK, "sequence"), [[third, third, third], [tenth, tenth, 0.0]])


def test_clip_takes_the_pessimistic_side() -> None:
    terms = losses.surrogate_terms(torch.zeros(2, 3), _t(RATIO), ADVANTAGES, LOW, HIGH, "clip")
    # A = 2:  -min(1.0, 1.6), -min(2, 2), -min(3.2, 2.8); A = -1: -min(-0.5, -0.8), -min(-1.1, -1.1), -min(-1.6, -1.4)
    _same(terms, [[-1.0, -2.0, -2.8], [0.8, 1.1, 1.6]])


def test_clip_stops_the_gradient_exactly_where_clipped_tokens_says() -> None:
    log_ratio = _t([[math.log(r) for r in row] for row in RATIO], grad=True)
    ratio = log_ratio.exp()
    losses.surrogate_terms(torch.zeros(2, 3), ratio, ADVANTAGES, LOW, HIGH, "clip").sum().backward()
    # -rho A where the unclipped side is the smaller one, else 0
    _same(log_ratio.grad, [[-1.0, -2.0, 0.0], [0.0, 1.1, 1.6]])
    low, high = losses.clipped_tokens(ratio, ADVANTAGES, LOW, HIGH)
    assert low.tolist() == [[False, False, False], [True, False, False]]
    assert high.tolist() == [[False, False, True], [False, False, False]]


def test_a_wider_upper_bound_frees_only_the_upper_side() -> None:
    terms = losses.surrogate_terms(torch.zeros(2, 3), _t(RATIO), ADVANTAGES, LOW, 1.0, "clip")
    _same(terms, [[-1.0, -2.0, -3.2], [0.8, 1.1, 1.6]])
    low, high = losses.clipped_tokens(_t(RATIO), ADVANTAGES, LOW, 1.0)
    assert (int(low.sum()), int(high.sum())) == (1, 0)


def test_an_advantage_of_zero_clips_nothing() -> None:
    low, high = losses.clipped_tokens(_t(RATIO), torch.zeros(2), LOW, HIGH)
    assert not low.any()
    assert not high.any()


def test_cispo_weighs_log_probabilities_and_keeps_every_gradient() -> None:
    policy = _t([[-1.0, -0.5, -2.0], [-0.1, -1.5, -0.7]], grad=True)
    old = policy.detach() - _t([[math.log(r) for r in row] for row in RATIO])
    ratio = (policy - old).exp()
    terms = losses.surrogate_terms(policy, ratio, ADVANTAGES, LOW, HIGH, "cispo")
    # -clip(rho) A log pi with clip(rho) = 0.8 1 1.4 | 0.8 1.1 1.4
    _same(terms, [[1.6, 1.0, 5.6], [-0.08, -1.65, -0.98]])
    terms.sum().backward()
    _same(policy.grad, [[-1.6, -2.0, -2.8], [0.8, 1.1, 1.4]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("grpo", [1 / 12, 1 / 8]), ("dapo", [0.1, 0.1]), ("dr_grpo", [1 / 32, 1 / 32]), ("bnpo", [0.1, 0.1])],
)
def test_aggregation_weights_count_the_whole_step(kind: Aggregation, expected: list[float]) -> None:
    # two of the step's four rollouts, five of its ten tokens, completions of at most eight tokens
    weights = losses.aggregation_weights(torch.tensor([3, 2]), kind, rollouts=4, tokens=10, max_completion_length=8)
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("grpo", 3.25),  # ((1 + 2 + 3) / 3 + (4 + 5) / 2) / 2
        ("dapo", 3.0),  # 15 / 5
        ("dr_grpo", 1.875),  # 15 / (2 * 4)
        ("bnpo", 3.0),  # one micro-batch: as dapo
    ],
)
def test_loss_of_one_step(kind: Aggregation, expected: float) -> None:
    terms = _t([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]])
    lengths = MASK.sum(dim=1)
    weights = losses.aggregation_weights(lengths, kind, rollouts=2, tokens=5, max_completion_length=4)
    assert losses.weighted_sum(terms, weights, MASK).item() == pytest.approx(expected)
    parts = [losses.weighted_sum(terms[i : i + 1], weights[i : i + 1], MASK[i : i + 1]).item() for i in range(2)]
    assert sum(parts) == pytest.approx(expected)


def test_bnpo_averages_over_micro_batches() -> None:
    # micro-batches of one rollout each: ((1 + 2 + 3) / 3 + (4 + 5) / 2) / 2
    terms = _t([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]])
    totals = []
    for i, tokens in ((0, 3), (1, 2)):
        weights = losses.aggregation_weights(
            torch.tensor([tokens]), "bnpo", rollouts=2, tokens=tokens, max_completion_length=4
        )
        totals.append(losses.weighted_sum(terms[i : i + 1], weights, MASK[i : i + 1]).item())
    assert sum(totals) / 2 == pytest.approx(3.25)


@pytest.mark.parametrize("junk", [math.inf, -math.inf, math.nan, 1e30])
def test_a_masked_term_may_hold_anything(junk: float) -> None:
    terms = _t([[1.0, 2.0, 3.0], [4.0, 5.0, junk]], grad=True)
    total = losses.weighted_sum(terms, torch.tensor([0.5, 2.0]), MASK)
    assert total.item() == 21.0  # 0.5 * 6 + 2 * 9
    total.backward()
    _same(terms.grad, [[0.5, 0.5, 0.5], [2.0, 2.0, 0.0]])


LN2 = math.log(2)
DIFFERENCE = [[0.0, 0.5, -1.0], [LN2, -LN2, 0.1]]
REFERENCE = [[-1.0, -0.5, -2.0], [-0.1, -1.5, -0.7]]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", DIFFERENCE),
        ("k2", [[0.0, 0.125, 0.5], [LN2**2 / 2, LN2**2 / 2, 0.005]]),
        # exp(-d) - 1 + d
        ("k3", [[0.0, math.exp(-0.5) - 0.5, math.e - 2], [LN2 - 0.5, 1 - LN2, math.exp(-0.1) - 0.9]]),
    ],
)
def test_kl_terms(estimator: KLEstimator, expected: list[list[float]]) -> None:
    reference = _t(REFERENCE)
    _same(losses.kl_terms(reference + _t(DIFFERENCE), reference, estimator), expected)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_is_exactly_zero_at_equality(estimator: KLEstimator) -> None:
    values = -torch.rand(2, 3, generator=torch.Generator().manual_seed(0)) * 10
    assert losses.kl_terms(values, values.clone(), estimator).tolist() == [[0.0] * 3] * 2


def test_k3_is_never_negative() -> None:
    exponents = torch.linspace(-6, 1, 2000)
    difference = torch.cat([10**exponents, -(10**exponents)])[None]
    assert losses.kl_terms(difference, torch.zeros_like(difference), "k3").min().item() >= 0


def test_k3_keeps_its_digits_where_policy_and_reference_almost_agree() -> None:
    # d^2 / 2 = 5e-9; exp(-d) - 1 + d in float32 would give 0 or 6e-8
    terms = losses.kl_terms(torch.tensor([[1e-4, -1e-4]]), torch.zeros(1, 2), "k3")
    assert terms[0].tolist() == pytest.approx([5e-9, 5e-9], rel=1e-2)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimate_is_unbiased(estimator: KLEstimator) -> None:
    p, q = (0.5, 0.3, 0.15, 0.05), (0.1, 0.2, 0.3, 0.4)
    true = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    estimates = losses.kl_terms(_t([[math.log(a) for a in p]]), _t([[math.log(b) for b in q]]), estimator)[0]
    assert sum(a * e for a, e in zip(p, estimates.tolist(), strict=True)) == pytest.approx(true, rel=1e-12)


def _softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["clip", "cispo"])
def test_policy_gradient_at_ratio_1_is_reinforce(kind: Surrogate, level: RatioLevel) -> None:
    values = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    logits = values.clone().requires_grad_()
    tokens = [[0, 3, 1], [2, 2, 0]]
    policy = logits.log_softmax(dim=-1).gather(-1, torch.tensor(tokens)[..., None])[..., 0]
    ratio = losses.log_ratio(policy, policy.detach(), MASK, level).exp()
    assert ratio.tolist() == [[1.0] * 3] * 2
    weights = losses.aggregation_weights(MASK.sum(dim=1), "grpo", rollouts=2, tokens=5, max_completion_length=4)
    losses.weighted_sum(losses.surrogate_terms(policy, ratio, ADVANTAGES, LOW, HIGH, kind), weights, MASK).backward()
    # d/dlogit of -weight * A * log softmax(logits)[token] = -weight * A * (onehot - softmax)
    expected = [
        [
            [
                -weight * advantage * real * ((place == tokens[i][t]) - chance)
                for place, chance in enumerate(_softmax(values[i, t].tolist()))
            ]
            for t, real in enumerate(MASK[i].tolist())
        ]
        for i, (weight, advantage) in enumerate([(1 / 6, 2.0), (1 / 4, -1.0)])
    ]
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor(expected, dtype=torch.float64))
