"""What a vLLM worker learns from us: `--worker-extension-cls grpo_vllm_worker.WeightLoader`, this folder on PYTHONPATH.

vLLM's own `reload_weights` has two gaps: a path that does not exist ends the engine, and on a CPU the output layer of a
model with tied embeddings keeps its old weights, because they were packed for the matrix kernel at start. This loader
checks the path first, and packs the output layer again. And it tells which weights the worker computes with, as sums
that the trainer compares with its own.

With adapters, vLLM 0.32's CPU build has two more gaps, which are mended when a worker imports this module
(`mend_adapters`).
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import torch
from torch import Tensor

_MIX, _PLACE = -7046029254386353131, -4417276706812531889  # odd 64-bit constants (of xxHash), as signed integers
_AT_ONCE = 1 << 22  # weights; each takes 8 bytes three times over while it is summed
_COLUMNS = 64
_WORD = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(weight: Tensor, first: int = 0, step: int = 1) -> int:
    """Return a sum over the bits of a tensor (rows, ...), in whole numbers modulo 2**64.

    Each weight's bits are scrambled and multiplied by a factor of their column, so that neither two changes of opposite
    sign nor swapped columns cancel. Whole numbers make it exact in any order of summation, on any device. The sum
    over rows makes it additive: that of a fused layer is the sum of its parts', and rows of zeros, with which
    vocabularies are padded, add nothing. -0 counts as 0, which a product with zeros and ones cannot tell from it.

    Args:
        weight: floating-point numbers; the columns `first`, `first` + `step`, ... of a larger tensor.
        first: which column of that tensor is the first.
        step: their distance.
    """
    table = weight.detach().reshape(weight.shape[0] if weight.ndim else 1, -1)
    columns = torch.arange(table.shape[1], device=table.device) * step + first + 1
    factors, total = columns * _PLACE | 1, 0
    for part in torch.split(table, max(1, _AT_ONCE // max(1, table.shape[1]))):
        bits = (part + 0).contiguous().view(_WORD[part.element_size()]).to(torch.int64) * _MIX
        total += int(((bits ^ (bits >> 29)) * factors).sum())
    return total % 2**64


class WeightLoader:
    """Mixed into vLLM's worker class, whose attributes it uses."""

    def grpo_load_weights(self, path: str) -> dict[str, Any]:
        """Load a model folder in place; say what went wrong instead of raising, which would end the engine."""
        worker: Any = self
        if not os.path.isfile(os.path.join(path, "config.json")):
            return {"ok": False, "error": f"no model folder at {path} on the server's machine"}
        try:
            worker.reload_weights(weights_path=path)
            if worker.device.type == "cpu":
                from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

                dispatch_cpu_unquantized_gemm(worker.model_runner.get_model().lm_head, remove_weight=False)
        except Exception as error:
            return {"ok": False, "error": f"{type(error).__name__}: {error}"}
        return {"ok": True}

    def grpo_checksums(self, seed: int) -> dict[str, Any]:
        """Return a `checksum` of every tensor that the worker computes with, or an error.

        On a CPU the layers' weights are packed for the matrix kernel, and nothing else is kept. What a layer computes
        with is read through it: its product with unit vectors is, exactly, columns of its weights. `seed` chooses
        which, other ones each time; all of them would cost as much as scoring a text of thousands of tokens.

        Each worker tells of its own part. With tensor parallelism the sums over workers are those of the whole for
        layers that are split by rows; columns would have to count from the first of the worker's part, and what every
        worker holds whole would count once for each. Until that is done the trainer compares one worker only.

        Returns:
            `tensors`: for each name the sum, the number format, and which columns it covers (first, step); `parts`:
            the layers that were fused, each with the names of its parts; `dtype`: what the weights were rounded to.
        """
        worker: Any = self
        try:
            model = worker.model_runner.get_model()
            return {
                "tensors": _checksums(model, seed),
                "parts": {name: list(parts) for name, parts in getattr(model, "packed_modules_mapping", {}).items()},
                "dtype": str(worker.model_runner.model_config.dtype).removeprefix("torch."),
            }
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def grpo_adapter_checksums(self) -> dict[str, Any]:
        """Return a `checksum` of every tensor of the adapters that the worker computes with, or an error.

        vLLM copies an adapter into a slot of each layer's stack when it is loaded or asked for, rounded to the stack's
        number format, B times the adapter's scaling. These stacks are what is summed; the zeros that fill them up to
        the largest rank add nothing.

        Returns:
            `adapters`: for each slot in use, for each layer (those that are fused by their parts' names) and A and B
            the sum, the number format, and which columns it covers (all of them); `dtype`: what they were rounded to.
        """
        worker: Any = self
        try:
            manager = worker.model_runner.lora_manager._adapter_manager
            slots = [slot for slot, adapter in enumerate(manager.lora_index_to_id) if adapter is not None]
            return {
                "adapters": [_adapter_checksums(manager, slot) for slot in slots],
                "dtype": str(manager.lora_config.lora_dtype).removeprefix("torch."),
            }
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}


