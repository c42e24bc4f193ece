"""Every optimizer of the table: its options, its steps, and a run that goes on with its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_mlflow import runs
from grpo_mlflow.config import TrainConfig
from grpo_mlflow.config.optimizers import OPTIMIZERS
from grpo_mlflow.training import optimizer_files
from grpo_mlflow.training.optimizers import create
from tests.support.groups import fresh, make_groups
from tests.support.small_runs import resume, same, small
from tests.support.updates import learner

EVERY = pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in OPTIMIZERS), ("adamw", {"betas": [0.8, 0.9]}), ("sgd", {"momentum": 0})],
)


def made(name: str = "adamw", options: dict[str, Any] | None = None, **settings: Any) -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    return create([parameter], TrainConfig(optimizer=name, optimizer_options=options or {}, **settings))


def steps(optimizer: torch.optim.Optimizer, gradients: list[list[float]]) -> torch.Tensor:
    """Take a step with each gradient and return the parameter."""
    (parameter,) = optimizer.param_groups[0]["params"]
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    result: torch.Tensor = parameter.detach().clone()
    return result


def test_the_default_is_adamw_with_the_defaults_of_torch() -> None:
    found = made(lr=0.1, weight_decay=0.3)
    assert type(found) is torch.optim.AdamW
    expected = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=0.1, weight_decay=0.3, fused=True)
    assert found.defaults == expected.defaults


def test_options_reach_the_optimizer() -> None:
    assert made(options={"betas": [0.8, 0.95], "eps": 1e-6}).defaults["betas"] == (0.8, 0.95)
    assert made(options={"eps": 1e-6}).defaults["eps"] == 1e-6
    assert made("sgd", {"momentum": 0.5}).defaults["momentum"] == 0.5


def test_sgd_is_gradient_descent_with_momentum() -> None:
    # v = g, then 0.9 v + g: 1 - 0.1 (2) - 0.1 (1.8 + 1) and -2 - 0.1 (-1) - 0.1 (-0.9 + 3)
    found = steps(made("sgd", lr=0.1), [[2.0, -1.0], [1.0, 3.0]])
    torch.testing.assert_close(found, torch.tensor([0.52, -2.11]))


@EVERY
def test_a_saved_state_goes_on_exactly(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    first, second = [[0.3, -1.0], [0.5, 2.0]], [[-0.7, 0.2], [1.5, 0.1]]
    whole, before, after = (made(name, options, lr=0.1) for _ in range(3))
    expected = steps(whole, first + second)
    reached = steps(before, first)
    optimizer_files.save(before, tmp_path / "optimizer.safetensors")
    after.param_groups[0]["params"][0].data.copy_(reached)
    optimizer_files.load(after, tmp_path / "optimizer.safetensors")
    assert torch.equal(steps(after, second), expected)


@EVERY
def test_an_update_changes_the_weights(name: str, options: dict[str, Any]) -> None:
    policy, before = fresh(), fresh().model.state_dict()
    learner(policy, 16, optimizer=name, optimizer_options=options, lr=0.1).update(make_groups(4), 0, 0)
    assert not all(torch.equal(value, before[key]) for key, value in policy.model.state_dict().items())


def test_a_resumed_run_has_the_momentum_of_sgd(shared_store: str) -> None:
    sgd = ("train.optimizer=sgd", "train.lr=0.05", "eval.enabled=false", "train.lr_schedule=constant")
    whole = runs.train(small(shared_store, *sgd))
    part = runs.train(small(shared_store, *sgd, "train.iterations=2"))
    same(whole, resume(shared_store, part.run_id, "train.iterations=4"), shared_store)
