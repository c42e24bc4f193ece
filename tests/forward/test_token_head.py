"""The output layer in slices: the same numbers and gradients as the whole logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grpo_mlflow.forward import tuning
from grpo_mlflow.forward.token_head import token_logprobs

N, D, V = 23, 12, 50


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=draw, dtype=dtype) for shape in ((N, D), (V, D), (V,)))
    targets = torch.randint(V, (N,), generator=draw)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float) -> list[Tensor]:
    distribution = torch.distributions.Categorical(
        logits=torch.nn.functional.linear(hidden, weight, bias) / temperature
    )
    return [distribution.log_prob(targets), distribution.entropy()]


@pytest.fixture(params=["one slice, kept", "many slices, kept", "many slices, computed again"])
def sliced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param.startswith("many"):
        monkeypatch.setattr(tuning, "LOGITS_SLICE", 4 * V)
    if request.param.endswith("again"):
        monkeypatch.setattr(tuning, "KEPT_LOGPROBS", 0)


@pytest.mark.usefixtures("sliced")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("entropy_gradient", [True, False])
def test_slices_change_nothing(temperature: float, with_bias: bool, entropy_gradient: bool) -> None:
    coefficients = torch.randn(2, N, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (plain, token_logprobs):
        hidden, weight, bias, targets = inputs()
        arguments = (hidden, weight, bias if with_bias else None, targets, temperature)
        extra = (entropy_gradient,) if function is token_logprobs else ()
        logprobs, entropy = function(*arguments, *extra)
        loss = (logprobs * coefficients[0]).sum()
        if entropy_gradient:
            loss = loss + (entropy * coefficients[1]).sum()
        else:
            assert function is plain or not entropy.requires_grad
        loss.backward()
        results.append([logprobs, entropy, hidden.grad, weight.grad, *([bias.grad] if with_bias else [])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("sliced")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_capped_logits_bend_their_gradient(temperature: float) -> None:
    results = []
    for sliced in (False, True):
        hidden, weight, bias, targets = inputs()
        if sliced:
            found = list(token_logprobs(hidden, weight, bias, targets, temperature, True, cap=1.5))
        else:
            capped = 1.5 * torch.tanh(torch.nn.functional.linear(hidden, weight, bias) / 1.5)
            logprobs = (capped / temperature).log_softmax(-1)
            found = [logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)]
        (found[0].sum() + found[1].square().sum()).backward()
        results.append([*found, hidden.grad, weight.grad, bias.grad])
    for expected, computed in zip(*results, strict=True):
        torch.testing.assert_close(computed, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("sliced")
def test_tokens_that_are_not_sampled_are_impossible() -> None:
    """The others' log-probabilities, entropy and gradients are those of a smaller vocabulary."""
    results = []
    for few in (True, False):
        hidden, weight, bias, targets = inputs()
        targets, sampled = targets % (V - 3), V - 3
        if few:
            found = plain(hidden, weight[:sampled], bias[:sampled], targets, 0.7)
        else:
            found = list(token_logprobs(hidden, weight, bias, targets, 0.7, True, sampled))
        (found[0].sum() + found[1].sum()).backward()
        results.append([*found, hidden.grad, weight.grad, bias.grad])
    for expected, computed in zip(*results, strict=True):
        torch.testing.assert_close(computed, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("sliced")
def test_frozen_inputs_get_no_gradient() -> None:
    hidden, weight, _, targets = inputs()
    token_logprobs(hidden.detach(), weight, None, targets, 1.0)[0].sum().backward()
    assert weight.grad is not None
    assert hidden.grad is None
    with torch.no_grad():
        assert not token_logprobs(hidden, weight, None, targets, 1.0)[0].requires_grad


@pytest.mark.usefixtures("sliced")
def test_under_autocast_only_the_output_layer_is_rounded() -> None:
    hidden, weight, _, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found, entropy = token_logprobs(hidden, weight, None, targets, 1.0, True)
        logits = torch.nn.functional.linear(hidden, weight).float()
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, expected)
    assert found.dtype == entropy.dtype == torch.float32
    (found.sum() + entropy.sum()).backward()
    rounded = [part.grad for part in (hidden, weight)]
    exact_hidden, exact_weight, _, _ = inputs()
    sum(part.sum() for part in plain(exact_hidden, exact_weight, None, targets, 1.0)).backward()  # type: ignore[union-attr]
    for one, exact in zip(rounded, (exact_hidden.grad, exact_weight.grad), strict=True):
        assert one is not None
        assert exact is not None
        assert one.dtype == torch.float32
        assert (one - exact).norm() < 0.02 * exact.norm()
