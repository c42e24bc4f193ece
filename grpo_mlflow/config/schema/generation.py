"""Who samples completions, how, and the server that a run may start for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from grpo_mlflow.config.engines import SERVERS
from grpo_mlflow.config.fields import Device, NonNegativeFloat, Positive, PositiveFloat, Section, as_tuple, setting

if TYPE_CHECKING:
    Backend = str  # type checkers take no computed Literal
else:
    _BACKENDS = ("local", *SERVERS)
    Backend = Literal[_BACKENDS]
AddressList = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), BeforeValidator(as_tuple)]
SyncName = Literal["reload", "lora", "restart", "none"]


class ServerConfig(Section, resume=True, compared=False, varies=False, secret=False, evaluation=True):
    """A server that the run starts as its child, watches and ends."""

    manage: bool = setting(
        False, "start a server with the run and end it with the run; generation.base_url then has no effect"
    )
    python: Annotated[str, Field(min_length=1)] | None = setting(
        None,
        "Python interpreter of the environment that the server is installed in; null: that of .venv-vllm "
        "or .venv-sglang",
    )
    replicas: Positive = setting(
        1, "servers to start, which share the work; they take the GPUs after those of the trainers one after another"
    )
    port: Annotated[int, Field(ge=0, le=65535)] = setting(
        0, "port on 127.0.0.1 that the server listens on, the next ones for further replicas; 0: free ones"
    )
    device: Device = setting(
        "auto",
        "where the server computes; auto: a GPU if there is one, else the CPU; cuda:N: further replicas on the next",
    )
    memory: PositiveFloat | None = setting(
        None,
        "memory of the server: its share of the GPU's (0 to 1), on a CPU the GiB of its KV cache; null: "
        "the server's default",
    )
    sleep: bool = setting(
        False,
        "vLLM's sleep mode: the server gives up its GPU's memory while the model is updated (docs/servers.md); no GPU "
        "has run it",
    )
    arguments: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = setting(
        (), "further arguments of the server's command line; they win over those of this package", secret=True
    )
    start_seconds: PositiveFloat = setting(600.0, "longest start of the server, in seconds; after it the run fails")


class GenerationConfig(Section, resume=False, compared=True, varies=True, secret=False):
    """What samples completions, how it samples, and how a server gets new weights."""

    backend: Backend = setting(
        "vllm_server", "what samples the rollouts: this process (local) or an inference server", evaluation=True
    )
    base_url: str | AddressList | None = setting(
        None,
        "address of the inference server, such as http://127.0.0.1:30000, or a list of several that share the work; "
        "null with backend local or a managed server",
        resume=True,
        compared=False,
        varies=False,
        secret=True,
        evaluation=True,
    )
    batch_size: Positive = setting(
        4, "prompts that are sampled at the same time, by each server where there are several", evaluation=False
    )
    max_tokens_per_batch: Positive | None = setting(
        None,
        "tokens that what is sampled at the same time in this process may come to, prompts included, in evaluations, "
        "too; fewer prompts are sampled at once, or fewer completions of one; null: no limit",
        resume=True,
        compared=False,
        varies=False,
        evaluation=True,
    )
    max_new_tokens: Positive = setting(256, "longest completion, in tokens; a longer one is cut off", evaluation=True)
    temperature: PositiveFloat = setting(
        0.7, "softmax temperature of sampling, and of the log-probabilities that are trained", evaluation=True
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = setting(
        0.95, "nucleus sampling: probability mass that is kept; 1: off", evaluation=True
    )
    top_k: Annotated[int, Field(ge=-1)] = setting(
        50, "number of most likely tokens that are kept; -1 or 0: off", evaluation=True
    )
    repetition_penalty: PositiveFloat = setting(
        1.1, "penalty on tokens that the prompt or the completion already has; 1: off", evaluation=True
    )
    sync: SyncName = setting(
        "reload",
        "how a server gets new weights. reload: in place; lora: as an adapter on the base model "
        "(model.lora); restart: by a restart (managed servers only); none: never, the sampler correction "
        "then makes up for the difference",
        evaluation=False,
    )
    sync_dir: str | None = setting(
        None,
        "folder that trainer and server both see, for the weights on their way; null: a temporary one",
        resume=True,
        compared=False,
        evaluation=False,
    )
    behaviour_logprobs: Literal["server", "recompute"] = setting(
        "server",
        "source of the log-probabilities of the sampled tokens. server: as reported with the tokens; "
        "recompute: computed by the trainer's model",
        evaluation=False,
    )
    timeout: PositiveFloat = setting(
        300.0, "seconds to wait for one complete answer of the server", resume=True, compared=False, evaluation=False
    )
    retry_seconds: NonNegativeFloat = setting(
        300.0,
        "seconds to keep asking a server that fails before the run stops; 0: stop at once",
        resume=True,
        compared=False,
        evaluation=False,
    )
    async_rollouts: Annotated[int, Field(ge=0, le=1)] = setting(
        0,
        "iterations that sampling may be ahead of training. 0: they alternate; 1: both run at once, and "
        "training is one step off-policy",
        evaluation=False,
    )
    server: ServerConfig = ServerConfig()
