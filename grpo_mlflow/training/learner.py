"""One iteration's optimizer steps on a set of groups.

The weight of every token is fixed over a whole optimizer step, over all processes and with flat groups counted, before
the step is split over processes and into micro-batches; so neither the split nor the skipping of flat groups changes
the gradient.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from grpo_mlflow import seeding
from grpo_mlflow.algorithm import correction
from grpo_mlflow.algorithm.correction import Correction, Measures
from grpo_mlflow.algorithm.losses import LossInputs
from grpo_mlflow.algorithm.schedules import adapt_kl_coef, learning_rate
from grpo_mlflow.config import TrainConfig
from grpo_mlflow.errors import UserError
from grpo_mlflow.model import sharding
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.pace import Pace
from grpo_mlflow.training import loss, optimizer_files, optimizers, parallel
from grpo_mlflow.training.batching import Limits, Row, collate, pad, rows_of
from grpo_mlflow.training.scoring import Scorer
from grpo_mlflow.training.steps import Applied, Frozen, Plan, row_weights
from grpo_mlflow.training.totals import Totals
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
    """Owns the optimizer; `policy` is changed in place. `pace` is told how far an update is."""

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        accelerator: Accelerator,
        config: TrainConfig,
        sizes: Sizes,
        *,
        pace: Pace | None = None,
    ) -> None:
        self._accelerator, self._config, self._sizes = accelerator, config, sizes
        self._policy = Scorer(policy, sizes.temperature)
        self._reference = Scorer(reference, sizes.temperature) if reference is not None else None
        self._loss = loss.load(config)
        self._correction = Correction(
            mode=config.importance_sampling_mode,
            cap=config.importance_sampling_cap,
            floor=config.importance_sampling_floor,
            eps=config.ipo_eps,
        )
        self._limits = Limits(config.batch_size, config.max_tokens_per_batch)
        if self._policy.reason is not None:
            _LOG.warning("each completion repeats the computation of its prompt: %s", self._policy.reason)
        self._parallel = parallel.of(accelerator, policy.model)
        self._parallel.rest(policy.model)
        parameters = [p for p in policy.model.parameters() if p.requires_grad]
        optimizer = optimizers.create(parameters, config)
        self._model, self.optimizer = self._parallel.prepare(policy.model, optimizer)
        self._model.eval()  # dropout would make sampled and trained log-probs differ
        self.step = 0
        self.kl_coef = config.kl_coef
        self._pace = pace or Pace(lambda _: None)

    def update(self, groups: Sequence[Group], seed: int, iteration: int) -> dict[str, float | None]:
        """Take this iteration's optimizer steps and return its training metrics (docs/metrics.md).

        What is measured on tokens is None where all groups are flat, so that there are none to train on. Every process
        is given all groups, and does its share of each step.

        Raises:
            UserError: the gradient is not finite; the weights are left as they were before that step.
        """
        rows = rows_of(groups, self._config.mask_truncated_completions)
        per_step = self._sizes.rollouts_per_step
        steps = self._config.epochs * (len(rows) // per_step)
        active = [i for i, row in enumerate(rows) if row.teaches]
        frozen = Frozen(
            old=self._score(self._policy, rows, active) if steps > 1 else None,
            reference=self._score(self._reference, rows, active) if self._reference and self.kl_coef > 0 else None,
        )
        totals = Totals(self._accelerator.device)
        self._pace.begin("update")
        for number in range(steps):
            self._pace.at(number / steps)
            epoch, place = divmod(number * per_step, len(rows))
            order = list(range(len(rows)))
            if steps > 1:
                order = seeding.stream(seed, "update", iteration, epoch).permutation(len(rows)).tolist()
            plan = self._plan(rows, order[place : place + per_step])
            self._accumulate(plan, rows, frozen, totals)
            totals.step(self._apply())
        metrics = totals.means(self._accelerator, steps)
        metrics["kl_coef"] = self.kl_coef
        kl = metrics.get("kl_divergence")
        if self._config.kl_target is not None and self.kl_coef > 0 and kl is not None:
            self.kl_coef = adapt_kl_coef(self.kl_coef, kl, self._config.kl_target, self._config.kl_horizon)
        return metrics

    def save(self, path: Path) -> None:
        """Write the state of the optimizer; see `optimizer_files.save`."""
        optimizer_files.save(self.optimizer, path, self._policy.model)

    def offer(self) -> None:
        """Let the first process ask for the state of the optimizer from now on, where that is in shards."""
        sharding.hold_states(self._policy.model, lambda: optimizer_files.states(self.optimizer))

    def restore(self, path: Path, step: int, kl_coef: float) -> None:
        optimizer_files.load(self.optimizer, path)
        self.step, self.kl_coef = step, kl_coef

    @torch.no_grad()
    def _score(self, scorer: Scorer, rows: Sequence[Row], indices: Sequence[int]) -> dict[int, list[float]]:
        """Return the log-probs of completions under a frozen model, by row; processes share the work."""
        found: dict[int, list[float]] = {}
        batches = scorer.split(rows, self._own(indices), self._limits)
        spare = [list(indices[:1])] * (self._parallel.passes(len(batches)) - len(batches))
        for chosen in [*batches, *spare]:
            logprobs, _ = scorer.score([rows[i] for i in chosen])
            for i, values in zip(chosen, logprobs.tolist(), strict=True):
                found[i] = values[: len(rows[i].completion_ids)]
        self._parallel.rest(scorer.model)
        if self._accelerator.num_processes > 1:
            found = {i: values for part in gather_object([found]) for i, values in part.items()}
        return found

    def _own(self, indices: Sequence[int]) -> list[int]:
        """Return this process's share of rows: of equal size, and a prompt's rows together as far as that allows."""
        rank, count = self._accelerator.process_index, self._accelerator.num_processes
        return sorted(indices)[len(indices) * rank // count : len(indices) * (rank + 1) // count]

    def _plan(self, rows: Sequence[Row], indices: Sequence[int]) -> Plan:
        """Return this process's micro-batches of an optimizer step over all rows of `indices`."""
        config = self._config
        active = self._own([i for i in indices if rows[i].teaches])
        batches = self._policy.split(rows, active, self._limits)
        most = torch.tensor([len(batches)], device=self._accelerator.device)
        needed = int(self._accelerator.gather(most).max())  # processes must run backward equally often
        return Plan(
            batches=[*batches, *[[indices[0]]] * (needed - len(batches))],
            counted=len(batches),
            weights=row_weights(
                rows, indices, config.aggregation, config.batch_size, self._sizes.max_completion_length
            ),
        )

    def _accumulate(self, plan: Plan, rows: Sequence[Row], frozen: Frozen, totals: Totals) -> None:
        """Add up the step's gradient in the model, and what is measured beside it in `totals`.

        A step whose groups are all flat, in every process, has the gradient 0 without a pass. It still is one, for
        Adam's momentum.
        """
        if not plan.batches:
            silent = self._loss.unweighted(self.kl_coef, with_reference=frozen.reference is not None)
            totals.add(silent, torch.zeros(()), None)
            for parameter in self._model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        for number, chosen in enumerate(plan.batches):
            last, counts = number + 1 == len(plan.batches), number < plan.counted
            with nullcontext() if last else self._parallel.accumulating(self._model):
                inputs, measures = self._inputs(rows, chosen, plan.weights if counts else None, frozen)
                parts = self._loss(inputs, self.kl_coef)
                totals.add(parts, inputs.mask, measures if counts else None)
                self._parallel.backward(reduce(add, parts.terms.values()))

    def _apply(self) -> Applied:
        """Take the optimizer step with the gradient that stands in the model.

        Raises:
            UserError: the gradient is not finite.
        """
        config = self._config
        limit = float("inf") if config.grad_clip is None else config.grad_clip
        norm = self._parallel.clip(self._model.parameters(), limit)
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient of optimizer step {self.step} is not finite (norm {norm}): the run stops before "
                "it harms the weights; lower train.lr or train.grad_clip, or look at the last rollouts"
            )
        rate = learning_rate(self.step, self._sizes.total_steps, config.lr, config.lr_warmup_steps, config.lr_schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.step += 1  # from here on the weights are others, also if the step fails half-way
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Applied(grad_norm=norm, lr=rate)

    def _inputs(
        self, rows: Sequence[Row], chosen: Sequence[int], weights: Mapping[int, float] | None, frozen: Frozen
    ) -> tuple[LossInputs, Measures]:
        """Return what the loss sees of the chosen rows, and what is measured between sampler and trainer.

        Without weights all are 0, and no frozen scores are needed.
        """
        own = [rows[i] for i in chosen]
        batch = collate(own, self._accelerator.device)
        policy, entropy = self._policy.score(own, self._model, entropy_gradient=self._config.entropy_coef > 0)

        def stored(scores: Mapping[int, Sequence[float]]) -> Tensor:
            if weights is None:
                return policy.detach()
            return pad([scores[i] for i in chosen], batch.mask.shape[1]).to(policy.device)

        old = policy.detach() if frozen.old is None else stored(frozen.old)
        corrected = self._correction(old, batch.behaviour, batch.mask)
        inputs = LossInputs(
            policy=policy,
            old=old,
            behaviour=batch.behaviour,
            correction=corrected.values,
            reference=None if frozen.reference is None else stored(frozen.reference),
            entropy=entropy,
            mask=batch.mask,
            advantages=batch.advantages,
            weights=torch.tensor([weights[i] if weights else 0.0 for i in chosen], device=self._accelerator.device),
        )
        return inputs, correction.measures(old, batch.behaviour, batch.mask, corrected)
