"""What an evaluation measures, and when."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from grpo_mlflow.config.fields import Ints, NonNegative, Positive, PositiveFloat, Section, setting
from grpo_mlflow.config.schema.generation import Backend


class EvalConfig(Section, resume=False, compared=True, varies=False, secret=False):
    enabled: bool = setting(True, "evaluate before, during and after training", evaluation=False)
    interval: Positive = setting(1, "iterations between evaluations", resume=True, evaluation=False)
    backend: Backend | None = setting(None, "who samples; null: as generation.backend", evaluation=True)
    base_url: str | None = setting(
        None,
        "address of the server; null: as generation.base_url",
        resume=True,
        compared=False,
        secret=True,
        evaluation=True,
    )
    batch_size: Positive = setting(8, "prompts in flight at once", evaluation=False)
    seed: NonNegative | None = setting(None, "seed of its random draws; null: as seed", evaluation=True)
    replicates: Positive = setting(4, "completions per problem", evaluation=True)
    num_ids: Annotated[int, Field(ge=2)] = setting(16, "number of evaluation problems", evaluation=True)
    id_seed_start: NonNegative = setting(5000, "first evaluation problem", evaluation=True)
    ks: Annotated[Ints, Field(min_length=1)] = setting((1, 4), "the k of pass@k and mean@k", evaluation=True)
    greedy: bool = setting(True, "also score the most likely answer", evaluation=True)
    max_new_tokens: Positive | None = setting(None, "null: as generation.max_new_tokens", evaluation=True)
    temperature: PositiveFloat | None = setting(None, "null: as generation.temperature", evaluation=True)
    top_p: Annotated[float, Field(gt=0, le=1)] | None = setting(None, "null: as generation.top_p", evaluation=True)
    top_k: Annotated[int, Field(ge=-1)] | None = setting(None, "null: as generation.top_k", evaluation=True)
    repetition_penalty: PositiveFloat | None = setting(None, "null: as generation.repetition_penalty", evaluation=True)
