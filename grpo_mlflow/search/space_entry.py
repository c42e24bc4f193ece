"""One entry of a space file: the values of a setting as people write them, and what Optuna makes of them."""

from __future__ import annotations

import math
from typing import Annotated, Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from grpo_mlflow.errors import ConfigError
from grpo_mlflow.search.space import Distribution

Value = StrictBool | StrictInt | StrictFloat | StrictStr | None
Number = StrictInt | Annotated[StrictFloat, Field(allow_inf_nan=False)]
_RANGE = "choices, or numbers low and high (and step)"
_ALLOWED = {"low": _RANGE, "high": _RANGE, "step": _RANGE, "log": "true, false", "when": "settings and lists of values"}


def _different(choices: list[Any]) -> list[Any]:
    if any(choices.count(choice) > 1 for choice in choices):
        raise PydanticCustomError("twice", "holds a value twice")
    return choices


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    when: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}


class Choices(_Entry):
    """One of some values, each different from the others."""

    choices: Annotated[list[Value], Field(min_length=1), AfterValidator(_different)]

    def distribution(self, real: bool) -> Distribution:
        """Return the categorical distribution; `real` is ignored."""
        return CategoricalDistribution(self.choices)


class Range(_Entry):
    """A number from `low` to `high`, both included."""

    low: Number
    high: Number
    log: StrictBool = False
    step: Number | None = None

    def distribution(self, real: bool) -> Distribution:
        """Return a distribution of integers, or of floats if `real` or if an end or the step is one.

        Raises:
            ValueError: Optuna refuses the range, or the step does not lead from `low` to `high`.
        """
        numbers = [self.low, self.high, *([] if self.step is None else [self.step])]
        if self.step is not None and self.step > 0:
            steps = (self.high - self.low) / self.step
            if not math.isclose(steps, round(steps), abs_tol=1e-9):  # Optuna would lower `high` with a warning
                raise ValueError(f"step = {self.step} does not lead from low to high; allowed: a divisor")
        if not real and all(isinstance(number, int) for number in numbers):
            step = 1 if self.step is None else int(self.step)
            return IntDistribution(int(self.low), int(self.high), self.log, step)
        return FloatDistribution(self.low, self.high, self.log, self.step)


def parse(entry: Any, where: str) -> Choices | Range:
    """Return what is written for a setting, `where` being its place in messages.

    Raises:
        ConfigError: it is no list and no mapping of the fields above.
    """
    if isinstance(entry, list):
        entry = {"choices": entry}
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} = {entry!r}: allowed: a list of values, or low and high")
    kind: type[Choices | Range] = Choices if "choices" in entry else Range
    try:
        return kind.model_validate(entry)
    except ValidationError as error:
        found = error.errors(include_url=False)
        found.sort(key=lambda item: item["type"] != "extra_forbidden")  # a misspelt `low` is also a missing one
        raise ConfigError(f"{where}{_line(found[0], entry)}") from None


def _line(error: Any, entry: dict[str, Any]) -> str:
    """Return what is wrong with an entry, and what is allowed."""
    field, nested = str(error["loc"][0]), len(error["loc"]) > 1
    if error["type"] == "extra_forbidden" and field in Range.model_fields:
        return f": choices = {entry['choices']!r}; allowed: a list with at least one value and no range ({field})"
    if error["type"] == "extra_forbidden":
        return f": {field!r} is unknown; allowed: choices, low, high, log, step, when"
    if field == "choices" and error["type"] == "twice":
        return f": choices = {entry[field]!r}: {error['msg']}"
    if field == "choices":
        allowed = "numbers, words, true, false, null" if nested else "a list with at least one value and no range"
        return f": choices = {entry[field]!r}; allowed: {allowed}"
    if error["type"] == "finite_number":
        return f" = {entry!r}: allowed: finite numbers"
    if _ALLOWED[field] == _RANGE:
        return f" = {entry!r}: allowed: {_RANGE}"
    return f": {field} = {entry[field]!r}; allowed: {_ALLOWED[field]}"
