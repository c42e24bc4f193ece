"""The dotted keys of all settings, and how they stand for nested sections."""

from __future__ import annotations

import difflib
import json
from collections.abc import Container, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from grpo_mlflow import redaction
from grpo_mlflow.config.fields import Section
from grpo_mlflow.config.schema import Config


def _section(kind: Any) -> type[Section] | None:
    """Return the class of a field that is a section."""
    return kind if isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, Section) else None


def _leaves(section: type[Section], prefix: str = "") -> dict[str, tuple[type[Section], str]]:
    """Return every dotted key with the class and the name of its field."""
    found: dict[str, tuple[type[Section], str]] = {}
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        found |= {prefix + name: (section, name)} if inner is None else _leaves(inner, f"{prefix}{name}.")
    return found


def _classes(section: type[Section], prefix: str = "") -> dict[str, type[Section]]:
    """Return every section inside one by its dotted name, in the schema's order."""
    found: dict[str, type[Section]] = {}
    for name, field in section.model_fields.items():
        if (inner := _section(field.annotation)) is not None:
            found |= {prefix + name: inner} | _classes(inner, f"{prefix}{name}.")
    return found


def _takes_list(kind: Any) -> bool:
    return get_origin(kind) in (tuple, list) or any(_takes_list(part) for part in get_args(kind))


def _takes_text(kind: Any) -> bool:
    """Return whether a setting takes a text of any form, and besides at most null or a list."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return str in parts and all(part in (str, NoneType) or _takes_list(part) for part in parts)


def _takes_mapping(kind: Any) -> bool:
    return any(get_origin(part) is dict for part in (kind, *get_args(kind)))


_LEAVES = _leaves(Config)
CLASSES = _classes(Config)
_FIELDS = {key: section.model_fields[name] for key, (section, name) in _LEAVES.items()}
KEYS = {key: field.description for key, field in _FIELDS.items()}
TRAITS = {key: section.traits_of(name) for key, (section, name) in _LEAVES.items()}
OF_EVALUATION = {
    own: key
    for key, traits in TRAITS.items()
    if traits.evaluation and traits.varies and (own := f"eval.{key.rpartition('.')[2]}") in TRAITS
}
"""Settings of `eval` that say for evaluations what another, which may vary, says for the run; null: as that one."""
TEXT = {key for key, field in _FIELDS.items() if _takes_text(field.annotation)}
MAPPINGS = {key for key, field in _FIELDS.items() if _takes_mapping(field.annotation)}  # one value, not a section
LISTS = {key for key, field in _FIELDS.items() if key not in MAPPINGS and _takes_list(field.annotation)}
ENTRIES = "train.reward_weights."
"""Before the names of the one mapping whose entries can be given one by one, and so vary in a search space."""
SECTIONS = sorted(CLASSES)
EARLIER_CAP = "train.sampler_correction_cap"  # of versions that knew one mode, and null for none


def summary(keys: Container[str]) -> tuple[str, ...]:
    """Return the settings among `keys` in the schema's order; a section that is among them whole stands as `NAME.`."""
    whole = [f"{section}." for section in SECTIONS if all(k in keys for k in KEYS if k.startswith(f"{section}."))]
    return tuple(dict.fromkeys(next((w for w in whole if key.startswith(w)), key) for key in KEYS if key in keys))


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into dotted keys; a setting whose value is itself a mapping keeps it whole."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value and f"{prefix}{key}" not in MAPPINGS:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def with_entries(layer: Mapping[str, tuple[Any, str]]) -> dict[str, tuple[Any, str]]:
    """Return values with their origins in which entries given one by one stand in their mapping."""
    found = {key: value for key, value in layer.items() if not key.startswith(ENTRIES)}
    mapping = ENTRIES.removesuffix(".")
    for key, (value, origin) in layer.items():
        if key.startswith(ENTRIES):
            known, _ = found.get(mapping, ({}, ""))
            found[mapping] = {**known, key.removeprefix(ENTRIES): value}, origin
    return found


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys in which settings of earlier versions have today's names and values.

    Runs, trials and config files keep what they were written with: without this, none of them could go on. A search
    space has to name those of today.
    """
    found = dict(values)
    if EARLIER_CAP in found:
        cap = found.pop(EARLIER_CAP)
        mode = {"train.importance_sampling_mode": "none" if cap is None else "token_truncate"}
        found = {**mode, **({} if cap is None else {"train.importance_sampling_cap": cap}), **found}
    return found


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested mappings."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return nested


def short(value: Any) -> str:
    """Return a value as error lines show it."""
    shown = redaction.without(value)
    text = json.dumps(shown) if shown is None or isinstance(shown, bool) else repr(shown)  # null, true as typed
    return text if len(text) <= 300 else f"{text[:300]}..."


def unknown_line(key: str, value: Any, origin: str) -> str:
    """Return the line that refuses a key that is no setting, with what may have been meant.

    The setting that was meant may be a secret one, so only a number, true, false or null is shown.
    """
    shows = isinstance(value, (int, float, bool, NoneType)) and not redaction.is_secret_name(key)
    shows |= key.startswith("hydra.")
    start = f"{key} = {short(value)} ({origin})" if shows else f"{key} ({origin})"
    if key in SECTIONS:
        return f"{start}: is a section; set a key in it: {', '.join(k for k in KEYS if k.startswith(f'{key}.'))}"
    if key.startswith("hydra."):
        return f"{start}: there is no Hydra here; a run's files lie in outputs/RUN_ID, and in MLflow (tracking.uri)"
    for mapping in MAPPINGS:
        if key.startswith(f"{mapping}."):
            return f"{start}: unknown key; {mapping} takes a whole mapping: {mapping}='{{NAME: VALUE}}'"
    name, section = key.rsplit(".", 1)[-1], key.rpartition(".")[0]
    close = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.85) + [k for k in KEYS if k.rsplit(".", 1)[-1] == name]
    if close:
        return f"{start}: unknown key; did you mean {' or '.join(dict.fromkeys(close))}?"
    while section and section not in SECTIONS:
        section = section.rpartition(".")[0]
    inside = [k for k in KEYS if k.startswith(f"{section}.")] if section else [k.split(".")[0] for k in KEYS]
    return f"{start}: unknown key; allowed: {', '.join(dict.fromkeys(inside))}"
