"""Who samples completions, how, and the server that a run may start for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from grpo_mlflow.config.engines import SERVERS
from grpo_mlflow.config.fields import NonNegativeFloat, Positive, PositiveFloat, Section, as_tuple, setting

if TYPE_CHECKING:
    Backend = str  # type checkers take no computed Literal
else:
    _BACKENDS = ("local", *SERVERS)
    Backend = Literal[_BACKENDS]
SyncName = Literal["reload", "lora", "restart", "none"]


class ServerConfig(Section, resume=True, compared=False, varies=False, secret=False, evaluation=True):
    """A server that the run starts as its child, watches and ends."""

    manage: bool = setting(False, "start the server; generation.base_url then has no effect")
    python: Annotated[str, Field(min_length=1)] | None = setting(
        None, "Python of the environment that the server is installed in; null: that of .venv-vllm or .venv-sglang"
    )
    port: Annotated[int, Field(ge=0, le=65535)] = setting(0, "port on 127.0.0.1; 0: a free one")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = setting(
        "auto", "where it computes: auto, cpu, cuda or cuda:N"
    )
    memory: PositiveFloat | None = setting(
        None, "its share of the GPU's memory; on a CPU: GiB for its cache; null: the server's default"
    )
    arguments: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = setting(
        (), "further arguments of its command line; they win over ours", secret=True
    )
    start_seconds: PositiveFloat = setting(600.0, "how long its start may take")


class GenerationConfig(Section, resume=False, compared=True, varies=True, secret=False):
    backend: Backend = setting("vllm_server", "who samples the rollouts", evaluation=True)
    base_url: str | None = setting(
        None, "address of the inference server", resume=True, compared=False, varies=False, secret=True, evaluation=True
    )
    batch_size: Positive = setting(4, "prompts in flight at once", evaluation=False)
    max_new_tokens: Positive = setting(256, "longest completion, in tokens", evaluation=True)
    temperature: PositiveFloat = setting(
        0.7, "softmax temperature of sampling and of trained log-probs", evaluation=True
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = setting(0.95, "nucleus mass; 1 is off", evaluation=True)
    top_k: Annotated[int, Field(ge=-1)] = setting(50, "most likely tokens kept; -1 or 0 is off", evaluation=True)
    repetition_penalty: PositiveFloat = setting(1.1, "penalty on tokens seen before; 1 is off", evaluation=True)
    sync: SyncName = setting(
        "reload",
        "how a server gets new weights: in place, as an adapter beside the base model (model.lora), by a "
        "restart (managed only), or never (it keeps the initial ones, and the sampler correction carries the "
        "difference)",
        evaluation=False,
    )
    sync_dir: str | None = setting(
        None,
        "folder for those weights that trainer and server both see; null: a temporary one",
        resume=True,
        compared=False,
        evaluation=False,
    )
    behaviour_logprobs: Literal["server", "recompute"] = setting(
        "server",
        "who says how likely the sampled tokens were: the server, or the trainer's model anew",
        evaluation=False,
    )
    timeout: PositiveFloat = setting(
        300.0, "seconds to wait for one complete answer of the server", resume=True, compared=False, evaluation=False
    )
    retry_seconds: NonNegativeFloat = setting(
        300.0,
        "seconds to go on asking a server that fails before the run stops; 0: not at all",
        resume=True,
        compared=False,
        evaluation=False,
    )
    async_rollouts: Annotated[int, Field(ge=0, le=1)] = setting(
        0, "iterations that sampling may be ahead of training; 1: both at once, one step off-policy", evaluation=False
    )
    server: ServerConfig = ServerConfig()
