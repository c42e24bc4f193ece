"""Sampling in this process, from the very weights that are trained.

Each prompt is prefilled once and its key-value cache is expanded K-fold; rows that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from grpo_mlflow import seeding
from grpo_mlflow.generation.base import Sampling
from grpo_mlflow.generation.sampling import draw, processed_logprobs
from grpo_mlflow.policy import Policy, keeps_logits
from grpo_mlflow.types import Completion, Prompt


class LocalGenerator:
    """Draws from `policy`, `batch_size` prompts at a time."""

    def __init__(self, policy: Policy, batch_size: int, version: int = 0) -> None:
        self._policy, self._batch_size, self._version = policy, batch_size, version

    def sync(self, version: int) -> None:
        """Note the version: the weights are shared with the trainer."""
        self._version = version

    def metrics(self) -> dict[str, float]:
        return {}

    def generate(
        self, prompts: Sequence[Prompt], k: int, sampling: Sampling, seed: int, key: tuple[str | int, ...]
    ) -> list[list[Completion]]:
        groups: list[list[Completion]] = []
        for start in range(0, len(prompts), self._batch_size):
            batch = prompts[start : start + self._batch_size]
            streams = [seeding.stream(seed, *key, prompt.problem_id, j) for prompt in batch for j in range(k)]
            uniforms = torch.from_numpy(np.stack([stream.random(sampling.max_new_tokens) for stream in streams]))
            rows = self._sample([prompt.token_ids for prompt in batch], k, sampling, uniforms)
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
            groups += [completions[i * k : (i + 1) * k] for i in range(len(batch))]
        return groups

    @torch.inference_mode()
    def _sample(
        self, prompts: Sequence[Sequence[int]], k: int, sampling: Sampling, uniforms: Tensor
    ) -> list[tuple[list[int], list[float]]]:
        """Return token ids and log-probs of len(prompts) * k rows; `uniforms` is (rows, max_new_tokens)."""
        policy, device = self._policy, self._policy.device
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), policy.pad_id)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, mask, uniforms = ids.to(device), mask.to(device), uniforms.to(device)
        last = {"logits_to_keep": 1} if keeps_logits(policy.model) else {}
        with policy.autocast():
            out = policy.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
                use_cache=True,
                **last,
            )
        cache = out.past_key_values
        cache.batch_repeat_interleave(k)
        logits = out.logits[:, -1].repeat_interleave(k, dim=0)
        mask = mask.repeat_interleave(k, dim=0)
        lengths = mask.sum(dim=1)
        seen = _seen(ids, mask[::k], logits.shape[-1], k) if sampling.repetition_penalty != 1.0 else None

        rows = len(prompts) * k
        tokens = torch.full((rows, sampling.max_new_tokens), policy.pad_id, device=device)
        logprobs = torch.zeros(rows, sampling.max_new_tokens, device=device)
        ends = torch.full((rows,), sampling.max_new_tokens, device=device)
        eos = torch.tensor(policy.eos_ids, device=device)
        alive = torch.arange(rows, device=device)
        for place in range(sampling.max_new_tokens):
            distribution = processed_logprobs(logits, sampling, seen)
            if sampling.temperature == 0:
                chosen = distribution.argmax(dim=-1)
            else:
                chosen = draw(distribution, uniforms[alive, place])
            tokens[alive, place] = chosen
            logprobs[alive, place] = distribution.gather(1, chosen[:, None]).squeeze(1)
            going = ~torch.isin(chosen, eos)
            ends[alive[~going]] = place + 1
            if place + 1 == sampling.max_new_tokens or not going.any():
                break
            if seen is not None:
                seen.scatter_(1, chosen[:, None], True)
            if not going.all():
                index = going.nonzero().squeeze(1)
                cache.batch_select_indices(index)
                alive, chosen, mask, lengths = alive[index], chosen[index], mask[index], lengths[index]
                seen = seen[index] if seen is not None else None
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            with policy.autocast():
                out = policy.model(
                    input_ids=chosen[:, None],
                    attention_mask=mask,
                    position_ids=(lengths + place)[:, None],
                    past_key_values=cache,
                    use_cache=True,
                )
            logits = out.logits[:, -1]
        return [
            (row[:end], values[:end])
            for row, values, end in zip(tokens.tolist(), logprobs.tolist(), ends.tolist(), strict=True)
        ]


def _seen(ids: Tensor, mask: Tensor, vocabulary: int, k: int) -> Tensor:
    """Return which tokens each row's prompt holds, (B * k, V); padding does not count."""
    seen = torch.zeros(len(ids), vocabulary, dtype=torch.bool, device=ids.device)
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    seen[rows[mask == 1], ids[mask == 1]] = True
    return seen.repeat_interleave(k, dim=0)
