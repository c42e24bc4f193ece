"""Optimizer steps on groups of random rollouts, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from grpo_mlflow.config import TrainConfig
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.training.learner import Learner, Sizes
from grpo_mlflow.types import Group
from tests.support.groups import K, fresh


def learner(policy: Policy, rollouts: int, reference: Policy | None = None, **settings: Any) -> Learner:
    config = TrainConfig(**{"batch_size": 4, "grad_accum_steps": "auto", "kl_coef": 0.0, "lr": 1e-3, **settings})
    return Learner(policy, reference, Accelerator(cpu=True), config, Sizes(0.8, 16, rollouts, 100))


def measured(made: Learner, groups: list[Group], iteration: int = 0) -> dict[str, float]:
    """The metrics of an update in which every one of them has a value."""
    metrics = made.update(groups, 0, iteration)
    found = {name: value for name, value in metrics.items() if value is not None}
    assert found.keys() == metrics.keys()
    return found


def gradient(groups: list[Group], **settings: Any) -> torch.Tensor:
    """The gradient of one optimizer step, before clipping, read off plain gradient descent: Adam's first moment."""
    policy, reference = fresh(), fresh(seed=4)
    coefficient = settings.get("kl_coef", 0.0)
    made = learner(policy, len(groups) * K, reference if coefficient else None, grad_clip=None, **settings)
    made.update(groups, seed=0, iteration=0)
    state = made.optimizer.state_dict()["state"]
    return torch.cat([entry["exp_avg"].flatten() for entry in state.values()]) / 0.1  # exp_avg = (1 - beta1) g
