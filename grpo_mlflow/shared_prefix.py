"""Log-probabilities of many completions of the same prompts, each prompt computed once.

K rollouts of a problem differ only after their prompt. A micro-batch becomes one row of tokens without padding: all
prompts, then all completions but for their last tokens, which predict nothing. A prompt attends to itself; a completion
attends to its prompt, whose keys and values are expanded over its completions, and to itself. Autograd adds the
gradients of all completions up at the expansion, so the prompt runs backward once too. The result is that of padded
rows, up to rounding.

This needs a model whose attention can be replaced (`attention`) and whose other layers look at single tokens.
`reason_against` finds out by trying; any other model takes the padded path, `policy.completion_logprobs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from grpo_mlflow.attention import Packed, allow_packing, packed_forward
from grpo_mlflow.policy import completion_logprobs
from grpo_mlflow.token_head import token_logprobs

Ids = Sequence[int]
_REASONS: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


class Prefixes(Packed):
    """G prompts and R completions in one packed row of N tokens; `owners` (R,) names each completion's prompt.

    ids, positions (N,)    the row: prompt after prompt, completion after completion
    picks, targets (M,)    for each completion token: where it is predicted, and which it is
    mask (R, T)            True on the tokens of each completion; its True places in order are those of picks
    """

    def __init__(
        self, prompts: Sequence[Ids], completions: Sequence[Ids], owners: Sequence[int], device: torch.device
    ) -> None:
        sequences = [*prompts, *(completion[:-1] for completion in completions)]
        before = [0] * len(prompts) + [len(prompts[owner]) for owner in owners]
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        starts = lengths.cumsum(0) - lengths
        self.ids = torch.tensor([token for sequence in sequences for token in sequence], device=device)
        offsets = torch.tensor(before) - starts
        self.positions = (torch.arange(len(self.ids)) + offsets.repeat_interleave(lengths)).to(device)
        whole = torch.tensor([len(completion) for completion in completions])
        self.mask = (torch.arange(int(whole.max()))[None, :] < whole[:, None]).to(device)
        self.targets = torch.tensor([token for completion in completions for token in completion], device=device)
        ends = (starts + lengths - 1)[: len(prompts)][torch.tensor(owners)]
        own = starts[len(prompts) :, None] + torch.arange(self.mask.shape[1] - 1)[None, :]
        self.picks = torch.cat([ends[:, None], own], dim=1).to(device)[self.mask]

        # For attention the sequences are laid out as (G, P) prompts and (R, T - 1) completions, padded on the right.
        self.owners = torch.tensor(owners, device=device)
        self._shapes = [(len(prompts), int(lengths[: len(prompts)].max())), (len(owners), self.mask.shape[1] - 1)]
        widths = torch.tensor([width for count, width in self._shapes for _ in range(count)])
        begins = widths.cumsum(0) - widths
        slots = (torch.arange(len(self.ids)) + (begins - starts).repeat_interleave(lengths)).to(device)
        places = torch.zeros(int(widths.sum()), dtype=torch.long, device=device)  # a filler repeats the first token
        places[slots] = torch.arange(len(self.ids), device=device)
        filler = torch.ones(len(places), dtype=torch.bool, device=device)
        filler[slots] = False
        self._slots, self._places, self._fillers = slots, places, filler.nonzero().squeeze(1)
        self._visible = self._visibility(lengths[: len(prompts)].to(device))

    def _visibility(self, prompt_lengths: Tensor) -> Tensor:
        """Return what a completion may look at as an additive mask (R, 1, T - 1, P + T - 1)."""
        (_, wide), (_, long) = self._shapes
        device = prompt_lengths.device
        prompt = torch.arange(wide, device=device)[None, :] < prompt_lengths[self.owners, None]
        before = torch.ones(long, long, dtype=torch.bool, device=device).tril()
        rows = len(self.owners)
        seen = torch.cat([prompt[:, None, :].expand(rows, long, wide), before.expand(rows, long, long)], dim=2)
        return torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `Packed.attend`; tokens are those of `ids`."""
        (prompts, wide), (rows, long) = self._shapes
        parts = [torch.split(self._unpack(part), [prompts * wide, rows * long]) for part in (query, key, value)]
        shared = query.shape[1] != key.shape[1]
        q, k, v = (part[0].view(prompts, wide, *part[0].shape[1:]).transpose(1, 2) for part in parts)
        on_prompts = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=shared)
        found = [on_prompts.transpose(1, 2).flatten(0, 1)]
        if long:
            own_q, own_k, own_v = (part[1].view(rows, long, *part[1].shape[1:]).transpose(1, 2) for part in parts)
            on_completions = scaled_dot_product_attention(
                own_q,
                torch.cat([_expand(k, self.owners), own_k], dim=2),
                torch.cat([_expand(v, self.owners), own_v], dim=2),
                attn_mask=self._visible.to(query.dtype),
                scale=scaling,
                enable_gqa=shared,
            )
            found.append(on_completions.transpose(1, 2).flatten(0, 1))
        return self._pack(torch.cat(found))

    def _unpack(self, rows: Tensor) -> Tensor:
        """Return tokens (N, ...) in their padded places."""
        if not len(self._fillers):
            return rows
        return _look_up(rows, self._places, self._slots, None)

    def _pack(self, rows: Tensor) -> Tensor:
        """Return the tokens (N, ...) of padded places."""
        if not len(self._fillers):
            return rows
        return _look_up(rows, self._slots, self._places, self._fillers)


