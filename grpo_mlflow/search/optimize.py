"""A whole study from a resolved config: open it, run its trials, confirm the best, leave what people need.

Any number of commands, on any machines, work on the study of one name and storage. One of them leads: it owns the
parent run and ends the study. The others run trials and leave. A leader shows that it lives by a time stamp in the
study; where that has grown old, the next command takes its place.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import optuna
import torch

from grpo_mlflow import runs
from grpo_mlflow.config import Resolved
from grpo_mlflow.console import Console
from grpo_mlflow.errors import UserError
from grpo_mlflow.search import report
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.space import Space
from grpo_mlflow.sources import Stored
from grpo_mlflow.tracking import NullTracker

_PARENT, _SEEN = "parent_run_id", "leader_seen"
_BEAT, _DEAD = 15.0, 60.0  # seconds between a leader's signs of life, and until it is given up


def optimize(resolved: Resolved, space: Space, command: Sequence[str] = ()) -> list[studies.Finalist]:
    """Lead or join the study of the config; return the finalists, the winner first (none where it only joined).

    `command` are the words of this command, for the worker processes that `search.n_jobs` asks for.
    """
    search = resolved.config.search
    study = studies.open_study(resolved.config, space)
    console = Console()
    if time.time() - study.user_attrs.get(_SEEN, 0.0) < _DEAD:
        console.say(f"joining study {search.study_name}; the command that leads it will end it")
        studies.Search(resolved, space, study, _parent_of(study), console).run()
        return []
    with _leading(study):
        known = study.user_attrs.get(_PARENT)
        with runs.session(resolved, "optimize", Stored(known, {}, None) if known else None) as (_, tracker, console):
            study.set_user_attr(_PARENT, tracker.run_id)
            console.say(f"study {search.study_name}: {search.sampler} proposes, {search.pruner} prunes")
            work = studies.Search(resolved, space, study, tracker.run_id, console)
            with _workers(search.n_jobs - 1, command):
                _run_all(work, study, console)
            finalists = work.confirm()
            _leave(work, study, finalists, tracker, search.k)
            console.say(f"\n{report.summary(search.k, studies.final_trials(study), finalists)}")
            console.say(f"files     {tracker.run_dir / 'study'}")
    return finalists


@contextmanager
def _leading(study: optuna.Study) -> Iterator[None]:
    """Show the other commands that this one leads, until the block ends."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT):
            study.set_user_attr(_SEEN, time.time())

    study.set_user_attr(_SEEN, time.time())
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        study.set_user_attr(_SEEN, 0.0)


def _parent_of(study: optuna.Study) -> str:
    """Return the parent run, which the leader may be about to open."""
    for _ in range(120):
        if parent := study.user_attrs.get(_PARENT):
            return str(parent)
        time.sleep(0.5)
    raise UserError(f"study {study.study_name!r}: the command that leads it has opened no MLflow run")


@contextmanager
def _workers(count: int, command: Sequence[str]) -> Iterator[None]:
    """Run further processes that join the study, and end them with the block."""
    environment = dict(os.environ)
    if count:  # all processes share the cores, this one too
        threads = max(1, torch.get_num_threads() // (count + 1))
        torch.set_num_threads(threads)
        environment["OMP_NUM_THREADS"] = str(threads)
    environment.pop("MLFLOW_RUN_ID", None)  # the parent's
    words = [sys.executable, "-m", "entrypoints.optimize", *command]
    processes = [subprocess.Popen(words, env=environment) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait()


def _run_all(work: studies.Search, study: optuna.Study, console: Console) -> None:
    """Run trials, and wait for those of other processes; one whose process died goes back into the queue."""
    said = False
    while True:
        work.run()
        states = {trial.state for trial in studies.final_trials(study)}
        if optuna.trial.TrialState.RUNNING not in states:
            return
        if not said:
            console.say("waiting for trials of other processes")
            said = True
        optuna.storages.fail_stale_trials(study)
        time.sleep(1.0)


def _leave(
    work: studies.Search,
    study: optuna.Study,
    finalists: Sequence[studies.Finalist],
    tracker: NullTracker,
    k: int,
) -> None:
    """Leave the table, the winner's config and the report in the parent run."""
    trials = studies.final_trials(study)
    tracker.text("study/trials.csv", report.trials_table(trials))
    tracker.text("study/report.html", report.page(study, k, trials, finalists))
    if finalists:
        winner = finalists[0]
        tracker.text("study/best_config.yaml", work.config_of(winner.trial))
        confirmed = winner.confirmed.pass_at(k)
        tracker.metrics(
            {
                f"study/confirmed_pass_at_{k}": confirmed.value,
                f"study/confirmed_pass_at_{k}_low": confirmed.low,
                f"study/confirmed_pass_at_{k}_high": confirmed.high,
                f"study/selected_pass_at_{k}": winner.selected.value,
            },
            0,
        )
        tracker.tags({"study.winner_run": winner.trial.user_attrs["run_id"]})
