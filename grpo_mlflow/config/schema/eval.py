"""What an evaluation measures, and when."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from grpo_mlflow.config.fields import NonNegative, Positive, PositiveFloat, Section, as_tuple, setting
from grpo_mlflow.config.schema.generation import AddressList, Backend


class EvalConfig(Section, resume=False, compared=True, varies=False, secret=False):
    """What an evaluation measures, and when."""

    enabled: bool = setting(True, "evaluate before, during and after training", evaluation=False)
    interval: Positive = setting(1, "iterations between evaluations", resume=True, evaluation=False)
    backend: Backend | None = setting(None, "what samples evaluations; null: as generation.backend", evaluation=True)
    base_url: str | AddressList | None = setting(
        None,
        "address of the inference server for evaluations, or a list of several; null: as generation.base_url",
        resume=True,
        compared=False,
        secret=True,
        evaluation=True,
    )
    batch_size: Positive = setting(
        8,
        "prompts that are sampled at the same time in an evaluation, by each server where there are several",
        evaluation=False,
    )
    seed: NonNegative | None = setting(None, "seed of the random draws of evaluations; null: as seed", evaluation=True)
    replicates: Positive = setting(4, "completions per evaluation problem", evaluation=True)
    num_ids: Annotated[int, Field(ge=2)] = setting(16, "number of evaluation problems", evaluation=True)
    id_seed_start: NonNegative = setting(5000, "number of the first evaluation problem", evaluation=True)
    ks: Annotated[tuple[Positive, ...], Field(min_length=1), BeforeValidator(as_tuple)] = setting(
        (1, 4), "values of k for pass@k and mean@k; none may be above replicates", evaluation=True
    )
    greedy: bool = setting(
        True, "also score one completion per problem that takes the most likely token each time", evaluation=True
    )
    max_new_tokens: Positive | None = setting(
        None, "longest completion in evaluations, in tokens; null: as generation.max_new_tokens", evaluation=True
    )
    temperature: PositiveFloat | None = setting(
        None, "softmax temperature in evaluations; null: as generation.temperature", evaluation=True
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = setting(
        None, "nucleus mass in evaluations, 1: off; null: as generation.top_p", evaluation=True
    )
    top_k: Annotated[int, Field(ge=-1)] | None = setting(
        None,
        "number of most likely tokens kept in evaluations, -1 or 0: off; null: as generation.top_k",
        evaluation=True,
    )
    repetition_penalty: PositiveFloat | None = setting(
        None, "repetition penalty in evaluations, 1: off; null: as generation.repetition_penalty", evaluation=True
    )
