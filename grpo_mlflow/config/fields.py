"""The types that settings are made of, and what a setting declares about itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

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


OWN = r"python:[A-Za-z_][\w.]*:[A-Za-z_]\w*"
"""How a setting names code of the user's own."""


@dataclass(frozen=True)
class Form:
    """What the schema says of a text with a form: its pattern, the values that can be listed, and how people read it.

    It checks nothing: the field's own check does.
    """

    pattern: str
    choices: tuple[str, ...]
    shown: str

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": self.pattern, "examples": [*self.choices], SHOWN: self.shown}


SHOWN = "x-shown"
"""Where a part of the JSON schema says in words which values are allowed."""

_DEVICE, _GIVEN_DEVICE = r"^(auto|cpu|cuda(:\d+)?)$", r"^(cpu|cuda(:\d+)?)$"
Device = Annotated[
    str,
    Field(pattern=_DEVICE),
    Form(_DEVICE, choices=("auto", "cpu", "cuda"), shown="auto, cpu, cuda or cuda:N"),
]
GivenDevice = Annotated[
    str, Field(pattern=_GIVEN_DEVICE), Form(_GIVEN_DEVICE, choices=("cpu", "cuda"), shown="cpu, cuda or cuda:N")
]


class OneOf:
    """The check that a text is one of the names of a table, or code of the user's own (shown as `own`)."""

    def __init__(self, names: Iterable[str], own: str = "") -> None:
        self._names, self._own = tuple(names), own

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        if not self._own:
            return {"type": "string", "enum": [*self._names]}
        names = "|".join(re.escape(name) for name in self._names)
        form = Form(f"^({names}|{OWN})$", choices=self._names, shown=" or ".join([*self._names, self._own]))
        return form.__get_pydantic_json_schema__(schema, handler)

    def _check(self, name: str) -> str:
        if name not in self._names and not (self._own and re.fullmatch(OWN, name)):
            allowed = [*(repr(known) for known in self._names), *([self._own] if self._own else [])]
            raise PydanticCustomError("name", "input should be {names}", {"names": " or ".join(allowed)})
        return name


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
