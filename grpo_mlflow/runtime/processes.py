"""The processes of a run: one, or several that a launcher started.

They part an iteration's work and must take every decision together, or a collective of one waits for ever for the
others. `agreed` is where they decide: a phase of own work, which a signal or an error may end in any of them, and then
one exchange after which all go on or all end, in the same iteration.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

from grpo_mlflow.config import Config
from grpo_mlflow.errors import ConfigError, PeerLost, Pruned, UserError, one_line
from grpo_mlflow.runtime import interrupts, meeting
from grpo_mlflow.runtime.heartbeat import Heartbeat, Meeting, connect

T = TypeVar("T")
Item = TypeVar("Item")
E = TypeVar("E", bound=BaseException)
# One may have to wait for another that makes a model or sends a checkpoint; `heartbeat` tells who is dead.
_PATIENCE = timedelta(hours=2)
_LAUNCHED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_GRACE = 15.0  # seconds that a collective has, after a loss, to fail by itself


def join(config: Config, device: torch.device) -> Processes:
    """Connect the processes that the launcher's environment names.

    Raises:
        ConfigError: they cannot work together like this.
    """
    missing = [name for name in _LAUNCHED if name not in os.environ]
    if missing and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}, but no {missing[0]}: each of several processes needs "
            f"{', '.join(_LAUNCHED)} in its environment; torchrun and accelerate launch set them"
        )
    for way in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):  # accelerate ignores some of them on a CPU
        if os.environ.get(f"ACCELERATE_USE_{way}", "false").lower() == "true":
            raise ConfigError(f"ACCELERATE_USE_{way} = true: allowed: plain data parallel, or train.sharding=full")
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",  # `model.dtype` decides, not a launcher
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    processes = Processes(accelerator)
    if problem := _objection(config, processes):
        processes.together([None])  # the first holds the store through which the others may still be connecting
        raise processes.told_by_first(ConfigError(problem))
    return processes


def _objection(config: Config, processes: Processes) -> str | None:
    """Return what is wrong with these processes for this config, or None."""
    count = processes.count
    if count > 1 and re.fullmatch(r"cuda:\d+", config.model.device):
        return (
            f"model.device = {config.model.device!r}: each of {count} processes takes its own GPU; allowed: auto, cpu"
        )
    if (problems := config.data.problems_per_iteration) % count:
        return (
            f"data.problems_per_iteration = {problems}: does not divide over {count} processes; allowed: multiples of "
            f"{count}"
        )
    return None


class Processes:
    """This process, `rank`, among `count`; where it is alone, everything here is a plain call."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self._heartbeat: Heartbeat | None = None
        self._blocked = False  # in a collective, which no Python code can leave
        self._common_end = False  # the others know that the run ends, and why

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def first_lost(self) -> bool:
        """Whether the process that tracks the run is gone."""
        return self._heartbeat is not None and self._heartbeat.first_lost

    def own(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's share: every `count`-th item."""
        return items[self.rank :: self.count]

    def together(self, share: Sequence[Item]) -> list[Item]:
        """Return all items in their first order, where each process has its own share."""
        if self.count == 1:
            return list(share)
        with self.collective():
            shares = gather_object([share])
        return [shares[i % self.count][i // self.count] for i in range(sum(map(len, shares)))]

    def broadcast(self, value: T) -> T:
        """Return the first process's value."""
        values = [value]
        if self.count > 1:
            with self.collective():
                broadcast_object_list(values)
        return values[0]

    def one_after_first(self, work: Callable[[], T]) -> T:
        """Let the first process work, then the others, which find made what it made."""
        if self.is_first:
            made = self.agreed(work)
            self.agreed(lambda: None)
            return made
        self.agreed(lambda: None)
        return self.agreed(work)

    def agreed(self, work: Callable[[], T]) -> T:
        """Do this process's part of a phase; all go on after it, or all end.

        Where there are several processes, a signal ends a phase at once, in all of them; elsewhere it waits for the
        next.

        Raises:
            Interrupted: one of them got a signal.
            PeerLost: another failed, or is gone.
        """
        if self._heartbeat is None:
            return work()
        value: Any = None
        failure: Exception | None = None
        outcome: tuple[int, str | None] = (0, None)  # a signal, an error
        try:
            with interrupts.let_through():
                value = work()
        except interrupts.Interrupted as stop:
            outcome = (stop.signum, None)
            self._heartbeat.stop(stop.signum)
        except Exception as error:
            failure, outcome = error, (0, _line(error))
            self._heartbeat.stop(signal.SIGTERM)  # what the others do is in vain
        with self.collective():
            outcomes = gather_object([outcome])
        failed = [(rank, text) for rank, (_, text) in enumerate(outcomes) if text is not None]
        if failure is not None:
            raise self.told_by_first(failure)
        if failed:
            rank, text = failed[0]
            raise self.told_by_first(PeerLost(f"process {rank} of {self.count} failed: {text}"))
        if signum := max(number for number, _ in outcomes):
            self._common_end = True
            interrupts.stop(signum)
        return value  # type: ignore[no-any-return]

    def decided(self, decide: Callable[[], None]) -> None:
        """Let the first process decide; where it raises, all end: with Pruned where that is what it raised."""
        raised: Exception | None = None
        if self.is_first:
            try:
                decide()
            except Exception as error:
                raised = error
        own = raised is None or isinstance(raised, Pruned)
        found = self.broadcast(raised if own else PeerLost(f"process 0 of {self.count} failed"))
        if found is not None:
            raise self.told_by_first(raised or found)

    def told_by_first(self, error: E) -> E:
        """Return an error that all processes end with, so that the first alone need tell it."""
        self._common_end = True
        if isinstance(error, UserError):
            error.told = not self.is_first
        return error

    @contextmanager
    def collective(self, *, common: bool = True) -> Iterator[None]:
        """Exchange with the others inside the block.

        Args:
            common: a UserError in the block is one that all of them get. Else the others must hear of it, or they would
                wait for this one for ever.

        Raises:
            PeerLost: one of them is gone.
        """
        if self._heartbeat is None:
            yield
            return
        self._require_all()
        self._blocked = True
        try:
            yield
        except UserError as error:
            if not common:
                raise
            raise self.told_by_first(error) from error.__cause__
        except RuntimeError as error:
            if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
                raise
            self._heartbeat.wait_for_loss(3.0)  # it may know more
            self._require_all()
            raise PeerLost(f"process {self.rank} of {self.count}: another is gone ({one_line(error)})") from error
        finally:
            self._blocked = False
        self._require_all()

    def meet(self) -> bool:
        """Return whether all processes come here and can exchange something; see `meeting.all_come`."""
        beat = self._heartbeat
        return beat is None or meeting.all_come(self.rank, self.count, lambda: beat.loss is not None)

    @contextmanager
    def inside(self, block: AbstractContextManager[None]) -> Iterator[None]:
        """Enter a block whose beginning, not its end, exchanges something with the others."""
        with ExitStack() as stack:
            with self.collective():
                stack.enter_context(block)
            yield

    def _require_all(self) -> None:
        assert self._heartbeat is not None
        if self._heartbeat.loss is not None:
            error = PeerLost(f"{self._heartbeat.loss}; process {self.rank} of {self.count} stops")
            error.told = not (self.is_first or self._heartbeat.first_lost)
            raise error

    @contextmanager
    def watched(self, on_hang: Callable[[], None]) -> Iterator[None]:
        """Watch the other processes inside the block, and hold signals back but in phases (`agreed`).

        Args:
            on_hang: called in another thread before this process ends itself because it hangs in a collective with a
                process that is lost.
        """
        if self.count == 1:
            yield
            return
        meeting = Meeting() if self.is_first else None
        port, secret = self.broadcast((meeting.port, meeting.secret) if meeting else (0, ""))
        others = meeting.accept(self.count - 1) if meeting else {}
        connections = others or connect(os.environ["MASTER_ADDR"], port, secret, self.rank)

        def on_loss(line: str) -> None:
            interrupts.request(signal.SIGTERM)  # what is being sampled is in vain
            self._end_if_blocked(line, on_hang)

        with interrupts.shared(silent=not self.is_first):
            self._heartbeat = heartbeat = Heartbeat(connections, self.rank, interrupts.request, on_loss)
            failure: str | None = None
            try:
                yield
            except BaseException as error:
                failure = None if self._common_end else _line(error)
                raise
            finally:
                self._heartbeat = None
                heartbeat.end(failure)

    def _end_if_blocked(self, line: str, on_hang: Callable[[], None]) -> None:
        """End this process where a collective does not fail by itself; return once that has seen the loss."""
        until = time.monotonic() + _GRACE
        while time.monotonic() < until:
            if self._heartbeat is None:
                return
            if not self._blocked:
                until = time.monotonic() + _GRACE
            time.sleep(0.1)
        print(f"error: {line}; process {self.rank} of {self.count} hangs and is ended", file=sys.stderr, flush=True)
        last = threading.Thread(target=on_hang, daemon=True)
        last.start()
        last.join(10.0)  # the tracking store may hang as well
        os._exit(1)


def _line(error: BaseException) -> str:
    return one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
