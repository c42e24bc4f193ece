"""A file of reward functions as TRL takes them: of texts, with a column, with what TRL gives besides."""

# mypy: ignore-errors

import re


def right(completions, answer, **kwargs):
    return [1.0 if text.strip() == str(wanted) else 0.0 for text, wanted in zip(completions, answer, strict=True)]


def short(prompts, completions, completion_ids, **kwargs):
    assert all(isinstance(prompt, str) for prompt in prompts)
    kwargs["log_extra"]("prompt", prompts)
    kwargs["log_metric"]("tokens", sum(map(len, completion_ids)) / len(completion_ids))
    return [len(ids) / (10 + kwargs["trainer_state"].global_step) for ids in completion_ids]


def digits(completions, level, **kwargs):
    found = [re.fullmatch(r"\s*\d+\s*", text) is not None for text in completions]
    return [None if hard is None or hard > 2 else good for good, hard in zip(found, level, strict=True)]
