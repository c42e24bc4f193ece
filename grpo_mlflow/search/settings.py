"""Whose settings are whose: what belongs to the study, and what to a trial.

How a model is evaluated (problems, prompts, sampling, length, judging, draws) belongs to the study: trials that were
measured differently cannot be compared. What a trial trained with is what its run says, whatever is set by now.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from grpo_mlflow.config import OF_EVALUATION, TRAITS, Config, Resolved, flatten, overlay


def pinned(resolved: Resolved) -> Resolved:
    """Return the config of a study with every setting of `eval` that follows another set to what that is now.

    A trial may then vary the other, such as generation.temperature, and is evaluated like all the rest.
    """
    flat = flatten(resolved.config.model_dump(mode="json"))
    values = {own: flat[other] for own, other in OF_EVALUATION.items() if flat[own] is None}
    return replace(overlay(resolved, values, "study"), warnings=resolved.warnings)


def comparable(config: Config) -> dict[str, str]:
    """Return what must be the same for trials to be comparable, as text by dotted key."""
    flat = flatten(config.model_dump(mode="json"))
    return {key: json.dumps(value) for key, value in flat.items() if TRAITS[key].compared}


def pinned_then(begun: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return what `comparable` gave when a study was begun, pinned, and what of it an earlier version left to trials.

    The latter holds, by settings of the trials, those of `eval` that followed them.
    """
    followed = {other: own for own, other in OF_EVALUATION.items() if begun.get(own, "null") == "null"}
    return {**begun, **{own: begun[other] for other, own in followed.items() if other in begun}}, followed


def untrained_alike(config: Config, other: Config) -> bool:
    """Return whether the untrained model scores the same under both."""
    kept = {key for key, traits in TRAITS.items() if traits.evaluation} - {*OF_EVALUATION.values()}
    one, two = (flatten(each.model_dump(mode="json")) for each in (config, other))
    return all(one[key] == two[key] for key in one if key.startswith("model.") or key in kept)
