"""A task that lets something happen while an iteration goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from grpo_mlflow.tasks.arithmetic import Arithmetic


class Asking(Arithmetic):
    """Calls `then` with the version that each iteration and each evaluation begins with."""

    name = "asking"
    then: ClassVar[Callable[[int], None]] = staticmethod(lambda version: None)

    def __init__(self) -> None:
        super().__init__(digits=1)

    def at(self, iteration: int, iterations: int) -> None:
        type(self).then(iteration)
