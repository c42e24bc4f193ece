"""Faults of a `GoBetween` that leave a vLLM server with something old, which neither it nor the trainer knows of.

`old`: the folder of the weights, or of the adapter, that the server has before.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.support.go_between import Answer, Fault, Forward


def _loads_weights(path: str, body: Any) -> bool:
    return path == "/collective_rpc" and body["method"] == "grpo_load_weights"


def all_old(old: Path) -> Fault:
    def answer(path: str, body: Any, forward: Forward) -> Answer:
        if _loads_weights(path, body):
            body["kwargs"]["path"] = str(old)
        return forward(path, body)

    return answer


def one_block_old(old: Path) -> Fault:
    def answer(path: str, body: Any, forward: Forward) -> Answer:
        if _loads_weights(path, body):
            given, mixed = Path(body["kwargs"]["path"]), old.with_name("mixed")
            shutil.copytree(given, mixed, dirs_exist_ok=True)
            new, before = (load_file(each / "model.safetensors") for each in (given, old))
            of_block = {name: tensor for name, tensor in before.items() if name.startswith("model.layers.7.")}
            assert of_block
            save_file(new | of_block, mixed / "model.safetensors", metadata={"format": "pt"})
            body["kwargs"]["path"] = str(mixed)
        return forward(path, body)

    return answer


def output_layer_old(old: Path) -> Fault:
    """As vLLM's own loader does on a CPU where the output layer is the embedding: its packed copy stays."""

    def answer(path: str, body: Any, forward: Forward) -> Answer:
        if not _loads_weights(path, body):
            return forward(path, body)
        new = {"method": "reload_weights", "kwargs": {"weights_path": body["kwargs"]["path"]}}
        assert forward(path, new)[0] == 200
        return 200, json.dumps({"results": [{"ok": True}]}).encode()

    return answer


def adapter_old(old: Path) -> Fault:
    def answer(path: str, body: Any, forward: Forward) -> Answer:
        if path == "/v1/load_lora_adapter":
            body["lora_path"] = str(old)
        return forward(path, body)

    return answer


class KeepsPrefixes:
    """Cached prefixes are not forgotten, by the pause or after it; `one_salt`: those of all versions go by one salt."""

    def __init__(self, one_salt: bool) -> None:
        self.one_salt = one_salt

    def __call__(self, path: str, body: Any, forward: Forward) -> Answer:
        if path == "/reset_prefix_cache":
            return 200, json.dumps({"success": True}).encode()
        if path.startswith("/pause"):
            path += "&clear_cache=false"
        if self.one_salt and body is not None and "cache_salt" in body:
            body["cache_salt"] = "always"
        return forward(path, body)
