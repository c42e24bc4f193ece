"""Settings that are legal but cannot act as meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from urllib.parse import urlsplit

from grpo_mlflow.config import addresses, task_checks
from grpo_mlflow.config.schema import Config


def warnings(config: Config, chosen: Sequence[str]) -> Iterator[str]:
    """Yield one line per setting that somebody chose and that cannot act. Defaults and presets stay silent."""
    for keys, why in (*_update(config), *_problems(config, chosen), *_servers(config, chosen)):
        for key in keys:
            if key in chosen:
                yield f"{key} has no effect: {why}"
    yield from _unwise(config)


def _update(config: Config) -> Iterator[tuple[Iterable[str], str]]:
    """Yield keys of the optimizer's steps and of the loss, with why they cannot act."""
    train = config.train
    if config.steps_per_iteration == 1:
        yield (
            ("train.clip_low", "train.clip_high", "train.ratio_level"),
            "with one optimizer step per iteration the ratio is exactly 1 (raise train.epochs, or lower "
            "train.batch_size * train.grad_accum_steps)",
        )
    if train.multi_objective_aggregation == "normalize_then_sum":
        yield ("train.scale_rewards",), "train.multi_objective_aggregation normalises by groups, and then by the batch"
    if train.importance_sampling_mode == "none":
        bounds = ("train.importance_sampling_cap", "train.importance_sampling_floor")
        yield bounds, "train.importance_sampling_mode is none"
    if train.kl_coef == 0:
        yield ("model.ref_id", "model.ref_device", "train.kl_estimator"), "train.kl_coef is 0"
    if train.kl_target is None:
        yield ("train.kl_horizon",), "train.kl_target is null"
    if config.model.device == "cpu":
        yield ("train.optimizer_offload",), "all is in host memory already (model.device is cpu)"
    if train.iterations * config.steps_per_iteration == 1:
        yield ("train.lr_schedule",), "the run has one optimizer step"


def _problems(config: Config, chosen: Sequence[str]) -> Iterator[tuple[Iterable[str], str]]:
    """Yield keys of the model, the tasks and their evaluation, with why they cannot act."""
    if config.model.train_id != "tiny":
        yield _under("model.tiny.", chosen), "model.train_id is not tiny"
    if config.model.chat_template == "none":
        yield _under("model.chat_template_kwargs", chosen), "model.chat_template is none"
    if not config.model.lora.rank:
        yield ("model.lora.alpha", "model.lora.targets"), "model.lora.rank is null or 0"
        if config.train.kl_coef == 0:
            yield ("model.frozen_dtype",), "all weights are trained, and there is no reference model"
    if config.model.dtype == "float32":
        yield ("model.cast_lm_head_to_fp32",), "model.dtype is float32"
    for keys in task_checks.idle(config, chosen):
        yield keys, f"data.task is {config.data.task}"
    if config.search.n_jobs == 1:
        yield ("search.launcher",), "search.n_jobs is 1"
    if config.search.launcher == "local":
        yield ("search.cpus_per_worker", "search.gpus_per_worker"), "search.launcher is local"
    if not config.eval.enabled:
        yield [key for key in _under("eval.", chosen) if key != "eval.enabled"], "eval is disabled"


def _servers(config: Config, chosen: Sequence[str]) -> Iterator[tuple[Iterable[str], str]]:
    """Yield keys of servers, with why they cannot act."""
    generation, evaluation = config.generation, config.eval
    if generation.backend == "local" and (evaluation.backend or "local") == "local":
        remote = ("base_url", "sync", "sync_dir", "behaviour_logprobs", "timeout", "retry_seconds")
        yield (
            [f"generation.{key}" for key in remote],
            "no server is asked (generation.backend=vllm_server or sglang_server asks one)",
        )
    elif generation.server.manage:
        yield ("generation.base_url",), "generation.server.manage starts a server of its own"
    if "local" not in (generation.backend, evaluation.backend or generation.backend):
        yield ("generation.max_tokens_per_batch",), "nothing is sampled in this process"
    if not generation.server.manage:
        keys = [key for key in _under("generation.server.", chosen) if key != "generation.server.manage"]
        yield [key for key in keys if key not in _of_start_command(config)], "generation.server.manage is false"
    if evaluation.enabled and (evaluation.backend or generation.backend) == "local":
        yield ("eval.base_url",), "evaluation samples in this process"


def _of_start_command(config: Config) -> list[str]:
    """Return what shapes the command that starts a server by hand, which refusals show; none where none is asked."""
    generation, backends = config.generation, {config.generation.backend, config.eval.backend or "local"}
    if backends == {"local"}:
        return []
    names = ["python", "device", "memory", "arguments"]
    if any(urlsplit(address).port is None for address in addresses.of(generation.base_url)):
        names.append("port")
    return [f"generation.server.{name}" for name in names]


def _unwise(config: Config) -> Iterator[str]:
    """Yield a line for values that do harm, whether somebody chose them or not."""
    train, data, generation = config.train, config.data, config.generation
    if train.kl_coef != 0 and train.kl_estimator == "k1":
        yield "train.kl_estimator = 'k1': as a loss its gradient is zero on average; k2 and k3 pull to the reference"
    if data.resample_rounds > 0 and data.source != "live":
        yield "data.resample_rounds has no effect: data.source replays the groups that a run trained on"
    elif data.resample_rounds > 0 and data.num_train_seeds == data.problems_per_iteration:
        yield "data.resample_rounds has no effect: every iteration holds all data.num_train_seeds problems"
    older = generation.backend != "local" and (generation.async_rollouts or generation.sync == "none")
    off = train.importance_sampling_mode == "none"
    if older and off:
        yield "train.importance_sampling_mode = 'none' while rollouts come from older weights: the gradient is biased"
    shaped = generation.top_p < 1 or generation.top_k > 0 or generation.repetition_penalty != 1
    if shaped and off:
        yield (
            "train.importance_sampling_mode = 'none' while generation.top_p, top_k or repetition_penalty reshape the "
            "samples: the gradient is biased"
        )


def _under(prefix: str, keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key.startswith(prefix)]
