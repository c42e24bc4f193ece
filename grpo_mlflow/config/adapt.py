"""Values of presets and defaults that give way to what the user set, where both together would be refused.

Only a value that nobody chose gives way, and only where one other value is plainly right. How long a run is, who
samples, and how long completions may be is never decided here: those contradictions are refused (`checks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from grpo_mlflow.config.engines import SERVERS
from grpo_mlflow.config.schema import Config


@dataclass(frozen=True, slots=True)
class Change:
    """A setting, the value that it takes, and why the one of the preset or default cannot stand."""

    key: str
    value: Any
    why: str


Free = Callable[[str], bool]  # whether a key's value comes from a preset or is a default
Rule = Callable[[Config, Free], Iterator[Change]]


def _task(config: Config, free: Free) -> Iterator[Change]:
    if config.data.rows.path is not None and "rows" not in config.data.tasks and free("data.task"):
        yield Change("data.task", "rows", "data.rows.path names rows")


def _problems(config: Config, free: Free) -> Iterator[Change]:
    seeds, problems = config.data.num_train_seeds, config.data.problems_per_iteration
    if seeds >= problems:
        return
    if free("data.num_train_seeds"):
        yield Change("data.num_train_seeds", problems, f"an iteration takes {problems} different problems")
    elif free("data.problems_per_iteration"):
        yield Change("data.problems_per_iteration", seeds, f"there are only {seeds} training problems")


def _seeds(config: Config, free: Free) -> Iterator[Change]:
    data, evaluation = config.data, config.eval
    train_end = data.train_seed_start + data.num_train_seeds
    eval_end = evaluation.id_seed_start + evaluation.num_ids
    if not evaluation.enabled or evaluation.id_seed_start >= train_end or data.train_seed_start >= eval_end:
        return
    why = "evaluation problems must not be training problems"
    if free("eval.id_seed_start"):
        yield Change("eval.id_seed_start", train_end, why)
    elif free("data.train_seed_start"):
        yield Change("data.train_seed_start", eval_end, why)


def _confirmation(config: Config, free: Free) -> Iterator[Change]:
    data, evaluation, search = config.data, config.eval, config.search
    first, end = search.confirm_seed_start, search.confirm_seed_end
    ranges = (
        (data.train_seed_start, data.train_seed_start + data.num_train_seeds),
        (evaluation.id_seed_start, evaluation.id_seed_start + evaluation.num_ids),
    )
    overlaps = any(first < other_end and other < end for other, other_end in ranges)
    if search.finalists and overlaps and free("search.confirm_seed_start"):
        start = max(other_end for _, other_end in ranges)
        yield Change("search.confirm_seed_start", start, "problems that confirm must be fresh")


def _replicates(config: Config, free: Free) -> Iterator[Change]:
    evaluation, search = config.eval, config.search
    most = max(evaluation.ks) if evaluation.enabled else 0
    needed = max(most, search.k)
    if needed <= evaluation.replicates:
        return
    if free("eval.replicates"):
        yield Change("eval.replicates", needed, f"pass@{needed} needs {needed} completions of a problem")
    elif most > evaluation.replicates and free("eval.ks"):
        left = [k for k in evaluation.ks if k <= evaluation.replicates] or [1]
        yield Change("eval.ks", left, f"pass@{most} cannot be estimated from {evaluation.replicates} completions")


def _confirm_replicates(config: Config, free: Free) -> Iterator[Change]:
    search, needed = config.search, max(config.search.k, *config.eval.ks)
    if search.finalists and search.confirm_replicates < needed and free("search.confirm_replicates"):
        why = f"pass@{needed} needs {needed} completions of a fresh problem"
        yield Change("search.confirm_replicates", needed, why)


def _steps(config: Config, free: Free) -> Iterator[Change]:
    train, rollouts = config.train, config.rollouts_per_iteration
    if rollouts % config.rollouts_per_step == 0 or train.grad_accum_steps == "auto":
        return
    why = f"optimizer steps must divide the {rollouts} rollouts of an iteration evenly"
    fitting = [n for n in range(1, train.batch_size + 1) if rollouts % (n * train.grad_accum_steps) == 0]
    if not free("train.batch_size"):
        fitting = []
    automatic = free("train.grad_accum_steps")
    # many steps of a few rollouts each would be another training: then rather one of all
    if fitting and (not automatic or 2 * fitting[-1] >= train.batch_size):
        yield Change("train.batch_size", fitting[-1], why)
    elif automatic:
        yield Change("train.grad_accum_steps", "auto", why)


def _warm_up(config: Config, free: Free) -> Iterator[Change]:
    if config.rollouts_per_iteration % config.rollouts_per_step or not free("train.lr_warmup_steps"):
        return
    steps = config.train.iterations * config.steps_per_iteration
    if config.train.lr_warmup_steps >= steps:
        yield Change("train.lr_warmup_steps", steps // 10, f"the run has only {steps} optimizer steps")


def _kl(config: Config, free: Free) -> Iterator[Change]:
    train = config.train
    if train.kl_target is not None and train.kl_coef == 0 and free("train.kl_coef"):
        yield Change("train.kl_coef", Config().train.kl_coef, "train.kl_target adapts it, which 0 leaves no room for")


def _tiny(config: Config, free: Free) -> Iterator[Change]:
    heads, size = config.model.tiny.heads, config.model.tiny.hidden_size
    if size % 2 or size % (2 * heads) == 0:
        return
    why = "twice the heads must divide the hidden size (rotary embedding)"
    if free("model.tiny.heads"):
        yield Change("model.tiny.heads", max(n for n in range(1, heads + 1) if size % (2 * n) == 0), why)
    elif free("model.tiny.hidden_size"):
        yield Change("model.tiny.hidden_size", -(-size // (2 * heads)) * 2 * heads, why)


def _adapter(config: Config, free: Free) -> Iterator[Change]:
    model = config.model
    if not model.lora.rank:
        if config.generation.sync == "lora" and free("generation.sync"):
            yield Change("generation.sync", "reload", "the model has no adapter")
    elif model.ref_id not in (None, model.train_id) and free("model.ref_id"):
        yield Change("model.ref_id", None, "the reference is the trained model without its adapter")


def _logprobs(config: Config, free: Free) -> Iterator[Change]:
    generation = config.generation
    kind = SERVERS.get(generation.backend)
    penalised = kind and not kind.penalises_as_here and generation.repetition_penalty != 1
    if kind and penalised and free("generation.repetition_penalty"):
        why = f"{kind.title}'s penalty falls on other tokens than the trainer's"
        yield Change("generation.repetition_penalty", 1.0, why)
    older = generation.async_rollouts  # what sampled is not there any more to be asked
    shaped = generation.top_p < 1 or generation.top_k > 0
    if not kind or kind.shaped_logprobs or older or not shaped or generation.behaviour_logprobs != "server":
        return
    if free("generation.behaviour_logprobs"):
        why = f"{kind.title}'s log-probabilities leave top_p and top_k out"
        yield Change("generation.behaviour_logprobs", "recompute", why)


def _pruner(config: Config, free: Free) -> Iterator[Change]:
    if config.search.sampler == "nsga2" and config.search.pruner != "none" and free("search.pruner"):
        yield Change("search.pruner", "none", "search.sampler = 'nsga2' has two objectives, and pruners know one")


# In this order: what a rule changes may be what the next one looks at.
RULES: tuple[Rule, ...] = (
    *(_task, _problems, _seeds, _confirmation, _replicates, _confirm_replicates, _steps, _warm_up),
    *(_kl, _tiny, _adapter, _logprobs, _pruner),
)
