"""One decoding step of a model of the Llama family, written out: one token for each of R rows.

transformers' modules serve every length, type and device, in some seventy small operations a layer; with the few rows
of a decoding step these cost more than the matrix products. Here the same sums take half as many, and the products are
the way round that BLAS does fast: hidden states are columns (width, R), because with few rows weight @ columns runs up
to twice as fast as rows @ weight.T.

A layer (Touvron et al. 2023, arXiv:2302.13971): x += O attention(rope(Q n(x)), rope(K n(x)), V n(x));
x += down (act(gate n(x)) * up n(x)), where n is RMSNorm (Zhang and Sennrich 2019) and rope is rotary position embedding
(Su et al. 2021), whose angles are those of the model's own module.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from grpo_mlflow.attention import Packed, packed_forward
from grpo_mlflow.prefix_tree import Level, Tree

_FAMILY = ("llama", "mistral", "qwen2", "qwen3")  # values of config.model_type
_TRIED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def can_step(model: Any) -> bool:
    """Return whether `LlamaStep` gives what the model gives; found out once per model.

    The model can be packed (`shared_prefix.reason_against`).
    """
    if model not in _TRIED:
        _TRIED[model] = model.config.model_type in _FAMILY and _agrees(model)
    return _TRIED[model]


@torch.no_grad()
def _agrees(model: Any) -> bool:
    """Try both with a few random tokens: a transformers version may write its layers differently."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (7,), generator=draw)
    tree = Tree([Level([ids.tolist()])], model.device)
    with torch.autocast(model.device.type, enabled=False):
        expected = packed_forward(model, tree.ids, tree.positions, tree, 0)
        try:
            found = LlamaStep(model)(tree.ids, tree.positions, tree)
        except Exception:  # other modules than those known here may fail in any way
            return False
    return torch.allclose(found, expected, atol=1e-3, rtol=1e-3)


class LlamaStep:
    """Steps of `model`, whose weights it reads anew each time."""

    def __init__(self, model: Any) -> None:
        self._model = model.model
        self._head = model.get_output_embeddings()

    def __call__(self, tokens: Tensor, positions: Tensor, packed: Packed) -> Tensor:
        """Return logits (R, V) of the tokens that follow `tokens` (R,) at `positions` (R,)."""
        model = self._model
        hidden = functional.embedding(tokens, model.embed_tokens.weight).t().contiguous()
        cos, sin = (part[0].t().contiguous() for part in model.rotary_emb(hidden, positions[None]))  # (D, R)
        half = len(sin) // 2
        sin = torch.cat([-sin[:half], sin[half:]])  # rotate_half(x) * sin = roll(x) * this
        for number, layer in enumerate(model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            normed = _norm(hidden, layer.input_layernorm)
            query, key, value = (
                _product(part, normed).view(-1, attention.head_dim, len(tokens))  # (heads, D, R)
                for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if hasattr(attention, "q_norm"):
                query, key = _norm(query, attention.q_norm), _norm(key, attention.k_norm)
            count = len(query)
            both = torch.cat([query, key])
            turned = torch.addcmul(both * cos, both.roll(half, dims=1), sin)
            found = packed.attend(
                number,
                turned[:count].permute(2, 0, 1),
                turned[count:].permute(2, 0, 1),
                value.permute(2, 0, 1),
                attention.scaling,
            )
            hidden = _product(attention.o_proj, found.flatten(1).t(), hidden)
            normed = _norm(hidden, layer.post_attention_layernorm)
            inner = mlp.act_fn(_product(mlp.gate_proj, normed)).mul_(_product(mlp.up_proj, normed))
            hidden = _product(mlp.down_proj, inner, hidden)
        return _product(self._head, _norm(hidden, model.norm)).t()


def _product(layer: Any, columns: Tensor, added: Tensor | None = None) -> Tensor:
    """Return what a linear layer makes of columns (in, R), plus `added`: (out, R)."""
    if type(layer) is not nn.Linear:  # peft's, with an adapter
        found = _product(layer.base_layer, columns, added)
        for name in () if layer.disable_adapters else layer.active_adapters:
            inner = _product(layer.lora_A[name], columns)
            found = found.add_(_product(layer.lora_B[name], inner), alpha=layer.scaling[name])
        return found
    if layer.bias is not None:
        bias = layer.bias[:, None]
        added = bias if added is None else added + bias
    weight: Tensor = layer.weight
    return weight @ columns if added is None else torch.addmm(added, weight, columns)


def _norm(columns: Tensor, module: Any) -> Tensor:
    """Return RMSNorm over the width of columns (..., width, R)."""
    inverse = (columns * columns).mean(dim=-2, keepdim=True).add_(module.variance_epsilon).rsqrt_()
    return (columns * inverse).mul_(module.weight[:, None])
