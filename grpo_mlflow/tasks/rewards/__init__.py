"""Rewards by name (`data.rewards`): built in, functions in TRL's form, and judges.

entries    what the config says, checked
texts      built-in rewards that look at a text
isolated   built-in ones that run in a process of their own, as functions of the user's do
calling    the keywords that functions are called with
judge      a model that grades by a rubric, and its answers on disk
named      all of them together: from texts to verdicts
"""

from grpo_mlflow.tasks.rewards.named import Rewards, create

__all__ = ["Rewards", "create"]
