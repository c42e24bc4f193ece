"""From a config to the generators of a run: in this process, or a connection per server."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from grpo_mlflow.config import Config, addresses, remedies, server_checks
from grpo_mlflow.config.addresses import Addresses
from grpo_mlflow.errors import UserError
from grpo_mlflow.generation.base import Generator, training_sampling
from grpo_mlflow.generation.local.generator import LocalGenerator
from grpo_mlflow.generation.server import replicas
from grpo_mlflow.generation.server.fleet import Fleet
from grpo_mlflow.generation.server.generator import ServerGenerator
from grpo_mlflow.generation.server.launch import engine_class, start_command
from grpo_mlflow.generation.server.policy_server import PolicyServer
from grpo_mlflow.generation.server.process import ServerProcess
from grpo_mlflow.generation.server.servers import Servers
from grpo_mlflow.generation.server.shared import shared
from grpo_mlflow.generation.server.sync import SYNCS
from grpo_mlflow.model import lora
from grpo_mlflow.model.policy import Policy, load_as
from grpo_mlflow.runtime.http.client import Client
from grpo_mlflow.runtime.pace import Pace
from grpo_mlflow.runtime.processes import Processes


class Generators:
    """The generators of a run; what they hold open ends with the `with` block.

    Args:
        config: which backends, where.
        policy: the model that is trained or measured.
        source: the folder or hub id that it was loaded from.
        initial: the one that version 0 was loaded from; what a server that is sent no weights has.
        log: the file for the output of a server of our own.
        say: takes lines about its progress.
        trains: whether the policy is trained, and not only measured.
        processes: those of the run, whose first one talks to the servers for all; None: this one alone.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        source: str | Path,
        initial: str | Path,
        log: Path,
        say: Callable[[str], None],
        *,
        trains: bool = True,
        processes: Processes | None = None,
    ) -> None:
        self._config, self._policy, self._log, self._say = config, policy, log, say
        self._source, self._initial, self._trains = source, initial, trains
        self._frozen: Policy | None = None
        self._sync = SYNCS[config.generation.sync]
        self._processes = processes
        self._servers: dict[tuple[str, frozenset[str]], Servers] = {}

    def __enter__(self) -> Generators:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as all_of_them:
            for servers in self._servers.values():
                all_of_them.callback(servers.close)

    def training(self) -> Generator:
        """Return what samples rollouts."""
        return self._generator(
            self._config.generation.backend, self._config.generation.base_url, self._config.generation.batch_size
        )

    def evaluation(self) -> Generator:
        """Return what samples for evaluations: from the same server where it is the same."""
        own, shared = self._config.eval, self._config.generation
        return self._generator(own.backend or shared.backend, own.base_url or shared.base_url, own.batch_size)

    def _generator(self, backend: str, base_url: Addresses, batch_size: int) -> Generator:
        if backend == "local":
            tokens = self._config.generation.max_tokens_per_batch
            return LocalGenerator(self._policy, batch_size, pace=Pace(self._say), tokens=tokens)
        recompute = self._config.generation.behaviour_logprobs == "recompute"
        pricing = self._served_policy if recompute else None
        return ServerGenerator(self._shared(backend, base_url), self._policy, batch_size, pricing, pace=Pace(self._say))

    def _shared(self, backend: str, base_url: Addresses) -> Servers:
        """Return the servers at these addresses, or those that the run starts: the same each time."""
        settings = self._config.generation
        trained_on = backend == settings.backend and addresses.same(base_url, settings.base_url)
        managed = settings.server.manage and trained_on
        urls = () if managed else addresses.of(base_url)

        def fleet() -> Fleet:
            processes = self._managed() if managed else []
            servers = [self._server(backend, process.url, process, trained_on) for process in processes]
            servers += [self._server(backend, url, None, trained_on) for url in urls]
            return Fleet(servers, self._policy, settings, self._load_initial)

        key = backend, frozenset(map(addresses.place, urls))
        if key not in self._servers:
            self._servers[key] = shared(fleet, self._processes, self._policy.model)
        return self._servers[key]

    def _server(self, backend: str, address: str, process: ServerProcess | None, trained_on: bool) -> PolicyServer:
        settings = self._config.generation
        only_measures = not (trained_on and self._trains)
        priced = trained_on and self._trains and settings.behaviour_logprobs == "server"
        return PolicyServer(
            engine_class(backend)(Client(address, settings.timeout)),
            self._policy,
            settings,
            process,
            training_sampling(settings) if priced else None,
            source=None if self._trains else self._source,
            start_command=lambda: start_command(self._config, backend, address, self._start_model(), secrets=False),
            complete=lambda words: self._complete(words, only_measures),
        )

    def _complete(self, words: str, only_measures: bool) -> str:
        """Return settings that do without what a server lacks, as this run takes them; empty: it takes none."""
        if only_measures:  # how rollouts are drawn is not to change for that
            return "eval.backend=local"
        found = server_checks.complete(self._config, words)
        if not found:
            return ""
        try:
            SYNCS[remedies.changed(self._config, found).generation.sync].starts_with(self._source, self._initial)
        except UserError:
            return ""
        return found

    def _start_model(self) -> str | Path:
        return self._sync.starts_with(self._source, self._initial)

    def _load_initial(self) -> Policy:
        if self._policy.has_adapter and lora.base_of(self._initial) is None:
            return self._policy.base()  # training started from it, with an adapter that changed nothing yet
        found = load_as(self._config.model, self._initial, self._policy.device, frozen=True)
        found.model.requires_grad_(False)
        return found

    def _served_policy(self) -> Policy:
        """Return the policy whose weights the servers have: what is trained, or what it was at first."""
        if self._sync.sends or not self._trains:
            return self._policy
        self._frozen = self._frozen or self._load_initial()
        return self._frozen

    def _managed(self) -> list[ServerProcess]:
        """Return the servers that the run starts, with what they start with."""
        found = replicas.processes(self._config, self._log, self._say, self._trained_on())
        for process in found:
            process.model = self._start_model()
        return found

    def _trained_on(self) -> Sequence[int]:
        """Return the GPUs of the processes of this run on this machine: of several, each has that of its number."""
        device = self._policy.device
        if device.type == "cpu":
            return ()
        if self._processes is None or self._processes.count == 1:
            return (device.index or 0,)
        return range(int(os.environ.get("LOCAL_WORLD_SIZE", self._processes.count)))
