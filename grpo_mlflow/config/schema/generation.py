"""Who samples completions, how, and the server that a run may start for it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from grpo_mlflow.config.fields import NonNegativeFloat, Positive, PositiveFloat, Section, as_tuple

Backend = Literal["local", "vllm_server", "sglang_server"]


class ServerConfig(Section):
    """A server that the run starts as its child, watches and ends."""

    manage: bool = Field(False, description="start the server; generation.base_url then has no effect")
    python: Annotated[str, Field(min_length=1)] = Field(
        ".venv-vllm/bin/python", description="Python of the environment that the server is installed in"
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="port on 127.0.0.1; 0: a free one")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        "auto", description="where it computes: auto, cpu, cuda or cuda:N"
    )
    memory: PositiveFloat | None = Field(
        None, description="its share of the GPU's memory; on a CPU: GiB for its cache; null: the server's default"
    )
    arguments: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        (), description="further arguments of its command line; they win over ours"
    )
    start_seconds: PositiveFloat = Field(600.0, description="how long its start may take")


class GenerationConfig(Section):
    backend: Backend = Field("vllm_server", description="who samples the rollouts")
    base_url: str | None = Field(None, description="address of the inference server")
    batch_size: Positive = Field(4, description="prompts in flight at once")
    max_new_tokens: Positive = Field(256, description="longest completion, in tokens")
    temperature: PositiveFloat = Field(0.7, description="softmax temperature of sampling and of trained log-probs")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(0.95, description="nucleus mass; 1 is off")
    top_k: Annotated[int, Field(ge=-1)] = Field(50, description="most likely tokens kept; -1 or 0 is off")
    repetition_penalty: PositiveFloat = Field(1.1, description="penalty on tokens seen before; 1 is off")
    sync: Literal["reload", "lora", "restart", "none"] = Field(
        "reload",
        description="how a server gets new weights: in place, as an adapter beside the base model (model.lora), by a "
        "restart (managed only), or never (it keeps the initial ones, and the sampler correction carries the "
        "difference)",
    )
    sync_dir: str | None = Field(
        None, description="folder for those weights that trainer and server both see; null: a temporary one"
    )
    behaviour_logprobs: Literal["server", "recompute"] = Field(
        "server", description="who says how likely the sampled tokens were: the server, or the trainer's model anew"
    )
    timeout: PositiveFloat = Field(300.0, description="seconds to wait for one answer of the server")
    retry_seconds: NonNegativeFloat = Field(
        300.0, description="seconds to go on asking a server that fails before the run stops; 0: not at all"
    )
    async_rollouts: Annotated[int, Field(ge=0, le=1)] = Field(
        0, description="iterations that sampling may be ahead of training; 1: both at once, one step off-policy"
    )
    server: ServerConfig = ServerConfig()
