"""Products of few rows the faster way round: the same numbers, and the layers left as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grpo_mlflow.generation.products import of_few_rows


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(320, 640), nn.SiLU(), nn.Linear(640, 320, bias=False), nn.Linear(320, 8))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3, 320), (1, 5, 320), (128, 320), (129, 320), (2, 70, 320)])
def test_both_ways_give_the_same(model: nn.Sequential, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    expected = model(x)
    with of_few_rows(model):
        found = model(x)
        first = model[0](x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    few = x.numel() <= 128 * 320
    assert first.is_contiguous() is not few  # it is the transposed of a product exactly where there are few rows


def test_layers_are_themselves_again_after_an_error(model: nn.Sequential) -> None:
    def touched() -> list[bool]:
        return ["forward" in vars(layer) for layer in model]

    with pytest.raises(RuntimeError), of_few_rows(model):
        assert touched() == [True, False, True, False]  # the last is too small to gain
        model(torch.ones(1, 7))
    assert not any(touched())
