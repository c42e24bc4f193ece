"""Checks everything that a run needs before it needs it: one line per check, and a remedy where one fails.

A check that builds on a failed one is skipped, not failed: the first failure is the one to mend.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import psutil
import torch

from grpo_mlflow import policy, sources, tracking
from grpo_mlflow.config import Config
from grpo_mlflow.errors import UserError, one_line
from grpo_mlflow.generation import Generators, Sampling
from grpo_mlflow.generation.recompute import behaviour_logprobs
from grpo_mlflow.generation.remote import ServerGenerator
from grpo_mlflow.policy import Policy
from grpo_mlflow.rollouts import training_sampling
from grpo_mlflow.types import Completion, Prompt

_PACKAGES = ("torch", "transformers", "accelerate", "mlflow", "optuna", "openai")
_STATE_BYTES = 16  # per parameter: float32 weights, gradient, two moments of AdamW
_REFERENCE_BYTES = 4
_SAMPLER_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # as in `generation.canary`
_TEXT = "What is 12 + 34? (x1 OR NOT x2)\n<SOLUTION>01</SOLUTION> naïve 東京"


class Trouble(Exception):
    """A check found something wrong: what, and what to do."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check; `remedy` where it failed."""

    name: str
    state: Literal["ok", "FAILED", "skipped"]
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.state:<8}{self.name:<22}{self.found}"
        return f"{text}\n{'':<8}{'':<22}remedy: {self.remedy}" if self.remedy else text


