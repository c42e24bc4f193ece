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
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grpo_mlflow import seeding
from grpo_mlflow.config import LoraConfig
from grpo_mlflow.errors import ConfigError, ModelError, one_line
from grpo_mlflow.forward import layers
from grpo_mlflow.model import folder, lora_settings, reading
from grpo_mlflow.program import program

NAME, _PREFIX, _MARK = "default", "base_model.model.", ".lora_"  # peft's own words, of adapter, file and layers
_FILE = "adapter_model.safetensors"


def has_adapter(model: Any) -> bool:
    return bool(getattr(model, "peft_config", None))


def base_of(source: str | Path) -> str | None:
    """Return the base model that an adapter's folder names, None for any other model.

    Raises:
        ModelError: the folder is damaged, its base is gone, or peft is missing.
    """
    if not (Path(source) / "adapter_config.json").is_file():
        return None
    base = folder.read_json(Path(source), "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"model {str(source)!r}: adapter_config.json cannot be read: base_model_name_or_path = {json.dumps(base)} "
            "names no model; allowed: a hub id or a folder"
        )
    if find_spec("peft") is None:
        raise ModelError(
            f"model {str(source)!r} is a LoRA adapter: it needs pip install -e '.[lora]' in the project's folder"
        )
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ModelError(
            f"model {str(source)!r} is a LoRA adapter of {base!r}, which is not there; allowed: that model in that "
            "place, or a link to it"
        )
    if (Path(base) / "adapter_config.json").is_file():
        raise ModelError(
            f"model {str(source)!r} is a LoRA adapter of {base!r}, which is an adapter, too; allowed: that one merged "
            f"({program()} merge)"
        )
    return base


def add(model: Any, settings: LoraConfig, seed: int) -> None:
    """Put an untrained adapter into the model, and freeze everything else.

    Raises:
        ConfigError: a target names no layer that can have an adapter.
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


def read(model: Any, source: Path) -> None:
    """Put the adapter of a folder into its base model, and freeze everything else.

    Raises:
        ModelError: it is damaged, or is more than low-rank updates of linear layers inside the model.
    """
    lora_settings.require_carried(source, folder.read_json(source, "adapter_config.json"))
    folder.require_readable(source, _FILE)
    weights = load_file(source / _FILE)
    peft = importlib.import_module("peft")
    try:
        settings = peft.PeftConfig.from_pretrained(str(source))
        settings.init_lora_weights = True  # overwritten by those of the file, and others may change the base model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about targets that are refused below
            _inject(model, settings)
    except Exception as error:  # peft raises all kinds for settings that do not fit the model
        raise ModelError(
            f"model {str(source)!r}: its LoRA adapter cannot be loaded: {one_line(error)}; allowed: settings in "
            "adapter_config.json that fit its base model"
        ) from error
    _require_inside(model, source)
    _require_weights(model, weights, source)
    model.load_state_dict({_in_model(name): tensor for name, tensor in weights.items()}, strict=False)


def _require_inside(model: Any, source: Path) -> None:
    """Refuse layers that passes of our own and merged models of tied weights would leave out."""
    outer = model.get_output_embeddings()
    for name, layer in adapted_layers(model).items():
        if layer is outer or not isinstance(layer.get_base_layer(), (nn.Linear, Conv1D)):
            raise ModelError(
                f"model {str(source)!r}: its LoRA adapter has {name!r} as a target; allowed: linear layers inside the "
                "model, not its embeddings or its output layer"
            )


def _require_weights(model: Any, weights: Mapping[str, Tensor], source: Path) -> None:
    wanted = {_in_file(name): tensor.shape for name, tensor in model.state_dict().items() if _MARK in name}
    shaped = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(wanted[name])}"
        for name, tensor in weights.items()
        if name in wanted and tensor.shape != wanted[name]
    ]
    for what, names in (
        ("missing", wanted.keys() - weights.keys()),
        ("no part of a plain LoRA adapter as its adapter_config.json describes", weights.keys() - wanted.keys()),
        ("of another shape", shaped),
    ):
        if names:
            raise ModelError(
                f"model {str(source)!r}: its LoRA adapter cannot be loaded: {reading.counted(names)} {what}; allowed: "
                "the tensors that its adapter_config.json and its base model ask for"
            )
    reading.require_finite(source, weights)


def save(model: Any, path: Path, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
    """Write the adapter in the format of peft, which servers read; `whole` returns a parameter in full."""
    state = {name: whole(each).detach().cpu() for name, each in model.named_parameters() if _MARK in name}
    path.mkdir(parents=True, exist_ok=True)
    model.peft_config[NAME].save_pretrained(str(path))
    save_file({_in_file(name): t.contiguous() for name, t in state.items()}, path / _FILE)


def put_in(model: Any, like: Any) -> None:
    """Put an adapter like that of another model, whose settings these are, into a model, its weights of any value."""
    settings = copy.copy(like)
    settings.init_lora_weights = True
    _inject(model, settings)


def settings_of(model: Any) -> Any:
    """Return the settings of a model's adapter, None where it has none."""
    return model.peft_config[NAME] if has_adapter(model) else None


