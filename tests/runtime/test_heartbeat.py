"""Who is alive, who is not, and what cannot wait."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, field

from grpo_mlflow.runtime.heartbeat import Heartbeat, Meeting, connect


@dataclass
class Heard:
    """What a heartbeat told of the others."""

    stops: list[int] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    anything: threading.Event = field(default_factory=threading.Event)

    def stop(self, signum: int) -> None:
        self.stops.append(signum)
        self.anything.set()

    def loss(self, line: str) -> None:
        self.losses.append(line)
        self.anything.set()


def beat(rank: int, connections: dict[int, socket.socket], silence: float = 20.0) -> tuple[Heartbeat, Heard]:
    heard = Heard()
    return Heartbeat(connections, rank, heard.stop, heard.loss, silence), heard


def three() -> list[tuple[Heartbeat, Heard]]:
    """The first process, connected to two others."""
    (a, b), (c, d) = socket.socketpair(), socket.socketpair()
    return [beat(0, {1: a, 2: c}), beat(1, {0: b}), beat(2, {0: d})]


def test_a_closed_connection_is_a_lost_process_for_everyone() -> None:
    (a, b), (c, d) = socket.socketpair(), socket.socketpair()
    first, second = beat(0, {1: a, 2: c}), beat(2, {0: d})
    b.close()
    for beating, heard in (first, second):
        assert beating.wait_for_loss(5) == "process 1 is gone"
        assert heard.anything.wait(5)
        assert heard.losses == ["process 1 is gone"]
        assert not beating.first_lost


def test_the_loss_of_the_first_is_seen_by_the_others() -> None:
    a, b = socket.socketpair()
    beating, _ = beat(1, {0: b})
    a.close()
    assert beating.wait_for_loss(5) == "process 0 is gone"
    assert beating.first_lost


def test_silence_is_a_lost_process() -> None:
    a, b = socket.socketpair()
    beating, heard = beat(0, {1: a}, silence=1.0)
    assert beating.wait_for_loss(0.5) is None
    assert heard.anything.wait(5)
    assert heard.losses == ["process 1 gave no sign of life for 1 s"]
    b.close()


def test_a_signal_to_one_is_heard_by_the_others_once() -> None:
    beats = three()
    beats[1][0].stop(15)
    for rank in (0, 2):
        assert beats[rank][1].anything.wait(5)
    ends = [threading.Thread(target=beating.end, args=(None,)) for beating, _ in beats]
    for end in ends:
        end.start()
    for end in ends:
        end.join(5)
        assert not end.is_alive()
    assert [heard.stops for _, heard in beats] == [[15], [], [15]]
    assert [heard.losses for _, heard in beats] == [[], [], []]


def test_an_end_waits_for_the_others_and_a_failure_does_not() -> None:
    beats = three()
    waits = threading.Thread(target=beats[0][0].end, args=(None,))
    waits.start()
    beats[1][0].end("ValueError: no")
    waits.join(5)
    assert not waits.is_alive()
    assert beats[2][0].wait_for_loss(5) == "process 1 failed: ValueError: no"


def test_a_stranger_is_not_let_in() -> None:
    meeting = Meeting()
    strange = connect("127.0.0.1", meeting.port, "0" * 32, 1)
    known = connect("127.0.0.1", meeting.port, meeting.secret, 1)
    found = meeting.accept(1)
    assert found[1].getpeername()[1] == known[0].getsockname()[1]
    assert strange[0].recv(1) == b""
    for connection in (*found.values(), *known.values(), *strange.values()):
        connection.close()
