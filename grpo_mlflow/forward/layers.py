"""Layers that store weights in fewer bits than they compute in, and the output layer that computes in float32.

A model's modules become one of these in place, so its names, hooks and tied weights stay. Weights in 4 bits (NF4:
Dettmers et al. 2023, arXiv 2305.14314) are those of bitsandbytes.

The code around a layer decides which type it computes in, as for any layer: that of autocast, else that of the input.
So under autocast to bfloat16 a frozen base in bfloat16 gives what one in float32 with the same numbers gives; and in
float32 it gives what its numbers give exactly, which the trials of `ways` compare with.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class StoredLinear(nn.Linear):
    """A linear layer with a weight of fewer bits."""

    def forward(self, rows: Tensor) -> Tensor:
        """Return (..., out) from (..., in), in the type of autocast or of `rows`."""
        return product(rows, self.weight, self.bias, computed_in(rows))

    def dense(self) -> nn.Linear:
        """Return a plain layer with the same numbers in float32; it shares the bias."""
        found = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        found.weight, found.bias = nn.Parameter(in_float32(self.weight)), self.bias
        return found


class Float32Linear(nn.Linear):
    """An output layer that computes in float32 also under autocast: small differences of large logits stay."""

    def forward(self, rows: Tensor) -> Tensor:
        """Return (..., out) in float32 from (..., in)."""
        with torch.autocast(rows.device.type, enabled=False):
            return product(rows, self.weight, self.bias, torch.float32)


class StoredEmbedding(nn.Embedding):
    """An embedding with a weight of fewer bits; what it gives is float32, as the sums of all layers are."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return (..., width) in float32 from token ids (...)."""
        return super().forward(ids).float()


_PLAIN = (nn.Linear, StoredLinear, Float32Linear)  # exactly these: a subclass may compute anything


def is_plain(layer: Any) -> bool:
    """Return whether a layer is nothing but a product with its weight and its bias."""
    return type(layer) in _PLAIN


def in_float32(weight: Any) -> Tensor:
    """Return the numbers that a weight stands for."""
    if not _is_packed(weight):
        plain: Tensor = weight.detach().float()
        return plain
    library: Any = importlib.import_module("bitsandbytes.functional")
    unpacked: Tensor = library.dequantize_4bit(weight.detach(), weight.quant_state)
    return unpacked.float()


def _is_packed(weight: Any) -> bool:
    """Return whether a weight is one of bitsandbytes in 4 bits."""
    return getattr(weight, "quant_state", None) is not None


def computed_in(rows: Tensor) -> torch.dtype:
    """Return the type in which a product of rows is computed here."""
    kind = rows.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype


def product(rows: Tensor, weight: Any, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return rows @ weight.T + bias in `dtype`; of a weight in another type no copy outlives the call."""
    bias = None if bias is None else bias.to(dtype)
    if _is_packed(weight):
        library: Any = importlib.import_module("bitsandbytes")
        unbiased: Tensor = library.matmul_4bit(rows.to(dtype), weight, quant_state=weight.quant_state)
        return unbiased if bias is None else unbiased + bias
    if weight.dtype == dtype:
        return functional.linear(rows.to(dtype), weight, bias)
    apply: Any = _Product.apply
    found: Tensor = apply(rows.to(dtype), weight)
    return found if bias is None else found + bias


class _Product(torch.autograd.Function):
    """rows @ weight.T of a frozen weight: autograd would keep that of every layer, converted, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        with torch.autocast(rows.device.type, enabled=False):
            return functional.linear(rows, weight.to(rows.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,), (weight,) = grads, ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None


_STORED: dict[type, type] = {nn.Linear: StoredLinear, nn.Embedding: StoredEmbedding}
_PLAIN_AGAIN = {kind: plain for plain, kind in _STORED.items()}


def use_float32(model: Any) -> None:
    """Let the output layer compute in float32; raise NotImplementedError if it is no plain one."""
    layer = model.get_output_embeddings()
    if not is_plain(layer):
        raise NotImplementedError(f"its output layer is a {type(layer).__name__}")
    layer.__class__ = Float32Linear


def store(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the matrices of a frozen model's linear layers and embeddings in `dtype`; all else stays float32.

    A weight that a module of another kind holds, too, stays as it is: that one may compute anything.
    """
    holders: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(parameter, []).append((module, name))
    for parameter, held in holders.items():
        if parameter.ndim == 2 and all(type(module) in _STORED and name == "weight" for module, name in held):
            stored = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
            for module, _ in held:
                module.weight = stored
                module.__class__ = _STORED[type(module)]


def stored_in(model: nn.Module) -> torch.dtype:
    """Return the type in which `store` has put a model's matrices; float32 where it has not."""
    kinds = tuple(_PLAIN_AGAIN)
    found = (cast(nn.Parameter, module.weight).dtype for module in model.modules() if isinstance(module, kinds))
    return next(found, torch.float32)


def unstore(model: nn.Module, device: torch.device | str | None = None) -> None:
    """Undo `store`: weights in float32 on `device` (None: where they are), those that were tied still tied."""
    found: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        if type(module) not in (*_PLAIN_AGAIN, Float32Linear) or module.weight.dtype == torch.float32:
            continue
        weight = cast(nn.Parameter, module.weight)
        if weight not in found:
            found[weight] = nn.Parameter(in_float32(weight).to(device or weight.device), requires_grad=False)
        module.weight = found[weight]
        module.__class__ = _PLAIN_AGAIN.get(type(module), type(module))


@contextmanager
def shown_in_float32(model: nn.Module) -> Iterator[None]:
    """Let weights in fewer bits look like float32 ones inside the block, all their numbers zero."""
    held = {module: module.weight for module in model.modules() if isinstance(module, StoredLinear)}
    for module, weight in held.items():
        shape = (module.out_features, module.in_features)
        module.weight = nn.Parameter(torch.zeros((), device=weight.device).expand(shape), requires_grad=False)
    try:
        yield
    finally:
        for module, weight in held.items():
            module.weight = weight


def numbers(weight: Any) -> int:
    """Return how many numbers a weight stands for; one in 4 bits packs two into each of its bytes."""
    shape: torch.Size = weight.quant_state.shape if _is_packed(weight) else weight.shape
    return shape.numel()