def is_adapters(name: str) -> bool:
    """Return whether a parameter of this name belongs to an adapter."""
    return _MARK in name


def _inject(model: Any, config: Any) -> None:
    with layers.shown_in_float32(model):  # peft gives an adapter the type of the weight that it is for
        importlib.import_module("peft").inject_adapter_in_model(config, model, NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_MARK in name)
    model.eval()


def _in_file(name: str) -> str:
    return f"{_PREFIX}{name.replace(f'.{NAME}.', '.')}"


def _in_model(name: str) -> str:
    part, _, kind = name.removeprefix(_PREFIX).rpartition(".")
    return f"{part}.{NAME}.{kind}"


def _targets(model: Any, settings: LoraConfig) -> list[str]:
    """Return the names of the layers that get an adapter, as short as they may be; the output layer never has one."""
    possible = _possible(model)
    last = {name: name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    short = {last[name] for name in possible}
    if settings.targets == "all-linear":
        clear = all(name in possible for name in last if last[name] in short)
        return sorted(short if clear else possible)
    for target in settings.targets:
        if not any(_ends(name, target) for name in possible):
            raise ConfigError(
                f"model.lora.targets = {list(settings.targets)}: {target!r} is no linear layer inside the model; "
                f"allowed: all-linear, or names among {', '.join(sorted(short))}"
            )
    return list(settings.targets)


def _possible(model: Any) -> set[str]:
    """Return the names of all layers that can have an adapter, those that have one included."""
    outer = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    adapted = adapted_layers(model)
    return adapted.keys() | {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D))
        and id(layer) not in outer
        and not any(name.startswith(f"{other}.") for other in adapted)  # it is a part of one
    }


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def require_same(model: Any, settings: LoraConfig) -> None:
    """Raise ConfigError unless the model's adapter is one that `settings` would have made."""
    found = model.peft_config[NAME]
    for key, wanted, actual in (("rank", settings.rank, found.r), ("alpha", settings.alpha, found.lora_alpha)):
        if wanted != actual:
            raise ConfigError(f"model.lora.{key} = {wanted}: the adapter to go on with has {actual}; allowed: {actual}")
    possible, adapted = _possible(model), adapted_layers(model).keys()
    all_linear = settings.targets == "all-linear"
    chosen = possible if all_linear else {n for n in possible for target in settings.targets if _ends(n, target)}
    if chosen != adapted:
        shown = settings.targets if all_linear else f"[{','.join(settings.targets)}]"
        short = sorted({name.rsplit(".", 1)[-1] for name in adapted})
        clear = all(name in adapted for name in possible if name.rsplit(".", 1)[-1] in short)
        actual = "all-linear" if adapted == possible else f"[{','.join(short if clear else sorted(adapted))}]"
        raise ConfigError(
            f"model.lora.targets = {shown}: the adapter to go on with has other layers; allowed: {actual}"
        )


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """Compute as the base model inside the block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in adapted_layers(model).values():
        layer.enable_adapters(False)
    for parameter in trained:  # shards settle the types of their gradients in their first pass, which may be this one
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for layer in adapted_layers(model).values():
            layer.enable_adapters(True)


def adapted_layers(model: Any) -> dict[str, Any]:
    """Return the layers with an adapter by their names."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
