"""The small files that make a model's folder one of MLflow's: `mlflow.pyfunc` and `mlflow.transformers` load it.

They are written by hand. `mlflow.transformers.save_model` would write all weights a second time; here its flavour finds
them in the folder itself (`model_binary: .`), and only the tokenizer's files stand in `components/tokenizer`, too,
because the flavour reads them nowhere else. Nothing is pickled.

    MLmodel, requirements.txt, python_env.yaml, code/grpo_pyfunc_loader.py, components/tokenizer/
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from grpo_mlflow import serverside
from grpo_mlflow.config import ModelConfig
from grpo_mlflow.errors import redact
from grpo_mlflow.model.policy import Policy

MLMODEL, _LOADER, _COMPONENTS = "MLmodel", "grpo_pyfunc_loader", "components"
FILES = (MLMODEL, "requirements.txt", "python_env.yaml", "code", _COMPONENTS)
"""What `write` adds to a folder."""
_PACKAGES = ("mlflow", "torch", "transformers", "safetensors")
_OF_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template*", "added_tokens.json", "vocab*", "merges.txt")
_TYPES = {int: "long", float: "double"}


_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # a run may write a checkpoint per iteration


@cache
def version_of(package: str) -> str:
    return metadata.version(package)


@dataclass(frozen=True, slots=True)
class Serving:
    """How a model is asked outside of its run: as its run asked it.

    `defaults` are those of the sampling that a request may change, by name. `run_id` and `place`, a path below its
    artifacts, are where it comes from; empty for a folder of no run.
    """

    defaults: Mapping[str, float | int]
    system_prompt: str | None = None
    run_id: str = ""
    place: str = ""
    source: str = field(default="", kw_only=True)  # the model that training began with


def write(folder: Path, policy: Policy, settings: ModelConfig, serving: Serving) -> None:
    """Make the folder that `policy.save` wrote loadable by MLflow."""
    packages = [*_PACKAGES, *(["peft"] if (folder / "adapter_config.json").exists() else [])]
    pins = [f"{name}=={version_of(name).partition('+')[0]}" for name in packages]  # no index has `2.6.0+cpu`
    (folder / "requirements.txt").write_text("".join(f"{pin}\n" for pin in pins))
    python = {
        "python": platform.python_version(),
        "build_dependencies": ["pip"],
        "dependencies": ["-r requirements.txt"],
    }
    (folder / "python_env.yaml").write_text(yaml.dump(python, Dumper=_DUMPER, sort_keys=False))
    (folder / "code").mkdir()
    shutil.copyfile(Path(serverside.__path__[0]) / f"{_LOADER}.py", folder / "code" / f"{_LOADER}.py")
    _link_tokenizer(folder)
    content = _mlmodel(policy, settings, serving)
    (folder / MLMODEL).write_text(redact(yaml.dump(content, Dumper=_DUMPER, sort_keys=False, allow_unicode=True)))


def _link_tokenizer(folder: Path) -> None:
    inner = folder / _COMPONENTS / "tokenizer"
    inner.mkdir(parents=True)
    for name in sorted({path.name for pattern in _OF_TOKENIZER for path in folder.glob(pattern) if path.is_file()}):
        try:
            os.link(folder / name, inner / name)
        except OSError:  # a file system without links
            shutil.copyfile(folder / name, inner / name)


def _mlmodel(policy: Policy, settings: ModelConfig, serving: Serving) -> dict[str, Any]:
    now = time.time()
    flavors = {"transformers": _transformers(settings, serving), "python_function": _pyfunc(policy, settings, serving)}
    utc = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}"
    return {
        "artifact_path": serving.place or None,
        "run_id": serving.run_id or None,
        "model_id": None,
        "model_uuid": uuid.uuid4().hex,
        "mlflow_version": version_of("mlflow"),
        "utc_time_created": utc,
        "flavors": flavors,
        "signature": _signature(serving),
    }


def _transformers(settings: ModelConfig, serving: Serving) -> dict[str, Any]:
    return {
        "code": "code",
        "task": "text-generation",
        "framework": "pt",
        "instance_type": "TextGenerationPipeline",
        "pipeline_model_type": "AutoModelForCausalLM",  # which reads from config.json what it is
        "source_model_name": serving.source or "model",
        "model_binary": ".",
        "torch_dtype": f"torch.{settings.dtype}",
        "components": ["tokenizer"],
        "tokenizer_type": "AutoTokenizer",
        "transformers_version": version_of("transformers"),
    }


def _pyfunc(policy: Policy, settings: ModelConfig, serving: Serving) -> dict[str, Any]:
    config = {
        "system_prompt": serving.system_prompt,
        "chat_template_kwargs": dict(policy.template_settings),
        "end_token_ids": list(policy.eos_ids),
        "pad_token_id": policy.pad_id,
        "known_tokens": policy.sampled,
        "dtype": settings.dtype,
        "device": "auto",
        "trust_remote_code": settings.trust_remote_code,
    }
    return {
        "loader_module": _LOADER,
        "code": "code",
        "data": ".",
        "python_version": platform.python_version(),
        "env": {"virtualenv": "python_env.yaml"},
        "config": config,
    }


def _signature(serving: Serving) -> dict[str, str | None]:
    """Return what goes in and out.

    Inputs have no schema: with one MLflow would take either tables with named columns or plain texts, and neither
    beside chat messages. The loader checks them.
    """
    params: list[dict[str, Any]] = [
        *({"name": name, "type": _TYPES[type(value)], "default": value} for name, value in serving.defaults.items()),
        {"name": "seed", "type": "long", "default": None},
    ]
    return {
        "inputs": None,
        "outputs": json.dumps([{"type": "string", "required": True}]),
        "params": json.dumps([{**param, "shape": None} for param in params]),
    }
