"""Which settings of an adapter's folder are carried: those that the layers compute with, and that a merge adds in.

peft knows many more. Some change the base model or other weights (`modules_to_save`, `bias`, PiSSA), some compute what
no sum of weights is (DoRA's norm, adapters that begin at a token); some came after the version installed here, which
leaves them out with a warning. Left out, the model would be another one than the adapter's.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_mlflow.errors import ModelError

_CARRIED = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
# What only says where it comes from, and what acts in training alone: dropout, which is off here, and first weights.
_IDLE = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "lora_dropout", "eva_config"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "revision": (None, "main"),  # of the base model, which is read as it is
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the base model's weights
}


def require_carried(source: str | Path, settings: Mapping[str, Any]) -> None:
    """Refuse an adapter whose settings, as adapter_config.json holds them, are not all carried.

    Raises:
        ModelError: the line names the first one.
    """
    for key, value in settings.items():
        allowed = _ALLOWED.get(key) or _inactive(key)
        # by type too, since 0 == False: none of these settings is a number that could be either
        if key in _CARRIED | _IDLE or any(type(value) is type(one) and value == one for one in allowed):
            continue
        shown = " or ".join(json.dumps(one) for one in (allowed if key in _ALLOWED else allowed[:1]))
        raise ModelError(
            f"model {str(source)!r}: {key} = {json.dumps(value)} in adapter_config.json is not carried by a merge; "
            f"allowed: {shown}"
        )


def _inactive(key: str) -> tuple[Any, ...]:
    """Return the values with which a setting does nothing, peft's default first."""
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(importlib.import_module("peft").LoraConfig)
        if field.default is not dataclasses.MISSING
    }
    return (defaults.get(key), None, False, [], {})
