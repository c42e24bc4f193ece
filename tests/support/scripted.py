"""A task and generators that do as the test says."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mlflow.errors import ServerFailed
from grpo_mlflow.generation import Sampling
from grpo_mlflow.tasks import Task
from grpo_mlflow.types import Completion, Problem, Prompt, Split, Verdict


class Numbered(Task):
    """Problem n asks for n; its id says so."""

    name = "numbered"

    def problem(self, split: Split, seed: int) -> Problem:
        assert split == "train"
        return Problem(f"numbered/{seed}", seed, ({"role": "user", "content": "1"},))

    def verify(self, problem: Problem, text: str) -> Verdict:
        return Verdict(float(text == "right"), {}, text == "right", text)

    def reference_answer(self, problem: Problem) -> str:
        return "right"


class Scripted:
    """Answers rightly once in a group whose problem's number `mixed` accepts, else never; notes what it is asked."""

    def __init__(self, mixed: range) -> None:
        self.mixed, self.asked = mixed, list[tuple[tuple[str | int, ...], list[int]]]()

    def generate(
        self, prompts: Sequence[Prompt], k: int, sampling: Sampling, seed: int, key: tuple[str | int, ...]
    ) -> list[list[Completion]]:
        numbers = [int(prompt.problem_id.rsplit("/", 1)[1]) for prompt in prompts]
        self.asked.append((key, numbers))

        def completion(right: bool) -> Completion:
            return Completion((7, 2), "right" if right else "wrong", (-1.0, -1.0), "stop", 0)

        return [[completion(n in self.mixed and j == 0) for j in range(k)] for n in numbers]

    def sync(self, version: int) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}


class Background(Scripted):
    """Samples in the background as well; `events` are its calls in order. `done` says whether that has ended."""

    def __init__(self, mixed: range, done: bool = True) -> None:
        super().__init__(mixed)
        self.done, self.events = done, list[tuple[object, ...]]()
        self.fails: tuple[str | int, ...] | None = None

    def sync(self, version: int) -> None:
        self.events.append(("sync", version))

    def generate(
        self, prompts: Sequence[Prompt], k: int, sampling: Sampling, seed: int, key: tuple[str | int, ...]
    ) -> list[list[Completion]]:
        self.events.append(("generate", *key))
        if key == self.fails:
            raise ServerFailed("as asked")
        return super().generate(prompts, k, sampling, seed, key)

    def begin(
        self, prompts: Sequence[Prompt], k: int, sampling: Sampling, seed: int, key: tuple[str | int, ...]
    ) -> Handle:
        self.events.append(("begin", *key))
        return Handle(self, super().generate(prompts, k, sampling, seed, key))


class Handle:
    """What `Background.begin` returns."""

    def __init__(self, generator: Background, completions: list[list[Completion]]) -> None:
        self._generator, self._completions = generator, completions

    def result(self) -> list[list[Completion]]:
        self._generator.events.append(("result",))
        return self._completions

    def succeeded(self) -> bool:
        return self._generator.done

    def cancel(self) -> None:
        self._generator.events.append(("cancel",))