@dataclass
class Doctor:
    """Examines what a config needs. `folder` takes the log of a server that the run would start itself."""

    config: Config
    folder: Path
    healthy: bool = True
    _missing: set[str] = field(default_factory=set)

    def examine(self) -> Iterator[Check]:
        """Yield the outcome of each check as soon as it is known."""
        with ExitStack() as held:
            yield from self._examine(held)

    def _examine(self, held: ExitStack) -> Iterator[Check]:
        config = self.config
        yield self._check("packages", self._packages)
        yield self._check("MLflow store", self._store)
        yield self._check("device", self._device)
        actor: list[Policy] = []
        yield self._check("model", lambda: self._model(actor), needs=("device",))
        yield self._check("memory", lambda: self._memory(actor[0]), needs=("model",))
        yield self._check("disk", lambda: self._disk(actor[0]), needs=("model",))
        backends = {config.generation.backend, config.eval.backend or config.generation.backend}
        if backends == {"local"}:
            return
        opened: list[ServerGenerator] = []
        yield self._check("server", lambda: self._server(held, actor[0], opened), needs=("model",))
        yield self._check("tokenizer", lambda: self._tokenizer(actor[0], opened[0]), needs=("model", "server"))
        yield self._check("weights", lambda: self._weights(opened[0]), needs=("model", "server"))
        drawn: list[tuple[Prompt, list[Completion]]] = []
        needs: tuple[str, ...] = ("model", "server", "tokenizer", "weights")
        yield self._check("completions", lambda: self._completions(actor[0], opened[0], drawn), needs)
        yield self._check("log-probabilities", lambda: self._logprobs(actor[0], drawn), (*needs, "completions"))
        yield self._check("seeds", lambda: self._seeds(actor[0], opened[0], drawn), (*needs, "completions"))
        if config.generation.sync != "none":
            yield self._check("new weights", lambda: self._new_weights(actor[0], opened[0]), needs)

    def _check(self, name: str, examine: Callable[[], str], needs: tuple[str, ...] = ()) -> Check:
        if missing := [need for need in needs if need in self._missing]:
            self._missing.add(name)
            return Check(name, "skipped", f"needs: {missing[0]}")
        try:
            return Check(name, "ok", examine())
        except Trouble as trouble:
            found, remedy = str(trouble), trouble.remedy
        except UserError as error:
            found, remedy = one_line(error), "as the line says"
        self._missing.add(name)
        self.healthy = False
        return Check(name, "FAILED", found, remedy)

    # Without a server

    def _packages(self) -> str:
        python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        return ", ".join([python, *(f"{name} {version(name)}" for name in _PACKAGES)])

    def _store(self) -> str:
        remedy = "start the MLflow server, or set tracking.uri (MLFLOW_TRACKING_URI) to a store that you may write to"
        try:
            tracker = tracking.start(self.config.tracking, "doctor")
        except UserError as error:
            raise Trouble(one_line(error), remedy) from error
        tracker.metrics({"doctor/store": 1.0}, 0)
        tracker.text("doctor.txt", "The store takes runs, metrics and files.\n")
        tracker.finish("FINISHED")
        if (tracker.run_dir / "spool.jsonl").exists():
            raise Trouble(f"{tracker.url} opens runs but takes no metrics", remedy)
        return f"takes runs, metrics and files (run {tracker.run_id})"

    def _device(self) -> str:
        try:
            return str(policy.choose_device(self.config.model.device))
        except UserError as error:
            remedy = "set model.device=auto; `nvidia-smi` lists GPUs, CUDA_VISIBLE_DEVICES may hide them"
            raise Trouble(one_line(error), remedy) from error

    def _model(self, actor: list[Policy]) -> str:
        model = self.config.model
        try:
            source = sources.model_source(model.train_id, self.config)
            actor.append(policy.load(source, policy.choose_device(model.device), model.dtype, model.trust_remote_code))
        except UserError as error:
            remedy = "set model.train_id to a folder with config.json, tokenizer and safetensors weights, or a hub id"
            raise Trouble(one_line(error), remedy) from error
        prompt, longest = self._prompt(actor[0]), getattr(actor[0].model.config, "max_position_embeddings", None)
        needed = len(prompt.token_ids) + self.config.generation.max_new_tokens
        if longest is not None and needed > longest:
            raise Trouble(
                f"a prompt of {len(prompt.token_ids)} tokens and {self.config.generation.max_new_tokens} new ones "
                f"exceed its {longest} positions",
                f"lower generation.max_new_tokens to {longest - len(prompt.token_ids)} or less",
            )
        size = sum(p.numel() for p in actor[0].model.parameters())
        return f"{model.train_id}, {size / 1e6:.1f} M parameters"

    def _memory(self, actor: Policy) -> str:
        size = sum(p.numel() for p in actor.model.parameters())
        needed = size * (_STATE_BYTES + (_REFERENCE_BYTES if self.config.train.kl_coef > 0 else 0))
        held = size * 4  # the model is loaded already
        if actor.device.type == "cuda":
            free, where = torch.cuda.mem_get_info(actor.device)[0], str(actor.device)
        else:
            free, where = psutil.virtual_memory().available, "this machine"
        return enough("memory", needed - held, free, where, "a smaller model, another model.device, train.kl_coef=0")

    def _disk(self, actor: Policy) -> str:
        size = sum(p.numel() for p in actor.model.parameters())
        count = self.config.checkpoint.keep_last + 2  # the best, and one in the making
        free = shutil.disk_usage(Path.cwd()).free
        return enough("disk", count * size * 12, free, "this disk", "checkpoint.keep_last=1, or another folder")

    # With one

    def _server(self, held: ExitStack, actor: Policy, opened: list[ServerGenerator]) -> str:
        config = self.config
        patient = config.generation.model_copy(update={"retry_seconds": 0.0})  # a failure is news here
        source = sources.model_source(config.model.train_id, config)
        generators = Generators(
            config.model_copy(update={"generation": patient}), actor, source, source, self.folder / "server.log", print
        )
        held.enter_context(generators)
        served = config.generation.backend != "local"
        generator = generators.training() if served else generators.evaluation()
        assert isinstance(generator, ServerGenerator)
        try:
            name = generator.server.connect()
        except UserError as error:
            url = generator.server.url
            raise Trouble(
                one_line(error),
                f"is it up, and at this address? `curl {url}/v1/models`; `make server` starts one; docs/servers.md "
                "says which versions and options it needs",
            ) from error
        opened.append(generator)
        return f"{generator.server.url} serves {name}, with token ids and log-probabilities"

    def _tokenizer(self, actor: Policy, generator: ServerGenerator) -> str:
        ours: list[int] = actor.tokenizer(_TEXT, add_special_tokens=False).input_ids
        theirs = generator.server.tokenize(_TEXT)
        if ours != theirs:
            place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
            raise Trouble(
                f"differs from the trainer's at token {place} of a test text",
                "serve the very model that is trained: start the server with model.train_id",
            )
        return f"equal on {len(ours)} tokens"

    def _weights(self, generator: ServerGenerator) -> str:
        try:
            generator.sync(0)
        except UserError as error:
            raise Trouble(
                one_line(error),
                "start the server with model.train_id and --dtype like model.dtype; for generation.sync=reload with "
                "VLLM_SERVER_DEV_MODE=1 and our worker extension; it must see generation.sync_dir (docs/servers.md)",
            ) from error
        error_found = generator.metrics()["server_canary_error"]
        return f"the policy's: log-probabilities of fixed tokens differ by {error_found:.1e} on average"

    def _completions(
        self, actor: Policy, generator: ServerGenerator, drawn: list[tuple[Prompt, list[Completion]]]
    ) -> str:
        prompt = self._prompt(actor)
        try:
            found = generator.generate([prompt], 2, training_sampling(self.config.generation), 0, ("doctor",))[0]
        except UserError as error:
            raise Trouble(one_line(error), "as the line says; the server's log may say more") from error
        drawn.append((prompt, found))
        return f"{len(found)} of {', '.join(str(len(c.token_ids)) for c in found)} tokens"

    def _logprobs(self, actor: Policy, drawn: list[tuple[Prompt, list[Completion]]]) -> str:
        prompt, found = drawn[0]
        sampling = training_sampling(self.config.generation)
        anew = behaviour_logprobs(actor, prompt.token_ids, [c.token_ids for c in found], sampling)
        pairs = [
            pair
            for c, values in zip(found, anew, strict=True)
            for pair in zip(c.behaviour_logprobs, values, strict=True)
        ]
        gap = sum(abs(a - b) for a, b in pairs) / len(pairs)
        if gap > _SAMPLER_GAP[actor.dtype]:
            raise Trouble(
                f"those of sampled tokens differ from the trainer's by {gap:.2g} on average",
                "start vLLM with --logprobs-mode processed_logprobs, or set generation.behaviour_logprobs=recompute",
            )
        return f"those of sampled tokens differ from the trainer's by {gap:.1e} on average"

    def _seeds(self, actor: Policy, generator: ServerGenerator, drawn: list[tuple[Prompt, list[Completion]]]) -> str:
        prompt, sampling = drawn[0][0], Sampling(min(16, self.config.generation.max_new_tokens), 1.5)
        first, again = (generator.generate([prompt], 8, sampling, 1, ("doctor",))[0] for _ in range(2))
        if len({c.token_ids for c in first}) == 1:
            raise Trouble("8 completions of one prompt are all the same", "raise generation.temperature")
        if [c.token_ids for c in first] != [c.token_ids for c in again]:
            raise Trouble(
                "the same request twice gives different completions: runs cannot be repeated",
                "start SGLang with --enable-deterministic-inference; another user of the server also changes batches",
            )
        return "repeat completions; different ones differ"

    def _new_weights(self, actor: Policy, generator: ServerGenerator) -> str:
        """Give the server other weights and the old ones again; both times it must prove them."""
        weight = actor.model.get_input_embeddings().weight
        before = weight.detach().clone()
        try:
            try:
                with torch.no_grad():
                    weight.mul_(1.05)
                generator.sync(1)
            finally:
                with torch.no_grad():
                    weight.copy_(before)
            generator.sync(2)
        except UserError as error:
            raise Trouble(one_line(error), "see docs/servers.md, “When weights do not arrive”") from error
        return f"arrive, proven twice, in {generator.metrics()['seconds_sync'] / 2:.2f} s each"

    def _prompt(self, actor: Policy) -> Prompt:
        task = sources.make_task(self.config)
        return actor.prompt(task.problem("train", self.config.data.train_seed_start))


def enough(what: str, needed: float, free: float, where: str, remedy: str) -> str:
    """Return a line about what is needed and free, in bytes.

    Raises:
        Trouble: it is not enough.
    """
    line = f"{needed / 2**30:.2f} GiB needed at least, {free / 2**30:.1f} GiB free on {where}"
    if needed > free:
        raise Trouble(line, f"{remedy} ({what})")
    return line
