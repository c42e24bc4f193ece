"""The loss that `train.loss` names: found, given its options, and tried before anything is trained with it.

A loss is a function `loss(inputs, **options)` from `LossInputs` to `LossParts`. An option whose name is a setting of
`train` has that setting's value; all others are its own and come from `train.loss_options`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from grpo_mlflow.algorithm.names import LOSSES
from grpo_mlflow.config import TrainConfig
from grpo_mlflow.config.keys import EARLIER_CAP
from grpo_mlflow.errors import ConfigError, one_line
from grpo_mlflow.runtime import own_code

if TYPE_CHECKING:  # torch is imported only once the function is known to be there
    from grpo_mlflow.algorithm.losses import LossInputs, LossParts

_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

_GONE = EARLIER_CAP.rpartition(".")[2]  # what losses of earlier versions took, and corrected by


class Loss:
    """A loss with its options."""

    def __init__(self, function: Callable[..., LossParts], options: Mapping[str, Any]) -> None:
        self._function, self._options = function, dict(options)

    def __call__(self, inputs: LossInputs, kl_coef: float) -> LossParts:
        """Return the parts of a micro-batch; `kl_coef` is the coefficient as adapted so far."""
        adapted = {"kl_coef": kl_coef} if "kl_coef" in self._options else {}
        return self._function(inputs, **self._options | adapted)

    def unweighted(self, kl_coef: float, *, with_reference: bool) -> LossParts:
        """Return the parts of an example that weighs nothing: their names are those of any micro-batch."""
        return self(_example(0.0, with_reference), kl_coef)


def load(config: TrainConfig) -> Loss:
    """Return the loss that the config names.

    Raises:
        ConfigError: it cannot be imported, takes other arguments or options, or returns no loss on an example.
    """
    function = _find(config.loss)
    loss = Loss(function, _options(function, config))
    _try(loss, config)
    return loss


def _find(name: str) -> Callable[..., LossParts]:
    if name not in LOSSES:
        own: Callable[..., LossParts] = own_code.load("train.loss", name, "function")
        return own
    module, _, attribute = LOSSES[name].partition(":")
    shipped: Callable[..., LossParts] = getattr(importlib.import_module(module), attribute)
    return shipped


def _options(function: Callable[..., LossParts], config: TrainConfig) -> dict[str, Any]:
    """Return the value of each option that was given or is a setting; the others keep the function's default."""
    start, key = f"train.loss = {config.loss!r}", f"train.loss_options = {config.loss_options}"
    try:
        first, *rest = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # no parameters, or none that can be read
        first, rest = None, []
    if first is None or first.kind not in _BY_PLACE or any(option.kind not in _BY_NAME for option in rest):
        raise ConfigError(f"{start}: takes other arguments; allowed: a function of (inputs, *, option=default, ...)")
    if _GONE in (option.name for option in rest):
        raise ConfigError(
            f"{start}: takes {_GONE}, which is no setting any more; allowed: to multiply its terms by inputs.correction"
        )
    settings = {option.name: getattr(config, option.name) for option in rest if option.name in TrainConfig.model_fields}
    own = {option.name: option for option in rest if option.name not in settings}
    for name, value in config.loss_options.items():
        if name in settings:
            raise ConfigError(f"{key}: {name} is a setting of its own; allowed: train.{name}")
        if name not in own:
            raise ConfigError(f"{key}: {config.loss} has no option {name}; allowed: {', '.join(own) or 'none'}")
        _check(value, _hints(function).get(name, Any), f"{key}: {name}")
    lacks = [name for name, option in own.items() if option.default is option.empty and name not in config.loss_options]
    if lacks:
        raise ConfigError(f"{key}: {config.loss} needs {', '.join(lacks)}; allowed: '{{{lacks[0]}: VALUE}}'")
    return {**settings, **config.loss_options}


