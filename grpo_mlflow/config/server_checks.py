"""Settings of servers that contradict each other: where they are, who starts them, what they can do."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from grpo_mlflow.config import addresses, remedies
from grpo_mlflow.config.engines import SERVERS
from grpo_mlflow.config.remedies import Contradiction
from grpo_mlflow.config.schema import Config

_LAST_PORT = 65535


def errors(config: Config) -> Iterator[str]:
    """Yield one line per contradiction: the key, its value and what is allowed."""
    for found in _contradictions(config):
        yield remedies.line(config, found, _all)


def untrainable(config: Config) -> Iterator[str]:
    """Yield as `errors` what is right for measuring a model but not for training one."""
    for found in _measures_again(config):
        yield remedies.line(config, found, _all)


def complete(config: Config, words: str) -> str:
    """Return overrides that do without what a server lacks, with what they need beside them; empty: none will do."""
    return next((each for each in (words, f"{words} generation.async_rollouts=0") if takes(config, each)), "")


def takes(config: Config, words: str) -> bool:
    """Return whether overrides bring no new contradiction of servers."""
    return remedies.accepted(config, words, _all)


def _all(config: Config) -> Iterator[Contradiction]:
    yield from _contradictions(config)
    yield from _measures_again(config)


def _contradictions(config: Config) -> Iterator[Contradiction]:
    yield from _addresses(config)
    yield from _managed(config)
    yield from _older_weights(config)
    yield from _shaping(config)


def _addresses(config: Config) -> Iterator[Contradiction]:
    generation, evaluation = config.generation, config.eval
    backend, somewhere = evaluation.backend or generation.backend, "http://HOST:PORT"
    if generation.backend != "local" and not generation.base_url and not generation.server.manage:
        why = f"generation.backend = {generation.backend!r} needs the server's address"
        yield Contradiction("generation.base_url", "null", why, (somewhere, "generation.server.manage=true"))
    elif backend not in ("local", generation.backend) and not evaluation.base_url:
        sampling = f"while generation.backend = {generation.backend!r}"
        why = f"eval.backend = {backend!r}, {sampling}, needs an address of its own"
        yield Contradiction("eval.base_url", "null", why, (somewhere, "eval.backend=local"))
    for key, value in (("generation.base_url", generation.base_url), ("eval.base_url", evaluation.base_url)):
        yield from _wrong_addresses(key, value, somewhere)
    own, others = ({*map(addresses.place, addresses.of(each))} for each in (evaluation.base_url, generation.base_url))
    both_ask = "local" not in (backend, generation.backend) and not generation.server.manage
    if both_ask and (shared := own & others) and own != others:
        why = f"it shares {min(shared)} with generation.base_url, but not all, and each list is given its own weights"
        yield Contradiction(
            "eval.base_url", addresses.shown(evaluation.base_url), why, ("eval.base_url=null", "others")
        )


def _wrong_addresses(key: str, value: addresses.Addresses, somewhere: str) -> Iterator[Contradiction]:
    """Yield what is wrong with the addresses of a setting, each alone and all together."""
    known = set[str]()
    for address in addresses.of(value):
        if not _is_address(address):
            yield Contradiction(
                key, repr(address), "not an address", (somewhere, "https://HOST:PORT", "a list of such")
            )
        elif (place := addresses.place(address)) in known:
            yield Contradiction(key, addresses.shown(value), f"it names {place} twice", ("each address once",))
        known.add(addresses.place(address))


def _is_address(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, or half a bracket
        return False


def _managed(config: Config) -> Iterator[Contradiction]:
    generation, evaluation = config.generation, config.eval
    managed, backend = generation.server.manage, evaluation.backend or generation.backend
    borrows = backend == generation.backend and (
        evaluation.base_url is None or addresses.same(evaluation.base_url, generation.base_url)
    )
    if managed and generation.backend == "local":
        starts = tuple(f"generation.backend={name}" for name in SERVERS)
        why = "generation.backend = 'local' has no server to start"
        off = ("generation.server.manage=false", "generation.server.manage=false generation.sync=reload")
        yield Contradiction("generation.server.manage", "true", why, (*starts, *off))
    elif generation.sync == "restart" and managed and backend != "local" and not borrows:
        at = addresses.shown(evaluation.base_url)
        why = f"the run did not start the server at eval.base_url = {at} and cannot restart it"
        yield Contradiction("generation.sync", "'restart'", why, ("generation.sync=reload",))
    if generation.sync == "restart" and not managed:
        why = "only a server that the run started can be restarted by it"
        choices = ("generation.sync=reload", "generation.sync=none", "generation.server.manage=true")
        yield Contradiction("generation.sync", "'restart'", why, choices)
    if generation.server.sleep:
        awake = "generation.server.sleep=false"
        if not managed:
            why = "only a server that the run started is put to sleep"
            yield Contradiction("generation.server.sleep", "true", why, (awake, "generation.server.manage=true"))
        if generation.backend != "vllm_server":
            why = f"generation.backend = {generation.backend!r}: only vLLM has a sleep mode"
            yield Contradiction("generation.server.sleep", "true", why, (awake, "generation.backend=vllm_server"))
        if generation.async_rollouts:
            why = "with generation.async_rollouts = 1 the server samples during the update"
            yield Contradiction("generation.server.sleep", "true", why, (awake, "generation.async_rollouts=0"))
    port, replicas = generation.server.port, generation.server.replicas
    if replicas > 1 and not managed:
        why = "only servers that the run starts have replicas; others are a list of addresses in generation.base_url"
        one_or_own = ("generation.server.replicas=1", "generation.server.manage=true")
        yield Contradiction("generation.server.replicas", replicas, why, one_or_own)
    if port and port + replicas - 1 > _LAST_PORT:
        most = _LAST_PORT + 1 - replicas
        why = f"{replicas} replicas take one port each from there on"
        yield Contradiction("generation.server.port", port, why, ("generation.server.port=0", f"at most {most}"))


def _older_weights(config: Config) -> Iterator[Contradiction]:
    generation, local, off = config.generation, config.generation.backend == "local", "generation.async_rollouts=0"
    if generation.async_rollouts and local:
        why = "generation.backend = 'local' samples with the weights that are being trained"
        yield Contradiction("generation.async_rollouts", 1, why, (off, "a server backend"))
    if generation.async_rollouts and generation.behaviour_logprobs == "recompute" and not local:
        why = "with generation.async_rollouts = 1 the trainer's weights are not those that sampled"
        choices = ("generation.behaviour_logprobs=server", off)
        yield Contradiction("generation.behaviour_logprobs", "'recompute'", why, choices)


def _shaping(config: Config) -> Iterator[Contradiction]:
    generation = config.generation
    kind = SERVERS.get(generation.backend)
    if kind and not kind.penalises_as_here and generation.repetition_penalty != 1:
        why = f"{kind.title}'s penalty falls on other tokens than the trainer's, which cannot price what it draws then"
        key, value = "generation.repetition_penalty", f"{generation.repetition_penalty:g}"
        yield Contradiction(key, value, why, (f"{key}=1",))
    if not kind or kind.shaped_logprobs or generation.behaviour_logprobs != "server":
        return
    anew = "generation.behaviour_logprobs=recompute"
    if generation.async_rollouts:
        anew += " generation.async_rollouts=0"
    why = f"{kind.title}'s log-probabilities leave it out"
    for name, off, active in (("top_p", 1.0, generation.top_p < 1), ("top_k", -1, generation.top_k > 0)):
        if active:
            key = f"generation.{name}"
            yield Contradiction(key, getattr(generation, name), why, (f"{key}={off}", anew))


def _measures_again(config: Config) -> Iterator[Contradiction]:
    generation, backend = config.generation, config.eval.backend or config.generation.backend
    if config.eval.enabled and backend != "local" and generation.sync == "none":
        why = f"the server keeps the initial weights, so eval.backend = {backend!r} would measure those again and again"
        choices = ("generation.sync=reload", "generation.sync=restart", "eval.backend=local")
        yield Contradiction("generation.sync", "'none'", why, choices)
