"""A forward pass of a model of the Llama family over many tokens, written out, with gradients.

transformers' modules take seven operations for a norm and as many for rotary embedding, and autograd twice as many to
go back; each reads and writes all tokens. Here each of these is one function with its gradient by hand, and residuals
are added by the matrix products. The sums are the same; tokens are rows (N, width), in float32 on a CPU.

RMSNorm (Zhang and Sennrich 2019): y = w x r, r = (mean x^2 + epsilon)^-1/2;  dx = r (g w - x r^2 mean(g w x)).
Rotary embedding (Su et al. 2021) turns pairs of numbers by an angle; its gradient is turned back.
SwiGLU (Shazeer 2020, arXiv:2002.05202): y = s u with s = z sigmoid(z);  ds/dz = sigmoid(z) + s (1 - sigmoid(z)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from grpo_mlflow.forward.attention import Packed, require_reach
from grpo_mlflow.forward.layers import Float32Linear, StoredEmbedding, StoredLinear

_GIVE_FLOAT32 = (StoredLinear, StoredEmbedding, Float32Linear)  # without autocast, of which `serves` asks
FAMILY = ("llama", "mistral", "qwen2", "qwen3")  # values of config.model_type
_EXACT = (torch.float32, torch.float64)  # transformers computes norms of others in float32


def serves(model: Any) -> bool:
    """Return whether `hidden_states` may stand in for the model's own forward pass, here and now.

    The model can be packed, and `ways` found that both agree. Not one that is wrapped for several processes, is in
    training mode (it may drop out), or has layers with another forward pass (`model.recomputing`). Hooks on
    modules larger than a projection are not called, so not one in shards: they gather the weights.
    """
    if isinstance(model, FSDPModule):
        return False
    config, layers = getattr(model, "config", None), getattr(getattr(model, "model", None), "layers", None)
    kind, act = (getattr(config, name, None) for name in ("model_type", "hidden_act"))
    if layers is None or kind not in FAMILY or act != "silu":
        return False
    if model.device.type != "cpu" or torch.is_autocast_enabled("cpu") or model.training:
        return False
    return not any("forward" in vars(layer) for layer in layers)


def is_exact(model: Any) -> bool:
    """Return whether hidden states are of a type in which transformers computes norms as they are written here.

    They are of the type of the weights, but for weights in layers that give float32 whatever they store.
    """
    stored = {p for m in model.modules() if isinstance(m, _GIVE_FLOAT32) for p in m.parameters(recurse=False)}
    return all(parameter.dtype in _EXACT for parameter in model.parameters() if parameter not in stored)


def hidden_states(model: Any, ids: Tensor, positions: Tensor, packed: Packed, picks: Tensor | int) -> Tensor:
    """Return what the output layer is given, (M, width); see `packed_forward`."""
    body = model.model
    require_reach(window(model), packed)
    hidden = body.embed_tokens(ids)
    cos, sin = (part[:, None] for part in angles(body, hidden, positions))
    for number, layer in enumerate(body.layers):
        hidden = _attended(layer, number, hidden, cos, sin, packed)
        hidden = _fed_forward(layer, hidden)
    if isinstance(picks, Tensor):
        hidden = hidden.index_select(0, picks)
    return _norm(body.norm, hidden)


def window(model: Any) -> int | None:
    """Return how many tokens some layer looks back, itself among them; None: all do to the first."""
    config = model.config
    kinds = getattr(config, "layer_types", None)
    found: int | None = getattr(config, "sliding_window", None)
    return found if kinds is None or "sliding_attention" in kinds else None


def angles(body: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary embedding in the type of `hidden`, both (N, D).

    A row x is turned to x cos + roll(x) sin: signs are those of rotate_half, which rolls by half of D and negates.
    """
    cos, sin = (part[0] for part in body.rotary_emb(hidden, positions[None]))
    half = sin.shape[1] // 2
    return cos, torch.cat([-sin[:, :half], sin[:, half:]], dim=1)


def _attended(layer: Any, number: int, hidden: Tensor, cos: Tensor, sin: Tensor, packed: Packed) -> Tensor:
    attention, normed = layer.self_attn, _norm(layer.input_layernorm, hidden)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (part(normed).view(len(hidden), -1, attention.head_dim) for part in projections)
    if hasattr(attention, "q_norm"):
        query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
    query, key = _call(_Turned, query, cos, sin), _call(_Turned, key, cos, sin)
    found = packed.attend(number, query, key, value, attention.scaling)
    return _added(attention.o_proj, found.flatten(1), hidden)


def _fed_forward(layer: Any, hidden: Tensor) -> Tensor:
    mlp, normed = layer.mlp, _norm(layer.post_attention_layernorm, hidden)
    gate, up = mlp.gate_proj(normed), mlp.up_proj(normed)
    return _added(mlp.down_proj, _call(_Gated, gate, up), hidden)


def _added(layer: Any, rows: Tensor, residual: Tensor) -> Tensor:
    """Return the residual plus what a linear layer, perhaps with an adapter, makes of the rows."""
    if type(layer) is nn.Linear and layer.bias is None:
        return torch.addmm(residual, rows, layer.weight.t())
    added: Tensor = residual + layer(rows)
    return added


def _norm(module: Any, rows: Tensor) -> Tensor:
    """Return RMSNorm over the last dimension."""
    return _call(_Normed, rows.flatten(0, -2), module.weight, module.variance_epsilon).view_as(rows)


def _call(function: Any, *given: Any) -> Tensor:
    found: Tensor = function.apply(*given)
    return found


class _Normed(torch.autograd.Function):
    """Rows (N, width), weight (width,) and epsilon."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        inverse = rows.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(rows, weight, inverse)
        return (rows * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (gradient,), (rows, weight, inverse) = grads, ctx.saved_tensors
        scaled = rows * inverse
        product = gradient * scaled
        to_weight = product.sum(dim=0) if ctx.needs_input_grad[1] else None
        mean = (product @ weight).div_(rows.shape[-1])[:, None]
        torch.mul(gradient, weight, out=product)
        return product.addcmul_(scaled, mean, value=-1).mul_(inverse), to_weight, None


class _Turned(torch.autograd.Function):
    """Rows (N, heads, D) by angles (N, 1, D)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (rows * cos).addcmul_(rows.roll(rows.shape[-1] // 2, dims=-1), sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (cos, sin) = grads, ctx.saved_tensors
        back = (gradient * cos).addcmul_(gradient.roll(gradient.shape[-1] // 2, dims=-1), sin, value=-1)
        return back, None, None


class _Gated(torch.autograd.Function):
    """SwiGLU of gate and up, both (N, width)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        sigmoid = gate.sigmoid()
        ctx.save_for_backward(gate, up, sigmoid)
        return (gate * sigmoid).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,), (gate, up, sigmoid) = grads, ctx.saved_tensors
        share = gate * sigmoid
        to_up = gradient * share
        slope = torch.addcmul(sigmoid, share, sigmoid, value=-1).add_(share)
        return slope.mul_(torch.mul(gradient, up, out=share)), to_up
