"""Messages from one process of a run to another, beside the collectives.

Who waits in a collective notices neither a signal nor that waiting is in vain, and has to wait for all. Messages lie in
the store at which the processes met; who waits looks there now and then, so that it can be told to stop.
"""

from __future__ import annotations

import itertools
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.distributed_c10d import _get_default_store

from grpo_mlflow.errors import PeerLost, one_line

_PART = 4 * 2**20  # bytes: the store takes 8 MiB at most
_SHORTEST, _LONGEST = 0.001, 0.05  # seconds between two looks
_numbers = itertools.count()


class Mail:
    """Messages of process `rank` to and from others, in order for each pair. Every process makes its own, in step."""

    def __init__(self, rank: int) -> None:
        self._rank, self._name = rank, f"grpo-mail-{next(_numbers)}"
        store: Any = _get_default_store()
        self._store = store.clone()  # its own connection: threads may look while others exchange
        self._sent, self._taken = Counter[int](), Counter[int]()

    def post(self, to: int, message: Any) -> None:
        """Send a message and go on.

        Raises:
            PeerLost: the process that holds the store is gone.
        """
        place, content = f"{self._name}/{self._rank}/{to}/{self._sent[to]}", pickle.dumps(message)
        self._sent[to] += 1
        parts = range(0, len(content), _PART)
        with self._reaching():
            for number, start in enumerate(parts):
                self._store.set(f"{place}/{number}", content[start : start + _PART])
            self._store.set(place, str(len(parts)))  # last: now it is there as a whole

    def wait(self, source: int, given_up: Callable[[], bool] = lambda: False) -> Any:
        """Return the next message of a process; None where the wait is given up.

        Raises:
            PeerLost: as `post`.
        """
        place, pause = f"{self._name}/{source}/{self._rank}/{self._taken[source]}", _SHORTEST
        while True:
            with self._reaching():
                if self._store.check([place]):
                    break
            if given_up():
                return None
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
        self._taken[source] += 1
        with self._reaching():
            names = [f"{place}/{number}" for number in range(int(self._store.get(place)))]
            message = pickle.loads(b"".join(self._store.get(name) for name in names))
            for name in (place, *names):
                self._store.delete_key(name)
        return message

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's, for a connection that is closed
            raise PeerLost(f"process {self._rank}: another is gone ({one_line(error)})") from error
