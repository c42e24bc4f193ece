"""Groups of random rollouts, and a small policy to train on them."""

from __future__ import annotations

import random

from grpo_mlflow.config import TinyConfig
from grpo_mlflow.model import tiny
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.types import Completion, Group, Problem, Prompt, Rollout, Verdict

K = 4
CUT = 8


def make_groups(count: int, flat: tuple[int, ...] = (), seed: int = 0) -> list[Group]:
    """Groups of ragged random rollouts with advantages that sum to zero; those in `flat` have equal rewards.

    Completions of `CUT` tokens or more count as cut off.
    """
    rng = random.Random(seed)
    groups = []
    for number in range(count):
        prompt = Prompt(f"p{number}", (), tuple(rng.randrange(5, 200) for _ in range(rng.randint(2, 12))))
        rewards = [0.1] * K if number in flat else [0.0, 1.0, 0.0, 0.5]
        mean = sum(rewards) / K
        rollouts = []
        for reward in rewards:
            length = rng.randint(1, 9)
            completion = Completion(
                token_ids=tuple(rng.randrange(5, 200) for _ in range(length)),
                text="",
                behaviour_logprobs=tuple(-6 + rng.random() for _ in range(length)),
                finish_reason="length" if length >= CUT else "stop",
                policy_version=0,
            )
            rollouts.append(Rollout(prompt, completion, Verdict(reward, {}, reward == 1.0, None)))
        advantages = tuple(0.0 if number in flat else reward - mean for reward in rewards)
        groups.append(Group(Problem(prompt.problem_id, number, ()), tuple(rollouts), advantages))
    return groups


def fresh(seed: int = 3) -> Policy:
    return tiny.build(TinyConfig(hidden_size=32, layers=2, heads=2, seed=seed))


ALL_TERMS = {"kl_coef": 0.3, "entropy_coef": 0.05}
