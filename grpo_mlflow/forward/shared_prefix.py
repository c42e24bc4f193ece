"""Log-probabilities of many completions of the same prompts, each prompt computed once.

K rollouts of a problem differ only after their prompt, and prompts often begin alike. A micro-batch becomes one row of
tokens without padding (`prefix_tree`): all prompts, then all completions but for their last tokens, which predict
nothing. The result is that of padded rows, up to rounding.

This needs a model whose attention can be replaced (`attention`), whose other layers look at single tokens, and whose
logits are what its output layer gives, or a multiple. `ways` finds out by trying.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grpo_mlflow.forward import llama_pass, long_rows
from grpo_mlflow.forward.attention import Packed, packed_forward
from grpo_mlflow.forward.long_rows import Continued
from grpo_mlflow.forward.prefix_tree import Ids, Level, Tree, in_a_row, prompt_levels
from grpo_mlflow.forward.token_head import token_logprobs


class Prefixes(Packed):
    """Prompts and R completions without their last tokens; `owners` (R,) names each completion's prompt.

    ids, positions (N,)    the row
    picks, targets (M,)    for each token that is scored: where it is predicted, and which it is
    mask (R, T)            True on those tokens of each completion; its True places in order are those of picks

    `scored` names the tokens of each completion that are scored, None for all; by default all of all completions are.
    """

    def __init__(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        owners: Sequence[int],
        device: torch.device,
        scored: Sequence[Sequence[bool] | None] = (),
    ) -> None:
        beginnings, above = [completion[:-1] for completion in completions], prompt_levels(prompts)
        self._row: Tree | Continued
        if long_rows.pays(prompts, beginnings):
            self._row = Continued(Tree(above, device), beginnings, owners, device)
        else:
            self._row = Tree([*above, Level(beginnings, owners)], device)
        self.ids, self.positions, self.longest = self._row.ids, self._row.positions, self._row.longest
        starts, lengths = self._row.starts, self._row.lengths
        whole = torch.tensor([len(completion) for completion in completions])
        mask = torch.arange(int(whole.max()))[None, :] < whole[:, None]
        targets = in_a_row(completions, torch.device("cpu"))
        for row, chosen in enumerate(scored):
            if chosen is not None:
                mask[row, : len(chosen)] = torch.tensor(chosen)
        if any(chosen is not None for chosen in scored):
            every = torch.arange(int(whole.max()))[None, :] < whole[:, None]
            targets = targets[mask[every]]
        self.mask = mask.to(device)
        self.targets = targets.to(device)
        ends = (starts[-2] + lengths[-2] - 1)[torch.tensor(owners)]
        own = starts[-1][:, None] + torch.arange(mask.shape[1] - 1)[None, :]
        self.picks = torch.cat([ends[:, None], own], dim=1)[mask].to(device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `Packed.attend`; tokens are those of `ids`."""
        return self._row.attend(layer, query, key, value, scaling)


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


def logprobs(
    model: Any,
    batch: Prefixes,
    temperature: float,
    entropy_gradient: bool = False,
    *,
    written_out: bool = False,
    sampled: int | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies of completion tokens, both (R, T) in float32, zero where none is scored.

    See `padded.completion_logprobs`, which computes the same of padded rows. With `written_out` the pass of
    `llama_pass` stands in for the model's modules where it serves the model. Where the model's logits are a multiple of
    what its output layer gives, the temperature is to be divided by it; `cap` as in `token_logprobs`.
    """
    layer = output_layer(model)
    if written_out and llama_pass.serves(model):
        hidden = llama_pass.hidden_states(model, batch.ids, batch.positions, batch, batch.picks)
    else:
        hidden = _hidden_states(model, batch, layer)
    found = token_logprobs(hidden, layer.weight, layer.bias, batch.targets, temperature, entropy_gradient, sampled, cap)
    chosen, entropy = (
        torch.zeros(batch.mask.shape, device=value.device).masked_scatter(batch.mask, value) for value in found
    )
    return chosen, entropy


def _hidden_states(model: Any, batch: Prefixes, layer: nn.Linear) -> Tensor:
    """Return what the output layer is given at the picks, (M, width)."""
    with _Head(layer) as head:
        packed_forward(model, batch.ids, batch.positions, batch, batch.picks)
    assert head.hidden is not None
    return head.hidden[0]


def output_layer(model: Any) -> nn.Linear:
    """Return the layer that makes logits of hidden states; raise NotImplementedError if it is no plain one."""
    layer = getattr(model, "module", model).get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise NotImplementedError(f"its output layer is a {type(layer).__name__}")
    return layer
