"""Signals arrive at once, or at the end of a deferred block, and never twice."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from pathlib import Path

import mlflow
import optuna
import pytest

from grpo_mlflow import tracking
from grpo_mlflow.config.schema import TrackingConfig
from grpo_mlflow.runtime.interrupts import Interrupted, check, deferred, handled, let_through, request, shared, stop
from grpo_mlflow.search.storage import open_storage
from tests.support.signals import count_lines, send, send_at


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


def test_a_signal_whose_exception_got_lost_is_raised_by_the_next_check(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Interrupted) as caught, handled():
        check()
        with suppress(ValueError), deferred():
            send(signal.SIGTERM)
            raise ValueError("goes first, and is dealt with")
        with deferred():
            check()  # only where signals are let through
        check()
    assert caught.value.exit_code == 143
    with pytest.raises(Interrupted), handled():
        with suppress(BaseException):  # as a bare except in other code does
            send()
        check()
    with handled():
        check()


@pytest.mark.usefixtures("_terminal")
def test_sighup_stops_unless_it_is_ignored() -> None:
    with pytest.raises(Interrupted) as caught, handled():
        send(signal.SIGHUP)
    assert caught.value.exit_code == 129
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under `nohup`
    try:
        with handled():
            send(signal.SIGHUP)
            check()
    finally:
        signal.signal(signal.SIGHUP, before)


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


@pytest.mark.parametrize("kind", ["sqlite:///", "journal:"])
def test_a_signal_anywhere_in_a_call_to_a_storage_leaves_it_usable(tmp_path: Path, kind: str) -> None:
    address = f"{kind}{tmp_path}/storage"
    storage, other = open_storage(address), open_storage(address)
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    trial.report(0.5, 0)  # what only a first call does is not counted
    moments = count_lines(lambda: trial.report(0.5, 1))
    for step in range(2, 42):
        with pytest.raises(Interrupted), handled(), send_at((step - 1) * moments // 42):
            trial.report(0.5, step)
        other.set_trial_user_attr(trial._trial_id, "at", step)  # the database is not locked
        trial.report(0.5, step)
    assert sorted(study.trials[0].intermediate_values) == list(range(42))
    study.tell(trial, 1.0)


def test_a_signal_anywhere_in_a_write_to_mlflow_stops_the_run_and_damages_no_write(store: str) -> None:
    tracker = tracking.start(TrackingConfig(uri=store, experiment="signals"), "train")
    tracker.tags({"0": "0"})  # what only a first call does is not counted
    tracker.settle()
    moments = count_lines(lambda: tracker.tags({"0": "0"}))
    for number in range(1, 31):
        tracker.settle()  # what a write does depends on whether others wait
        with pytest.raises(Interrupted), handled(), send_at(number * moments // 32):
            tracker.tags({f"{number}": f"{number}"})
        tracker.tags({f"after {number}": f"{number}"})
    tracker.finish("KILLED")
    tags = mlflow.MlflowClient(store).get_run(tracker.run_id).data.tags
    assert {key: value for key, value in tags.items() if key.startswith("after")} == {
        f"after {n}": f"{n}" for n in range(1, 31)
    }
    written = {key: value for key, value in tags.items() if key.isdigit()}
    assert written.items() <= {f"{n}": f"{n}" for n in range(31)}.items()  # the others had not begun
    assert len(written) > 10
    assert not (tracker.run_dir / "refused.jsonl").exists()
