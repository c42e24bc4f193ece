"""What a refusal proposes is taken: each choice of each line mends it, and breaks nothing else."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest

from grpo_mlflow.config import Config, GenerationConfig, checks, resolve
from grpo_mlflow.config.remedies import changed
from grpo_mlflow.config.schema import EvalConfig
from grpo_mlflow.config.server_checks import complete
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.generation.server.engine import WITHOUT_LOADS

LINE = re.compile(r"(?P<key>[\w.]+) = .*; allowed: (?P<choices>.*)")
ANY_OTHER = {"a server backend", "http://HOST:PORT", "https://HOST:PORT"}  # what the reader has to fill in


def configs() -> Iterator[Config]:
    """Every combination of what settings of servers depend on."""
    for backend, other, (url, other_url), manage, sync, logprobs, ahead, top_p, top_k, penalty in itertools.product(
        ("local", "vllm_server", "sglang_server"),
        (None, "local", "vllm_server", "sglang_server"),
        ((None, None), ("http://h:1", None), ("http://h:1", "http://h:2"), (None, "http://h:2")),
        (False, True),
        ("reload", "restart", "none"),
        ("server", "recompute"),
        (0, 1),
        *((1.0, 0.9), (-1, 50), (1.0, 1.1)),
    ):
        if (top_k > 0 or penalty > 1) and (other or top_p == 1):  # act like top_p
            continue
        content = {"backend": backend, "base_url": url, "server": {"manage": manage}, "sync": sync, "top_p": top_p}
        content |= {"behaviour_logprobs": logprobs, "async_rollouts": ahead, "top_k": top_k}
        content |= {"repetition_penalty": penalty}
        evaluation = EvalConfig.model_validate({"backend": other, "base_url": other_url})
        yield Config(generation=GenerationConfig.model_validate(content), eval=evaluation)


def refusals(config: Config) -> dict[str, str]:
    """The choices of each line by which the config is refused, by its key."""
    lines = [LINE.fullmatch(each) for each in (*checks.errors(config), *checks.untrainable(config))]
    assert None not in lines
    return {each["key"]: each["choices"] for each in lines if each}


def proposed(key: str, choices: str) -> list[str]:
    """The overrides that a line proposes."""
    found = [choice for choice in re.split(r", or |, ", choices) if choice not in ANY_OTHER]
    return [choice if "=" in choice else f"{key}={choice}" for choice in found]


def test_every_choice_of_every_refusal_mends_it_and_breaks_nothing() -> None:
    refused, pasted = 0, set()
    for config in configs():
        before = refusals(config)
        refused += bool(before)
        for key, choices in before.items():
            for words in proposed(key, choices):
                after = refusals(changed(config, words))
                assert after.keys() <= before.keys() - {key}, (config.generation, config.eval, key, words)
                pasted.add((key, words))
    assert refused > 1000
    assert len(pasted) >= 15


def test_the_first_choices_of_all_lines_make_a_config_that_is_taken() -> None:
    """Pasted one after the other, as a reader does who mends a line at a time."""
    for config in itertools.islice(configs(), 0, None, 7):
        for _ in range(6):
            left = refusals(config)
            if not left:
                break
            key, choices = next(iter(left.items()))
            words = next(iter(proposed(key, choices)), None)
            config = changed(config, words or f"{key}=http://h:9")
        assert not refusals(config)


@pytest.mark.parametrize("more", [[], ["generation.async_rollouts=1"], ["generation.server.manage=true"]])
@pytest.mark.parametrize("words", [WITHOUT_LOADS, "generation.behaviour_logprobs=recompute", "generation.sync=reload"])
def test_what_does_without_something_is_completed(words: str, more: list[str]) -> None:
    given = ["generation.backend=vllm_server", "generation.base_url=http://h:1", *more]
    whole = complete(resolve("tiny", given).config, words)
    assert whole.startswith(words)
    resolve("tiny", [*given, *whole.split()]).require_trainable()
    if whole != words:
        with pytest.raises(ConfigError):
            resolve("tiny", [*given, *words.split()])