def _look_up(rows: Tensor, index: Tensor, inverse: Tensor, unused: Tensor | None) -> Tensor:
    """Return rows by index. Each is used once, so its gradient is looked up by `inverse`; those in `unused` never.

    The gradient of plain indexing adds up row by row, which costs more than attention itself.
    """
    apply: Any = _LookUp.apply
    found: Tensor = apply(rows, index, inverse, unused)
    return found


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, unused: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, unused)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, unused = ctx.saved_tensors
        gradient = grads[0].index_select(0, inverse)
        if unused is not None:
            gradient.index_fill_(0, unused, 0.0)
        return gradient, None, None, None


def _expand(prompts: Tensor, owners: Tensor) -> Tensor:
    """Return (R, ...) from (G, ...): each completion's own copy of what its prompt holds."""
    apply: Any = _Expand.apply
    found: Tensor = apply(prompts, owners)
    return found


class _Expand(torch.autograd.Function):
    """Rows by index, with the gradient as a matrix product, which adds up far faster than `index_add`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,), (gradient,) = ctx.saved_tensors, grads
        belongs = torch.zeros(ctx.count, len(index), dtype=gradient.dtype, device=gradient.device)
        belongs[index, torch.arange(len(index), device=index.device)] = 1.0
        return (belongs @ gradient.flatten(1)).view(ctx.count, *gradient.shape[1:]), None


class _Head:
    """Takes what the output layer is given, and gives it a single token to spend its time on."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self.hidden: Tensor | None = None

    def __enter__(self) -> _Head:
        self._hook = self._layer.register_forward_pre_hook(self._take)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _take(self, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        self.hidden = inputs[0]
        return (self.hidden[:, :1].detach(),)


def logprobs(model: Any, batch: Prefixes, temperature: float, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies of completion tokens, both (R, T) in float32, zero past the end.

    See `policy.completion_logprobs`, which computes the same of padded rows.
    """
    layer = _output_layer(model)
    with _Head(layer) as head:
        packed_forward(model, batch.ids, batch.positions, batch, batch.picks)
    assert head.hidden is not None
    found = token_logprobs(head.hidden[0], layer.weight, layer.bias, batch.targets, temperature, entropy_gradient)
    chosen, entropy = (
        torch.zeros(batch.mask.shape, device=value.device).masked_scatter(batch.mask, value) for value in found
    )
    return chosen, entropy


def _output_layer(model: Any) -> nn.Linear:
    layer = getattr(model, "module", model).get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise NotImplementedError(f"an output layer of type {type(layer).__name__}")
    return layer


def reason_against(model: Any) -> str | None:
    """Return why the model cannot share prompts, None if it can; found out once per model."""
    if model not in _REASONS:
        with torch.autocast(model.device.type, enabled=False):  # in low precision both ways differ visibly
            _REASONS[model] = _try(model)
    return _REASONS[model]


@torch.no_grad()
def _try(model: Any) -> str | None:
    """Take both ways with a few ragged random tokens."""
    try:
        if not allow_packing(model):
            return f"its attention is {model.config._attn_implementation}"
        draw = torch.Generator().manual_seed(0)
        device, vocabulary = model.device, model.get_input_embeddings().weight.shape[0]
        ids = [torch.randint(vocabulary, (n,), generator=draw).tolist() for n in (5, 3, 4, 1, 6)]
        prompts, completions, owners = ids[:2], ids[2:], [0, 0, 1]
        found, _ = logprobs(model, Prefixes(prompts, completions, owners, device), 1.0)
        for row, (completion, owner) in enumerate(zip(completions, owners, strict=True)):
            whole = torch.tensor([[*prompts[owner], *completion]], device=device)
            start = torch.tensor([len(prompts[owner])], device=device)
            expected, _ = completion_logprobs(model, whole, start, len(completion), 1.0)
            if not torch.allclose(found[row, : len(completion)], expected[0], atol=1e-3, rtol=1e-3):
                return "its layers look at more than single tokens"
    except Exception as error:  # a model may fail at this in any way of its own
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None