def _adapter_checksums(manager: Any, slot: int) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name, layer in manager.modules.items():
        parts = manager.packed_modules.get(name, [name])
        for kind, given in (("lora_A", layer.lora_a_stacked), ("lora_B", layer.lora_b_stacked)):
            stacks = [given] if isinstance(given, Tensor) else list(given)
            if len(stacks) != len(parts) or any(len(stack) != manager.lora_slots for stack in stacks):
                raise ValueError(f"{name} keeps adapters in a layout of its own")
            for part, stack in zip(parts, stacks, strict=True):
                found[f"{part}.{kind}.weight"] = _described(stack[slot].reshape(-1, stack.shape[-1]), 0, 1)
    return found


def _checksums(model: Any, seed: int) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if ".lora_" in name:
            continue
        plain = f"{name}.".replace(".base_layer.", ".")  # as it is called without --enable-lora
        for kind, parameter in module.named_parameters(recurse=False):
            if parameter.numel():
                found[f"{plain}{kind}"] = _described(parameter, 0, 1)
            elif kind == "weight" and hasattr(module, "cpu_linear"):
                found[f"{plain}{kind}"] = _packed(module, module.input_size_per_partition, seed)
    head: Any = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):  # its plain weights are kept for the embedding, but it computes with packed ones
        found["lm_head.weight"] = _packed(head, head.weight.shape[1], seed)
    return found


def _packed(module: Any, width: int, seed: int) -> list[Any]:
    step = max(1, width // _COLUMNS)
    first = seed % step
    places = torch.arange(first, width, step)
    units = torch.zeros(len(places), width, dtype=module.weight.dtype)
    units[torch.arange(len(places)), places] = 1
    return _described(module.cpu_linear(units, module.weight, None).t(), first, step)


def _described(weight: Tensor, first: int, step: int) -> list[Any]:
    return [checksum(weight, first, step), str(weight.dtype).removeprefix("torch."), first, step]


def mend_adapters(wrapper: Any, mapping: Any) -> list[str]:
    """Mend what adds adapters to a batch's rows on a CPU, as far as trying it shows that it needs it.

    - A row without an adapter has the index -1, and gets the last adapter: a request for the base model that shares a
      batch with one for an adapter is answered by the adapter.
    - The output layer's part takes the rows that are sampled from. Those of a prompt that is scored are others, and the
      engine dies as soon as another request shares the batch. An adapter without an output layer adds nothing there, so
      such rows are left alone. One with an output layer still meets it.

    Args:
        wrapper: vLLM's `PunicaWrapperCPU`, which is changed in place.
        mapping: vLLM's `LoRAMapping`.

    Returns:
        What was mended.
    """
    shrink, add_logits, mended = wrapper._apply_shrink, wrapper.add_lora_logits, []

    def _apply_shrink(self: Any, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        shrink(self, y, x, w_t_all, scale)
        if not self.no_lora:  # else nothing was written
            y.view(-1, y.shape[-1])[self.token_lora_indices < 0] = 0

    def add_lora_logits(self: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, **others: Any) -> None:
        if x.numel() // x.shape[-1] == len(self.sampler_indices) or b.any():
            add_logits(self, y, x, a, b, scale, **others)

    if _reaches_rows_without(wrapper, mapping):
        wrapper._apply_shrink = _apply_shrink
        mended.append("requests without an adapter")
    if _dies_of_other_rows(wrapper, mapping):
        wrapper.add_lora_logits = add_lora_logits
        mended.append("scores of prompts")
    return mended


def _tried(wrapper: Any, mapping: Any) -> Any:
    """Return one that has a batch of two requests of one token, the second without an adapter."""
    tried = wrapper(8, 2, torch.device("cpu"))
    tried.update_metadata(mapping((1, 0), (1, 0), is_prefill=True), [1], 2, 1)
    return tried


def _reaches_rows_without(wrapper: Any, mapping: Any) -> bool:
    rows, one = torch.zeros(2, 1), torch.ones(1, 1, 1, 1)
    _tried(wrapper, mapping).add_lora_linear(rows, torch.ones(2, 1), (one,), (one,), 1.0, (1,))
    return bool(rows[1] != 0)


def _dies_of_other_rows(wrapper: Any, mapping: Any) -> bool:
    nothing = torch.zeros(1, 1, 1, 1)
    try:
        _tried(wrapper, mapping).add_lora_logits(torch.zeros(3, 1), torch.ones(3, 1), nothing, nothing, 1.0)
    except RuntimeError:
        return True
    return False


def _mend_worker() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    note = logging.getLogger("vllm.grpo")
    try:
        from vllm.lora.layers import LoRAMapping
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        if mended := mend_adapters(PunicaWrapperCPU, LoRAMapping):
            note.info("mended for adapters on a CPU: %s", ", ".join(mended))
    except Exception as error:  # another version's: not worth a server that does not start
        note.warning("adapters on a CPU are as vLLM has them: %s: %s", type(error).__name__, error)


if "vllm" in sys.modules:  # in a worker; the trainer takes `checksum` from here, and has no vLLM
    _mend_worker()
