"""A few rows of random tokens under a model's plain pass: what every other way of computing them must give, too.

Plain is the model's own forward pass of one row, without padding, mask or cache: what the log-probability of a token
given those before it means. A way is right if it gives the same log-probabilities, and the same gradients of a weighted
sum of them, up to the rounding of float32. Gradients are needed because in a model that has learned little, tokens
hardly feel each other: layers that mix the wrong ones change log-probabilities by less than a thousandth, and their own
gradients altogether. A type of fewer bits hides such differences, so it is only asked for what its own rounding allows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_mlflow.forward import attention
from grpo_mlflow.forward.padded import keeps_logits

Ids = tuple[int, ...]
Rows = list[Tensor]  # for each completion, log-probabilities of all tokens at each of its places: (T, V)

_SHARE, _FLOOR = 3e-4, 1e-5  # of the spread of a place's logits; rounding of the softmax
_GRADIENT = 1e-3  # of a tensor's norm
_NEGLIGIBLE = 1e-5  # of the largest norm of any tensor's gradient: below it is rounding
_SMALL = 1 << 16  # numbers in a tensor; most layers have such tensors, and their gradients cost little
_NOISE = 8  # times the rounding of the plain pass: what a type of fewer bits allows
_OF_TORCH = (None, "eager", "sdpa", "flex_attention", attention.NAME)
# Constants of `tuning` that let a few tokens take the ways of long rows, and of many long rows.
LONG_ROWS: Mapping[str, float] = {
    "PLAIN_ATTENTION_SCORES": 0,
    "CACHE_GROWTH": 1,
    "SUMMED_NUMBERS": 0,
    "PREFIX_TOKENS_SAVED": 1,
}
LONG_COMPLETIONS: Mapping[str, float] = {**LONG_ROWS, "ALONE_FROM_TOKENS": 0, "ALONE_LONGEST_PROMPT": math.inf}
MANY_ROWS: Mapping[str, float] = {**LONG_ROWS, "COPIED_TOKENS": 0}
_LAYER = re.compile(r".*?\.\d+(?=\.)")  # what the names of a layer's tensors begin with
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
    """Return ragged rows that begin alike, among them a completion of one token.

    The shorter prompt has the longest completion: padded on the left, it goes on for some tokens.
    """
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> Ids:
        return tuple(torch.randint(vocabulary, (count,), generator=draw).tolist())

    alike = ids(_PREFIX)
    prompts = [alike + ids(rest) for rest in (3, 1)]
    return Examples(prompts, [ids(count) for count in (2, 1, 3)], [0, 0, 1])


def long(vocabulary: int, prompt: int, completion: int, seed: int = 1) -> Examples:
    """Return a row of these lengths beside a short one, which must not feel it."""
    draw = torch.Generator().manual_seed(seed)
    prompts = [tuple(torch.randint(vocabulary, (n,), generator=draw).tolist()) for n in (prompt, 5)]
    completions = [tuple(torch.randint(vocabulary, (n,), generator=draw).tolist()) for n in (completion, 3)]
    return Examples(prompts, completions, [0, 1])


@dataclass(frozen=True, slots=True)
class Trial:
    """What the plain pass gives: log-probabilities, the spread of each place's logits, and gradients by name.

    `gradients` is empty where they are not compared. With a `dtype` of fewer bits than float32, ways are computed in it
    and may be some times as far off as the plain pass is in this type: by `noise`, see `against`.
    """

    examples: Examples
    logprobs: Rows
    spreads: list[Tensor]
    gradients: dict[str, Tensor]
    dtype: torch.dtype = torch.float32
    noise: float = 0.0

    @property
    def chosen(self) -> list[Tensor]:
        """Log-probabilities of the completions' own tokens, (T,) each."""
        return [_of_tokens(rows, own) for rows, own in zip(self.logprobs, self.examples.completions, strict=True)]

    def computing(self, model: Any) -> AbstractContextManager[None]:
        """Compute in the type of the trial inside the block."""
        return exactly(model) if self.dtype == torch.float32 else torch.autocast(model.device.type, self.dtype)

    def against(self, excess: Sequence[Tensor]) -> str | None:
        """Return what is wrong with rows, None if nothing is.

        Args:
            excess: for each row, by how many times what is allowed the log-probabilities at its places are off.
        """
        if self.dtype == torch.float32:
            found = float(torch.cat([*excess]).max())
        else:
            found = _ordinary(excess) / (_NOISE * self.noise + 1)
        return None if found <= 1 else f"its log-probabilities are {found:.2g} times as far off as rounding explains"

    def against_chosen(self, found: Sequence[Tensor]) -> str | None:
        """Return what is wrong with log-probabilities of the completions' tokens, (T,) each; None: nothing."""
        rows = zip(found, self.chosen, self.spreads, strict=True)
        return self.against([_excess(own[:, None], wanted[:, None], each) for own, wanted, each in rows])

    def excess(self, row: int, place: int, logits: Tensor) -> Tensor:
        """Return by how many times what is allowed the logits (V,) of a row's token at this place are off, (1,)."""
        found = logits.float().log_softmax(-1)
        return _excess(found[None], self.logprobs[row][place][None], self.spreads[row][place][None])

    def against_gradients(self, found: Mapping[str, Tensor]) -> str | None:
        """Return what is wrong with gradients of `weighted`; None: nothing."""
        largest = max((float(each.norm()) for each in self.gradients.values()), default=0.0)
        for name, wanted in self.gradients.items():
            size, error = float(wanted.norm()), float((found[name] - wanted).norm())
            if not error <= _GRADIENT * size + _NEGLIGIBLE * largest:
                return f"its gradient of {name} is {error / max(size, 1e-30):.1g} of its size off"
        return None


