"""A task whose problems take as long as a variable says, so that a run lasts minutes and computes little."""

from __future__ import annotations

import os
import time

from grpo_mlflow.tasks import Arithmetic
from grpo_mlflow.types import Problem, Split

PAUSE = "TORTURE_PAUSE"  # seconds


class Slow(Arithmetic):
    """Sums of digits."""

    name = "slow"

    def __init__(self) -> None:
        super().__init__(digits=1)

    def problem(self, split: Split, seed: int) -> Problem:
        if split == "train":
            time.sleep(float(os.environ.get(PAUSE, "0")))
        return super().problem(split, seed)
