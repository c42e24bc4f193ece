"""Log-probabilities of rollouts under a model, by the cheapest way that the model allows.

Rows that are computed once (`shared_prefix`: prompts, and completions drawn several times) and padded rows
(`padded.completion_logprobs`) give the same numbers up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_mlflow.forward import shared_prefix
from grpo_mlflow.forward.padded import completion_logprobs
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.training.batching import Row, micro_batches, pad, prompt_batches


class Scorer:
    """Scores rows under `policy.model`, or under what wraps it for several processes.

    `shares` tells whether prompts are computed once; if not, `reason` says why.
    """

    def __init__(self, policy: Policy, temperature: float) -> None:
        self._policy, self._temperature = policy, temperature
        self.reason = shared_prefix.reason_against(policy.model)
        self.shares = self.reason is None

    def split(self, rows: Sequence[Row], indices: Sequence[int], size: int) -> list[list[int]]:
        """Return micro-batches of at most `size` rows that are cheap to score."""
        return (prompt_batches if self.shares else micro_batches)(rows, indices, size)

    def score(self, rows: Sequence[Row], model: Any = None, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies of the completions, both (B, T) in float32.

        They are zero past the end of a completion and on tokens that are not trained.
        """
        model = model or self._policy.model
        with self._policy.autocast(), self._policy.weights():
            if self.shares:
                return self._shared(rows, model, entropy_gradient)
            return self._padded(rows, model, entropy_gradient)

    def _shared(self, rows: Sequence[Row], model: Any, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        # a completion that was drawn several times is computed once
        numbers: dict[tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...] | None], int] = {}
        places = [numbers.setdefault((row.prompt_ids, row.completion_ids, row.trained), len(numbers)) for row in rows]
        prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompt for prompt, *_ in numbers))}
        batch = shared_prefix.Prefixes(
            list(prompts),
            [completion for _, completion, _ in numbers],
            [prompts[prompt] for prompt, *_ in numbers],
            self._policy.device,
            [trained for *_, trained in numbers],
        )
        chosen, entropy = shared_prefix.logprobs(
            model, batch, self._temperature, entropy_gradient, self._policy.written_out
        )
        if len(numbers) == len(rows):
            return chosen, entropy
        index = torch.tensor(places, device=chosen.device)
        return chosen.index_select(0, index), entropy.index_select(0, index)

    def _padded(self, rows: Sequence[Row], model: Any, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        device, width = self._policy.device, max(row.width for row in rows)
        ids = [[*row.prompt_ids, *row.completion_ids, *[self._policy.pad_id] * (width - row.width)] for row in rows]
        starts = torch.tensor([len(row.prompt_ids) for row in rows], device=device)
        most = max(len(row.completion_ids) for row in rows)
        found = completion_logprobs(
            model, torch.tensor(ids, device=device), starts, most, self._temperature, entropy_gradient
        )
        unscored = pad([row.mask for row in rows], most).to(device) == 0
        chosen, entropy = (value.masked_fill(unscored, 0.0) for value in found)
        return chosen, entropy
