"""What single values cannot show: settings that contradict each other, or that cannot act together."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from importlib.util import find_spec

from grpo_mlflow.config import model_checks, optimizers, server_checks, task_checks
from grpo_mlflow.config.schema import Config

_LONGEST_ID = 96  # of a model on the hub, which allows no longer names
_CONFIGS = ("config.json", "adapter_config.json")


def errors(config: Config) -> list[str]:
    """Return one line per contradiction: the key, its value and what is allowed."""
    return [
        *_seeds(config),
        *_counts(config),
        *task_checks.errors(config),
        *_batches(config),
        *_correction(config),
        *optimizers.errors(config.train.optimizer, config.train.optimizer_options),
        *_models(config),
        *model_checks.errors(config),
        *server_checks.errors(config),
    ]


def _seeds(config: Config) -> Iterator[str]:
    data, evaluation = config.data, config.eval
    train_end = data.train_seed_start + data.num_train_seeds
    eval_end = evaluation.id_seed_start + evaluation.num_ids
    if evaluation.enabled and evaluation.id_seed_start < train_end and data.train_seed_start < eval_end:
        yield (
            f"eval.id_seed_start = {evaluation.id_seed_start}: evaluation seeds {evaluation.id_seed_start} to "
            f"{eval_end - 1} overlap training seeds {data.train_seed_start} to {train_end - 1}; allowed: a start of "
            f"{train_end} or more, or {max(0, data.train_seed_start - evaluation.num_ids)} or less"
        )
    search = config.search
    confirm_end = search.confirm_seed_end
    for name, first, end in (
        ("training", data.train_seed_start, train_end),
        ("evaluation", evaluation.id_seed_start, eval_end),
    ):
        if search.finalists and search.confirm_seed_start < end and first < confirm_end:
            yield (
                f"search.confirm_seed_start = {search.confirm_seed_start}: fresh problems overlap {name} seeds {first} "
                f"to {end - 1}; allowed: {end} or more"
            )


def _counts(config: Config) -> Iterator[str]:
    data, evaluation, search = config.data, config.eval, config.search
    if data.num_train_seeds < data.problems_per_iteration:
        yield (
            f"data.problems_per_iteration = {data.problems_per_iteration}: more than data.num_train_seeds = "
            f"{data.num_train_seeds}; allowed: 1 to {data.num_train_seeds}"
        )
    if evaluation.enabled and max(evaluation.ks) > evaluation.replicates:
        yield (
            f"eval.ks = {list(evaluation.ks)}: pass@{max(evaluation.ks)} cannot be estimated from eval.replicates = "
            f"{evaluation.replicates}; allowed: k from 1 to {evaluation.replicates}"
        )
    if search.k > evaluation.replicates:
        yield f"search.k = {search.k}: cannot be estimated; allowed: 1 to eval.replicates = {evaluation.replicates}"
    if len(set(evaluation.ks)) < len(evaluation.ks):
        yield f"eval.ks = {list(evaluation.ks)}: holds a k twice; allowed: each k once"
    low, high = data.sat.difficulty
    if low > high:
        yield f"data.sat.difficulty = [{low}, {high}]: the first exceeds the second; allowed: [low, high] within 0 to 1"


def _batches(config: Config) -> Iterator[str]:
    rollouts, step = config.rollouts_per_iteration, config.rollouts_per_step
    if rollouts % step:
        small = [n for n in range(1, math.isqrt(rollouts) + 1) if rollouts % n == 0]
        divisors = sorted({*small, *(rollouts // n for n in small)})
        yield (
            f"train.batch_size = {config.train.batch_size}: times train.grad_accum_steps = "
            f"{config.train.grad_accum_steps} makes steps of {step} rollouts, which do not divide the {rollouts} of an "
            f"iteration; allowed: a product in {{{', '.join(map(str, divisors))}}}, or train.grad_accum_steps=auto"
        )
        return
    steps = config.train.iterations * config.steps_per_iteration
    if config.train.lr_warmup_steps >= steps:
        yield (
            f"train.lr_warmup_steps = {config.train.lr_warmup_steps}: the run has only {steps} optimizer steps, so lr "
            f"would never reach train.lr; allowed: 0 to {steps - 1}"
        )


def _correction(config: Config) -> Iterator[str]:
    train = config.train
    mode, cap, floor = train.importance_sampling_mode, train.importance_sampling_cap, train.importance_sampling_floor
    key = "train.importance_sampling_"
    if mode == "none":
        return
    if cap is None and floor is None:
        yield f"{key}mode = {mode!r}: {key}cap and {key}floor are null; allowed: one of them a number, or none"
    elif cap is not None and floor is not None and floor >= cap:
        yield f"{key}floor = {floor}: not below {key}cap = {cap}; allowed: less than {cap}, or null"
    elif mode.endswith("mask") and cap is not None and cap < 1:
        yield f"{key}cap = {cap}: masks the weight 1, on which sampler and trainer agree; allowed: 1 or more, or null"
    elif mode.endswith("mask") and floor is not None and floor > 1:
        yield f"{key}floor = {floor}: masks the weight 1, on which sampler and trainer agree; allowed: up to 1, or null"


def _models(config: Config) -> Iterator[str]:
    for key, value in (("model.train_id", config.model.train_id), ("model.ref_id", config.model.ref_id)):
        if value is None or value == "tiny":
            continue
        looks_like_path = value.startswith(("/", "./", "../", "~")) or value.count("/") > 1 or len(value) > _LONGEST_ID
        folder = os.path.expanduser(value)
        if not value.strip() or (looks_like_path and not os.path.exists(folder)):
            yield f"{key} = {value!r}: no such folder; allowed: tiny, a hub id (org/name) or a model folder"
        elif os.path.exists(folder) and not any(os.path.isfile(os.path.join(folder, name)) for name in _CONFIGS):
            yield f"{key} = {value!r}: holds no config.json; allowed: a folder written by save_pretrained"
    tiny = config.model.tiny
    if tiny.hidden_size % 2:
        yield f"model.tiny.hidden_size = {tiny.hidden_size}: odd; allowed: even numbers (rotary embedding)"
    elif tiny.hidden_size % (2 * tiny.heads):
        yield (
            f"model.tiny.heads = {tiny.heads}: twice that must divide model.tiny.hidden_size = {tiny.hidden_size} "
            f"(rotary embedding); allowed: {[h for h in range(1, 65) if tiny.hidden_size % (2 * h) == 0]}"
        )
    if config.train.kl_target is not None and config.train.kl_coef == 0:
        yield f"train.kl_target = {config.train.kl_target}: cannot adapt train.kl_coef = 0; allowed: kl_coef > 0"


def unsearchable(config: Config) -> list[str]:
    """Return one line per setting that a study cannot work with."""
    search, lines = config.search, []
    if config.resume is not None:
        lines.append(f"resume = {config.resume!r}: a study goes on with its own command; allowed: null")
    if not config.eval.enabled:
        lines.append("eval.enabled = false: a study compares trials by their evaluations; allowed: true")
    if search.sampler == "nsga2" and search.pruner != "none":
        lines.append(
            f"search.pruner = {search.pruner!r}: search.sampler = 'nsga2' has two objectives, and Optuna prunes by "
            "one only; allowed: none"
        )
    served = {config.generation.backend, config.eval.backend or config.generation.backend} != {"local"}
    if search.n_jobs > 1 and served and not config.generation.server.manage and config.generation.sync != "none":
        own = "generation.server.manage=true"
        if config.generation.server.port:
            own += " generation.server.port=0"
        choice = f", or {own} (a server per trial)" if server_checks.takes(config, own) else ""
        lines.append(
            f"search.n_jobs = {search.n_jobs}: trials at once would load their weights into the same server; allowed: "
            f"1{choice}"
        )
    if search.n_jobs > 1 and config.generation.server.manage and config.generation.server.port:
        lines.append(
            f"generation.server.port = {config.generation.server.port}: with search.n_jobs = {search.n_jobs} each "
            "trial has a server of its own; allowed: 0 (free ports)"
        )
    if search.objective == "best" and search.k != 1:
        lines.append(
            f"search.objective = 'best': the checkpoint that a run keeps as its best is that by pass@1, but search.k = "
            f"{search.k}; allowed: last, mean"
        )
    if search.launcher == "ray" and find_spec("ray") is None:
        lines.append(
            "search.launcher = 'ray': the package ray is not installed; allowed: local, or ray after pip install -e "
            "'.[ray]' in the project's folder"
        )
    needed = max(search.k, *config.eval.ks)
    if search.finalists and search.confirm_replicates < needed:
        lines.append(
            f"search.confirm_replicates = {search.confirm_replicates}: pass@{needed} cannot be estimated from it; "
            f"allowed: {needed} or more"
        )
    return lines


def untrainable(config: Config) -> list[str]:
    """Return one line per setting that is right for measuring a model but not for training one."""
    return list(server_checks.untrainable(config))
