"""The embedded model: a Qwen2 of about half a million parameters that knows a task a little.

It is made here, so a run needs no download: seeded weights, then supervised warm-up on demonstrations of which a share
is wrong, so that it starts with a skill and a bad habit for reinforcement learning to improve on. Saved as an ordinary
Hugging Face folder in a cache keyed by the hash of its whole recipe, it takes the path that a hub model takes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from grpo_mlflow import seeding
from grpo_mlflow.algorithm.schedules import learning_rate
from grpo_mlflow.config import TinyConfig
from grpo_mlflow.errors import UserError, one_line
from grpo_mlflow.forward.padded import completion_logprobs
from grpo_mlflow.model import checksums
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.files import cache_root, scratch
from grpo_mlflow.tasks import TASKS, Task

_RECIPE = 2  # raise when code below changes what a recipe yields
_POOL = 16384  # distinct demonstrations; drawing one costs more than training on it
_SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>")
_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
Progress = Callable[[int, int, float], None]  # step, steps, loss


@contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    """Make a folder of the cache, and tell what the disk refuses inside the block."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the cache {str(cache_root())!r} cannot be written: {one_line(error)}; "
            "allowed: as GRPO_MLFLOW_CACHE a folder with room for a model"
        ) from error


def ensure(recipe: TinyConfig, task: Task, task_settings: dict[str, Any], progress: Progress | None = None) -> Path:
    """Return the folder of the warmed-up model, making it first where the cache lacks it or holds a damaged one."""
    key = json.dumps([_RECIPE, recipe.model_dump(), task.name, task_settings, _corpus()], sort_keys=True)
    folder = cache_root() / "tiny" / hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    if checksums.intact(folder):
        return folder
    with _written_to(folder.parent), scratch(".making-", folder.parent) as made:
        policy = build(recipe)
        warm_up(policy, recipe, task, progress)
        policy.save(made)
        (made / "recipe.json").write_text(key)
        checksums.write(made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first with the same model
                raise
    return folder


def make_tokenizer() -> Qwen2Tokenizer:
    """Return a Qwen2 tokenizer (byte-level BPE: covers all text, single digits) in which the tasks' words are whole.

    It has to be a genuine one: for a `qwen2` model transformers applies Qwen2's own splitting rules, whatever
    tokenizer the folder holds.
    """
    empty = Qwen2Tokenizer()._tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2048,  # never reached: merging stops when every word of the corpus is whole
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(_corpus(), trainer)
    model = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token="<|pad|>",
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=list(_SPECIAL[2:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _corpus() -> list[str]:
    return sorted({phrase for kind in TASKS.values() for phrase in kind().phrases})


def build(recipe: TinyConfig) -> Policy:
    """Return the model with its seeded initial weights."""
    tokenizer = make_tokenizer()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.integer(recipe.seed, "tiny", "weights"))
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=recipe.hidden_size,
                intermediate_size=4 * recipe.hidden_size,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads,
                num_key_value_heads=recipe.heads,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
                initializer_range=0.05,  # the usual 0.02 suits wide models; at this width it learns far slower
                bos_token_id=None,
                eos_token_id=eos,
                pad_token_id=pad,
            )
        ).eval()
    return Policy(model, tokenizer, torch.device("cpu"), torch.float32, (eos,), pad)


def warm_up(policy: Policy, recipe: TinyConfig, task: Task, progress: Progress | None = None) -> None:
    """Train on demonstrations of the training split: cross-entropy of answer and end token, AdamW, cosine decay."""
    rows = _demonstrations(policy, recipe, task)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=recipe.lr, weight_decay=0.01)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps, recipe.lr, min(50, recipe.steps // 10), "cosine")
        chosen = seeding.stream(recipe.seed, "tiny", "batch", step).integers(len(rows), size=recipe.batch_size)
        batch = [rows[i] for i in chosen]
        widths = [len(prompt) + len(answer) for prompt, answer in batch]
        ids = torch.tensor([[*p, *a, *[policy.pad_id] * (max(widths) - len(p) - len(a))] for p, a in batch])
        lengths = torch.tensor([len(answer) for _, answer in batch])
        width = int(lengths.max())
        starts = torch.tensor([len(prompt) for prompt, _ in batch])
        logprobs, _ = completion_logprobs(policy.model, ids, starts, width, 1.0)
        loss = -logprobs[torch.arange(width)[None, :] < lengths[:, None]].mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress(step + 1, recipe.steps, float(loss.detach()))


def _demonstrations(policy: Policy, recipe: TinyConfig, task: Task) -> list[tuple[list[int], list[int]]]:
    count = min(_POOL, recipe.steps * recipe.batch_size)
    rng: np.random.Generator = seeding.stream(recipe.seed, "tiny", "demonstrations")
    first = 10**12  # far from any seed that a config names
    problems = [task.problem("train", first + i) for i in range(count)]
    answers = [task.demonstration(problem, rng, recipe.error_rate) for problem in problems]
    encoded = policy.tokenizer(answers, add_special_tokens=False).input_ids
    return [
        (list(policy.prompt(problem).token_ids), [*ids, policy.eos_ids[0]])
        for problem, ids in zip(problems, encoded, strict=True)
    ]
