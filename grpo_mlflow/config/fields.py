"""The types that settings are made of, and what a setting declares about itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

T = TypeVar("T")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """What the commands must know of a setting besides its type.

    Attributes:
        resume: it may change when a run is resumed.
        compared: it must be equal in all trials of a study, unless the search space varies it; a study that is
            continued with another value would mix trials that cannot be compared.
        varies: a search space may vary it. What decides how trials are measured or kept may not.
        secret: its value may hold a credential. What an environment variable puts into it is one (`references`); else
            it is found by where it stands in the value (`redaction`), as in any other setting.
        evaluation: it decides what an evaluation measures: problems, prompts, sampling, length, judging, random draws.
            In a study that is the same for all trials: it may vary only where `eval` has a setting of the same name,
            which then holds for evaluations (`keys.OF_EVALUATION`).
    """

    resume: bool
    compared: bool
    varies: bool
    secret: bool
    evaluation: bool


_NAMES = tuple(field.name for field in fields(Traits))


def _declared(**traits: bool | None) -> dict[str, bool]:
    return {name: value for name, value in traits.items() if value is not None}


def setting(
    default: T,
    description: str,
    *,
    resume: bool | None = None,
    compared: bool | None = None,
    varies: bool | None = None,
    secret: bool | None = None,
    evaluation: bool | None = None,
) -> T:
    """Return the field of a setting. A trait (`Traits`) that it leaves out is the one that its section declares."""
    traits = _declared(resume=resume, compared=compared, varies=varies, secret=secret, evaluation=evaluation)
    return Field(default, description=description, json_schema_extra={**traits})


class Section(BaseModel):
    """Settings under one name. The traits in the class statement hold for all settings that do not declare their own.

    They hold for the class's own settings only: a section inside it declares its own.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", validate_default=True)
    _traits: ClassVar[dict[str, bool]] = {}

    def __init_subclass__(
        cls,
        *,
        resume: bool | None = None,
        compared: bool | None = None,
        varies: bool | None = None,
        secret: bool | None = None,
        evaluation: bool | None = None,
        **config: Any,
    ) -> None:
        super().__init_subclass__(**config)
        cls._traits = _declared(resume=resume, compared=compared, varies=varies, secret=secret, evaluation=evaluation)

    @classmethod
    def traits_of(cls, name: str) -> Traits:
        """Return the traits of one of the class's settings.

        Raises:
            TypeError: it is not made by `setting`, or neither it nor its section declares a trait.
        """
        own = cls.model_fields[name].json_schema_extra
        if not isinstance(own, dict):
            raise TypeError(f"{cls.__name__}.{name}: declare it as setting(DEFAULT, DESCRIPTION)")
        declared = cls._traits | {trait: bool(value) for trait, value in own.items()}
        if missing := [trait for trait in _NAMES if trait not in declared]:
            raise TypeError(f"{cls.__name__}.{name}: neither it nor its section declares {', '.join(missing)}")
        return Traits(**declared)
