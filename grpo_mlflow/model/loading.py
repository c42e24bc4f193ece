"""The models of a run: the one that is trained, and the reference of its KL term."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from grpo_mlflow import tasks
from grpo_mlflow.config import Config, ModelConfig
from grpo_mlflow.errors import UserError
from grpo_mlflow.model import lora, policy, tiny
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.tasks.settings import task_settings


def trained(config: Config, source: str | Path, device: torch.device) -> Policy:
    """Load the model to train: with the adapter of `model.lora` in it, or with all its weights to be trained.

    A source that is an adapter goes on as one, or is merged into its base model first.

    Raises:
        UserError: it cannot be loaded, or cannot have such an adapter.
    """
    found, settings = policy.load_as(config.model, source, device), config.model.lora
    if not settings.rank:
        found = found.merged() if found.has_adapter else found
    elif found.has_adapter:
        lora.require_same(found.model, settings)
    else:
        lora.add(found.model, settings, config.seed)
    if config.model.gradient_checkpointing:
        policy.recompute_activations(found.model)
    return found


def reference(config: Config, actor: Policy, initial: Callable[[], str | Path]) -> Policy | None:
    """Return the reference model of the KL term, None where that has no weight; `initial` names model.train_id.

    It is the trained model without its adapter, where that is what training started from: no second model.
    """
    if config.train.kl_coef == 0:
        return None
    model = config.model
    named = initial() if model.ref_id is None else model_source(model.ref_id, config)
    if actor.has_adapter and lora.base_of(named) is None:
        return actor.base()
    device = policy.device_of(model.ref_device, "model.ref_device") if model.ref_device else actor.device
    found = policy.load_as(model, named, device)
    found.model.requires_grad_(False)
    return found


def merge(source: str | Path, output: str | Path, settings: ModelConfig) -> Path:
    """Write the adapter in `source` and its base as one plain float32 model, and return its folder.

    Raises:
        UserError: the source is no adapter, or the output is in the way.
    """
    folder = Path(output).expanduser()
    if folder.exists():
        raise UserError(f"output = {str(output)!r}: exists already; allowed: a new folder")
    if lora.base_of(source) is None:
        raise UserError(f"model = {str(source)!r}: is no LoRA adapter, so there is nothing to merge")
    policy.load_as(settings, source, torch.device("cpu")).save_plain(folder)
    return folder


def model_source(name: str, config: Config, progress: tiny.Progress | None = None) -> str | Path:
    """Return what to load for a model name: the embedded model's folder for `tiny`, else the name itself."""
    if name != "tiny":
        return name
    return tiny.ensure(config.model.tiny, tasks.of(config), task_settings(config), progress)
