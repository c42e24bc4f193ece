"""Equal completions of one prompt: chance, or a server that gives one draw several times.

A group of copies trains on nothing, or on one completion as if it were many, and no number of the run would say so.
Honest groups hold equal completions too: short answers, and any answer that a trained model is sure of. So it is their
probability that decides. An honest server draws a completion x of probability p(x); given one, that m - 1 further ones
are equal to it has the probability p(x)^(m - 1), and there are C(k, m) ways to choose the m of k. Where that is below
`_CHANCE`, the completions are refused. An honest server is thereby refused with a probability below k * `_CHANCE` per
prompt, for any distribution: the sum over all such x of p(x) p(x)^(m - 1) C(k, m) is at most `_CHANCE`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from grpo_mlflow.generation.server.recompute import FLOOR

_CHANCE = 1e-12


def copied(completions: Sequence[tuple[int, ...]], logprobs: Sequence[Sequence[float]]) -> str | None:
    """Return what shows that completions of one prompt were not drawn one by one, or None.

    Args:
        completions: k times token ids.
        logprobs: the log-probability of each token under the distribution that it was drawn from. Under another one,
            such as that before top-p, honest completions look too unlikely.
    """
    k = len(completions)
    for tokens, count in Counter(completions).items():
        if count == 1:
            continue
        # The likeliest of the prices that a server gives the copies, and none for a token that is not priced.
        log_p = max(
            sum(value for value in values if value > FLOOR)
            for each, values in zip(completions, logprobs, strict=True)
            if each == tokens
        )
        log_chance = (count - 1) * log_p + math.log(math.comb(k, count))
        if log_chance < math.log(_CHANCE):
            return (
                f"{count} of {k} completions are the same {len(tokens)} tokens, which chance brings once in "
                f"10^{-log_chance / math.log(10):.0f} times: it gives one draw several times"
            )
    return None
