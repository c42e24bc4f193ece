"""How well a run uses its machine: useful work against the rate of plain matrix products, time shares, memory.

Useful are the operations that an iteration cannot do without: each prompt once, and once what all prompts begin with,
each token of a completion once in sampling, and once where completions begin alike, and in the update one forward pass
for 1 and one backward pass for 2 (for 1 where all but an adapter is frozen), of groups with a signal only and without
completions that `train.mask_truncated_completions` leaves out, completions that are the same once. Padding, repeated
prompts and recomputation are not useful, so they lower the utilisation. A token costs two operations per weight of a
matrix, the output layer only where a token is predicted, and attention 4 * width per layer and token seen.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from typing import Any

import psutil
import torch

from grpo_mlflow.config import Config
from grpo_mlflow.forward import layers
from grpo_mlflow.forward.prefix_tree import common_prefix
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.types import Group

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Costs:
    """Floating-point operations of a forward pass: per token, per prediction, per pair of tokens that attend."""

    token: float
    prediction: float
    pair: float

    @classmethod
    def of(cls, model: Any) -> Costs:
        """Read them off a model's weights; experts that a token does not pass count as well."""
        head = model.get_output_embeddings().weight
        outer = {id(head), id(model.get_input_embeddings().weight)}
        body = sum(layers.numbers(p) for p in model.parameters() if p.ndim >= 2 and id(p) not in outer)
        config = model.config
        return cls(2.0 * body, 2.0 * head.numel(), 4.0 * config.hidden_size * config.num_hidden_layers)

    def forward(self, groups: Iterable[Group], sampling: bool = False) -> float:
        """Return the operations of one forward pass over groups, each prompt and each different completion of it once,
        and once what all prompts share; in `sampling`, also once what completions of a prompt begin with."""
        groups = list(groups)
        shared = common_prefix([group.rollouts[0].prompt.token_ids for group in groups])
        total = -(len(groups) - 1) * (self.token * shared + self.pair * shared * shared / 2)
        for group in groups:
            prompt = len(group.rollouts[0].prompt.token_ids)
            total += self.token * prompt + self.pair * prompt * prompt / 2 + self.prediction * sampling
            before: tuple[int, ...] = ()
            # in order, a completion has no longer beginning in common with any before than with the last one
            for completion in sorted({rollout.completion.token_ids for rollout in group.rollouts}):
                given = completion[:-1]  # the last token predicts nothing
                pairs = zip(before, given, strict=False) if sampling else ()
                known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                new = len(given) - known
                total += self.token * new + self.prediction * (new if sampling else len(completion))
                total += self.pair * (prompt * new + (len(given) * len(completion) - known * (known + 1)) / 2)
                before = given
        return total


@cache
def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations per second of a square matrix product: the best of a few, measured once per process."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_memory(device: torch.device) -> float:
    """Return the most memory that this process has held so far, in MB: on the device, or of the host for a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    if resource is None:
        memory = psutil.Process().memory_info()
        return float(getattr(memory, "peak_wset", memory.rss)) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class Meter:
    """Turns the phases of an iteration into `perf/` metrics (`docs/metrics.md`)."""

    def __init__(self, policy: Policy, config: Config, processes: int) -> None:
        self._device, self._costs = policy.device, Costs.of(policy.model)
        self._peak = gemm_peak(policy.device, policy.dtype) * processes
        self._samples_here = config.generation.backend == "local"
        train = config.train
        self._masks = train.mask_truncated_completions
        self._passes = (
            (2 if policy.has_adapter else 3) * train.epochs + (config.steps_per_iteration > 1) + (train.kl_coef > 0)
        )

    def metrics(
        self, groups: Sequence[Group], sampled: Sequence[Group], phases: Mapping[str, float], seconds: float
    ) -> dict[str, float]:
        """Return the metrics of an iteration of `seconds`, of which `phases` were spent in its parts.

        `groups` were trained on, `sampled` were sampled for it.
        """
        work = {"update": self._passes * self._costs.forward(self._taught(groups))}
        if self._samples_here:
            work["generate"] = self._costs.forward(sampled, sampling=True)
        shares = {f"share_{phase}": spent / seconds for phase, spent in phases.items()}
        return {
            **shares,
            "share_other": max(0.0, 1.0 - sum(shares.values())),
            **{f"mfu_{phase}": flops / phases[phase] / self._peak for phase, flops in work.items()},
            "mfu": sum(work.values()) / seconds / self._peak,
            "peak_gflops": self._peak / 1e9,
            "peak_memory_mb": peak_memory(self._device),
        }

    def _taught(self, groups: Sequence[Group]) -> Iterator[Group]:
        """Yield the groups that an update computes, with the rollouts that it does."""
        for group in groups:
            kept = [each for each in group.rollouts if not (self._masks and each.completion.is_truncated)]
            if kept and not group.is_flat:
                yield replace(group, rollouts=tuple(kept))
