"""Long work says how far it is: not at once, not too often, with the time that is left."""

from __future__ import annotations

import time

import pytest

from grpo_mlflow.runtime.pace import Pace, duration, told_if_slow


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (45, "45s"), (99, "99s"), (180, "3 min"), (5900, "98 min"), (9000, "2.5 h")]
)
def test_a_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_first_line_after_a_quarter_of_a_minute_then_one_a_minute() -> None:
    said, clock = list[tuple[float, str]](), Clock()
    pace = Pace(lambda line: said.append((clock.now - 100, line)), clock)
    pace.begin("rollouts", at_most=True)
    for second in range(1, 151):
        clock.now = 100.0 + second
        pace.at(second / 300)
    assert said == [
        (15, "rollouts: 5% after 15s, at most 5 min left"),
        (75, "rollouts: 25% after 75s, at most 4 min left"),
        (135, "rollouts: 45% after 2 min, at most 3 min left"),
    ]


def test_short_work_says_nothing_and_another_begins_anew() -> None:
    said, clock = list[str](), Clock()
    pace = Pace(said.append, clock)
    pace.at(0.5)
    for name in ("one", "two"):
        pace.begin(name)
        clock.now += 14
        pace.at(0.9)
        assert pace.wait() == pytest.approx(1)
    assert said == []
    clock.now += 1
    pace.at(0.0)
    assert said == ["two: 0% after 15s"]


def test_only_what_is_slow_is_told() -> None:
    said = list[str]()
    with told_if_slow(said.append, "quick", seconds=30.0):
        pass
    with told_if_slow(said.append, "slow", seconds=0.05):
        end = time.monotonic() + 10
        while not said and time.monotonic() < end:
            time.sleep(0.01)
    assert said == ["slow"]
