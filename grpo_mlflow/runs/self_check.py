"""Every way in which a run will compute its model proves itself on the loaded weights, before the run is opened.

The trials are those of `forward.ways` and `generation.local.ways`, with a few tokens, with rows as long as the run's
where that is cheap, and across each length at which the config says that the model changes its ways: a window, a chunk,
angles that are stretched. What was found is kept in the cache folder for the same model, versions and lengths.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from grpo_mlflow.errors import ModelError
from grpo_mlflow.forward import llama_pass, trial, ways
from grpo_mlflow.generation.local import ways as sampling
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.model.tiny import cache_root

_CHEAP = 5_000_000_000  # weights times tokens: less than a second
_LONGEST = 256  # tokens of a row that is tried for its length alone
_NEW = 24  # of them in the completion
_SWITCHES = ("window", "chunk", "original_max_position_embeddings", "block_size")  # parts of names in a config


def prove(policy: Policy, most: int) -> float:
    """Find out how to compute rows of at most `most` tokens, and return the seconds that it took.

    Raises:
        ModelError: there is no right way, at all or beyond some length.
    """
    began = time.perf_counter()
    kept = cache_root() / "ways" / f"{_key(policy, most)}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):  # none, or none that this version understands
        found = json.loads(kept.read_text())
        ways.know(policy.model, ways.Scoring(**found["scoring"]))
        sampling.know(policy, sampling.Sampler(**found["sampling"]))
        return time.perf_counter() - began
    scoring, sampler = find(policy, most)
    ways.know(policy.model, scoring)
    sampling.know(policy, sampler)
    with suppress(OSError):  # a cache that only others may write to
        kept.parent.mkdir(parents=True, exist_ok=True)
        beside = kept.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps({"scoring": asdict(scoring), "sampling": asdict(sampler)}))
        beside.replace(kept)
    return time.perf_counter() - began


def find(policy: Policy, most: int) -> tuple[ways.Scoring, sampling.Sampler]:
    """Try all ways anew, and return those that are right; see `prove`."""
    model, vocabulary = policy.model, policy.vocabulary
    try:
        tried = ways.trials(model, [trial.few(vocabulary)])
        for prompt, new in _lengths(policy, most):
            tried += _beyond(policy, trial.long(vocabulary, prompt, new), most)
        return ways.decide(model, tried), sampling.decide(policy, tried)
    except ways.Unfit as error:
        raise ModelError(f"model {policy.name!r}: {error}; allowed: another model") from error


def _beyond(policy: Policy, examples: trial.Examples, most: int) -> list[trial.Trial]:
    """Compute long rows plainly; raise ModelError where tokens feel those that follow only in long rows."""
    try:
        return ways.trials(policy.model, [examples])
    except ways.Unfit as error:
        room = len(examples.prompts[0])
        raise ModelError(
            f"model {policy.name!r}: {error}, as angles do that are stretched beyond a length: no log-probability of a "
            f"token is right there; allowed: prompts and completions of about {room} tokens together, here they have "
            f"up to {most} (generation.max_new_tokens)"
        ) from error


def _lengths(policy: Policy, most: int) -> Iterator[tuple[int, int]]:
    """Yield the lengths of a prompt and its completion that show what a few tokens do not."""
    size = sum(parameter.numel() for parameter in policy.model.parameters())
    cheap = min(most, _LONGEST, _CHEAP // max(1, size))
    if cheap > 2 * _NEW:
        yield cheap - _NEW, _NEW
    for switch in sorted(set(_switches(policy.model.config.get_text_config().to_dict()))):
        if 2 < switch < most:  # a row that crosses it
            yield max(2, switch - _NEW // 3), _NEW


def _switches(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield the lengths at which a config says that the model changes what it computes."""
    dynamic = "dynamic" in str(config.get("rope_parameters") or config.get("rope_scaling"))
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _switches(value)
        named = any(part in str(key) for part in _SWITCHES) or (dynamic and key == "max_position_embeddings")
        if named and type(value) is int:
            yield value


def _key(policy: Policy, most: int) -> str:
    """Return a hash of all that the outcome depends on."""
    config = {**policy.model.config.to_dict(), "_name_or_path": ""}
    parts = [
        json.dumps(config, sort_keys=True, default=str),
        policy.model.config._attn_implementation,
        *(f"{name} {version(name)}" for name in ("torch", "transformers")),
        _code(),
        f"{policy.device.type} {torch.backends.cpu.get_cpu_capability()} {policy.dtype} {policy.written_out}",
        f"{most} {policy.vocabulary} {policy.has_adapter} {llama_pass.serves(policy.model)}",
        *(f"{name} {tuple(each.shape)} {_few(each)}" for name, each in policy.model.named_parameters()),
    ]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _few(tensor: torch.Tensor) -> list[float]:
    """Return a few numbers of a tensor: enough to tell one model's weights from another's."""
    flat = tensor.detach().reshape(-1)
    found: list[float] = flat[:: max(1, len(flat) // 4)][:4].tolist()
    return found


@cache
def _code() -> str:
    """Return a hash of the code that computes models."""
    root = Path(__file__).parent.parent
    files = sorted([*root.glob("forward/*.py"), *root.glob("generation/local/*.py")])
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=16).hexdigest()
