"""A task that holds a process before it trains, as long as a test likes."""

from __future__ import annotations

import os
from pathlib import Path

from grpo_mlflow.tasks.arithmetic import Arithmetic
from tests.support.waiting import wait_for

VARIABLE = "HELD_UNTIL_FILE"


class Held(Arithmetic):
    """Sums of one digit. Training waits until the file that the environment variable names is there."""

    def __init__(self) -> None:
        super().__init__(digits=1)

    def at(self, iteration: int, iterations: int) -> None:
        if file := os.environ.get(VARIABLE):
            wait_for(Path(file).exists)
