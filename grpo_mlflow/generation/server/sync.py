"""How a server gets the policy's weights: one class for each value of `generation.sync`.

Whatever depends on that setting is asked of these classes, so that a further way is one class and one line of `SYNCS`.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from grpo_mlflow.config import LoraConfig, SyncName
from grpo_mlflow.errors import UserError
from grpo_mlflow.generation.server.engine import Engine
from grpo_mlflow.generation.server.weights import WeightsFolder
from grpo_mlflow.model import lora
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.program import program

StartAgain = Callable[[Path], Awaitable[None]]  # a server of our own, with another model


@dataclass(frozen=True, slots=True)
class Package:
    """Weights that were written for a server.

    `load` gives them to it. `label` is what it must say that it serves afterwards; None where it is given no label.
    `model` is what it is started with if it died and goes by no label; None: what it was started with before. `folder`
    holds what was written, a whole model or an adapter.
    """

    load: Callable[[Engine, StartAgain], Awaitable[None]]
    label: str | None
    model: Path | None
    folder: Path


class Sync(Protocol):
    """A way to give a server the policy's weights."""

    sends: bool  # whether new weights reach the server; without, it keeps those of version 0
    in_place: bool  # whether the server loads whole weights while it runs

    def starts_with(self, source: str | Path, initial: str | Path) -> str | Path:
        """Return what a server of our own starts with.

        Args:
            source: what the policy was loaded from.
            initial: what version 0 was loaded from.

        Raises:
            UserError: the server could never serve this policy.
        """
        ...

    def lora_rank(self, settings: LoraConfig) -> int | None:
        """Return the rank of the adapters that a server has to take; None: it takes none."""
        ...

    def is_there_at_start(self, policy: Policy) -> bool:
        """Return whether a server that has just been started needs no first load."""
        ...

    def pack(self, policy: Policy, weights: WeightsFolder, version: int) -> Package | None:
        """Write the policy's weights for the server; None where it is never sent any."""
        ...


class _Sending:
    """What is common to the ways that send weights."""

    sends, in_place = True, False

    def starts_with(self, source: str | Path, initial: str | Path) -> str | Path:
        return lora.base_of(source) or source  # an adapter comes with the first sync

    def lora_rank(self, settings: LoraConfig) -> int | None:
        return None

    def is_there_at_start(self, policy: Policy) -> bool:
        return False  # even if it is: the first load gives the weights their label


class Reload(_Sending):
    """The whole weights, an adapter merged into them, loaded in place."""

    in_place = True

    def pack(self, policy: Policy, weights: WeightsFolder, version: int) -> Package:
        folder = weights.write(policy.save_plain, version)
        return Package(lambda engine, _: engine.load(folder, folder.name), folder.name, folder, folder)


class Adapter(_Sending):
    """The adapter alone, beside the base model."""

    def lora_rank(self, settings: LoraConfig) -> int | None:
        return settings.rank

    def pack(self, policy: Policy, weights: WeightsFolder, version: int) -> Package | None:
        if not policy.has_adapter:  # the untrained model, which is evaluated as the server was started with it
            return None
        folder = weights.write(policy.save, version)
        return Package(lambda engine, _: engine.load_adapter(folder, folder.name), folder.name, None, folder)


class Restart(_Sending):
    """The whole weights, taken by a server of our own that starts again with them."""

    def is_there_at_start(self, policy: Policy) -> bool:
        return not policy.has_adapter  # with one, it started with the base alone

    def pack(self, policy: Policy, weights: WeightsFolder, version: int) -> Package:
        folder = weights.write(policy.save_plain, version)
        return Package(lambda _, start_again: start_again(folder), None, folder, folder)


class Static:
    """No new weights: the server keeps those of version 0."""

    sends = in_place = False

    def starts_with(self, source: str | Path, initial: str | Path) -> str | Path:
        if lora.base_of(initial) is not None:
            raise UserError(
                f"model {str(initial)!r} is an adapter, which generation.sync = 'none' never sends to the server; "
                "allowed: reload, lora (with model.lora.rank), restart (with generation.server.manage=true), or a "
                f"merged model ({program()} merge)"
            )
        return initial

    def lora_rank(self, settings: LoraConfig) -> int | None:
        return None

    def is_there_at_start(self, policy: Policy) -> bool:
        return True

    def pack(self, policy: Policy, weights: WeightsFolder, version: int) -> None:
        return None


SYNCS: dict[SyncName, Sync] = {"reload": Reload(), "lora": Adapter(), "restart": Restart(), "none": Static()}


def is_same_model(name: str, source: str | Path) -> bool:
    """Return whether a server that names a model so was started with `source`, a hub id or a folder here."""
    return name == str(source) or (os.path.isdir(name) and os.path.isdir(source) and os.path.samefile(name, source))
