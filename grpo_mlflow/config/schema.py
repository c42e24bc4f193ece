"""Every setting: its type, its default and its range. One class per YAML section.

The defaults are those of the guide's set-up (a 1.5B model and a server); the preset `tiny` turns them into a run for
a laptop. Fields are strict (the text "8" is not a number) and frozen.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue
from pydantic_core import PydanticCustomError

from grpo_mlflow.config.engines import SERVERS
from grpo_mlflow.config.fields import (
    Fraction,
    Ints,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    as_tuple,
)
from grpo_mlflow.config.methods import Method

if TYPE_CHECKING:
    Backend = str  # type checkers take no computed Literal
else:
    _BACKENDS = ("local", *SERVERS)
    Backend = Literal[_BACKENDS]
SyncName = Literal["reload", "lora", "restart", "none"]


class TinyConfig(Section):
    """The recipe of the embedded model; any change makes another model in the cache."""

    hidden_size: Positive = Field(128, description="width of the transformer")
    layers: Positive = Field(2, description="number of transformer blocks")
    heads: Positive = Field(4, description="attention heads; must divide hidden_size")
    steps: Positive = Field(800, description="supervised warm-up steps")
    batch_size: Positive = Field(128, description="demonstrations per warm-up step")
    lr: PositiveFloat = Field(1e-3, description="peak learning rate of the warm-up")
    error_rate: Fraction = Field(0.5, description="share of demonstrations with a wrong answer")
    seed: NonNegative = Field(0, description="seed of the initial weights and of the demonstrations")


class LoraConfig(Section):
    """A low-rank adapter, trained in the place of the model's own weights."""

    rank: NonNegative | None = Field(None, description="rank of the adapter; null or 0: none, all weights are trained")
    alpha: Positive = Field(32, description="the adapter's output is scaled by alpha / rank")
    targets: (
        Literal["all-linear"]
        | Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(as_tuple), Field(min_length=1)]
    ) = Field("all-linear", description="layers with an adapter: all-linear, or a list such as [q_proj, v_proj]")


class ModelConfig(Section):
    train_id: str = Field("Qwen/Qwen2.5-1.5B", description="model to train: `tiny`, a hub id or a local folder")
    ref_id: str | None = Field(None, description="reference model of the KL term; null: the initial train_id")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        "auto", description="auto, cpu, cuda or cuda:N"
    )
    ref_device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] | None = Field(
        None, description="device of the reference model: cpu, cuda or cuda:N; null: that of the trained one"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of the computation; weights and optimizer stay float32"
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        Field(None, description="how attention is computed; null: as transformers chooses, which is sdpa for most")
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, about a third more work"
    )
    chat_template: Literal["auto", "none"] = Field(
        "auto", description="auto: prompts through the tokenizer's chat template where it has one; none: plain text"
    )
    trust_remote_code: bool = Field(False, description="let a hub model run its own Python code")
    lora: LoraConfig = LoraConfig()
    tiny: TinyConfig = TinyConfig()


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
    sync: SyncName = Field(
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


class TrainConfig(Section):
    iterations: Positive = Field(10, description="generate, update, evaluate: how many times")
    batch_size: Positive = Field(8, description="rollouts per forward and backward pass (micro-batch)")
    grad_accum_steps: Positive | Literal["auto"] = Field(
        1, description="micro-batches per optimizer step; auto: one optimizer step per epoch"
    )
    epochs: Positive = Field(1, description="passes over the rollouts of an iteration")
    lr: PositiveFloat = Field(1e-5, description="peak learning rate (AdamW)")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="shape after the warm-up")
    lr_warmup_steps: NonNegative = Field(0, description="optimizer steps of linear warm-up")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay")
    grad_clip: PositiveFloat | None = Field(1.0, description="largest gradient norm; null is off")
    method: Method = Field(
        "grpo", description="a method by its name: what it sets, keys given beside it change (docs/methods.md)"
    )
    scale_rewards: Literal["group", "batch", "none", "leave_one_out"] = Field(
        "group", description="what divides r - mean(group); leave_one_out: r - mean of the others"
    )
    surrogate: Literal["clip", "cispo"] = Field("clip", description="how the ratio is bounded")
    ratio_level: Literal["token", "sequence"] = Field("token", description="ratio per token, or per rollout (GSPO)")
    clip_low: Annotated[float, Field(ge=0, le=1)] = Field(0.2, description="lower bound of the ratio is 1 - clip_low")
    clip_high: NonNegativeFloat = Field(0.2, description="upper bound of the ratio is 1 + clip_high")
    aggregation: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = Field("grpo", description="how tokens are averaged")
    kl_coef: NonNegativeFloat = Field(0.05, description="weight of KL(policy, reference); 0 loads no reference")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="KL estimate per token")
    kl_target: PositiveFloat | None = Field(None, description="adapt kl_coef towards this KL; null keeps it fixed")
    kl_horizon: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        10.0, description="iterations over which kl_coef adapts"
    )
    entropy_coef: NonNegativeFloat = Field(0.0, description="weight of the entropy bonus")
    sampler_correction_cap: PositiveFloat | None = Field(
        2.0, description="cap of the importance weight trainer / sampler; null is off"
    )


