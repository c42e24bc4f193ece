"""What an iteration's optimizer steps measured: sums over micro-batches, turned into means once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from grpo_mlflow.algorithm import correction
from grpo_mlflow.algorithm.correction import Measures
from grpo_mlflow.algorithm.losses import LossParts
from grpo_mlflow.errors import UserError
from grpo_mlflow.training.steps import Applied


class Totals:
    """Sums over tokens and optimizer steps of one iteration, by the names that the loss gives them."""

    def __init__(self, device: torch.device) -> None:
        self._terms, self._sums = _Sums("terms", device), _Sums("sums", device)
        self._tokens = torch.zeros((), device=device)
        self._measured = torch.zeros(len(correction.SUMS), device=device)
        self._largest = torch.full((len(correction.LARGEST),), -math.inf, device=device)
        self._summary: Callable[[dict[str, float]], dict[str, float]] | None = None
        self._grad_norm, self._lr = 0.0, 0.0

    def add(self, parts: LossParts, mask: Tensor, measures: Measures | None) -> None:
        """Add a micro-batch. One without measures only gives its names, which all processes have to know.

        Raises:
            UserError: the loss returns other names than before.
        """
        self._summary, counts = parts.summary, measures is not None
        self._terms.add(parts.terms, counts)
        self._sums.add(parts.sums, counts)
        if measures is not None:
            self._tokens += mask.sum()
            self._measured += measures.sums
            self._largest = torch.maximum(self._largest, measures.largest)

    def step(self, applied: Applied) -> None:
        """Count an optimizer step."""
        self._grad_norm += applied.grad_norm
        self._lr = applied.lr

    def means(self, accelerator: Accelerator, steps: int) -> dict[str, float | None]:
        """Return means: losses and gradient norm over optimizer steps, the others over the tokens trained on.

        Where all groups were flat there are no such tokens, and what would be measured on them is None.
        """
        terms, sums = self._terms.over(accelerator, steps), self._sums.over(accelerator)
        tokens = float(accelerator.reduce(self._tokens, "sum"))
        metrics: dict[str, float | None] = {"loss_total": sum(terms.values()), **terms}
        metrics |= {"grad_norm": self._grad_norm / steps, "lr": self._lr, "tokens_trained": tokens}
        means = {name: value / tokens if tokens else math.nan for name, value in sums.items()}
        summary = self._summary(means) if self._summary else means  # of NaNs too: it names the metrics
        summary = {**self._sampler(accelerator, tokens), **summary}
        return metrics | (summary if tokens else dict.fromkeys(summary))

    def _sampler(self, accelerator: Accelerator, tokens: float) -> dict[str, float]:
        """Return what was measured between sampler and trainer, over all processes."""
        sums = accelerator.reduce(self._measured, "sum").tolist()
        largest = accelerator.gather(self._largest[None]).amax(dim=0).tolist()
        means = [value / tokens if tokens else math.nan for value in sums]
        named = dict(zip(correction.SUMS, means, strict=True))
        return correction.metrics(named, dict(zip(correction.LARGEST, largest, strict=True)))


class _Sums:
    """Named scalars, added up on the device: reading each there would wait for it."""

    def __init__(self, kind: str, device: torch.device) -> None:
        self._kind, self._device = kind, device
        self._names: list[str] | None = None
        self._values = torch.zeros(0, device=device)

    def add(self, values: Mapping[str, Tensor], counts: bool) -> None:
        if self._names is None:
            self._names, self._values = list(values), torch.zeros(len(values), device=self._device)
        if self._names != list(values):
            raise UserError(
                f"train.loss: its {self._kind} are {list(values)} after {self._names}; allowed: the same names in the "
                "same order each time"
            )
        if counts and values:
            self._values += torch.stack([value.detach() for value in values.values()])

    def over(self, accelerator: Accelerator, divisor: int = 1) -> dict[str, float]:
        """Return the sums over all processes, divided."""
        if not self._names:
            return {}
        return dict(zip(self._names, (accelerator.reduce(self._values, "sum") / divisor).tolist(), strict=True))
