"""Matrix products of a few rows on a CPU.

BLAS chooses its loops by the shape: with the few rows of a decoding step, weight @ x.T runs up to twice as fast as
x @ weight.T, which is what a linear layer asks for. Both sum the same products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

_FEW = 128  # rows; beyond, both orders are equally fast
_LARGE = 100_000  # weights; a smaller product gains less than the detour costs


@contextmanager
def of_few_rows(model: nn.Module) -> Iterator[None]:
    """Let the large linear layers of a model multiply few rows the faster way inside the block.

    For float32 on a CPU. What they return is a transposed tensor, which not every model's code can take.
    """
    linear = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    layers = [layer for layer in linear if layer.weight.numel() >= _LARGE]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, plain: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:  # named as in nn.Linear
    if input.numel() > _FEW * layer.in_features:
        return plain(input)
    rows = input.reshape(-1, layer.in_features).t()
    product = layer.weight @ rows if layer.bias is None else torch.addmm(layer.bias[:, None], layer.weight, rows)
    return product.t().view(*input.shape[:-1], layer.out_features)
