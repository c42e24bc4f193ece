"""A few rows of random tokens under a model's plain pass: what every other way of computing them must give, too.

Plain is the model's own forward pass of one row, without padding, mask or cache: what the log-probability of a token
given those before it means. A way is right if it gives the same log-probabilities, and the same gradients of a weighted
sum of them, up to the rounding of float32. Gradients are needed because in a model that has learned little, tokens
hardly feel each other: layers that mix the wrong ones change log-probabilities by less than a thousandth, and their own
gradients altogether.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Ids = tuple[int, ...]
Rows = list[Tensor]  # for each completion, log-probabilities of all tokens at each of its places: (T, V)

_SHARE, _FLOOR = 3e-4, 1e-5  # of the spread of a place's logits; rounding of the softmax
_GRADIENT = 1e-3  # of a tensor's norm
_NEGLIGIBLE = 1e-5  # of the largest norm of any tensor's gradient: below it is rounding
_SMALL = 1 << 16  # numbers in a tensor; each layer has such tensors, and their gradients cost little
_PREFIX = 8  # tokens that the prompts of `few` begin alike with: enough to be computed once


@dataclass(frozen=True, slots=True)
class Examples:
    """Completions of prompts; `owners` names each completion's prompt."""

    prompts: list[Ids]
    completions: list[Ids]
    owners: list[int]

    @property
    def rows(self) -> list[Ids]:
        """Prompt and completion of each row."""
        return [(*self.prompts[owner], *own) for owner, own in zip(self.owners, self.completions, strict=True)]


def few(vocabulary: int, seed: int = 0) -> Examples:
    """Return ragged rows that begin alike, among them a completion of one token."""
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> Ids:
        return tuple(torch.randint(vocabulary, (count,), generator=draw).tolist())

    alike = ids(_PREFIX)
    prompts = [alike + ids(rest) for rest in (3, 1, 4)]
    return Examples(prompts, [ids(count) for count in (3, 5, 1, 4)], [0, 0, 1, 2])


def long(vocabulary: int, prompt: int, completion: int, seed: int = 1) -> Examples:
    """Return a row of these lengths beside a short one, which must not feel it."""
    draw = torch.Generator().manual_seed(seed)
    prompts = [tuple(torch.randint(vocabulary, (n,), generator=draw).tolist()) for n in (prompt, 5)]
    completions = [tuple(torch.randint(vocabulary, (n,), generator=draw).tolist()) for n in (completion, 3)]
    return Examples(prompts, completions, [0, 1])


@dataclass(frozen=True, slots=True)
class Trial:
    """What the plain pass gives: log-probabilities, the spread of each place's logits, and gradients by name."""

    examples: Examples
    logprobs: Rows
    spreads: list[Tensor]
    gradients: dict[str, Tensor]

    @property
    def chosen(self) -> list[Tensor]:
        """Log-probabilities of the completions' own tokens, (T,) each."""
        return [_of_tokens(rows, own) for rows, own in zip(self.logprobs, self.examples.completions, strict=True)]

    def against_chosen(self, found: Sequence[Tensor]) -> str | None:
        """Return what is wrong with log-probabilities of the completions' tokens, (T,) each; None: nothing."""
        excess = [_excess(a, b, spread) for a, b, spread in zip(found, self.chosen, self.spreads, strict=True)]
        return too_far(float(torch.stack(excess).max()))

    def excess(self, row: int, place: int, logits: Tensor) -> float:
        """Return by how many times what is allowed the logits (V,) of a row's token at this place are off."""
        return float(_excess(logits.float().log_softmax(-1), self.logprobs[row][place], self.spreads[row][place]))

    def against_gradients(self, found: Mapping[str, Tensor]) -> str | None:
        """Return what is wrong with gradients of `weighted`; None: nothing."""
        largest = max((float(each.norm()) for each in self.gradients.values()), default=0.0)
        for name, wanted in self.gradients.items():
            size, error = float(wanted.norm()), float((found[name] - wanted).norm())
            if not error <= _GRADIENT * size + _NEGLIGIBLE * largest:
                return f"its gradient of {name} is {error / max(size, 1e-30):.1g} of its size off"
        return None


def weighted(chosen: Sequence[Tensor]) -> Tensor:
    """Return a sum of log-probabilities with fixed random weights: its gradient feels each of them."""
    draw = torch.Generator().manual_seed(2)
    weights = [torch.randn(len(each), generator=draw).to(each.device) for each in chosen]
    return torch.stack([(a * b).sum() for a, b in zip(weights, chosen, strict=True)]).sum()


def gradients(model: Any, chosen: Callable[[], Sequence[Tensor]]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return what `chosen` gives, and the gradients of `weighted` by the model's small tensors."""
    named = {name: each for name, each in model.named_parameters() if each.numel() <= _SMALL}
    frozen = [each for each in named.values() if not each.requires_grad]
    for each in frozen:
        each.requires_grad_(True)
    try:
        with torch.enable_grad():
            found = list(chosen())
            grads = torch.autograd.grad(weighted(found), list(named.values()), allow_unused=True)
    finally:
        for each in frozen:
            each.requires_grad_(False)
    pairs = zip(named.items(), grads, strict=True)
    return [each.detach() for each in found], {
        name: (torch.zeros_like(own) if grad is None else grad).detach() for (name, own), grad in pairs
    }


def take(model: Any, examples: Examples) -> Trial:
    """Compute the examples row by row, in float32."""
    kept: Rows = []

    def chosen() -> list[Tensor]:
        found = []
        for owner, own in zip(examples.owners, examples.completions, strict=True):
            logits = plain(model, (*examples.prompts[owner], *own))[len(examples.prompts[owner]) - 1 : -1]
            logprobs = logits.log_softmax(-1)
            kept.append(logprobs.detach())
            spreads.append(logits.detach().std(-1))
            found.append(_of_tokens(logprobs, own))
        return found

    spreads: list[Tensor] = []
    _, grads = gradients(model, chosen)
    return Trial(examples, kept, spreads, grads)


def plain(model: Any, row: Ids) -> Tensor:
    """Return the logits of a row of tokens, (tokens, V) in float32."""
    logits: Tensor = model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits
    return logits[0].float()


@torch.no_grad()
def looks_ahead(model: Any, trial: Trial) -> bool:
    """Return whether the plain pass gives a place other logits when the row goes on: then they mean nothing."""
    examples = trial.examples
    row = max(range(len(examples.rows)), key=lambda each: len(examples.rows[each]))
    prompt = examples.prompts[examples.owners[row]]
    return any(
        trial.excess(row, place, plain(model, (*prompt, *examples.completions[row][:place]))[-1]) > 1
        for place in (0, len(examples.completions[row]) // 2)
    )


def _of_tokens(logprobs: Tensor, ids: Ids) -> Tensor:
    return logprobs.gather(-1, torch.tensor(ids, device=logprobs.device)[:, None]).squeeze(-1)


def _excess(found: Tensor, wanted: Tensor, spread: Tensor) -> Tensor:
    """Return the largest difference over what is allowed."""
    return ((found - wanted).abs() / (_SHARE * spread + _FLOOR)).nan_to_num(torch.inf).max()


def too_far(excess: float) -> str | None:
    """Return what it means that log-probabilities are off by so many times what is allowed; None: nothing."""
    return None if excess <= 1 else f"its log-probabilities are {excess:.2g} times as far off as rounding explains"
