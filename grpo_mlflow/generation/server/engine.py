"""What an inference server must be able to do, and what its completions must satisfy to be believed."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from grpo_mlflow.generation.base import Sampling
from grpo_mlflow.generation.server.checksums import WeightSums
from grpo_mlflow.runtime.http.client import Client, Fault, Refusal
from grpo_mlflow.types import FinishReason

T = TypeVar("T")
SERVERSIDE = Path(__file__).resolve().parents[2] / "serverside"  # what runs in the server's environment


@dataclass(frozen=True, slots=True)
class Draw:
    """One sampled completion; `logprobs` are those of the distribution that it was drawn from, where asked for."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt, and how many completions of it, drawn how. Completion j is drawn with seed + j."""

    token_ids: Sequence[int]
    k: int
    sampling: Sampling
    seed: int
    stop_ids: Sequence[int]
    logprobs: bool = True


@dataclass(frozen=True, slots=True)
class Start:
    """What a server of our own is started with.

    `memory` is in the unit of `generation.server.memory`, None: the server's default. `lora_rank` is the rank of the
    adapters that it has to take, None or 0: none. `host` is the address that it listens at. `sleeps`: it can be put
    to sleep.
    """

    model: str
    port: int
    dtype: str
    on_cpu: bool
    memory: float | None
    lora_rank: int | None
    host: str = "127.0.0.1"
    trust_remote_code: bool = False
    sleeps: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """What follows the interpreter on a command line, and what is added to the environment."""

    arguments: Sequence[str]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Remedies:
    """What a person can do about a server of one kind, as parts of messages; empty: nothing particular to the kind.

    `install` makes its environment, `run` starts one, `old_weights` says when new weights do not arrive, `seeds` when
    it ignores seeds, `context` is the option for a longer context, `variables` are those of the environment that it
    takes in the place of options that hold secrets. Every other option is part of the start command
    (`launch.start_command`), which messages end with.
    """

    install: str
    context: str
    run: str = ""
    old_weights: str = ""
    seeds: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)


class EngineClass(Protocol):
    """The class of an engine, which knows how a server of its kind is started."""

    @property
    def remedies(self) -> Remedies: ...

    def __call__(self, client: Client) -> Engine: ...

    def command(self, start: Start) -> Command:
        """Return how a server is started."""
        ...


class Engine(Protocol):
    """The tongue of one kind of server. All methods raise `Fault` and `Refusal`."""

    client: Client
    remedies: ClassVar[Remedies]

    async def connect(self) -> str:
        """Find out what the server serves, and return its name for it."""
        ...

    async def require_loads(self, tied: bool) -> None:
        """Make sure that the server can take whole weights in place, before any are written for it.

        Args:
            tied: the model's output layer is its embedding.

        Raises:
            Unfit: it was started without what that takes.
        """
        ...

    async def complete(self, ask: Ask) -> list[Draw]:
        """Return the completions as the server gave them, not yet checked."""
        ...

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probability of each token but the first given those before it, at temperature 1."""
        ...

    async def load(self, folder: Path, label: str) -> None:
        """Take the weights of a model folder in place, forget cached prefixes, and go by `label` from now on."""
        ...

    async def load_adapter(self, folder: Path, label: str) -> None:
        """Put the adapter of a folder beside the base model, under the name `label`, and sample from it from now on."""
        ...

    async def label(self) -> str | None:
        """Return the label of the weights that completions come from, or None where the server cannot say."""
        ...

    async def sums(self, seed: int) -> WeightSums | None:
        """Return sums over the weights that the server computes with, None where it cannot say.

        Where it is too much to sum all columns of a tensor, `seed` chooses some.
        """
        ...

    async def adapter_sums(self) -> Sequence[WeightSums] | None:
        """Return as `sums` those over each adapter that it computes with, None where it cannot say."""
        ...

    async def tokenize(self, text: str) -> list[int]:
        """Return the server's own tokens of a text, without special ones added."""
        ...


WITHOUT_LOADS = "generation.sync=none generation.behaviour_logprobs=recompute eval.backend=local"
NO_SCORES = "it does not score the tokens of a prompt, which is how it proves whose weights it serves"


