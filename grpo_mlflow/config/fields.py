"""The types that settings are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
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

OWN = r"python:[A-Za-z_][\w.]*:[A-Za-z_]\w*"
"""How a setting names code of the user's own."""


def one_of(names: Iterable[str], own: str = "") -> AfterValidator:
    """Return the check that a text is one of the names of a table, or code of the user's own (shown as `own`)."""
    allowed = " or ".join([*(repr(name) for name in names), *([own] if own else [])])
    known = {*names}

    def check(name: str) -> str:
        if name not in known and not (own and re.fullmatch(OWN, name)):
            raise PydanticCustomError("name", "input should be {names}", {"names": allowed})
        return name

    return AfterValidator(check)


class Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", validate_default=True)
