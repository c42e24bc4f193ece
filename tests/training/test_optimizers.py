"""Every optimizer of the table: its options, its steps, and a run that goes on with its state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_mlflow import runs
from grpo_mlflow.config import TrainConfig
from grpo_mlflow.config.optimizers import OPTIMIZERS
from grpo_mlflow.errors import ModelError
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


def steps(optimizer: torch.optim.Optimizer, gradients: Sequence[list[float] | Tensor]) -> torch.Tensor:
    """Take a step with each gradient and return the parameter."""
    (parameter,) = optimizer.param_groups[0]["params"]
    for gradient in gradients:
        parameter.grad = torch.as_tensor(gradient).clone()
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


@pytest.mark.parametrize(
    ("name", "lr", "offload"), [("sgd", 0.05, "none"), ("adamw8bit", 0.003, "none"), ("adamw8bit", 0.003, "cpu")]
)
def test_a_resumed_run_has_the_state_of_its_optimizer(name: str, lr: float, offload: str, shared_store: str) -> None:
    own = (f"train.optimizer={name}", f"train.lr={lr}", "eval.enabled=false", "train.lr_schedule=constant")
    whole = runs.train(small(shared_store, *own))
    part = runs.train(small(shared_store, *own, "train.iterations=2", f"train.optimizer_offload={offload}"))
    same(whole, resume(shared_store, part.run_id, "train.iterations=4"), shared_store)


# In 8 bits

SHAPE = (61, 85)  # 5185 numbers: blocks of 256, and one that is not full; below 4096 all is float32


def wide(name: str) -> torch.optim.Optimizer:
    draw = torch.Generator().manual_seed(0)
    return create([torch.nn.Parameter(torch.randn(SHAPE, generator=draw))], TrainConfig(optimizer=name, lr=0.1))


def drawn(count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(SHAPE, generator=draw) for _ in range(count)]


def test_a_state_in_8_bits_goes_on_exactly_and_weighs_a_quarter(tmp_path: Path) -> None:
    gradients = drawn(5)
    whole, before, after = (wide("adamw8bit") for _ in range(3))
    expected = steps(whole, gradients)
    reached = steps(before, gradients[:3])
    optimizer_files.save(before, tmp_path / "optimizer.safetensors")
    after.param_groups[0]["params"][0].data.copy_(reached)
    optimizer_files.load(after, tmp_path / "optimizer.safetensors")
    assert torch.equal(steps(after, gradients[3:]), expected)
    (state,) = after.state.values()
    held = {key: value.nbytes for key, value in state.items() if isinstance(value, torch.Tensor)}
    assert held["state1"] == held["state2"] == 5185
    assert held["absmax1"] == held["absmax2"] == 4 * 21  # a scale per 256 numbers
    assert sum(held.values()) == 2 * (5185 + 4 * 21 + 4 * 256)  # and what each of the 256 codes means


def test_adamw_in_8_bits_begins_as_adamw_and_stays_near() -> None:
    """A step is taken with moments in float32; what the next one begins with is rounded."""
    given = wide("adamw").param_groups[0]["params"][0].detach().clone()
    for count, allowed in ((1, 1e-6), (5, 0.1)):
        exact, rough = (steps(wide(name), drawn(count)) - given for name in ("adamw", "adamw8bit"))
        assert (rough - exact).norm() < allowed * exact.norm()


def test_a_damaged_state_in_8_bits_is_refused(tmp_path: Path) -> None:
    before = wide("adamw8bit")
    steps(before, drawn(1))
    (state,) = before.state.values()
    state["absmax1"] = state["absmax1"][:-1]
    optimizer_files.save(before, tmp_path / "optimizer.safetensors")
    with pytest.raises(ModelError, match=r"0\.absmax1 is \(20,\)"):
        optimizer_files.load(wide("adamw8bit"), tmp_path / "optimizer.safetensors")


# Offloaded


@EVERY
def test_an_offloaded_optimizer_gives_the_same_numbers(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    results = []
    for offload in ("none", "cpu"):
        policy = fresh()
        own: dict[str, Any] = {"optimizer": name, "optimizer_options": options, "optimizer_offload": offload}
        made = learner(policy, 8, epochs=2, lr=0.05, lr_warmup_steps=2, **own)  # several steps, at several rates
        metrics = [made.update(make_groups(4), 0, 0)]
        made.save(tmp_path / offload)
        again = learner(policy, 8, epochs=2, lr=0.05, lr_warmup_steps=2, **own)
        again.restore(tmp_path / offload, made.step, made.kl_coef)
        metrics += [again.update(make_groups(4, seed=1), 0, 1)]
        results.append((metrics, list(policy.model.parameters()), (tmp_path / offload).read_bytes()))
    (metrics, weights, state), (others, same_weights, same_state) = results
    assert metrics == others
    assert all(torch.equal(one, other) for one, other in zip(weights, same_weights, strict=True))
    assert state == same_state
