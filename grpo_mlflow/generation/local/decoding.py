"""From prompts to next-token logits, one token after another for K rows of each prompt.

`Branches` computes what rows have in common once: K rows begin as one, and part where they draw different tokens. Below
it is one of three. `PackedDecoder` keeps keys and values in buffers of its own (`kv_cache`): nothing is concatenated
or masked anew for a token, prompts are prefilled without padding, what they share once, and grouped key heads are never
repeated. `CacheDecoder` uses the model's own cache. `RecomputingDecoder` keeps nothing but tokens, and serves every
architecture. All give the same logits up to rounding, in the type of the autocast block around them; which of them a
model is sampled with is found out by trial (`ways`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo_mlflow.forward import kv_cache, tuning
from grpo_mlflow.forward.attention import Packed, packed_forward
from grpo_mlflow.forward.llama_step import LlamaStep
from grpo_mlflow.forward.padded import keeps_logits
from grpo_mlflow.forward.prefix_tree import Tree, prompt_levels
from grpo_mlflow.model.policy import Policy


class Decoder(Protocol):
    """Rows of tokens that grow. `logits` (R, V) are those of each row's next token."""

    @property
    def logits(self) -> Tensor: ...

    def step(self, tokens: Tensor) -> None:
        """Append one token to each row: `tokens` (R,)."""
        ...

    def keep(self, index: Tensor) -> None:
        """Go on with the rows of `index`, those of a prompt side by side; a row may be in it several times."""
        ...


class Branches:
    """Rows over a decoder that holds once those of them that have drawn the same tokens so far.

    It begins with a row for each prompt. Short answers of a model that has learned are often the same, so a step costs
    a fraction of what that of all rows does; long ones part within a few tokens.
    """

    def __init__(self, decoder: Decoder, k: int) -> None:
        self._decoder = decoder
        # which of the decoder's rows is each row's; those of a prompt are in no order until all are apart
        self._owners = torch.arange(len(decoder.logits), device=decoder.logits.device).repeat_interleave(k)
        self._apart = k == 1

    @property
    def logits(self) -> Tensor:
        """See `Decoder`."""
        found = self._decoder.logits
        return found if self._apart and len(self._owners) == len(found) else found.index_select(0, self._owners)

    def step(self, tokens: Tensor) -> None:
        """See `Decoder.step`."""
        held, vocabulary = self._decoder.logits.shape
        parents, newest, owners, moves = self._owners, tokens, torch.arange(len(tokens), device=tokens.device), False
        if not self._apart:
            different, alike = torch.unique(self._owners * vocabulary + tokens, return_inverse=True)
            if len(different) > tuning.DISTINCT_SHARE * len(tokens):
                self._apart = moves = True  # each row gets its own place, in order
            else:
                parents, newest, owners = different // vocabulary, different % vocabulary, alike
                moves = bool((parents[1:] == parents[:-1]).any())
        if moves or held - len(parents) > tuning.UNUSED_SHARE * held:
            self._decoder.keep(parents)
            self._owners = owners
        elif len(parents) < held:
            newest = newest.new_zeros(held).index_copy_(0, parents, newest)
        self._decoder.step(newest)

    def keep(self, index: Tensor) -> None:
        """Go on with some of the rows, each at most once; the decoder lets go of its own when that pays."""
        self._owners = self._owners.index_select(0, index)


