"""One iteration's optimizer steps on a set of groups.

The weight of every token is fixed over a whole optimizer step, over all processes and with flat groups counted, before
the step is split over processes and into micro-batches; so neither the split nor the skipping of flat groups changes
the gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from grpo_mlflow import seeding
from grpo_mlflow.algorithm import losses
from grpo_mlflow.algorithm.schedules import adapt_kl_coef, learning_rate
from grpo_mlflow.config import TrainConfig
from grpo_mlflow.errors import UserError
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.training.batching import Batch, Row, collate, micro_batches, pad, rows_of
from grpo_mlflow.training.checkpoint import load_optimizer, save_optimizer
from grpo_mlflow.training.scoring import Scorer
from grpo_mlflow.types import Group

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the loss needs to know of the run."""

    temperature: float
    max_completion_length: int
    rollouts_per_step: int  # over all processes
    total_steps: int


class Learner:
    """Owns the optimizer; `policy` is changed in place."""

    def __init__(
        self, policy: Policy, reference: Policy | None, accelerator: Accelerator, config: TrainConfig, sizes: Sizes
    ) -> None:
        self._accelerator, self._config, self._sizes = accelerator, config, sizes
        self._policy = Scorer(policy, sizes.temperature)
        self._reference = Scorer(reference, sizes.temperature) if reference is not None else None
        if self._policy.reason is not None:
            _LOG.warning("each completion repeats the computation of its prompt: %s", self._policy.reason)
        parameters = [p for p in policy.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self._model, self.optimizer = accelerator.prepare(policy.model, optimizer)
        self._model.eval()  # dropout would make sampled and trained log-probs differ
        self.step = 0
        self.kl_coef = config.kl_coef

    def update(self, groups: Sequence[Group], seed: int, iteration: int) -> dict[str, float]:
        """Take this iteration's optimizer steps and return its training metrics (`docs/metrics.md`).

        Every process is given all groups, and does its share of each step.

        Raises:
            UserError: the gradient is not finite; the weights are left as they were before that step.
        """
        rows = rows_of(groups)
        per_step = self._sizes.rollouts_per_step
        steps = self._config.epochs * (len(rows) // per_step)
        active = [i for i, row in enumerate(rows) if not row.flat]
        old = self._score(self._policy, rows, active) if steps > 1 else None
        reference = self._score(self._reference, rows, active) if self._reference and self.kl_coef > 0 else None
        totals = Totals(self._accelerator.device)
        for number in range(steps):
            epoch, place = divmod(number * per_step, len(rows))
            order = list(range(len(rows)))
            if steps > 1:
                order = seeding.stream(seed, "update", iteration, epoch).permutation(len(rows)).tolist()
            self._step(rows, order[place : place + per_step], old, reference, totals)
        metrics = totals.means(self._accelerator, steps)
        metrics["kl_coef"] = self.kl_coef
        if self._config.kl_target is not None and self.kl_coef > 0 and "kl_divergence" in metrics:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef, metrics["kl_divergence"], self._config.kl_target, self._config.kl_horizon
            )
        return metrics

    def save(self, path: Path) -> None:
        save_optimizer(self.optimizer, path)

    def restore(self, path: Path, step: int, kl_coef: float) -> None:
        load_optimizer(self.optimizer, path)
        self.step, self.kl_coef = step, kl_coef

    @torch.no_grad()
    def _score(self, scorer: Scorer, rows: Sequence[Row], indices: Sequence[int]) -> dict[int, list[float]]:
        """Return the log-probs of completions under a frozen model, by row; processes share the work."""
        found: dict[int, list[float]] = {}
        for chosen in scorer.split(rows, self._own(indices), self._config.batch_size):
            logprobs, _ = scorer.score([rows[i] for i in chosen])
            for i, values in zip(chosen, logprobs.tolist(), strict=True):
                found[i] = values[: len(rows[i].completion_ids)]
        if self._accelerator.num_processes > 1:
            found = {i: values for part in gather_object([found]) for i, values in part.items()}
        return found

    def _own(self, indices: Sequence[int]) -> list[int]:
        """Return this process's share of rows: of equal size, and a prompt's rows together as far as that allows."""
        rank, count = self._accelerator.process_index, self._accelerator.num_processes
        return sorted(indices)[len(indices) * rank // count : len(indices) * (rank + 1) // count]

    def _weights(self, rows: Sequence[Row], indices: Sequence[int]) -> dict[int, float]:
        """Return the token weight of each row of one optimizer step, flat ones counted."""
        config = self._config
        lengths = {i: len(rows[i].completion_ids) for i in indices}
        batches = micro_batches(rows, indices, config.batch_size)
        weights: dict[int, float] = {}
        for chosen in batches if config.aggregation == "bnpo" else [list(indices)]:
            own = torch.tensor([lengths[i] for i in chosen])
            values = losses.aggregation_weights(
                own,
                config.aggregation,
                rollouts=len(indices),
                tokens=int(own.sum()) * len(batches) if config.aggregation == "bnpo" else int(own.sum()),
                max_completion_length=self._sizes.max_completion_length,
            )
            weights |= dict(zip(chosen, values.tolist(), strict=True))
        return weights

    def _step(
        self,
        rows: Sequence[Row],
        indices: Sequence[int],
        old: dict[int, list[float]] | None,
        reference: dict[int, list[float]] | None,
        totals: Totals,
    ) -> None:
        weights = self._weights(rows, indices)
        active = self._own([i for i in indices if not rows[i].flat])
        batches = self._policy.split(rows, active, self._config.batch_size)
        # Processes must run backward equally often; and a step without signal still is one, for Adam's momentum.
        most = torch.tensor([len(batches)], device=self._accelerator.device)
        needed = max(1, int(self._accelerator.gather(most).max()))
        idle = needed - len(batches)
        for number, chosen in enumerate([*batches, *[[indices[0]]] * idle]):
            own = [rows[i] for i in chosen]
            batch = collate(own, self._accelerator.device)
            width = batch.mask.shape[1]
            weight = torch.tensor([weights[i] for i in chosen], device=self._accelerator.device)
            if number >= len(batches):
                weight = torch.zeros_like(weight)
            context = self._accelerator.no_sync(self._model) if number + 1 < needed else nullcontext()
            with context:
                stored_old = pad([old[i] for i in chosen], width) if old and number < len(batches) else None
                stored_ref = pad([reference[i] for i in chosen], width) if reference and number < len(batches) else None
                loss = self._loss(own, batch, weight, stored_old, stored_ref, totals)
                self._accelerator.backward(self._undo_averaging(loss))
        limit = self._config.grad_clip
        norm = self._accelerator.clip_grad_norm_(self._model.parameters(), float("inf") if limit is None else limit)
        if not torch.isfinite(norm):
            raise UserError(
                f"the gradient of optimizer step {self.step} is not finite (norm {float(norm)}): the run stops before "
                "it harms the weights; lower train.lr or train.grad_clip, or look at the last rollouts"
            )
        rate = learning_rate(
            self.step,
            self._sizes.total_steps,
            self._config.lr,
            self._config.lr_warmup_steps,
            self._config.lr_schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        totals.step(grad_norm=float(norm), lr=rate)

    def _undo_averaging(self, loss: Tensor) -> Tensor:
        """Undo accelerate's divisions: by processes and by accumulation steps; the weights already count both."""
        return loss * int(self._accelerator.num_processes * self._accelerator.gradient_accumulation_steps)

    def _loss(
        self,
        rows: Sequence[Row],
        batch: Batch,
        weights: Tensor,
        old: Tensor | None,
        reference: Tensor | None,
        totals: Totals,
    ) -> Tensor:
        config, mask = self._config, batch.mask
        policy, entropy = self._policy.score(rows, self._model, entropy_gradient=config.entropy_coef > 0)
        old = policy.detach() if old is None else old.to(policy.device)
        ratio = losses.log_ratio(policy, old, mask, config.ratio_level).exp()
        terms = losses.surrogate_terms(
            policy, ratio, batch.advantages, config.clip_low, config.clip_high, config.surrogate
        )
        correction = torch.ones_like(policy)
        if config.sampler_correction_cap is not None:
            correction = losses.sampler_correction(old, batch.behaviour, config.sampler_correction_cap)
        pg = losses.weighted_sum(terms * correction, weights, mask)
        kl = torch.zeros_like(policy)
        if reference is not None:
            kl = losses.kl_terms(policy, reference.to(policy.device), config.kl_estimator)
        loss_kl = self.kl_coef * losses.weighted_sum(kl, weights, mask)
        loss_entropy = -config.entropy_coef * losses.weighted_sum(entropy, weights, mask)
        low, high = losses.clipped_tokens(ratio, batch.advantages, config.clip_low, config.clip_high)
        with torch.no_grad():
            if bool(weights.any()):
                totals.add_losses(pg, loss_kl, loss_entropy)
                totals.add_tokens(mask, ratio, low, high, kl, entropy, correction, (old - batch.behaviour).exp())
        return pg + loss_kl + loss_entropy


class Totals:
    """Sums over tokens and optimizer steps, turned into means once, over all processes."""

    _LOSSES = ("loss_pg", "loss_kl", "loss_entropy")
    _TOKENS = (
        "ratio_shift",
        "ratio_square",
        "clip_low_frac",
        "clip_high_frac",
        "kl_divergence",
        "entropy_mean",
        "sampler_correction_mean",
        "sampler_ratio_mean",
    )

    def __init__(self, device: torch.device) -> None:
        self._losses = torch.zeros(len(self._LOSSES), device=device)
        self._tokens = torch.zeros(len(self._TOKENS) + 1, device=device)
        self._grad_norm, self._lr = 0.0, 0.0

    def add_losses(self, *values: Tensor) -> None:
        self._losses += torch.stack([value.detach() for value in values])

    def add_tokens(self, mask: Tensor, ratio: Tensor, *others: Tensor) -> None:
        sums = [(value.detach() * mask).sum() for value in (ratio - 1, (ratio - 1).square(), *others)]
        self._tokens += torch.stack([*sums, mask.sum()])

    def step(self, grad_norm: float, lr: float) -> None:
        self._grad_norm += grad_norm
        self._lr = lr

    def means(self, accelerator: Accelerator, steps: int) -> dict[str, float]:
        """Return means: losses and gradient norm over optimizer steps, the others over the tokens trained on.

        Where all groups were flat there are no such tokens, and what would be measured on them is left out.
        """
        parts = (accelerator.reduce(self._losses, "sum") / steps).tolist()
        sums = accelerator.reduce(self._tokens, "sum").tolist()
        tokens = sums.pop()
        metrics = {"loss_total": sum(parts), **dict(zip(self._LOSSES, parts, strict=True))}
        metrics |= {"grad_norm": self._grad_norm / steps, "lr": self._lr, "tokens_trained": tokens}
        if tokens:
            means = {name: value / tokens for name, value in zip(self._TOKENS, sums, strict=True)}
            shift, square = means.pop("ratio_shift"), means.pop("ratio_square")
            metrics |= {**means, "ratio_mean": 1.0 + shift, "ratio_std": max(0.0, square - shift**2) ** 0.5}
            metrics["ratio_clip_frac"] = means["clip_low_frac"] + means["clip_high_frac"]
        return metrics