class Incapable(Fault):
    """A part of the answer is missing: from a server that has given it before a failure, else beyond this server.

    `instead` are settings that do without it.
    """

    def __init__(self, message: str, instead: str = "") -> None:
        super().__init__(message)
        self.instead = instead


async def adapter_label(client: Client, adapter: str) -> str:
    """Return the adapter's name where the server still has it, else an empty label: it was restarted since."""
    served = (await client.get("/v1/models"))["data"]
    return adapter if any(entry["id"] == adapter for entry in served) else ""


def draw_of(token_ids: Any, logprobs: Any, finish_reason: Any, ask: Ask, *, prompt: Any = None) -> Draw:
    """Return a draw from what an answer holds; `prompt` is what it says it continues, if it does.

    Raises:
        Incapable: it holds no token ids or log-probabilities.
        Fault: a part is malformed, or it continues another prompt: mixed up by a gateway, it would be judged as an
            answer to this one.
    """
    if prompt is not None and prompt != list(ask.token_ids):
        raise Fault("completions of another prompt than the one asked for")
    if token_ids is None:
        raise Incapable("it gives text without token ids, and text is never tokenised again for training")
    if logprobs is None and ask.logprobs:
        raise Incapable(
            "it gives no log-probabilities of the sampled tokens", "generation.behaviour_logprobs=recompute"
        )
    if finish_reason not in ("stop", "length"):
        raise Fault(f"a completion ended with finish_reason {finish_reason!r}")
    # int() would make a token of 3.7, "3" and true, and the rollout would hold a token that nobody drew.
    if not (_holds(token_ids, int) and (not ask.logprobs or _holds(logprobs, int, float))):
        raise Fault("a completion holds tokens or log-probabilities that are not numbers")
    return Draw(tuple(token_ids), tuple(map(float, logprobs)) if ask.logprobs else None, finish_reason)


def _holds(values: Any, *kinds: type) -> bool:
    """Return whether a JSON value is a list of numbers of these types; true and false are none."""
    return isinstance(values, list) and all(type(value) in kinds for value in values)


def check(draws: Sequence[Draw], ask: Ask, vocabulary: int, longer_context: str) -> None:
    """Raise where draws cannot be what was asked for; `longer_context` is the server's option for that.

    Raises:
        Fault: a count, a token or a log-probability is impossible.
        Refusal: the server cuts completions short because its context is too small.
    """
    most, stops = ask.sampling.max_new_tokens, set(ask.stop_ids)
    if len(draws) != ask.k:
        raise Fault(f"{len(draws)} completions instead of {ask.k}")
    for draw in draws:
        count = len(draw.token_ids)
        if not 0 < count <= most:
            raise Fault(f"a completion of {count} tokens instead of 1 to {most}")
        if draw.logprobs is not None and len(draw.logprobs) != count:
            raise Fault(f"{len(draw.logprobs)} log-probabilities for {count} tokens")
        if not stops.isdisjoint(draw.token_ids[:-1]):
            raise Fault("a completion that goes on after its end token")
        if min(draw.token_ids) < 0 or max(draw.token_ids) >= vocabulary:
            raise Fault(f"a token id outside 0 to {vocabulary - 1}")
        # a sum is finite only if all are; rounding may exceed 0
        if draw.logprobs and not (math.isfinite(sum(draw.logprobs)) and max(draw.logprobs) <= 1e-3):
            raise Fault("log-probabilities that are not finite or above 0")
        ended = draw.token_ids[-1] in stops
        if draw.finish_reason == "stop" and not ended:
            raise Fault("a completion that ended without its end token")
        if draw.finish_reason == "length" and count < most and not ended:
            raise Refusal(
                f"its context holds only {count} new tokens after a prompt of {len(ask.token_ids)}; allowed: a longer "
                f"context ({longer_context}), or generation.max_new_tokens={count}"
            )


async def shaped(answer: Awaitable[T]) -> T:
    """Await what an engine makes of an answer.

    Raises:
        Incapable: the answer's JSON is not of the expected shape (another kind of server's, or a proxy's).
    """
    try:
        return await answer
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise Incapable(f"an answer of unexpected shape ({type(error).__name__}: {error})") from error
