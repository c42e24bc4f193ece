"""New weights on their last step: loaded by the server, and proven."""

from __future__ import annotations

import logging

from grpo_mlflow.generation.server.link import Link
from grpo_mlflow.generation.server.proof import Proof, WrongWeights
from grpo_mlflow.runtime.http.client import Unfit

log = logging.getLogger(__name__)


async def deliver(link: Link, proof: Proof, is_there: bool = False) -> None:
    """Let the server load the weights of `link.given` and prove them; once more if something came between.

    Args:
        link: the server.
        proof: what it has to prove.
        is_there: the server started with these weights, so that the first load is left out.

    Raises:
        ServerFailed: it cannot load them.
        Unfit: it serves something else afterwards.
    """
    for last in (False, True) if link.retries else (True,):
        if not is_there:
            await link.load()
        is_there = False
        try:
            await proof.prove()
            return
        except WrongWeights as wrong:
            if last:
                own = link.engine.remedies.old_weights
                raise Unfit(
                    f"it was given new weights, but {wrong}. Rollouts would be another policy's, so the run "
                    f"stops. Known causes: another run that uses the same server; {own + '; ' if own else ''}a server "
                    "of another number format (--dtype) than model.dtype"
                ) from None
            log.warning("after loading weights, %s; loading once more", wrong)
