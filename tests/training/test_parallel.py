"""The norm of a step's gradient, and what is clipped by it."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch.nn import Parameter

from grpo_mlflow.training.parallel import Replicated


def test_the_norm_of_many_numbers_is_exact_to_float32() -> None:
    draw = torch.Generator().manual_seed(0)
    parameters = [Parameter(torch.zeros(shape)) for shape in ((32_768, 256), (256,), ())]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    whole = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    exact = float(whole.double().norm())
    clip = Replicated(Accelerator(cpu=True)).clip
    assert clip(parameters, float("inf")) == pytest.approx(exact, rel=2e-7)
    assert clip(parameters, 3.0) == pytest.approx(exact, rel=2e-7)
    assert clip(parameters, float("inf")) == pytest.approx(3.0, rel=1e-6)
    assert clip([Parameter(torch.zeros(3))], 1.0) == 0  # without a gradient
