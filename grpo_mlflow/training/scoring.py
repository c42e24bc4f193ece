"""Log-probabilities of rollouts under a model, by the cheapest way that the model allows.

Rows that are computed once (`shared_prefix`: prompts, and completions drawn several times), padded rows, and rows of
one length at a time (`padded.completion_logprobs`) give the same numbers up to rounding; `ways` finds out which of them
are right for a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from grpo_mlflow.forward import shared_prefix, ways
from grpo_mlflow.forward.padded import completion_logprobs
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.training.batching import Limits, Row, micro_batches, pad, prompt_batches
from grpo_mlflow.training.rollouts import require_tried


class Scorer:
    """Scores rows under `policy.model`, or under what wraps it for several processes.

    `shares` tells whether prompts are computed once; if not, `reason` says why.
    """

    def __init__(self, policy: Policy, temperature: float) -> None:
        self._policy, self._temperature = policy, temperature
        self._way = ways.scoring(policy.model)
        self.reason = self._way.reason
        self.shares = self.reason is None

    def split(self, rows: Sequence[Row], indices: Sequence[int], limits: Limits) -> list[list[int]]:
        """Return micro-batches within the limits that are cheap to score."""
        return (prompt_batches if self.shares else micro_batches)(rows, indices, limits)

    def score(self, rows: Sequence[Row], model: Any = None, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies of the completions, both (B, T) in float32.

        They are zero past the end of a completion and on tokens that are not trained.

        Raises:
            TextUntried: a row, of a recording, say, is longer than the model was tried with.
        """
        require_tried(self._policy, max(row.width for row in rows), "a rollout")
        model = model or self._policy.model
        with self._policy.autocast(), self._policy.weights():
            if self.shares:
                return self._shared(rows, model, entropy_gradient)
            if self._way.way == "alike":
                return self._alike(rows, model, entropy_gradient)
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
        temperature = self._temperature / self._way.scale
        chosen, entropy = shared_prefix.logprobs(
            model,
            batch,
            temperature,
            entropy_gradient,
            written_out=self._policy.written_out and self._way.written_out,
            sampled=self._policy.priced,
            cap=self._way.cap,
        )
        if len(numbers) == len(rows):
            return chosen, entropy
        index = torch.tensor(places, device=chosen.device)
        return chosen.index_select(0, index), entropy.index_select(0, index)

    def _alike(self, rows: Sequence[Row], model: Any, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        most = max(len(row.completion_ids) for row in rows)
        found: dict[int, tuple[Tensor, ...]] = {}
        for width in sorted({row.width for row in rows}):
            index = [place for place, row in enumerate(rows) if row.width == width]
            parts = self._padded([rows[place] for place in index], model, entropy_gradient)
            wide = (functional.pad(part, (0, most - part.shape[1])) for part in parts)
            found |= dict(zip(index, zip(*wide, strict=True), strict=True))
        chosen, entropy = zip(*(found[place] for place in range(len(rows))), strict=True)
        return torch.stack(chosen), torch.stack(entropy)

    def _padded(self, rows: Sequence[Row], model: Any, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        device, width = self._policy.device, max(row.width for row in rows)
        # padded with the token that `ways` found the way right with
        ids = [[*row.prompt_ids, *row.completion_ids, *[0] * (width - row.width)] for row in rows]
        starts = torch.tensor([len(row.prompt_ids) for row in rows], device=device)
        most = max(len(row.completion_ids) for row in rows)
        rows_of_ids = torch.tensor(ids, device=device)
        found = completion_logprobs(
            model, rows_of_ids, starts, most, self._temperature, entropy_gradient, self._policy.priced
        )
        unscored = pad([row.mask for row in rows], most).to(device) == 0
        chosen, entropy = (value.masked_fill(unscored, 0.0) for value in found)
        return chosen, entropy