class ArithmeticConfig(Section):
    operations: Annotated[tuple[Literal["+", "-", "*"], ...], BeforeValidator(as_tuple), Field(min_length=1)] = Field(
        ("+",), description="operations to draw from"
    )
    digits: Annotated[int, Field(ge=1, le=9)] = Field(2, description="digits of each operand")
    terms: Annotated[int, Field(ge=2, le=6)] = Field(2, description="operands per problem")


class SatConfig(Section):
    difficulty: Annotated[
        tuple[Fraction, Fraction],
        BeforeValidator(as_tuple),
        Field(description="range [low, high] that problems draw d from"),
    ] = (0.3, 0.7)


class Gsm8kConfig(Section):
    path: str | None = Field(
        None, description="folder or file with question and answer, parquet or jsonl; null: openai/gsm8k from the hub"
    )


TASK_NAMES = "'arithmetic' or 'sat', 'gsm8k', 'mix', reasoning_gym/NAME or python:MODULE:CLASS"
_TASK_NAME = re.compile(r"arithmetic|sat|gsm8k|mix|reasoning_gym/[a-z0-9_]+|python:[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _task_name(name: str) -> str:
    if not _TASK_NAME.fullmatch(name):
        raise PydanticCustomError("task_name", "input should be {names}", {"names": TASK_NAMES})
    return name


TaskName = Annotated[str, AfterValidator(_task_name)]


class DataConfig(Section):
    task: TaskName = Field("sat", description="what the model learns")
    source: Annotated[str, Field(pattern=r"^(live|runs:/[0-9a-f]{32})$")] = Field(
        "live", description="live, or runs:/RUN_ID to train on the rollouts that a run has kept"
    )
    problems_per_iteration: Positive = Field(4, description="problems per iteration")
    rollouts_per_problem: Annotated[int, Field(ge=2)] = Field(4, description="K: completions per problem")
    resample_rounds: NonNegative = Field(
        0,
        description="how often an iteration may sample further training problems in place of groups whose rewards are "
        "all equal (DAPO); 0: never",
    )
    train_seed_start: NonNegative = Field(1000, description="first training problem")
    num_train_seeds: Positive = Field(64, description="number of training problems")
    system_prompt: str | None = Field(None, description="first message of every prompt; null: the task's own, or none")
    overlong_buffer: NonNegative = Field(
        0, description="last tokens before max_new_tokens over which a training reward falls by up to 1 (DAPO); 0: off"
    )
    mix: dict[str, PositiveFloat] = Field({}, description="task = mix: names of tasks and their weights")
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    sat: SatConfig = SatConfig()
    gsm8k: Gsm8kConfig = Gsm8kConfig()
    reasoning_gym: dict[str, JsonValue] = Field({}, description="settings of the generator, as a mapping")
    settings: dict[str, JsonValue] = Field({}, description="keyword arguments of a python: task, as a mapping")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that problems come from."""
        return tuple(self.mix) if self.task == "mix" else (self.task,)


class EvalConfig(Section):
    enabled: bool = Field(True, description="evaluate before, during and after training")
    interval: Positive = Field(1, description="iterations between evaluations")
    backend: Backend | None = Field(None, description="who samples; null: as generation.backend")
    base_url: str | None = Field(None, description="address of the server; null: as generation.base_url")
    batch_size: Positive = Field(8, description="prompts in flight at once")
    replicates: Positive = Field(4, description="completions per problem")
    num_ids: Annotated[int, Field(ge=2)] = Field(16, description="number of evaluation problems")
    id_seed_start: NonNegative = Field(5000, description="first evaluation problem")
    ks: Annotated[Ints, Field(min_length=1)] = Field((1, 4), description="the k of pass@k and mean@k")
    greedy: bool = Field(True, description="also score the most likely answer")
    temperature: PositiveFloat | None = Field(None, description="null: as generation.temperature")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="null: as generation.top_p")
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="null: as generation.top_k")


class CheckpointConfig(Section):
    save_interval: NonNegative = Field(1, description="iterations between checkpoints; 0: only the last")
    keep_last: Positive = Field(3, description="newest checkpoints kept; the best by pass@1 is kept beside them")


class TrackingConfig(Section):
    uri: str | None = Field(None, description="MLflow store; null: MLFLOW_TRACKING_URI, else ./mlflow.db")
    experiment: Annotated[str, Field(min_length=1)] = Field("grpo", description="MLflow experiment")
    run_name: str | None = Field(None, description="MLflow run name; null: MLflow picks one")
    rollouts: bool = Field(True, description="keep every training rollout as rollouts/iter_NNN.jsonl")
    samples: NonNegative = Field(32, description="completions in the table of each evaluation")
    system_metrics: bool = Field(False, description="let MLflow log CPU, memory and GPU use")


class SearchConfig(Section):
    space: Annotated[str, Field(min_length=1)] = Field("tiny", description="what varies: a name, a file, KEY=[VALUES]")
    n_trials: Positive = Field(12, description="trials of the whole study, over all commands that join it")
    timeout: PositiveFloat | None = Field(None, description="seconds after which no further trial starts")
    sampler: Literal["tpe", "random", "grid", "gp", "cmaes", "nsga2"] = Field(
        "tpe", description="who proposes settings; nsga2 has two objectives, pass@k and `cost`"
    )
    pruner: Literal["paired", "median", "asha", "hyperband", "percentile", "patient", "threshold", "none"] = Field(
        "paired", description="who ends hopeless trials early"
    )
    n_jobs: Positive = Field(1, description="trials at once on this machine, each in a process of its own")
    study_name: Annotated[str, Field(min_length=1)] = Field("grpo", description="running it again continues the study")
    storage: str | None = Field(None, description="Optuna storage URL; null: optuna.db beside the sqlite MLflow store")
    k: Positive = Field(1, description="the k of the pass@k to maximise")
    objective: Literal["last", "mean", "best"] = Field(
        "last", description="a trial's score: its last evaluation, the mean of its last ones, or its best"
    )
    objective_window: Positive = Field(3, description="how many of the last evaluations `mean` takes")
    cost: Literal["tokens", "seconds"] = Field("tokens", description="what nsga2 minimises beside: tokens or seconds")
    finalists: NonNegative = Field(3, description="best trials to measure again on fresh problems")
    confirm_seed_start: NonNegative = Field(50000, description="first of the fresh problems")
    confirm_num_ids: Annotated[int, Field(ge=2)] = Field(512, description="number of fresh problems")
    confirm_replicates: Positive = Field(16, description="completions per fresh problem")
    retrain_seeds: NonNegative = Field(
        0, description="train each finalist again with this many new seeds, and confirm those models"
    )


class Config(Section):
    """The resolved configuration of one run."""

    seed: NonNegative = Field(0, description="seed of every random draw of the run")
    resume: str | None = Field(None, description="run id or checkpoint folder to continue")
    model: ModelConfig = ModelConfig()
    generation: GenerationConfig = GenerationConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    search: SearchConfig = SearchConfig()

    @property
    def rollouts_per_iteration(self) -> int:
        return self.data.problems_per_iteration * self.data.rollouts_per_problem

    @property
    def rollouts_per_step(self) -> int:
        accumulate = self.train.grad_accum_steps
        return self.rollouts_per_iteration if accumulate == "auto" else self.train.batch_size * accumulate

    @property
    def steps_per_iteration(self) -> int:
        return self.train.epochs * (self.rollouts_per_iteration // self.rollouts_per_step)
