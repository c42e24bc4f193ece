"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv:2106.09685) in a transformers model, through peft.

A linear layer W becomes W + alpha / rank * B A with A (rank, in) and B (out, rank). B starts at zero, so an untrained
adapter changes nothing; W is frozen. The layers are put into the model in place, so whatever works on a model works on
one with an adapter; with its adapter switched off it is the base model, exactly.

An adapter's folder holds `adapter_model.safetensors` and `adapter_config.json`, which names the base model.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from grpo_mlflow import seeding
from grpo_mlflow.config import LoraConfig
from grpo_mlflow.errors import UserError

_NAME, _PREFIX, _MARK = "default", "base_model.model.", ".lora_"  # peft's own words, of adapter, file and layers


def has_adapter(model: Any) -> bool:
    return bool(getattr(model, "peft_config", None))


def base_of(source: str | Path) -> str | None:
    """Return the base model that an adapter's folder names, None for any other model.

    Raises:
        UserError: the folder is damaged, its base is gone, or peft is missing.
    """
    try:
        content = json.loads((Path(source) / "adapter_config.json").read_text())
        base = content["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise ValueError(f"base_model_name_or_path = {json.dumps(base)} names no model")
    except OSError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"model {str(source)!r}: adapter_config.json cannot be read: {error}") from error
    if find_spec("peft") is None:
        raise UserError(
            f"model {str(source)!r} is a LoRA adapter: it needs pip install -e '.[lora]' in the project's folder"
        )
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(
            f"model {str(source)!r} is a LoRA adapter of {base!r}, which is not there; allowed: that model in that "
            "place, or a link to it"
        )
    return base


def add(model: Any, settings: LoraConfig, seed: int) -> None:
    """Put an untrained adapter into the model, and freeze everything else.

    Raises:
        UserError: a target names no layer that can have an adapter.
    """
    targets = _targets(model, settings)
    peft = importlib.import_module("peft")
    base = model.name_or_path
    chosen = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),  # as of GPT-2, else peft warns
        # absolute, since a checkpoint is read from elsewhere, too
        base_model_name_or_path=str(Path(base).absolute()) if Path(base).is_dir() else base,
    )
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seeding.integer(seed, "lora", "weights"))
        _inject(model, chosen)


def read(model: Any, folder: Path) -> None:
    """Put the adapter of a folder into its base model, and freeze everything else.

    Raises:
        UserError: it is not one that `save` could have written.
    """
    peft = importlib.import_module("peft")
    try:
        _inject(model, peft.PeftConfig.from_pretrained(str(folder)))
        weights = {_in_model(name): tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
        wanted = {name for name in model.state_dict() if _MARK in name}
        if weights.keys() != wanted:
            odd = min(weights.keys() ^ wanted)
            raise ValueError(f"{odd} is {'missing' if odd in wanted else 'no part of a plain LoRA adapter'}")
        model.load_state_dict(weights, strict=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model {str(folder)!r}: its LoRA adapter cannot be loaded: {reason}") from error


def save(model: Any, folder: Path) -> None:
    """Write the adapter in the format of peft, which servers read."""
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items() if _MARK in name}
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[_NAME].save_pretrained(str(folder))
    save_file({_in_file(name): t.contiguous() for name, t in state.items()}, folder / "adapter_model.safetensors")


def _inject(model: Any, config: Any) -> None:
    importlib.import_module("peft").inject_adapter_in_model(config, model, _NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_MARK in name)
    model.eval()


def _in_file(name: str) -> str:
    return f"{_PREFIX}{name.replace(f'.{_NAME}.', '.')}"


def _in_model(name: str) -> str:
    part, _, kind = name.removeprefix(_PREFIX).rpartition(".")
    return f"{part}.{_NAME}.{kind}"


def _targets(model: Any, settings: LoraConfig) -> list[str]:
    """Return the names of the layers that get an adapter, as short as they may be; the output layer never has one."""
    outer = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    last = {name: name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    possible = {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and id(layer) not in outer
    }
    short = {last[name] for name in possible}
    if settings.targets == "all-linear":
        clear = all(name in possible for name in last if last[name] in short)
        return sorted(short if clear else possible)
    for target in settings.targets:
        if not any(f".{name}".endswith(f".{target}") for name in possible):
            raise UserError(
                f"model.lora.targets = {list(settings.targets)}: {target!r} is no linear layer inside the model; "
                f"allowed: all-linear, or names among {', '.join(sorted(short))}"
            )
    return list(settings.targets)


def require_same(model: Any, settings: LoraConfig) -> None:
    """Raise UserError unless the model's adapter is one that `settings` would have made."""
    found = model.peft_config[_NAME]
    for key, wanted, actual in (("rank", settings.rank, found.r), ("alpha", settings.alpha, found.lora_alpha)):
        if wanted != actual:
            raise UserError(f"model.lora.{key} = {wanted}: the adapter to go on with has {actual}; allowed: {actual}")


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """Compute as the base model inside the block."""
    for layer in _layers(model).values():
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in _layers(model).values():
            layer.enable_adapters(True)


def _layers(model: Any) -> dict[str, Any]:
    """Return the layers with an adapter by their names."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}


@torch.no_grad()
def merged(model: Any, device: torch.device | str | None = None) -> Any:
    """Return a plain model with the adapter added into its weights, on `device` (null: where they are).

    Weights without an adapter are shared with `model`, which stays as it is.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    plain = copy.deepcopy(model, shared)
    for name, layer in _layers(plain).items():
        linear = layer.get_base_layer()
        weight = linear.weight + layer.get_delta_weight(_NAME).to(linear.weight.dtype)
        linear.weight = nn.Parameter(weight.to(device or weight.device))
        parent, _, attribute = name.rpartition(".")
        setattr(plain.get_submodule(parent), attribute, linear)
    del plain.peft_config
    return plain
