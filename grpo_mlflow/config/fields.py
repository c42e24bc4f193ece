"""The types that settings are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def as_tuple(value: Any) -> Any:
    """Return a YAML list as a tuple: strict fields take no other type."""
    if not isinstance(value, (list, tuple)):
        raise PydanticCustomError("list_type", "input should be a list")
    return tuple(value)


Ints = Annotated[tuple[Positive, ...], BeforeValidator(as_tuple)]


class Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", validate_default=True)
