"""Settings of servers that contradict each other: where they are, who starts them, what they can do."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from grpo_mlflow.config.engines import SERVERS
from grpo_mlflow.config.schema import Config


def errors(config: Config) -> Iterator[str]:
    """Yield one line per contradiction: the key, its value and what is allowed."""
    yield from _addresses(config)
    yield from _managed(config)
    yield from _older_weights(config)
    yield from _shaping(config)


def _addresses(config: Config) -> Iterator[str]:
    generation, evaluation = config.generation, config.eval
    backend = evaluation.backend or generation.backend
    needed = ""
    if generation.backend != "local" and not generation.base_url and not generation.server.manage:
        needed = f"generation.base_url = null: generation.backend = {generation.backend!r}"
    elif backend not in ("local", generation.backend) and not evaluation.base_url:
        needed = f"eval.base_url = null: eval.backend = {backend!r}"
    if needed:
        yield f"{needed} needs the server's address; allowed: http://HOST:PORT, or generation.server.manage=true"
    for key, value in (("generation.base_url", generation.base_url), ("eval.base_url", evaluation.base_url)):
        if value is not None and not _is_address(value):
            yield f"{key} = {value!r}: not an address; allowed: http://HOST:PORT or https://HOST:PORT"


def _is_address(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, or half a bracket
        return False


def _managed(config: Config) -> Iterator[str]:
    generation, evaluation = config.generation, config.eval
    managed, backend = generation.server.manage, evaluation.backend or generation.backend
    borrows = backend == generation.backend and evaluation.base_url in (None, generation.base_url)
    if generation.sync == "restart" and managed and backend != "local" and not borrows:
        yield (
            f"generation.sync = 'restart': the run did not start the server at eval.base_url = {evaluation.base_url!r} "
            "and cannot restart it; allowed: reload"
        )
    if managed and generation.backend == "local":
        yield (
            "generation.server.manage = true: generation.backend = 'local' has no server to start; allowed: "
            f"generation.backend {' or '.join(SERVERS)}"
        )
    if generation.sync == "restart" and not managed:
        yield (
            "generation.sync = 'restart': only a server that the run started can be restarted by it; allowed: reload, "
            "none, or generation.server.manage=true"
        )


def _older_weights(config: Config) -> Iterator[str]:
    generation, local = config.generation, config.generation.backend == "local"
    if generation.async_rollouts and local:
        yield (
            "generation.async_rollouts = 1: generation.backend = 'local' samples with the weights that are being "
            "trained; allowed: 0, or a server backend"
        )
    if generation.async_rollouts and generation.behaviour_logprobs == "recompute" and not local:
        yield (
            "generation.behaviour_logprobs = 'recompute': with generation.async_rollouts = 1 the trainer's weights are "
            "not those that sampled; allowed: server"
        )


def _shaping(config: Config) -> Iterator[str]:
    generation = config.generation
    kind = SERVERS.get(generation.backend)
    if kind and not kind.penalises_as_here and generation.repetition_penalty != 1:
        yield (
            f"generation.repetition_penalty = {generation.repetition_penalty:g}: {kind.title}'s penalty falls on other "
            "tokens than the trainer's, which cannot price what it draws then; allowed: 1"
        )
    if not kind or kind.shaped_logprobs or generation.behaviour_logprobs != "server":
        return
    shaping = {"top_p": (1.0, generation.top_p < 1), "top_k": (-1, generation.top_k > 0)}
    for key, (off, active) in shaping.items():
        if active:
            yield (
                f"generation.{key} = {getattr(generation, key)}: {kind.title}'s log-probabilities leave it out; "
                f"allowed: {off}, or generation.behaviour_logprobs=recompute"
            )
