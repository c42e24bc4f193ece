"""The names of the variants, each declared once. Free of torch, so that the config reads them too."""

from __future__ import annotations

from typing import Literal

Scale = Literal["group", "batch", "none", "leave_one_out", "mean"]
MultiObjective = Literal["sum_then_normalize", "normalize_then_sum"]
RatioLevel = Literal["token", "sequence"]
ImportanceSampling = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Surrogate = Literal["clip", "cispo"]
Aggregation = Literal["grpo", "dapo", "dr_grpo", "bnpo"]
KLEstimator = Literal["k1", "k2", "k3"]
Schedule = Literal["constant", "linear", "cosine"]

LOSSES = {"grpo": "grpo_mlflow.algorithm.grpo:grpo"}
"""The losses that `train.loss` knows by name, and where each stands: `MODULE:FUNCTION`."""
