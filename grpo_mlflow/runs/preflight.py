"""Model, tokenizer, chat template and task meet before a run is opened: what would spoil it later is one line now."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from grpo_mlflow.config import Config
from grpo_mlflow.errors import ConfigError, ModelError, one_line
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.tasks import Task, contents
from grpo_mlflow.training import rollouts
from grpo_mlflow.training.evaluation import evaluation_sampling
from grpo_mlflow.training.sources import Recording
from grpo_mlflow.types import Problem, Prompt, Split

_TRAINING = 64  # training problems that are met, in the order of the run
_LOOKED = 0.5  # seconds for later ones, of which the longest are met; `rollouts.render` measures them all in the run
_LONGEST = 16  # of the later ones
_JUDGED = 16  # problems whose own answers take the way of a completion


def require(config: Config, task: Task, policy: Policy, begun: int | None = 0) -> int:
    """Return the most tokens that a prompt and its completion will have.

    Args:
        begun: iterations that the run has behind it, whose problems are not met again; None: it only evaluates.

    Raises:
        ModelError: the tokenizer or its template cannot say what the task asks, or not write what it wants to hear.
        ConfigError: a prompt and its completion are longer than the model has positions for.
    """
    most = 0
    for split, problems, new, key in _asked(config, task, begun):
        prompts = [_rendered(policy, problem) for problem in problems]
        _require_heard(policy, problems[0], prompts[0])
        _require_told_apart(policy, prompts)
        for problem in problems[:_JUDGED]:
            _require_answer(task, policy, problem)
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        lack = rollouts.lacks_room(policy, longest, new)
        if lack and (split == "eval" or not begun):  # a run that is resumed says how to go on without the problem
            raise ConfigError(f"{key} = {new}: {lack}")
        most = max(most, len(longest.token_ids) + new)
    return most if policy.positions is None else min(most, policy.positions)


def require_any(policy: Policy) -> None:
    """Refuse what needs no task to be seen, beyond what loading refuses.

    Raises:
        ModelError: a prompt has a token that the model has no embedding for.
    """
    prompt = policy.prompt(Problem("", 0, ({"role": "user", "content": "1 + 2 ="},), {}))
    _require_embedded(policy, prompt.token_ids, f"model {policy.name!r}: a prompt")


def require_recorded(config: Config, policy: Policy, recording: Recording, begun: int = 0) -> int:
    """Return the most tokens that a recorded prompt and its completion have, in the iterations that come first.

    Args:
        begun: as in `require`.

    Raises:
        ModelError: they have a token that the model has no embedding for.
        ConfigError: they are longer than the model has positions for.
    """
    most = met = 0
    for version in range(begun, config.train.iterations):
        groups = recording(version)
        for rollout in (each for group in groups for each in group.rollouts):
            ids = (*rollout.prompt.token_ids, *rollout.completion.token_ids)
            what = f"data.source = {config.data.source!r}: a rollout of {rollout.prompt.problem_id}"
            _require_embedded(policy, ids, what)
            if policy.positions is not None and len(ids) > policy.positions:
                raise ConfigError(
                    f"{what} has {len(ids)} tokens, and the model {policy.positions} positions; allowed: a model with "
                    "more positions, or a run with shorter texts"
                )
            most = max(most, len(ids))
        met += len(groups)
        if met >= _TRAINING:  # and all of the next iteration, so that a resume meets what the run has stopped at
            break
    return most


def idle_arguments(config: Config, task: Task, policy: Policy, *, trains: bool = True) -> str | None:
    """Return a line on arguments of the chat template without which a prompt is the same; None: there are none.

    Args:
        trains: whether the run trains, or evaluates alone.
    """
    settings, renders = policy.template_settings, trains and config.data.source == "live"
    if not settings or (trains and not renders and not config.eval.enabled):
        return None
    seeds: dict[Split, int] = {"train": config.data.train_seed_start, "eval": config.eval.id_seed_start}
    split: Split = "train" if renders else "eval"
    problem = task.problem(split, seeds[split])
    asked = policy.prompt(problem)
    idle = []
    for name in settings:
        others = {key: value for key, value in settings.items() if key != name}
        try:
            changes = replace(policy, template_settings=others).prompt(problem) != asked
        except Exception:  # a template that cannot do without
            changes = True
        if not changes:
            idle.append(name)
    if not idle:
        return None
    return (
        f"model.chat_template_kwargs: {', '.join(idle)} changes nothing in a prompt: the chat template does not know "
        "it, or does so anyway"
    )


def _asked(config: Config, task: Task, begun: int | None) -> list[tuple[Split, Sequence[Problem], int, str]]:
    """Return problems of a split, the most new tokens of their completions, and the setting that says so."""
    asked: list[tuple[Split, Sequence[Problem], int, str]] = []
    if config.eval.enabled or begun is None:
        key = "generation.max_new_tokens" if config.eval.max_new_tokens is None else "eval.max_new_tokens"
        problems, _ = contents.evaluation_problems(task, config)
        asked.append(("eval", problems, evaluation_sampling(config).max_new_tokens, key))
    goes_on = begun is not None and begun < config.train.iterations
    if begun is not None and goes_on and config.data.source == "live":  # of recorded ones, see `require_recorded`
        new = config.generation.max_new_tokens
        asked.append(("train", _training(config, task, begun), new, "generation.max_new_tokens"))
    return asked


def _training(config: Config, task: Task, begun: int) -> list[Problem]:
    """Return the training problems that come first, all of the next iteration among them, and the longest of others.

    So what a run has stopped at, its resume meets.
    """
    seeds = _seeds_to_come(config, begun)
    next_ones = config.data.problems_per_iteration * (1 + config.data.resample_rounds)
    first = [task.problem("train", seed) for seed in islice(seeds, max(_TRAINING, next_ones))]
    later, until = [], time.perf_counter() + _LOOKED
    for seed in seeds:
        later.append(task.problem("train", seed))
        if time.perf_counter() > until:
            break
    return first + heapq.nlargest(_LONGEST, later, key=_characters)


def _characters(problem: Problem) -> int:
    return sum(len(message["content"]) for message in problem.messages)


def _seeds_to_come(config: Config, begun: int) -> Iterator[int]:
    """Yield the seeds of the training problems in the order in which the run meets them, each once."""
    data, met = config.data, set[int]()
    first, count, each = data.train_seed_start, data.num_train_seeds, data.problems_per_iteration
    for version in range(begun, config.train.iterations):
        seeds = rollouts.seeds_of_iteration(first, count, each, version, config.seed)
        if version == begun:
            seeds += rollouts.further_seeds(first, count, seeds, version, config.seed)[: data.resample_rounds * each]
        for seed in seeds:
            if seed not in met:
                met.add(seed)
                yield seed
        if len(met) >= count:
            return


def _rendered(policy: Policy, problem: Problem) -> Prompt:
    """Return the problem's prompt.

    Raises:
        ModelError: it cannot be rendered, has no token, one that the model does not know, or ends already.
    """
    what = _prompt_of(policy, problem.id)
    try:
        prompt = policy.prompt(problem)
    except Exception as error:  # a template is a program of somebody's own
        raise ModelError(
            f"{what} cannot be rendered by its chat template: {one_line(error)}; allowed: model.chat_template=none, "
            "or a template that takes these roles (data.system_prompt adds a system message)"
        ) from error
    if not prompt.token_ids:
        raise ModelError(f"{what} has no token; allowed: a tokenizer that gives it some")
    _require_embedded(policy, prompt.token_ids, what)
    if prompt.token_ids[-1] in policy.eos_ids and _has_ended(policy, problem, prompt):
        raise ModelError(
            f"{what} ends with the end-of-sequence token {prompt.token_ids[-1]}, after which nothing is to be written; "
            "allowed: a tokenizer that adds none (add_eos_token=false), or a template with a generation prompt"
        )
    return prompt


def _prompt_of(policy: Policy, problem_id: str) -> str:
    return f"model {policy.name!r}: the prompt of {problem_id}"


def _require_embedded(policy: Policy, ids: Sequence[int], what: str) -> None:
    known = policy.model.get_input_embeddings().weight.shape[0]
    if max(ids, default=0) >= known:
        raise ModelError(f"{what} has token {max(ids)}; allowed: below {known}, which the model has embeddings for")


def _has_ended(policy: Policy, problem: Problem, prompt: Prompt) -> bool:
    """Return whether the end-of-sequence token at the end of a prompt means that nothing follows.

    It does not where it opens the answer: Phi-3 lists <|assistant|>, its generation prompt, among those tokens.
    """
    if prompt.token_ids[-1] == policy.tokenizer.eos_token_id or not policy.tokenizer.chat_template:
        return True
    return policy.prompt(problem, opens=False).token_ids == prompt.token_ids


def _require_heard(policy: Policy, problem: Problem, prompt: Prompt) -> None:
    """Refuse a template that leaves a message out, such as that of the system."""
    for place, message in enumerate(problem.messages):
        other = {**message, "content": f"{message['content']} 7"}
        messages = (*problem.messages[:place], other, *problem.messages[place + 1 :])
        if policy.prompt(replace(problem, messages=messages)).token_ids == prompt.token_ids:
            raise ModelError(
                f"{_prompt_of(policy, problem.id)} stays the same if its message of role {message['role']} changes; "
                "allowed: model.chat_template=none, or a template that renders every message"
            )


def _require_told_apart(policy: Policy, prompts: Sequence[Prompt]) -> None:
    """Refuse a tokenizer without tokens for what makes a problem: the model would be asked the same each time."""
    known: dict[tuple[int, ...], Prompt] = {}
    for prompt in prompts:
        other = known.setdefault(prompt.token_ids, prompt)
        if _said(other) != _said(prompt):
            raise ModelError(
                f"{_prompt_of(policy, prompt.problem_id)} has the same tokens as that of {other.problem_id}, which "
                "asks something else; allowed: a tokenizer that can write what the task asks"
            )


def _said(prompt: Prompt) -> list[list[str]]:
    """Return the words of a prompt; templates trim white space, and some tokenizers know no capitals."""
    return [message["content"].casefold().split() for message in prompt.messages]


def _require_answer(task: Task, policy: Policy, problem: Problem) -> None:
    """Raise ModelError if the task's own answer is worth less once it was made of tokens, as completions are."""
    try:
        answer = task.reference_answer(problem)
    except ConfigError:  # a generator without answers of its own
        return
    ids = policy.tokenizer(answer, add_special_tokens=False).input_ids
    what = f"model {policy.name!r}: the answer {_short(answer)} to {problem.id}"
    _require_embedded(policy, ids, what)
    written = policy.decode([ids])[0]
    if written == answer or _is_worth(task, problem, written, answer):
        return
    allowed = "a tokenizer that can write the task's answers"
    ways = {
        "clean_up_tokenization_spaces=false in tokenizer_config.json": (True, False),
        "a tokenizer that has no special token in an answer: the judge is given the text without them": (False, None),
    }
    for way, (skip, clean) in ways.items():
        whole = policy.tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=clean)
        if _is_worth(task, problem, whole, answer):
            allowed = way
            break
    raise ModelError(f"{what} becomes {_short(written)} in its tokens, which the task calls wrong; allowed: {allowed}")


def _is_worth(task: Task, problem: Problem, written: str, answer: str) -> bool:
    """Return whether the judge gives a text what it gives the answer."""
    with interrupts.deferred():  # a judge may catch whatever is raised in it, and go on
        found, own = task.verify(problem, written), task.verify(problem, answer)
    return found.success >= own.success and found.reward >= own.reward


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