def _hints(function: Callable[..., LossParts]) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except Exception:  # names that only a type checker imports: the options are not checked then
        return {}


def _check(value: object, hint: Any, start: str) -> None:
    try:
        TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        messages = [item["msg"][0].lower() + item["msg"][1:] for item in error.errors(include_url=False)]
        raise ConfigError(f"{start}: {', or '.join(dict.fromkeys(messages))}") from None
    except PydanticUserError as error:
        raise ConfigError(f"{start}: of type {hint}, which a setting cannot have: {one_line(error)}") from None


def _try(loss: Loss, config: TrainConfig) -> None:
    """Compute an example of two rollouts: what is wrong there would spoil a run, or stop it when it is under way."""
    from grpo_mlflow.algorithm.losses import LossParts

    start = f"train.loss = {config.loss!r}"
    try:
        parts, unweighted = (loss(_example(weight, config.kl_coef > 0), config.kl_coef) for weight in (0.25, 0.0))
    except Exception as error:  # whatever the user's function does
        raise ConfigError(f"{start}: fails on an example: {type(error).__name__}: {one_line(error)}") from error
    for returned in (parts, unweighted):
        if not isinstance(returned, LossParts):
            raise ConfigError(f"{start}: returns {type(returned).__name__}; allowed: LossParts")
    if not parts.terms or not all(re.fullmatch(r"loss_\w+", str(name)) for name in parts.terms):
        raise ConfigError(f"{start}: its terms are {list(parts.terms)}; allowed: one or more, named loss_...")
    for name, value in {**parts.terms, **parts.sums}.items():
        _check_scalar(value, f"{start}: {name}")
    if not any(term.requires_grad for term in parts.terms.values()):
        raise ConfigError(f"{start}: no term has a gradient; allowed: terms made of inputs.policy, not detached")
    if parts.summary is not None:
        _try_summary(parts.summary, list(parts.sums), start)
    if any(bool(term != 0) for term in unweighted.terms.values()):
        raise ConfigError(f"{start}: is not 0 where all weights are 0; allowed: terms from inputs.weighted_sum")


def _try_summary(summary: Callable[[dict[str, float]], dict[str, float]], names: Sequence[str], start: str) -> None:
    """Call it as the learner does: with means, and with NaNs if all groups were flat."""
    for mean in (0.5, math.nan):
        try:
            found = summary(dict.fromkeys(names, mean))
        except Exception as error:  # whatever the user's function does
            raise ConfigError(
                f"{start}: its summary fails where each mean is {mean}: {type(error).__name__}: {one_line(error)}"
            ) from error
        if not isinstance(found, dict) or not all(isinstance(value, (int, float)) for value in found.values()):
            raise ConfigError(f"{start}: its summary returns {found!r}; allowed: a dict of names to numbers")


def _check_scalar(value: object, start: str) -> None:
    import torch

    if not isinstance(value, torch.Tensor) or value.shape != ():
        shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ConfigError(f"{start} is {shape}; allowed: a scalar tensor")
    if not torch.isfinite(value):
        raise ConfigError(f"{start} is {float(value.detach())} on an example; allowed: finite numbers")


def _example(weight: float, with_reference: bool) -> LossInputs:
    """Return two rollouts of three and two tokens, one better and one worse than the mean."""
    import torch

    from grpo_mlflow.algorithm.losses import LossInputs

    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    policy = torch.tensor([[-1.0, -0.5, -2.0], [-0.1, -1.5, 0.0]], requires_grad=True)
    old = policy.detach() - 0.1 * mask
    return LossInputs(
        policy=policy,
        old=old,
        behaviour=old - 0.1 * mask,
        correction=torch.full_like(mask, 0.9),
        reference=old if with_reference else None,
        entropy=torch.ones_like(mask).mul(mask).requires_grad_(),
        mask=mask,
        advantages=torch.tensor([1.0, -1.0]),
        weights=torch.full((2,), weight),
    )
