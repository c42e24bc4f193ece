"""What the doctor examines of one server."""

from __future__ import annotations

import torch

from grpo_mlflow.config import Config
from grpo_mlflow.errors import ServerUnfit, UserError, one_line
from grpo_mlflow.generation import Sampling, training_sampling
from grpo_mlflow.generation.server.fleet import Fleet
from grpo_mlflow.generation.server.generator import ServerGenerator
from grpo_mlflow.generation.server.pricing import WrongLogprobs
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.types import Prompt


class Trouble(Exception):
    """A check found something wrong: what, and what to do."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.remedy = remedy


class Caution(Trouble):
    """As `Trouble`, but of a kind that a run can be trained with."""


class ServerCheckup:
    """Each method is one check: it returns what it found, or raises `Trouble`. Call them in the order of the file."""

    def __init__(self, config: Config, actor: Policy, generator: ServerGenerator[Fleet], prompt: Prompt) -> None:
        self._config, self._actor, self._generator, self._prompt = config, actor, generator, prompt
        self._remedies = generator.server.remedies
        self._recomputes = config.generation.behaviour_logprobs == "recompute"
        self._mispriced: WrongLogprobs | None = None

    def connect(self) -> str:
        server = self._generator.server
        try:
            name = ", ".join(server.connect())
        except UserError as error:
            hint = _joined(
                f"is it up, and at this address? `curl {server.url}/v1/models`",
                self._remedies.run,
                "docs/servers.md says which versions and options it needs",
            )
            raise _trouble(error, hint) from error
        return f"{server.url} serves {name}, with token ids and log-probabilities"

    def tokenizer(self) -> str:
        try:
            count = self._generator.server.check_tokenizer()
        except UserError as error:
            raise _trouble(error) from error
        return f"equal on {count} tokens" if count else "not checked: the server has no /tokenize"

    def weights(self) -> str:
        try:
            self._generator.sync(0)
        except WrongLogprobs as error:
            self._mispriced = error  # the weights are right
        except UserError as error:
            raise _trouble(error, "it must see generation.sync_dir (docs/servers.md)") from error
        error_found = self._generator.metrics()["server_canary_error"]
        return f"the policy's: log-probabilities of fixed tokens differ by {error_found:.1e} on average"

    def completions(self) -> str:
        prompt = self._prompt
        try:
            found = self._generator.generate([prompt], 2, training_sampling(self._config.generation), 0, ("doctor",))[0]
        except UserError as error:
            raise _trouble(error, "as the line says; the server's log may say more") from error
        return f"{len(found)} of {', '.join(str(len(c.token_ids)) for c in found)} tokens"

    def logprobs(self) -> str:
        if self._mispriced is not None:
            raise _trouble(self._mispriced)
        gap = self._generator.server.price_gap
        if gap is None:
            return "the trainer's own are taken" if self._recomputes else "not trained on"
        return f"those of sampled tokens differ from the trainer's by {gap:.1e} on average"

    def seeds(self) -> str:
        prompt, sampling = self._prompt, Sampling(min(16, self._config.generation.max_new_tokens), 1.5)
        first, again = (self._generator.generate([prompt], 8, sampling, 1, ("doctor",))[0] for _ in range(2))
        if len({c.token_ids for c in first}) == 1:
            raise Caution("8 completions of one prompt are all the same", "raise generation.temperature")
        if [c.token_ids for c in first] != [c.token_ids for c in again]:
            raise Caution(
                "the same request twice gives different completions: runs cannot be repeated",
                _joined(
                    "another user of the server also changes batches",
                    self._remedies.seeds and f"{self._remedies.seeds}. {self._generator.server.remedy()}",
                ),
            )
        return "repeat completions; different ones differ"

    def new_weights(self) -> str:
        """Give the server the weights after a step of the run's size and the old ones again; it must prove both."""
        weights = [parameter for parameter in self._actor.model.parameters() if parameter.requires_grad]
        before = [weight.detach().to("cpu", copy=True) for weight in weights]
        chance = torch.Generator().manual_seed(0)
        try:
            try:
                with torch.no_grad():
                    for weight in weights:  # as AdamW's first step: by the learning rate, up or down
                        signs = torch.randint(0, 2, weight.shape, generator=chance) * 2 - 1
                        weight.add_(self._config.train.lr * signs.to(weight.device))
                self._generator.sync(1)
            finally:
                with torch.no_grad():
                    for weight, value in zip(weights, before, strict=True):
                        weight.copy_(value)
            self._generator.sync(2)
        except UserError as error:
            raise _trouble(error, "see docs/servers.md, “When weights do not arrive”") from error
        return f"arrive, proven twice, in {self._generator.metrics()['seconds_sync'] / 2:.2f} s each"


def _trouble(error: UserError, hint: str = "") -> Trouble:
    """Return what was found and the remedy that the error names, after `hint`."""
    if isinstance(error, ServerUnfit):
        return Trouble(one_line(UserError(error.found)), _joined(hint, error.remedy))
    return Trouble(one_line(error), hint or "as the line says")


def _joined(*remedies: str) -> str:
    """Return those that apply to this kind of server."""
    return "; ".join(remedy for remedy in remedies if remedy)
