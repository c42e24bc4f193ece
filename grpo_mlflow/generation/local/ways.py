"""Which way of sampling is right for a model: found out by trial, the fastest first, as in `forward.ways`.

    packed      keys and values in buffers of our own (`PackedDecoder`), written out where `llama_step` serves
    cache       the model's own cache (`CacheDecoder`)
    recomputed  no cache: all tokens again for each new one (`RecomputingDecoder`); slow, for models whose state cannot
                be padded or reordered

A way is driven as the sampler does: prompts are prefilled together, rows part where their tokens differ, and leave when
they end. The logits of each token must be those of the plain pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from grpo_mlflow.forward import trial, tuning, ways
from grpo_mlflow.forward.llama_pass import FAMILY
from grpo_mlflow.forward.trial import Trial
from grpo_mlflow.forward.ways import Unfit
from grpo_mlflow.generation.local.decoding import (
    Branches,
    CacheDecoder,
    Decoder,
    PackedDecoder,
    RecomputingDecoder,
)
from grpo_mlflow.model.policy import Policy

Way = Literal["packed", "cache", "recomputed"]
Make = Callable[[Sequence[Sequence[int]], int], Decoder]


@dataclass(frozen=True, slots=True)
class Sampler:
    """A right way. `written_out`: `LlamaStep` gives the same. `reason`: why not the fastest; None where it is."""

    way: Way
    written_out: bool = False
    reason: str | None = None


_KNOWN: WeakKeyDictionary[Any, dict[tuple[bool, torch.dtype], Sampler]] = WeakKeyDictionary()


def sampler(policy: Policy) -> Sampler:
    """Return a right way for a policy, found out once with a few tokens unless `know` has said it.

    Raises:
        Unfit: there is none.
    """
    known, key = _KNOWN.setdefault(policy.model, {}), (policy.written_out, policy.dtype)
    if key not in known:
        model = policy.model
        known[key] = decide(policy, ways.trials(model, [trial.few(ways.vocabulary_of(model))]))
    return known[key]


def know(policy: Policy, found: Sampler) -> None:
    """Let `sampler` return this from now on; raise NotImplementedError where the model cannot be packed after all."""
    if found.way == "packed":
        ways.require_packing(policy.model)
    _KNOWN.setdefault(policy.model, {})[policy.written_out, policy.dtype] = found


def start(policy: Policy, prompts: Sequence[Sequence[int]], k: int, most: int) -> Decoder:
    """Prefill each prompt once and return a decoder of len(prompts) * k rows, k after k, for `most` tokens at most."""
    return Branches(prefill(policy, prompts, k, most), k)


def prefill(policy: Policy, prompts: Sequence[Sequence[int]], k: int, most: int) -> Decoder:
    """Return a decoder of one row for each prompt, which may become k, for `most` tokens at most."""
    found = sampler(policy)
    return _maker(policy, found.way, most, found.written_out)(prompts, k)


@torch.no_grad()
def decide(policy: Policy, tried: Sequence[Trial]) -> Sampler:
    """Return the fastest way that all trials find right.

    Raises:
        Unfit: there is none.
    """
    if not policy.written_out:
        reason = "model.forward_pass = 'transformers'"
    elif _may_step(policy) and _wrong(policy, "packed", tried, written_out=True) is None:
        return Sampler("packed", written_out=True)
    elif _wrong(policy, "packed", tried) is None:
        return Sampler("packed")
    else:
        reason = ways.against_packing(policy.model, tried)
    if (wrong := _wrong(policy, "cache", tried)) is None:
        return Sampler("cache", reason=reason)
    if (hopeless := _wrong(policy, "recomputed", tried)) is None:
        return Sampler("recomputed", reason=f"its own cache fails with padded or reordered rows: {wrong}")
    raise Unfit(f"no way to sample gives what it gives for a single row: {hopeless}")


@torch.no_grad()
def is_right(policy: Policy, found: Sampler, tried: Sequence[Trial]) -> bool:
    """Return whether all trials find a way right."""
    return _wrong(policy, found.way, tried, found.written_out) is None


def _may_step(policy: Policy) -> bool:
    """Return whether `LlamaStep` may serve: it knows the family, on a CPU in float32."""
    plain = policy.device.type == "cpu" and policy.dtype == torch.float32
    return plain and policy.model.config.model_type in FAMILY


def _maker(policy: Policy, way: Way, most: int, written_out: bool) -> Make:
    if way == "packed":
        return lambda prompts, k: PackedDecoder(policy, prompts, k, most, written_out=written_out)
    kind = CacheDecoder if way == "cache" else RecomputingDecoder
    return lambda prompts, _: kind(policy, prompts)


def _wrong(policy: Policy, way: Way, tried: Sequence[Trial], written_out: bool = False) -> str | None:
    """Return what is wrong with a way, None if nothing is."""
    try:
        if way == "packed":
            ways.require_packing(policy.model)
        for constants in _constants(policy.model) if way == "packed" else ({},):
            for each in tried:
                make = _maker(policy, way, max(map(len, each.examples.completions)), written_out)
                with each.computing(policy.model), tuning.set_to(constants):
                    if wrong := each.against(_excess(each, make)):
                        return wrong
    except Exception as error:  # a model may fail at this in any way of its own
        return ways.said(error)
    return None


def _constants(model: Any) -> list[Mapping[str, float]]:
    """Return what brings about each kind of cache: one more where query heads do not share those of keys."""
    config = model.config.get_text_config()
    heads, keys = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    shared = keys is not None and keys != heads
    return [{}, trial.MANY_ROWS] if shared else [{}, trial.LONG_ROWS, trial.MANY_ROWS]


def _excess(tried: Trial, make: Make) -> list[Tensor]:
    """Drive a decoder along the examples; return by how many times what is allowed the logits of each row are off."""
    examples = tried.examples
    found: list[list[Tensor]] = [[] for _ in examples.rows]
    k = max(examples.owners.count(owner) for owner in examples.owners)
    rows: list[int] = []  # which completion each row follows, k for each prompt
    for prompt in range(len(examples.prompts)):
        own = [row for row, owner in enumerate(examples.owners) if owner == prompt]
        rows += (own * k)[:k]
    decoder = Branches(make(examples.prompts, k), k)
    for place in range(max(map(len, examples.completions))):
        going = [at for at, row in enumerate(rows) if len(examples.completions[row]) > place]
        if len(going) < len(rows):
            decoder.keep(torch.tensor(going, device=decoder.logits.device))
            rows = [rows[at] for at in going]
        if place:
            newest = [examples.completions[row][place - 1] for row in rows]
            decoder.step(torch.tensor(newest, device=decoder.logits.device))
        logits = decoder.logits
        for at, row in enumerate(rows):
            found[row].append(tried.excess(row, place, logits[at]))
    return [torch.cat(each) for each in found]
