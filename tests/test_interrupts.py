"""Signals arrive at once, or at the end of a deferred block, and never twice."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from grpo_mlflow.interrupts import Interrupted, deferred, handled, let_through, request, shared, stop


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_raises_at_once_and_names_the_exit_code(number: int, code: int) -> None:
    before = signal.getsignal(number)
    reached = []
    with pytest.raises(Interrupted) as caught, handled():
        send(number)
        reached.append("after")
    assert (caught.value.exit_code, reached) == (code, [])
    assert signal.getsignal(number) is before


def test_a_deferred_signal_waits_for_the_outermost_block(capfd: pytest.CaptureFixture[str]) -> None:
    reached = []
    with pytest.raises(Interrupted), handled():
        with deferred():
            with deferred():
                send()
                reached.append("inner")
            reached.append("outer")
        reached.append("after")
    assert reached == ["inner", "outer"]
    assert "Ctrl-C again" in capfd.readouterr().err


def test_a_second_ctrl_c_gives_up_waiting_but_a_second_sigterm_does_not() -> None:
    with pytest.raises(KeyboardInterrupt), handled(), deferred():
        send()
        send()
    reached = []
    with pytest.raises(Interrupted), handled(), deferred():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        reached.append("end")
    assert reached == ["end"]


def test_after_an_error_in_a_deferred_block_signals_work_again() -> None:
    with handled():
        with pytest.raises(ValueError, match="own"), deferred():
            send()
            raise ValueError("its own error goes first")
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)


def test_while_stopping_further_sigterms_are_ignored() -> None:
    reached = []
    with handled():
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)
        send(signal.SIGTERM)  # as `mlflow run` passes on what the terminal has sent already
        reached.append("saved")
    assert reached == ["saved"]


def test_other_threads_are_left_alone() -> None:
    done = []

    def work() -> None:
        with handled(), deferred():
            done.append(True)

    thread = threading.Thread(target=work)
    with handled():
        thread.start()
        thread.join()
        with pytest.raises(Interrupted):
            send()
    assert done == [True]


def test_among_several_processes_signals_wait_but_where_they_are_let_through(capfd: pytest.CaptureFixture[str]) -> None:
    reached = []
    with pytest.raises(Interrupted), handled(), shared(silent=False):
        send()
        send()  # a launcher passes Ctrl-C on
        reached.append("held")
        with let_through():
            reached.append("not reached")
    assert reached == ["held"]
    assert "Ctrl-C again" not in capfd.readouterr().err
    with pytest.raises(Interrupted), handled(), shared(silent=True), let_through():
        send(signal.SIGTERM)
        reached.append("not reached")
    assert reached == ["held"]
    assert capfd.readouterr().err == ""


def test_another_thread_can_ask_to_stop_and_a_process_can_stop_for_another() -> None:
    with pytest.raises(Interrupted), handled(), shared(silent=False):
        with deferred():
            thread = threading.Thread(target=request, args=(signal.SIGTERM,))
            thread.start()
            thread.join()
        with let_through():
            pass
    with pytest.raises(Interrupted) as caught, handled(), shared(silent=False):
        stop(signal.SIGINT)
    assert caught.value.exit_code == 130
