"""Sampling in this process, from the very weights that are trained.

Each prompt is prefilled once for its K completions, and what they begin alike with computed once; rows that have ended
leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_mlflow import seeding
from grpo_mlflow.errors import UserError
from grpo_mlflow.generation.base import Sampling, work
from grpo_mlflow.generation.local import ways
from grpo_mlflow.generation.sampling import choose
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.pace import Pace
from grpo_mlflow.types import Completion, Prompt


class LocalGenerator:
    """Draws from `policy`, `batch_size` prompts at a time; `pace` is told how far it is.

    With `tokens` so many rows are drawn at a time as have room in that many tokens, each with its prompt and at its
    longest; at least one.
    """

    def __init__(
        self,
        policy: Policy,
        batch_size: int,
        version: int = 0,
        pace: Pace | None = None,
        *,
        tokens: int | None = None,
    ) -> None:
        self._policy, self._batch_size, self._version, self._tokens = policy, batch_size, version, tokens
        self._pace = pace or Pace(lambda _: None)

    def sync(self, version: int) -> None:
        """Note the version: the weights are shared with the trainer."""
        self._version = version

    def metrics(self) -> dict[str, float]:
        return {}

    def generate(
        self, prompts: Sequence[Prompt], k: int, sampling: Sampling, seed: int, key: tuple[str | int, ...]
    ) -> list[list[Completion]]:
        return [group for groups in self.stream(prompts, k, sampling, seed, key) for group in groups]

    def stream(
        self, prompts: Sequence[Prompt], k: int, sampling: Sampling, seed: int, key: tuple[str | int, ...]
    ) -> Iterator[list[list[Completion]]]:
        """Yield the completions of `batch_size` prompts at a time."""
        self._pace.begin(work(key), at_most=True)
        at_once = self._rows(prompts, k, sampling.max_new_tokens)
        size = min(self._batch_size, max(1, at_once // k))
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            found: list[list[Completion]] = [[] for _ in batch]
            for first in range(0, k, at_once):
                replicates = range(first, min(first + at_once, k))
                keys = [(*key, prompt.problem_id, j) for prompt in batch for j in replicates]
                uniforms = torch.from_numpy(seeding.uniforms(seed, keys, sampling.max_new_tokens))
                share = partial(self._far, start + len(batch) * first / k, len(keys) / k, len(prompts))
                drawn = self._drawn(batch, len(replicates), sampling, uniforms, share)
                for own, further in zip(found, drawn, strict=True):
                    own += further
            yield found

    def _rows(self, prompts: Sequence[Prompt], k: int, new: int) -> int:
        """Return how many rows are drawn at a time."""
        most = self._batch_size * k
        if self._tokens is None:
            return most
        longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
        return min(most, max(1, self._tokens // (longest + new)))

    def _far(self, before: float, batch: float, prompts: int, share: float) -> None:
        self._pace.at((before + batch * share) / prompts)

    def _drawn(
        self,
        prompts: Sequence[Prompt],
        k: int,
        sampling: Sampling,
        uniforms: Tensor,
        far: Callable[[float], None],
    ) -> list[list[Completion]]:
        """Return k completions of each prompt; the rest is as in `_sample`."""
        rows = self._sample([prompt.token_ids for prompt in prompts], k, sampling, uniforms, far)
        texts = self._policy.decode([ids for ids, _ in rows])
        completions = [
            Completion(
                token_ids=tuple(ids),
                text=text,
                behaviour_logprobs=tuple(logprobs),
                finish_reason="stop" if ids[-1] in self._policy.eos_ids else "length",
                policy_version=self._version,
            )
            for (ids, logprobs), text in zip(rows, texts, strict=True)
        ]
        return [completions[i * k : (i + 1) * k] for i in range(len(prompts))]

    @torch.no_grad()  # in inference mode autocast would cast the weights anew for every token
    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        k: int,
        sampling: Sampling,
        uniforms: Tensor,
        far: Callable[[float], None],
    ) -> list[tuple[list[int], list[float]]]:
        """Return token ids and log-probs of len(prompts) * k rows; `uniforms` is (rows, max_new_tokens).

        `far` is told the share of the longest completion that is sampled.
        """
        # one block for all tokens: the weights are cast when they are first met
        with _casts_kept(self._policy.model), self._policy.autocast():
            return self._loop(prompts, k, sampling, uniforms, far)

    def _loop(
        self,
        prompts: Sequence[Sequence[int]],
        k: int,
        sampling: Sampling,
        uniforms: Tensor,
        far: Callable[[float], None],
    ) -> list[tuple[list[int], list[float]]]:
        policy, device = self._policy, self._policy.device
        rows, most = len(prompts) * k, sampling.max_new_tokens
        decoder = ways.start(policy, prompts, k, most)
        uniforms = uniforms.T.contiguous().to(device)
        sampled = decoder.logits.shape[-1] if policy.sampled is None else policy.sampled
        seen = _seen(prompts, k, decoder.logits)[:, :sampled] if sampling.repetition_penalty != 1.0 else None
        tokens = torch.zeros(most, rows, dtype=torch.long, device=device)
        logprobs = torch.zeros(most, rows, device=device)
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        eos = torch.zeros(decoder.logits.shape[-1], dtype=torch.bool, device=device)
        eos[list(policy.eos_ids)] = True
        alive = torch.arange(rows, device=device)  # the rows that go on
        for place in range(most):
            far(place / most)
            logits = decoder.logits[:, :sampled]
            chosen, likelihood = choose(logits, sampling, uniforms[place].index_select(0, alive), seen)
            tokens[place].index_copy_(0, alive, chosen)
            logprobs[place].index_copy_(0, alive, likelihood)
            lengths[alive] = place + 1
            index = (~eos.index_select(0, chosen)).nonzero().squeeze(1)
            if place + 1 == most or not len(index):
                break
            if seen is not None:
                seen.scatter_(1, chosen[:, None], True)
            if len(index) < len(alive):
                decoder.keep(index)
                alive, chosen = alive[index], chosen[index]
                seen = seen[index] if seen is not None else None
            decoder.step(chosen)
        if not torch.isfinite(logprobs).all():
            raise UserError(
                f"model {policy.name!r}: its logits are not finite, so nothing can be sampled: its weights grew too "
                "large; allowed: to resume from a checkpoint before that with a lower train.lr, or with train.grad_clip"
            )
        return [
            (row[:length], values[:length])
            for row, values, length in zip(tokens.T.tolist(), logprobs.T.tolist(), lengths.tolist(), strict=True)
        ]


@contextmanager
def _casts_kept(model: Any) -> Iterator[None]:
    """Autocast keeps the cast of a weight only if it can have a gradient: where none is taken, let all look so."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _seen(prompts: Sequence[Sequence[int]], k: int, like: Tensor) -> Tensor:
    """Return which tokens each row's prompt holds, (B * k, V)."""
    seen = torch.zeros(len(prompts), like.shape[-1], dtype=torch.bool, device=like.device)
    for row, prompt in enumerate(prompts):
        seen[row, torch.tensor(prompt, device=like.device)] = True
    return seen.repeat_interleave(k, dim=0)