@contextmanager
def exactly(model: Any) -> Iterator[None]:
    """Compute in float32 inside the block, in all its bits, by an attention that takes it."""
    kind = model.config._attn_implementation
    other = kind not in _OF_TORCH  # flash attention, say: many such kernels take types of fewer bits alone
    shortened = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if other:
        model.set_attn_implementation("eager")
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = shortened
        if other:
            model.set_attn_implementation(kind)


def weighted(chosen: Sequence[Tensor]) -> Tensor:
    """Return a sum of log-probabilities with fixed random weights: its gradient feels each of them."""
    draw = torch.Generator().manual_seed(2)
    weights = [torch.randn(len(each), generator=draw).to(each.device) for each in chosen]
    return torch.stack([(a * b).sum() for a, b in zip(weights, chosen, strict=True)]).sum()


def gradients(model: Any, chosen: Callable[[], Sequence[Tensor]]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return what `chosen` gives, and some numbers of the gradients of `weighted` by tensors of each layer."""
    named = _felt(model)
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
        name: _some(torch.zeros_like(own) if grad is None else grad) for (name, own), grad in pairs
    }


def _felt(model: Any) -> dict[str, Tensor]:
    """Return the small tensors of a model, and of layers without any the smallest."""
    layers: dict[str, list[tuple[str, Tensor]]] = {}
    for name, each in model.named_parameters():
        if each.is_floating_point():
            layer = _LAYER.match(name)
            layers.setdefault(layer.group() if layer else "", []).append((name, each))
    found: dict[str, Tensor] = {}
    for layer_name, own in layers.items():
        found |= {name: each for name, each in own if each.numel() <= _SMALL}
        if layer_name and not any(name in found for name, _ in own):
            found |= [min(own, key=lambda pair: pair[1].numel())]
    return found


def _some(gradient: Tensor) -> Tensor:
    """Return numbers of a gradient, spread over all of it."""
    flat = gradient.detach().reshape(-1)
    return flat[:: -(-len(flat) // _SMALL)].clone()


def take(model: Any, examples: Examples, *, differentiated: bool = True) -> Trial:
    """Compute the examples row by row, in float32; without gradients unless `differentiated`."""
    kept: Rows = []
    spreads: list[Tensor] = []

    def chosen() -> list[Tensor]:
        found = []
        for owner, own in zip(examples.owners, examples.completions, strict=True):
            logits = plain(model, (*examples.prompts[owner], *own), len(own) + 1)[:-1]
            logprobs = logits.log_softmax(-1)
            kept.append(logprobs.detach())
            spreads.append(logits.detach().std(-1))
            found.append(_of_tokens(logprobs, own))
        return found

    with exactly(model):
        if differentiated:
            return Trial(examples, kept, spreads, gradients(model, chosen)[1])
        with torch.no_grad():
            chosen()
    return Trial(examples, kept, spreads, {})


@torch.no_grad()
def in_type(model: Any, exact: Trial, dtype: torch.dtype) -> Trial:
    """Return the same examples for ways that compute in a type of fewer bits."""
    rows = zip(exact.examples.rows, exact.examples.completions, strict=True)
    found = Trial(exact.examples, exact.logprobs, exact.spreads, {}, dtype)
    with found.computing(model):
        logits = [plain(model, row, len(own) + 1)[:-1] for row, own in rows]
    excess = [
        torch.cat([found.excess(row, place, each) for place, each in enumerate(own)]) for row, own in enumerate(logits)
    ]
    return replace(found, noise=_ordinary(excess))


def _ordinary(excess: Sequence[Tensor]) -> float:
    """Return the excess at an ordinary place of the row that is worst.

    Not at the worst place: a few bits may send a token to another expert, and all that follows feels it.
    """
    return max(float(row.median()) for row in excess)


def plain(model: Any, row: Ids, last: int = 0) -> Tensor:
    """Return the logits of a row's last tokens, (last, V) in float32; 0: of all."""
    kept = {"logits_to_keep": last} if keeps_logits(model) else {}
    logits: Tensor = model(input_ids=torch.tensor([row], device=model.device), use_cache=False, **kept).logits
    return logits[0, -last:].float()


@torch.no_grad()
def looks_ahead(model: Any, trial: Trial) -> bool:
    """Return whether the plain pass gives a prompt other logits when the row goes on: then they mean nothing."""
    row = max(range(len(trial.examples.rows)), key=lambda each: len(trial.examples.rows[each]))
    prompt = trial.examples.prompts[trial.examples.owners[row]]
    with exactly(model):
        return float(trial.excess(row, 0, plain(model, prompt, 1)[0])) > 1


def _of_tokens(logprobs: Tensor, ids: Ids) -> Tensor:
    return logprobs.gather(-1, torch.tensor(ids, device=logprobs.device)[:, None]).squeeze(-1)


def _excess(found: Tensor, wanted: Tensor, spread: Tensor) -> Tensor:
    """Return the largest difference of each place over what is allowed, (T,), of (T, V) and the spreads (T,)."""
    return ((found - wanted).abs() / (_SHARE * spread + _FLOOR)[:, None]).nan_to_num(torch.inf).amax(-1)
