"""The optimizers that `train.optimizer` names, and the options that each takes in `train.optimizer_options`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from grpo_mlflow.config.fields import PositiveFloat, Section, as_tuple

BelowOne = Annotated[float, Field(ge=0, lt=1)]


class AdamWOptions(Section):
    """Loshchilov and Hutter 2019, arXiv 1711.05101."""

    betas: Annotated[tuple[BelowOne, BelowOne], BeforeValidator(as_tuple)] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class SGDOptions(Section):
    """Gradient descent with momentum: one tensor of state per parameter instead of two, none without momentum."""

    momentum: BelowOne = 0.9


class AdamW8bitOptions(AdamWOptions):
    """AdamW with both moments in 8 bits, in blocks of 256 (Dettmers et al. 2022, arXiv 2110.02861)."""


OPTIMIZERS: dict[str, type[Section]] = {"adamw": AdamWOptions, "sgd": SGDOptions, "adamw8bit": AdamW8bitOptions}
_PACKAGES = {"adamw8bit": "bitsandbytes"}


def options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of an optimizer, those that were not given at their defaults.

    Raises:
        ValidationError: an option is unknown, or has the wrong type or range.
    """
    return OPTIMIZERS[name].model_validate(dict(given)).model_dump()


def errors(name: str, given: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for an optimizer whose package is missing, and one per wrong option."""
    if name in _PACKAGES and find_spec(_PACKAGES[name]) is None:
        yield (
            f"train.optimizer = {name!r}: the package {_PACKAGES[name]} is not installed; allowed: adamw, sgd, or this "
            "after pip install -e '.[quantized]' in the project's folder"
        )
    try:
        options(name, given)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            option, text = ".".join(str(part) for part in item["loc"]), item["msg"][0].lower() + item["msg"][1:]
            if item["type"] == "extra_forbidden":
                text = f"{name} has no such option; allowed: {', '.join(OPTIMIZERS[name].model_fields)}"
            yield f"train.optimizer_options = {dict(given)}: {option}: {text}"
