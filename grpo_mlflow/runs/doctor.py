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

from grpo_mlflow import tasks, tracking
from grpo_mlflow.config import Config
from grpo_mlflow.errors import ConfigError, StoreAway, UserError, one_line, redact
from grpo_mlflow.forward import layers, ways
from grpo_mlflow.generation import Generator, Generators
from grpo_mlflow.generation.local.generator import LocalGenerator
from grpo_mlflow.generation.server.fleet import Fleet
from grpo_mlflow.generation.server.generator import ServerGenerator
from grpo_mlflow.generation.server.sync import SYNCS
from grpo_mlflow.model import devices, loading, memory
from grpo_mlflow.model.memory import Shape, Workload
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runs import messages, models, plan, preflight, samples
from grpo_mlflow.runs.server_checks import Caution, ServerCheckup, Trouble
from grpo_mlflow.types import Prompt

_PACKAGES = ("torch", "transformers", "accelerate", "mlflow", "optuna", "openai")
_A_MODEL = "set model.train_id to a folder with config.json, tokenizer and safetensors weights, or a hub id"
_LIKE = 0.01  # of the weights: by so much a shape may be off; one of experts, say, is much more
_STATE_BYTES = 12  # per trained parameter: gradient, two moments of AdamW


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check; `remedy` where it failed, or found what a run can be trained with."""

    name: str
    state: Literal["ok", "warning", "FAILED", "skipped"]
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        found = self.found.replace("\n", f"\n{'':<10}")
        text = f"{self.state:<8}{self.name:<22}{found}"
        return f"{text}\n{'':<8}{'':<22}remedy: {self.remedy}" if self.remedy else text


@dataclass
class Doctor:
    """Examines what a config needs.

    Attributes:
        folder: takes the log of a server that the run would start itself.
        keeps_run: the run that tries the store is not deleted.
    """

    config: Config
    folder: Path
    keeps_run: bool = False
    exit_code: int = 0  # of the first failure
    _missing: set[str] = field(default_factory=set)

    @property
    def healthy(self) -> bool:
        """Whether no check has failed so far."""
        return not self.exit_code

    def examine(self) -> Iterator[Check]:
        """Yield the outcome of each check as soon as it is known."""
        with ExitStack() as held:
            yield from self._examine(held)

    def _examine(self, held: ExitStack) -> Iterator[Check]:
        yield self._check("packages", self._packages)
        yield self._check("device", self._device)
        actor: list[Policy] = []
        yield self._check("model", lambda: self._model(actor), needs=("device",))
        yield self._check("MLflow store", self._store, needs=("model",))  # it opens a run, as training would only then
        yield self._check("memory", lambda: self._memory(actor[0]), needs=("model",))
        yield self._check("disk", lambda: self._disk(actor[0]), needs=("model",))
        if self.config.generation.backend == "local" and self.config.data.source == "live":
            yield self._check("problems", lambda: self._problems(actor[0]), needs=("model",))
        if "model" in self._missing or not self._names_a_server:
            return
        started: list[tuple[str, ServerGenerator[Fleet]]] = []
        if self.config.generation.server.manage:
            yield self._check("server start", lambda: self._start(held, actor[0], started))
        else:
            started = self._generators(held, actor[0])
        for word, generator in started:
            yield from self._examine_servers(word, actor[0], generator)

    @property
    def _names_a_server(self) -> bool:
        backends = {self.config.generation.backend, self.config.eval.backend or self.config.generation.backend}
        return backends != {"local"}

    def _start(self, held: ExitStack, actor: Policy, started: list[tuple[str, ServerGenerator[Fleet]]]) -> str:
        try:
            started += self._generators(held, actor)
            for _, generator in started:
                generator.server.open()
        except UserError as error:
            raise Trouble(str(error), "its log above says why; generation.server.* say how it is started") from error
        return "by the run itself"

    def _check(self, name: str, examine: Callable[[], str], needs: tuple[str, ...] = ()) -> Check:
        if missing := [need for need in needs if need in self._missing]:
            self._missing.add(name)
            return Check(name, "skipped", f"needs: {missing[0]}")
        cause: BaseException | None
        try:
            return Check(name, "ok", examine())
        except Caution as caution:
            return Check(name, "warning", str(caution), caution.remedy)
        except Trouble as trouble:
            found, remedy, cause = str(trouble), trouble.remedy, trouble.__cause__
        except UserError as error:
            found, remedy, cause = one_line(error), "as the line says", error
        self._missing.add(name)
        self.exit_code = self.exit_code or (cause.exit_code if isinstance(cause, UserError) else 1)
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
        if not self.keeps_run:
            tracker.remove("doctor.txt")
        tracker.finish("FINISHED")
        if (tracker.run_dir / "spool.jsonl").exists():
            raise Trouble(f"{tracker.url} opens runs but takes no metrics", remedy)
        left = self.keeps_run or not tracking.discard(self.config.tracking.uri, tracker.run_id, tracker.run_dir)
        return f"takes runs, metrics and files{f' (run {tracker.run_id})' if left else ''}"

    def _device(self) -> str:
        try:
            return str(devices.choose_device(self.config.model.device))
        except UserError as error:
            remedy = "set model.device=auto; `nvidia-smi` lists GPUs, CUDA_VISIBLE_DEVICES may hide them"
            raise Trouble(one_line(error), remedy) from error

    def _model(self, actor: list[Policy]) -> str:
        model = self.config.model
        try:
            found, seconds = models.check(self.config, loading.model_source(model.train_id, self.config))
            actor.append(found)
        except StoreAway:  # of recorded rollouts
            raise
        except UserError as error:
            line = redact(str(error))  # as `train` prints it, not cut
            remedy = line.partition("; allowed: ")[2]
            if isinstance(error, ConfigError):
                remedy = f"set {line.partition(' = ')[0]} to what the line allows"
            raise Trouble(line, remedy or _A_MODEL) from error
        task = tasks.of(self.config)
        size, way = sum(layers.numbers(p) for p in found.model.parameters()), ways.scoring(found.model)
        slower = "" if way.reason is None else f", each completion with its prompt: {way.reason}"
        told = (messages.sampled_how(self.config, found), preflight.idle_arguments(self.config, task, found))
        proven = f"{model.train_id}, {size / 1e6:.1f} M parameters, proven in {seconds:.1f}s{slower}"
        return "; ".join([proven, *(line for line in told if line)])

    def _memory(self, actor: Policy) -> str:
        config, on_gpu = self.config, actor.device.type == "cuda"
        if on_gpu:
            free, where = torch.cuda.mem_get_info(actor.device)[0], str(actor.device)
        else:
            free, where = psutil.virtual_memory().available, "this machine"
        held = sum(memory.held(p) for p in actor.model.parameters())  # the model is loaded already
        shape = _shape(actor)
        if shape is None:  # of another architecture: no more is known than what its weights need
            return enough("memory", _of_weights(config, actor) - held, free, where, "a smaller model, train.kl_coef=0")
        # one for each GPU, as a launcher starts them; on a CPU all would share the memory that is looked at here
        processes = torch.cuda.device_count() if config.train.sharding == "full" and on_gpu else 1
        work = plan.workload(config, len(self._prompt(actor).token_ids), processes)

        def size(changed: Workload) -> float:
            found = plan.need(shape, changed, config, processes)
            return found.total if on_gpu else found.total + sum(found.host.values())

        chosen, fits = plan.to_fit(work, size, free + held, plan.STEPS if on_gpu else plan.ON_HOST)
        remedy = " ".join(chosen) if fits else f"a smaller model, or several GPUs; {' '.join(chosen)} is not enough"
        line = enough("memory", size(work) - held, free, where, remedy)
        return f"{line}; GiB by part: {plan.told(plan.need(shape, work, config, processes))}"

    def _disk(self, actor: Policy) -> str:
        size = sum(p.numel() for p in actor.model.parameters() if p.requires_grad)
        count = self.config.checkpoint.keep_last + 2  # the best, and one in the making
        free = shutil.disk_usage(Path.cwd()).free
        return enough("disk", count * size * 12, free, "this disk", "checkpoint.keep_last=1, or another folder")

    def _problems(self, actor: Policy, generator: Generator | None = None) -> str:
        """Ask a few problems of the server, or of the model in this process."""
        generator = generator or LocalGenerator(
            actor, self.config.generation.batch_size, tokens=self.config.generation.max_tokens_per_batch
        )
        return samples.show(self.config, tasks.of(self.config, Path("outputs/doctor")), actor, generator)

    # With one

    def _generators(self, held: ExitStack, actor: Policy) -> list[tuple[str, ServerGenerator[Fleet]]]:
        """Return the servers that the config names, each once, with a word that tells them apart."""
        patient = self.config.generation.model_copy(update={"retry_seconds": 0.0})  # a failure is news here
        config, log = self.config.model_copy(update={"generation": patient}), self.folder / "server.log"
        source = loading.model_source(config.model.train_id, config)
        generators = held.enter_context(Generators(config, actor, source, source, log, print))
        named = [("evaluation ", generators.evaluation())]
        if self.config.data.source == "live":  # recorded rollouts need no server
            named.insert(0, ("", generators.training()))
        found: list[tuple[str, ServerGenerator[Fleet]]] = []
        for name, generator in named:
            known = [other.server for _, other in found]
            if isinstance(generator, ServerGenerator) and generator.server not in known:
                found.append((name, generator))
        return found

    def _examine_servers(self, word: str, actor: Policy, generator: ServerGenerator[Fleet]) -> Iterator[Check]:
        servers = generator.server.parts()
        for number, server in enumerate(servers, 1):
            which = f"{word}{number}: " if len(servers) > 1 else word
            yield from self._examine_server(which, actor, generator.at(server), asks=not word and number == 1)

    def _examine_server(
        self, word: str, actor: Policy, generator: ServerGenerator[Fleet], *, asks: bool
    ) -> Iterator[Check]:
        checkup = ServerCheckup(self.config, actor, generator, self._prompt(actor))
        server, tokenizer, weights, drawn = (
            f"{word}{name}" for name in ("server", "tokenizer", "weights", "completions")
        )
        yield self._check(server, checkup.connect)
        yield self._check(tokenizer, checkup.tokenizer, (server,))
        yield self._check(weights, checkup.weights, (server, tokenizer))
        yield self._check(drawn, checkup.completions, (weights,))
        yield self._check(f"{word}log-probabilities", checkup.logprobs, (drawn,))
        yield self._check(f"{word}seeds", checkup.seeds, (drawn,))
        if asks:
            yield self._check("problems", lambda: self._problems(actor, generator), (drawn,))
        if SYNCS[self.config.generation.sync].sends:
            yield self._check(f"{word}new weights", checkup.new_weights, (weights,))

    def _prompt(self, actor: Policy) -> Prompt:
        task = tasks.of(self.config)
        return actor.prompt(task.problem("train", self.config.data.train_seed_start))


def _shape(actor: Policy) -> Shape | None:
    """Return the shape of a model; None if it is none of those that `Shape` describes."""
    own = sum(layers.numbers(p) for name, p in actor.model.named_parameters() if ".lora_" not in name)
    try:
        found = Shape.of(actor.model.config.get_text_config().to_dict())
        return found if abs(found.parameters - own) <= _LIKE * own else None
    except (KeyError, TypeError):
        return None


def _of_weights(config: Config, actor: Policy) -> float:
    """Return the bytes of weights, gradients and AdamW, and of a reference."""
    own = sum(memory.held(p) for p in actor.model.parameters())
    trained = sum(p.numel() for p in actor.model.parameters() if p.requires_grad)
    second = config.train.kl_coef > 0 and not actor.has_adapter  # without its adapter it is the reference
    return float(own * (1 + second) + trained * _STATE_BYTES)


def enough(what: str, needed: float, free: float, where: str, remedy: str) -> str:
    """Return a line about what is needed and free, in bytes.

    Raises:
        Trouble: it is not enough.
    """
    line = f"{needed / 2**30:.2f} GiB needed at least, {free / 2**30:.1f} GiB free on {where}"
    if needed > free:
        raise Trouble(line, f"{remedy} ({what})")
    return line
