"""What an evaluation measures, and when."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from grpo_mlflow.config.fields import Ints, NonNegative, Positive, PositiveFloat, Section
from grpo_mlflow.config.schema.generation import Backend


class EvalConfig(Section):
    enabled: bool = Field(True, description="evaluate before, during and after training")
    interval: Positive = Field(1, description="iterations between evaluations")
    backend: Backend | None = Field(None, description="who samples; null: as generation.backend")
    base_url: str | None = Field(None, description="address of the server; null: as generation.base_url")
    batch_size: Positive = Field(8, description="prompts in flight at once")
    replicates: Positive = Field(4, description="completions per problem")
    num_ids: Annotated[int, Field(ge=2)] = Field(16, description="number of evaluation problems")
    id_seed_start: NonNegative = Field(5000, description="first evaluation problem")
    ks: Annotated[Ints, Field(min_length=1)] = Field((1, 4), description="the k of pass@k and mean@k")
    greedy: bool = Field(True, description="also score the most likely answer")
    temperature: PositiveFloat | None = Field(None, description="null: as generation.temperature")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="null: as generation.top_p")
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="null: as generation.top_k")