class PackedDecoder:
    """Prompts prefilled without padding, then rows of single tokens: at first one for each prompt, in the end up to k.

    With `written_out` the forward pass is that of `llama_step`, in float32 on a CPU.
    """

    def __init__(
        self, policy: Policy, prompts: Sequence[Sequence[int]], k: int, most: int, *, written_out: bool
    ) -> None:
        device = policy.device
        tree = Tree(prompt_levels(prompts), device)
        prefill = _Prefill(tree)
        ends = (tree.starts[-1] + tree.lengths[-1] - 1).to(device)
        self._forward = LlamaStep(policy.model) if written_out else partial(packed_forward, policy.model)
        self.logits = self._forward(tree.ids, tree.positions, prefill, ends)
        self._cache = kv_cache.start(prefill.keys, prefill.values, tree.filled, k, most, prefill.heads)
        self._positions = torch.tensor([len(prompt) for prompt in prompts], device=device)

    def step(self, tokens: Tensor) -> None:
        """See `Decoder.step`."""
        self.logits = self._forward(tokens, self._positions, self._cache, picks=0)
        self._cache.advance()
        self._positions = self._positions + 1

    def keep(self, index: Tensor) -> None:
        """See `Decoder.keep`."""
        self._cache.keep(index)
        self._positions = self._positions[index]


class _Prefill(Packed):
    """Attention within a tree of prompts, whose keys and values are kept: (G, key heads, P, D) for each layer."""

    def __init__(self, tree: Tree) -> None:
        self._tree, self.longest = tree, tree.longest
        self.heads = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `Packed.attend`."""
        self.heads = query.shape[1]
        found, keys, values = self._tree.attend_keeping(query, key, value, scaling)
        self.keys.append(keys.contiguous())
        self.values.append(values.contiguous())
        return found


class CacheDecoder:
    """Rows padded on the left, with the cache that the model makes: at first one for each prompt."""

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]]) -> None:
        self._policy = policy
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), policy.pad_id)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, mask = ids.to(policy.device), mask.to(policy.device)
        last = {"logits_to_keep": 1} if keeps_logits(policy.model) else {}
        out = self._forward(ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0), **last)
        self._cache: Any = getattr(out, cache_name(policy.model), None)
        if self._cache is None:
            raise NotImplementedError("it gives none")
        self.logits = out.logits[:, -1].clone()  # of models that give logits of the whole prompt, the others go
        self._mask = mask
        self._positions = mask.sum(dim=1)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, **others: Any) -> Any:
        return self._policy.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **others)

    def step(self, tokens: Tensor) -> None:
        """See `Decoder.step`."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        cache = {cache_name(self._policy.model): self._cache}
        out = self._forward(tokens[:, None], self._mask, self._positions[:, None], **cache)
        self.logits, self._positions = out.logits[:, -1], self._positions + 1

    def keep(self, index: Tensor) -> None:
        """See `Decoder.keep`."""
        self._cache.reorder_cache(index)  # not batch_select_indices, which leaves out recurrent states
        self._mask, self._positions = self._mask[index], self._positions[index]


class RecomputingDecoder:
    """All tokens of each row again for each new one, in batches of the same length: nothing is padded or kept."""

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]]) -> None:
        self._policy, self._rows = policy, [tuple(prompt) for prompt in prompts]
        self._compute()

    def _compute(self) -> None:
        lengths = [len(row) for row in self._rows]
        found: dict[int, Tensor] = {}
        for length in set(lengths):
            index = [row for row, own in enumerate(lengths) if own == length]
            ids = torch.tensor([self._rows[row] for row in index], device=self._policy.device)
            last = {"logits_to_keep": 1} if keeps_logits(self._policy.model) else {}
            logits = self._policy.model(input_ids=ids, use_cache=False, **last).logits[:, -1]
            found |= dict(zip(index, logits, strict=True))
        self.logits = torch.stack([found[row] for row in range(len(lengths))])

    def step(self, tokens: Tensor) -> None:
        """See `Decoder.step`."""
        self._rows = [(*row, token) for row, token in zip(self._rows, tokens.tolist(), strict=True)]
        self._compute()

    def keep(self, index: Tensor) -> None:
        """See `Decoder.keep`."""
        self._rows = [self._rows[row] for row in index.tolist()]
        self.logits = self.logits[index]


def cache_name(model: Any) -> str:
    """Return what the model calls its cache, both as an argument and in its output."""
    forward = inspect.signature(inspect.unwrap(model.forward))
    return "cache" if "cache" in forward.parameters else "past_key_values"
