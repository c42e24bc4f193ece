"""Whose settings are whose: what belongs to the study, and what to a trial.

How a model is evaluated (problems, prompts, sampling, length, judging, draws) belongs to the study: trials that were
measured differently cannot be compared. What a trial trained with is what its run says, whatever is set by now.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from grpo_mlflow import redaction
from grpo_mlflow.config import OF_EVALUATION, TRAITS, Config, Resolved, flatten, nest, overlay, renamed, resolve, yaml12


def pinned(resolved: Resolved) -> Resolved:
    """Return the config of a study with every setting of `eval` that follows another set to what that is now.

    A trial may then vary the other, such as generation.temperature, and is evaluated like all the rest.
    """
    flat = flatten(resolved.config.model_dump(mode="json"))
    values = {own: flat[other] for own, other in OF_EVALUATION.items() if flat[own] is None}
    return replace(overlay(resolved, values, "study"), warnings=resolved.warnings)


def comparable(config: Config) -> dict[str, str]:
    """Return what must be the same for trials to be comparable, as text by dotted key: stored, so without secrets."""
    flat = flatten(config.model_dump(mode="json"))
    return {key: json.dumps(redaction.without(value)) for key, value in flat.items() if TRAITS[key].compared}


def digest(config: Config) -> str:
    """Return what two configs share if trials of them would be the same, whatever of it is varied."""
    flat = flatten(config.model_dump(mode="json"))
    kept = rounded({key: value for key, value in flat.items() if TRAITS[key].compared})
    return hashlib.sha256(kept.encode()).hexdigest()[:16]


def rounded(values: Mapping[str, Any]) -> str:
    """Return settings as text in which floats have 12 digits: .1 + .2 is what .3 is."""
    short = {key: f"{value:.12g}" if isinstance(value, float) else value for key, value in values.items()}
    return json.dumps(short, sort_keys=True)


def of_run(resolved: Resolved, stored: Mapping[str, Any], varied: Collection[str]) -> Resolved:
    """Return the config that a trial's run trained with, from what it has stored (nested).

    `resolved` is the study's, as it is now. Of it come how models are evaluated, and what trials need not have in
    common, such as where a server is, unless the trial `varied` it. A study may have been continued with other values
    of settings that vary, which say nothing about a trial from before.
    """
    today = flatten(resolved.config.model_dump(mode="json"))
    ours = {key for key, traits in TRAITS.items() if not traits.compared or key.startswith("eval.")} - {*varied}
    then = {key: value for key, value in flatten(stored).items() if key not in ours}
    return resolve("", base=nest({**{key: today[key] for key in ours}, **then}), origin="run")


def best_config(config: Config) -> str:
    """Return the config of a trial as a file to train with, without what belongs to its study."""
    kept = config.model_dump(mode="json", exclude={"search": True, "resume": True, "tracking": {"run_name"}})
    return yaml12.dump(redaction.without(kept))


def pinned_then(begun: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return what `comparable` gave when a study was begun, pinned, and what of it an earlier version left to trials.

    The latter holds, by settings of the trials, those of `eval` that followed them.
    """
    begun = {key: json.dumps(value) for key, value in renamed({k: json.loads(v) for k, v in begun.items()}).items()}
    followed = {other: own for own, other in OF_EVALUATION.items() if begun.get(own, "null") == "null"}
    return {**begun, **{own: begun[other] for other, own in followed.items() if other in begun}}, followed


def untrained_alike(config: Config, other: Config) -> bool:
    """Return whether the untrained model scores the same under both."""
    kept = {key for key, traits in TRAITS.items() if traits.evaluation} - {*OF_EVALUATION.values()}
    one, two = (flatten(each.model_dump(mode="json")) for each in (config, other))
    return all(one[key] == two[key] for key in one if key.startswith("model.") or key in kept)
