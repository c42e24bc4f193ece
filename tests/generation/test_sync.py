"""What each value of `generation.sync` decides, on an engine that notes what it is asked."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast, get_args

import pytest

from grpo_mlflow.config import LoraConfig, SyncName
from grpo_mlflow.errors import UserError
from grpo_mlflow.generation.server.engine import Engine
from grpo_mlflow.generation.server.sync import SYNCS
from grpo_mlflow.generation.server.weights import WeightsFolder
from grpo_mlflow.model import lora
from grpo_mlflow.model.policy import Policy


class Noting:
    """Notes what is called, with the folder."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Path]] = []

    async def load(self, folder: Path, label: str) -> None:
        assert label == folder.name
        self.calls.append(("load", folder))

    async def load_adapter(self, folder: Path, label: str) -> None:
        assert label == folder.name
        self.calls.append(("load_adapter", folder))

    async def start_again(self, folder: Path) -> None:
        self.calls.append(("start again", folder))


def test_every_value_has_its_class() -> None:
    assert set(SYNCS) == set(get_args(SyncName))


@pytest.mark.parametrize(
    ("name", "call", "labelled", "restarts_with_them"),
    [
        ("reload", "load", True, True),
        ("lora", "load_adapter", True, False),  # what a server with adapters is started with is their base
        ("restart", "start again", False, True),
    ],
)
def test_weights_are_written_and_given(
    policy: Policy, tmp_path: Path, name: SyncName, call: str, labelled: bool, restarts_with_them: bool
) -> None:
    if name == "lora":
        lora.add(policy.model, LoraConfig(rank=4), 0)
    engine, weights = Noting(), WeightsFolder(str(tmp_path))
    package = SYNCS[name].pack(policy, weights, 3)
    assert package is not None
    asyncio.run(cast(Any, package.load)(cast(Engine, engine), engine.start_again))
    assert weights.newest is not None
    assert (weights.newest / ("adapter_config.json" if name == "lora" else "config.json")).is_file()
    assert engine.calls == [(call, weights.newest)]
    assert package.label == (weights.newest.name if labelled else None)
    assert package.model == (weights.newest if restarts_with_them else None)


def test_without_sync_nothing_is_written(policy: Policy, tmp_path: Path) -> None:
    weights = WeightsFolder(str(tmp_path))
    assert SYNCS["none"].pack(policy, weights, 3) is None
    assert weights.newest is None
    assert [name for name, sync in SYNCS.items() if not sync.sends] == ["none"]


def test_beside_a_server_of_adapters_the_untrained_model_is_its_base(policy: Policy, tmp_path: Path) -> None:
    """A checkpoint without an adapter cannot be sent as one: the server was started with it."""
    weights = WeightsFolder(str(tmp_path))
    assert SYNCS["lora"].pack(policy, weights, 0) is None
    assert weights.newest is None


@pytest.mark.parametrize("name", SYNCS)
def test_what_a_server_starts_with(policy: Policy, folder: Path, tmp_path: Path, name: SyncName) -> None:
    first = SYNCS[name].starts_with("now", "at first")
    assert first == ("at first" if name == "none" else "now")
    lora.add(policy.model, LoraConfig(rank=4), 0)
    adapter = tmp_path / "adapter"
    policy.save(adapter)
    if name == "none":
        with pytest.raises(UserError, match=r"is an adapter.*grpo merge"):
            SYNCS[name].starts_with(adapter, adapter)
    else:
        assert SYNCS[name].starts_with(adapter, adapter) == lora.base_of(adapter)
    assert SYNCS[name].lora_rank(LoraConfig(rank=4)) == (4 if name == "lora" else None)


@pytest.mark.parametrize("name", ["reload", "lora", "restart"])
def test_only_a_restarted_server_needs_no_first_load(policy: Policy, name: SyncName) -> None:
    assert SYNCS[name].is_there_at_start(policy) == (name == "restart")
    lora.add(policy.model, LoraConfig(rank=4), 0)
    assert not SYNCS[name].is_there_at_start(policy)
