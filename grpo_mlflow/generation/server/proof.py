"""A server's proof that it samples from the weights that it should: by what `checksums` and `canary` compare."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from grpo_mlflow.generation.base import Sampling
from grpo_mlflow.generation.server import canary, checksums
from grpo_mlflow.generation.server.engine import Ask
from grpo_mlflow.generation.server.link import Link
from grpo_mlflow.model.policy import Policy

_FEW = 16  # tokens
log = logging.getLogger(__name__)


class WrongWeights(Exception):
    """The server does not serve what it should."""


class Proof:
    """Compares what one server says of its weights and of fixed tokens with what the trainer does.

    `error` is the mean absolute difference of the log-probabilities that was found last.

    Args:
        link: the server.
        policy: the trainer's model.
        priced: whether the server is asked for the log-probabilities of what it draws.
    """

    def __init__(self, link: Link, policy: Policy, priced: bool) -> None:
        self._link, self._dtype, self._model = link, policy.dtype, policy.model
        self._tokens = canary.tokens(policy)
        self._ask = Ask(self._tokens, 1, Sampling(1), 1, policy.eos_ids, priced)
        self.pair = Ask(self._tokens[:_FEW], 2, Sampling(1), 1, policy.eos_ids, priced)  # to see that two are given
        self._comparison = checksums.Comparison(policy.device)
        self._expected: canary.Expected | None = None
        self._reading: canary.Reading | None = None
        self._scored: canary.Expected | None = None  # what was expected of that reading
        self._digest: int | None = None
        self._noise, self._doubted = 0.0, False
        self._based = -1  # as `_proven`, of the base model below an adapter
        self._proven = -1  # the number of loads when the weights were proven last
        self.error = 0.0

    def expect(self, expected: canary.Expected) -> None:
        """Expect these scores of `canary.tokens` from now on."""
        self._expected = expected

    async def prove(self) -> None:
        """Let the server prove its weights.

        Raises:
            WrongWeights: it has others, does not score the tokens as the trainer does, or still as with the weights
                that it proved last.
        """
        assert self._expected is not None
        await self._check_label()
        reading = await self._link.ask("scoring the canary", self.read)
        self.error = canary.error(reading, self._expected)
        if found := canary.trouble(reading, self._expected, self._dtype):
            raise WrongWeights(found)
        if not await self._check_sums():
            await self._check_scores(reading)
        self._reading, self._scored, self._noise = reading, self._expected, max(self._noise, self.error)
        self._proven = self._link.loads

    async def prove_still(self) -> None:
        """As `prove`, after a batch. Only a load can change weights, and it sets a label: a proven load's is enough.

        A load that repaired the server in the middle of the batch is not proven yet.
        """
        if not await self._check_label() or self._proven != self._link.loads:
            await self.prove()

    async def read(self) -> canary.Reading:
        """Ask for the scores of the fixed tokens and for the token after them; one try."""
        # One after the other: a failure of one would leave the other behind, and vLLM's CPU engine with --enable-lora
        # dies of a score and a draw in one batch.
        scores = await self._link.score(self._tokens)
        draws = await self._link.complete(self._ask)
        logprobs = draws[0].logprobs
        return canary.Reading(tuple(scores), draws[0].token_ids[0], logprobs[0] if logprobs else None)

    async def _check_label(self) -> bool:
        """Return whether the server still goes by the label of its load; raise WrongWeights if by another."""
        label, wanted = await self._link.label(), self._link.given.label if self._link.given else None
        if wanted is None or label is None:
            return False
        if label != wanted:
            raise WrongWeights(f"it serves weights labelled {label!r} instead of {wanted!r}")
        return True

    async def _check_sums(self) -> bool:
        """Return whether all its tensors are those that it was given, False if that cannot be told.

        Raises:
            WrongWeights: some are not.
        """
        given = self._link.given
        if given is None:
            return False
        if given.model is None:
            return await self._check_adapter(given.folder)
        sums = await self._link.sums()
        wrong = None if sums is None else await asyncio.to_thread(self._comparison.wrong, given.model, sums)
        if sums is None or wrong is None:
            return False
        if wrong:
            raise WrongWeights(f"{len(wrong)} of its {len(sums.tensors)} tensors are not what was sent: {_some(wrong)}")
        return self._comparison.is_complete

    async def _check_adapter(self, folder: Path) -> bool:
        """As `_check_sums`, for an adapter beside the base model.

        Several runs may have theirs on one server: one of those that it computes with has to be this one.
        """
        adapters = await self._link.adapter_sums()
        if not adapters:
            return False
        wrong = [await asyncio.to_thread(self._comparison.wrong_adapter, folder, sums) for sums in adapters]
        found = [names for names in wrong if names is not None]
        if not found:
            return False
        if best := min(found, key=len):
            count = len(adapters[0].tensors)
            raise WrongWeights(f"{len(best)} of its adapter's {count} tensors are not what was sent: {_some(best)}")
        await self._check_base()
        return True

    async def _check_base(self) -> None:
        """Raise WrongWeights if the adapter stands on another base model; not again while nothing but adapters came."""
        known, self._based = self._based, self._link.loads
        sums = await self._link.sums() if known < 0 or self._link.loads > known + 1 else None
        wrong = None if sums is None else await asyncio.to_thread(self._comparison.wrong_base, self._model, sums)
        if sums is not None and wrong:
            self._based = -1
            raise WrongWeights(
                f"{len(wrong)} of its base model's {len(sums.tensors)} tensors are not the trainer's: {_some(wrong)}"
            )

    async def _check_scores(self, reading: canary.Reading) -> None:
        """Raise WrongWeights if the scores are beyond doubt those of the weights before; warn once if they may be."""
        before = self._scored
        if self._link.given is None:
            return
        digest = await asyncio.to_thread(checksums.digest, self._link.given.folder, self._dtype)
        moved, self._digest = digest != self._digest, digest
        if before is None or self._reading is None or before is self._expected or not moved:
            return
        assert self._expected is not None
        standing = canary.standing(before, self._expected, self._reading, reading)
        if standing == "old":
            self._digest = None  # they have not arrived: what is proven next has moved, too
            raise WrongWeights("its log-probabilities of fixed tokens stayed where they were with the old weights")
        if canary.partly_old(before, self._expected, reading, self._noise):
            self._digest = None
            raise WrongWeights(
                f"its log-probabilities of fixed tokens are {self.error:.2g} from the trainer's on average, and were "
                f"within {self._noise:.2g}: a part of the new weights is missing"
            )
        if standing == "unclear" and not self._doubted:
            self._doubted = True
            log.warning(
                "new weights and old ones are not distinguishable by the server's log-probabilities: the steps are "
                "smaller than the rounding of %s; whether sampler_ratio_mean stays near 1 shows it in the long run",
                str(self._dtype).removeprefix("torch."),
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
