"""The models of a run: the one that is trained, and the reference of its KL term."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from grpo_mlflow import tasks
from grpo_mlflow.config import Config, ModelConfig
from grpo_mlflow.errors import ConfigError, ModelError
from grpo_mlflow.model import devices, lora, policy, servable, tiny
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.model.recomputing import recompute_activations
from grpo_mlflow.model.servable import Serving
from grpo_mlflow.tasks.settings import task_settings


def trained(config: Config, source: str | Path, device: torch.device) -> Policy:
    """Load the model to train: with the adapter of `model.lora` in it, or with all its weights to be trained.

    A source that is an adapter goes on as one, or is merged into its base model first.

    Raises:
        ModelError: it cannot be loaded.
        ConfigError: it cannot have such an adapter, or completions so long.
    """
    settings = config.model.lora
    found = policy.load_as(config.model, source, device, frozen=bool(settings.rank))
    _require_room(config.generation.max_new_tokens, "generation.max_new_tokens", found)
    if config.eval.enabled:
        _require_room_of_evaluation(config, found)
    if not settings.rank:
        found = found.merged() if found.has_adapter else found
    elif found.has_adapter:
        lora.require_same(found.model, settings)
    else:
        lora.add(found.model, settings, config.seed)
    if config.model.gradient_checkpointing:
        recompute_activations(found.model)
    return found


def measured(config: Config, source: str | Path, device: torch.device, *, is_initial: bool = False) -> Policy:
    """Load a model to evaluate.

    Args:
        is_initial: it is the one that training starts from, stored as training stores it.

    Raises:
        ModelError: it cannot be loaded.
        ConfigError: it cannot have completions so long.
    """
    frozen = lora.base_of(source) is not None or (is_initial and bool(config.model.lora.rank))
    found = policy.load_as(config.model, source, device, frozen=frozen)
    _require_room_of_evaluation(config, found)
    return found


def _require_room_of_evaluation(config: Config, found: Policy) -> None:
    own = config.eval.max_new_tokens
    key = "eval.max_new_tokens" if own else "generation.max_new_tokens"
    _require_room(own or config.generation.max_new_tokens, key, found)


def _require_room(new: int, key: str, found: Policy) -> None:
    positions = getattr(found.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and new >= positions:
        raise ConfigError(
            f"{key} = {new}: the model has {positions} positions for a prompt and its completion; allowed: less than "
            f"{positions}"
        )


def other_reference(config: Config, actor: Policy, initial: Callable[[], str | Path]) -> str | Path | None:
    """Return what the reference is loaded from where it is another model than the trained one; None: there is none.

    `initial` names model.train_id.
    """
    if config.train.kl_coef == 0:
        return None
    named = initial() if config.model.ref_id is None else model_source(config.model.ref_id, config)
    return None if actor.has_adapter and lora.base_of(named) is None else named


def reference(config: Config, actor: Policy, initial: Callable[[], str | Path]) -> Policy | None:
    """Return the reference model of the KL term, None where that has no weight; `initial` names model.train_id.

    It is the trained model without its adapter, where that is what training started from: no second model.
    """
    named, model = other_reference(config, actor, initial), config.model
    if named is None:
        return actor.base() if config.train.kl_coef else None
    device = devices.device_of(model.ref_device, "model.ref_device") if model.ref_device else actor.device
    found = policy.load_as(model, named, device, frozen=True)
    found.model.requires_grad_(False)
    return found


def merge(
    source: str | Path,
    output: str | Path,
    settings: ModelConfig,
    require: Callable[[Policy], object] = lambda _: None,
    asked: Serving | None = None,
) -> Path:
    """Write the adapter in `source` and its base as one plain float32 model, and return its folder.

    Args:
        require: refuses a model before anything is written.
        asked: how MLflow is to ask the model; None: it is not made loadable by MLflow.

    Raises:
        ConfigError: the source is no adapter, or the output is in the way.
        ModelError: it cannot be loaded, or the written model is not that of the adapter.
    """
    folder = Path(output).expanduser()
    if folder.exists():
        raise ConfigError(f"output = {str(output)!r}: exists already; allowed: a new folder")
    if lora.base_of(source) is None:
        raise ConfigError(f"model = {str(source)!r}: is no LoRA adapter, so there is nothing to merge")
    found = policy.load_as(settings, source, torch.device("cpu"), frozen=True)
    require(found)
    try:
        found.save_plain(folder)
        require_equal(found, policy.load_as(settings, folder, found.device))
        if asked is not None:
            servable.write(folder, found, settings, asked)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it did not exist, and is not the model
        raise
    return folder


@torch.no_grad()
def require_equal(adapted: Policy, plain: Policy) -> None:
    """Refuse a merged model that gives a few tokens other scores than the model with its adapter."""
    rows = adapted.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, (1, 16), generator=torch.Generator().manual_seed(0))
    expected, found = (each.model(input_ids=ids, use_cache=False).logits.float() for each in (adapted, plain))
    error, spread = float((found - expected).abs().max()), float(expected.amax() - expected.amin())
    if not error <= 1e-3 * spread:  # float32 through many layers; NaN is refused, too
        raise ModelError(
            f"the merged model differs from its adapter: scores of a few tokens are {error:.2g} off, and lie within "
            f"{spread:.2g} of each other; allowed: an adapter that only adds to weights of its base model"
        )


def model_source(name: str, config: Config, progress: tiny.Progress | None = None) -> str | Path:
    """Return what to load for a model name: the embedded model's folder for `tiny`, else the name itself."""
    if name != "tiny":
        return name
    return tiny.ensure(config.model.tiny, tasks.of(config), task_settings(config), progress)
