"""A forward pass of a model of the Llama family, written out, for prompts or for one token of each of R rows.

transformers' modules serve every length, type and device, in some seventy small operations a layer; with the few tokens
of a decoding step these cost more than the matrix products. Here the same sums take half as many, and the products are
the way round that BLAS does fast: hidden states are columns (width, R), because with few rows weight @ columns runs up
to twice as fast as rows @ weight.T.

A layer (Touvron et al. 2023, arXiv:2302.13971): x += O attention(rope(Q n(x)), rope(K n(x)), V n(x));
x += down (act(gate n(x)) * up n(x)), where n is RMSNorm (Zhang and Sennrich 2019) and rope is rotary position embedding
(Su et al. 2021), whose angles are those of the model's own module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from grpo_mlflow.forward import tuning
from grpo_mlflow.forward.attention import Packed, require_reach
from grpo_mlflow.forward.llama_pass import angles, window


class LlamaStep:
    """A model taken apart, for one call of the sampler: later changes of its weights or adapters are not seen."""

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        self._model, self._window = model.model, window(model)
        self._layers = [_Layer(layer) for layer in model.model.layers]
        self._norm = _norm(model.model.norm)
        self._head = _product(model.get_output_embeddings())

    def __call__(self, tokens: Tensor, positions: Tensor, packed: Packed, picks: Tensor | int) -> Tensor:
        """Return logits of the tokens that follow `tokens` (R,) at `positions` (R,); see `packed_forward`."""
        require_reach(self._window, packed)
        model = self._model
        hidden = functional.embedding(tokens, model.embed_tokens.weight).t().contiguous()
        cos, sin = (part.t().contiguous() for part in angles(model, hidden, positions))
        for number, layer in enumerate(self._layers):
            hidden = layer(hidden, cos, sin, partial(packed.attend, number))
        if isinstance(picks, Tensor):
            hidden = hidden.index_select(1, picks)
        return self._head(self._norm(hidden), None).t()


class _Layer:
    """A layer taken apart once: to look a module up costs as much as a small operation."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._before, self._between = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self._inputs = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self._normed = [_norm(getattr(attention, name)) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        self._size, self._scaling = attention.head_dim, attention.scaling
        outputs = (part.out_features // self._size for part in (attention.q_proj, attention.k_proj))
        self._queries, self._both = accumulate(outputs)  # where keys begin among the heads, and where values do
        self._output, self._down = _product(attention.o_proj), _product(mlp.down_proj)
        self._gate, self._up, self._act = _product(mlp.gate_proj), _product(mlp.up_proj), mlp.act_fn

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Return the hidden states (width, R) that follow; the angles are (D, R)."""
        normed = self._before(hidden)
        rows = self._inputs(normed).view(-1, self._size, hidden.shape[1])
        query_key, value = rows[: self._both], rows[self._both :]
        if self._normed:
            parts = (query_key[: self._queries], query_key[self._queries :])
            query_key = torch.cat([norm(part) for norm, part in zip(self._normed, parts, strict=True)])
        turned = torch.addcmul(query_key * cos, query_key.roll(self._size // 2, dims=1), sin)
        given = (part.permute(2, 0, 1) for part in (turned[: self._queries], turned[self._queries :], value))
        found = attend(*given, self._scaling)
        hidden = self._output(found.flatten(1).t(), hidden)
        normed = self._between(hidden)
        return self._down(self._act(self._gate(normed, None)).mul_(self._up(normed, None)), hidden)


def _joined(layers: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """Return what linear layers make of columns (in, R), one after the other: (sum of out, R)."""
    if all(type(layer) is nn.Linear and layer.weight.numel() <= tuning.JOINED_UP_TO_WEIGHTS for layer in layers):
        weight = torch.cat([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        joined = _plain(weight, torch.cat(biases) if biases else None)
        return lambda columns: joined(columns, None)
    products = [_product(layer) for layer in layers]
    return lambda columns: torch.cat([product(columns, None) for product in products])


def _product(layer: Any) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return what a linear layer makes of columns (in, R), plus what is to be added: (out, R)."""
    if type(layer) is nn.Linear:
        return _plain(layer.weight, layer.bias)
    if not hasattr(layer, "base_layer"):  # else peft's, with an adapter
        raise NotImplementedError(f"it has a {type(layer).__name__}")  # a weight in fewer bits, say
    return _adapted(layer)


def _plain(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor, Tensor | None], Tensor]:
    bias = None if bias is None else bias[:, None]
    size = tuning.BLOCK_ROWS
    in_blocks = len(weight) >= tuning.BLOCKED_FROM_ROWS and not len(weight) % size

    def product(columns: Tensor, added: Tensor | None) -> Tensor:
        if bias is not None:
            added = bias if added is None else added + bias
        if added is not None:
            return torch.addmm(added, weight, columns)
        if in_blocks:
            blocks = weight.view(-1, size, weight.shape[1])
            return torch.bmm(blocks, columns.expand(len(blocks), *columns.shape)).flatten(0, 1)
        return weight @ columns

    return product


def _adapted(layer: Any) -> Callable[[Tensor, Tensor | None], Tensor]:
    base = _product(layer.base_layer)
    names = [] if layer.disable_adapters else layer.active_adapters
    adapters = [(_product(layer.lora_A[name]), _product(layer.lora_B[name]), layer.scaling[name]) for name in names]

    def product(columns: Tensor, added: Tensor | None) -> Tensor:
        found = base(columns, added)
        for down, up, scaling in adapters:
            found = found.add_(up(down(columns, None), None), alpha=scaling)
        return found

    return product


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    """Return RMSNorm over the width of columns (..., width, R)."""
    weight, epsilon = module.weight[:, None], module.variance_epsilon
    shares = torch.full((1, len(weight)), 1 / len(weight), device=weight.device)

    def norm(columns: Tensor) -> Tensor:
        inverse = (shares @ (columns * columns)).add_(epsilon).rsqrt_()  # a product takes a mean faster than `mean`
        return (columns * inverse).mul_(weight)

    return norm
