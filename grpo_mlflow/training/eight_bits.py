"""AdamW whose moments take 8 bits per number (Dettmers et al. 2021, arXiv 2110.02861): bitsandbytes, also of shards.

A moment is a code for each number, and a scale for each block of 256 in a row. A process that holds a share of a tensor
begins its blocks with its share, a checkpoint with the tensor. If shares are multiples of 256 numbers, as those of most
layers are, both have the same blocks, and a checkpoint has the very state. Otherwise it is rounded once more.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from grpo_mlflow.model.memory import SMALLEST_IN_8_BITS

BLOCK, CODES = 256, 256  # numbers that share a scale; values of 8 bits
_MOMENTS = ("1", "2")  # how bitsandbytes ends their names
# Tensors of a state that are not shaped as their parameter, which has n numbers.
OF_BLOCKS: dict[str, Callable[[int], tuple[int]]] = {
    **{f"qmap{moment}": lambda _: (CODES,) for moment in _MOMENTS},
    **{f"absmax{moment}": lambda n: (blocks(n),) for moment in _MOMENTS},
}


def blocks(numbers: int) -> int:
    """Return how many blocks so many numbers have."""
    return -(-numbers // BLOCK)


def create(held: Sequence[Parameter], whole: Sequence[Tensor], **settings: Any) -> torch.optim.Optimizer:
    """Return the optimizer of tensors, each a share of the tensor in `whole` at its place, or all of it."""
    library: Any = importlib.import_module("bitsandbytes.optim")
    sizes = [each.numel() for each in whole]

    class AdamW8bit(library.AdamW8bit):  # type: ignore[misc]
        def get_config(self, gindex: int, pindex: int, group: Any) -> dict[str, Any]:
            # by the size of all shares: else one process would hold a moment in 8 bits, and another one in float32
            found: dict[str, Any] = super().get_config(gindex, pindex, group)
            return found | {"min_8bit_size": 0 if sizes[pindex] >= SMALLEST_IN_8_BITS else sizes[pindex] + 1}

        def update_step(self, group: Any, p: Parameter, gindex: int, pindex: int) -> None:
            if p.numel():  # a GPU refuses a kernel of no blocks
                super().update_step(group, p, gindex, pindex)

    found: torch.optim.Optimizer = AdamW8bit(held, **settings)
    return found


def joined(codes: Tensor, scales: Tensor, meaning: Tensor, share: int) -> tuple[Tensor, Tensor]:
    """Return codes (n,) and scales (blocks,) of a whole moment, whose shares are no multiples of a block.

    Args:
        codes: (n,), of all shares.
        scales: (processes, blocks of a share), those of each share.
        meaning: (256,), the number of each code.
        share: the numbers of a share; the last ones may have fewer.
    """
    parts = zip(torch.split(codes, share), scales, strict=False)  # beyond the last numbers, shares are empty
    return _coded(torch.cat([_numbers(part, own, meaning) for part, own in parts]), meaning)


def cut(codes: Tensor, scales: Tensor, meaning: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Return codes (m,) and scales of a share: numbers `start` to `start + m` of a moment.

    Args:
        codes: (m,), of the share.
        scales: (blocks,), of the whole moment.
        meaning: (256,), the number of each code.
    """
    own = scales[start // BLOCK : blocks(start + len(codes))]
    before = start % BLOCK
    if not before or not len(codes):
        return codes, own[: blocks(len(codes))]
    filled = torch.cat([codes.new_zeros(before), codes])
    return _coded(_numbers(filled, own, meaning)[before:], meaning)


def _numbers(codes: Tensor, scales: Tensor, meaning: Tensor) -> Tensor:
    library: Any = importlib.import_module("bitsandbytes.functional")
    own = scales[: blocks(len(codes))].contiguous()
    found: Tensor = library.dequantize_blockwise(codes.contiguous(), absmax=own, code=meaning, blocksize=BLOCK)
    return found


def _coded(numbers: Tensor, meaning: Tensor) -> tuple[Tensor, Tensor]:
    library: Any = importlib.import_module("bitsandbytes.functional")
    codes, state = library.quantize_blockwise(numbers, code=meaning, blocksize=BLOCK)
    return codes, state.absmax
