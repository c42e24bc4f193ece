"""A whole study from a resolved config: open it, run its trials, confirm the best, leave what people need.

Any number of commands, on any machines, work on the study of one name and storage. One of them leads: it owns the
parent run and ends the study. The others run trials and leave.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow import runs, tasks, tracking
from grpo_mlflow.config import Config, Resolved
from grpo_mlflow.config.schema import SearchConfig
from grpo_mlflow.errors import ConfigError, UserError, one_line
from grpo_mlflow.runs import messages, models, next_steps
from grpo_mlflow.runs.stored import Stored, find
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.search import (
    champion,
    decay,
    kept,
    launchers,
    notes,
    outcome,
    report,
    rights,
    settings,
    study_page,
    views,
)
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.confirm import Confirmation, Finalist
from grpo_mlflow.search.launchers import Launcher
from grpo_mlflow.search.outcome import Outcome
from grpo_mlflow.search.space import Space
from grpo_mlflow.search.trials import Search
from grpo_mlflow.tasks import contents, data_sets
from grpo_mlflow.tracking import Tracker, pages
from grpo_mlflow.tracking.views import View
from grpo_mlflow.training import commands, evaluation, outlook

_BASELINE = "study/baseline.jsonl"


def optimize(resolved: Resolved, space: Space, storage: BaseStorage, command: Sequence[str] = ()) -> list[Finalist]:
    """Lead or join the study of the config; return the finalists, the winner first (none where it only joined).

    `command` are the words of this command, for the worker processes that `search.n_jobs` asks for.
    """
    resolved = settings.pinned(resolved)
    search = resolved.config.search
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("optimize under a launcher of several processes: each would run the study; allowed: n_jobs")
    console = Console()
    models.require(resolved.config, console)
    study = studies.open_study(storage, resolved.config, space)
    queue = studies.Queue(study, storage, resolved.config, space)
    while (right := rights.take(storage, search.study_name)) is None:
        if (parent := rights.parent_of(storage, search.study_name)) is not None:
            _require_same_rows(resolved.config, parent)
            console.say(f"joining study {search.study_name}; the command that leads it will end it")
            baseline = _shared_baseline(resolved, parent)
            with interrupts.handled():
                Search(resolved, space, study, queue, parent, console, baseline=baseline).run()
            return []
    with right.held():
        launcher = launchers.create(resolved.config, command, console)  # before a run is opened that could only fail
        return _lead(resolved, space, study, queue, right, launcher)


def _lead(
    resolved: Resolved,
    space: Space,
    study: optuna.Study,
    queue: studies.Queue,
    right: rights.Right,
    launcher: Launcher,
) -> list[Finalist]:
    config, search = resolved.config, resolved.config.search
    known = study.user_attrs.get(study_page.PARENT)
    if known:
        _require_usable(config, known)
    with runs.session(resolved, "optimize", Stored(known, {}, None) if known else None) as (_, tracker, console):
        study.set_user_attr(study_page.PARENT, tracker.run_id)
        view = views.of_study(search.study_name, tracker.run_id, [each.key for each in space.dimensions], search.k)
        tracker.view(view)
        tracker.note(notes.under_way(config, tracker, view, str(space)))
        _introduce(resolved, space, len(queue), console)
        baseline = _baseline(resolved, tracker, console)
        tracker.settle()  # who joins then asks the store for the baseline
        right.announce(tracker.run_id)

        def obey() -> None:
            _obey(tracker, console)

        work = Search(resolved, space, study, queue, tracker.run_id, console, baseline=baseline, obey=obey)
        with launcher.running():
            _run_all(work, study, launcher, console, obey)
        right.require()
        kept.require_sent(study, config.tracking.uri, tracker.run_id, console)
        confirmation = Confirmation(resolved, study, tracker.run_id, console)
        found = Outcome(len(queue), *confirmation.finalists())
        kept.send_below(config.tracking.uri, tracker.run_id, console)
        tracking.end_abandoned(tracking.connect(config.tracking.uri), tracker.run_id)
        with interrupts.deferred():
            if found.finalists:
                _honour(resolved, found.finalists[0], tracker, console)
            _leave(study, found, tracker, config, console)
            tracker.note(notes.ended(study, found, config, tracker, view, varied=str(space)))
        _conclude(study, found, config, tracker, view, console)
        _require_result(studies.begun_trials(study), search, found.finalists)
    return [*found.finalists]


def _introduce(resolved: Resolved, space: Space, trials: int, console: Console) -> None:
    search = resolved.config.search
    if champion.model_name(search.study_name) != search.study_name:
        console.say(
            f"study {search.study_name}: the model registry takes no such name; the winner will be "
            f"{champion.address(search.study_name)}"
        )
    console.say(f"study {search.study_name}: {search.sampler} proposes, {search.pruner} prunes")
    console.say(outlook.planned_study(resolved.config, trials))
    if (line := decay.note(resolved, space)) is not None:
        console.say(line)


def _conclude(
    study: optuna.Study, found: Outcome, config: Config, tracker: Tracker, view: View, console: Console
) -> None:
    """Say what the study has found, and where to look at it."""
    search = config.search
    console.say(f"\n{report.summary(search.k, studies.begun_trials(study), found.total, found.finalists, found.own)}")
    if found.finalists:
        console.say(f"champion  {champion.address(search.study_name)}")
    console.say(f"files     {tracker.run_dir / 'study'}")
    looking = next_steps.looking(tracker.url, pages.of_view(tracker.experiment_id, view.key))
    console.say("\n".join(messages.headed("open it", looking, 10)))


def _require_usable(config: Config, parent: str) -> None:
    """Raise UserError if a study cannot go on in its parent run."""
    if not tracking.lives(tracking.connect(config.tracking.uri), parent):
        raise UserError(
            f"study {config.search.study_name!r}: its parent run {parent} is not in this MLflow store, or was deleted; "
            f"allowed: the store that it was begun with, after `mlflow runs restore --run-id {parent}` (or `mlflow "
            "experiments restore`) this one, or another search.study_name"
        )
    tracking.require_free(config.tracking.uri, parent)
    _require_same_rows(config, parent)


def _require_same_rows(config: Config, parent: str) -> None:
    """Raise UserError if the study began with other rows: its trials could not be compared with further ones."""
    if data_sets.changed(config, tracking.find_run(tracking.connect(config.tracking.uri), parent).data.tags):
        raise UserError(
            f"study {config.search.study_name!r}: its rows have changed since it began; allowed: the rows as they "
            "were, or another search.study_name"
        )


def _require_result(trials: Sequence[FrozenTrial], search: SearchConfig, finalists: Sequence[Finalist]) -> None:
    """Raise UserError if there is no winner where there should be one."""
    failed, finished = [trial for trial in trials if trial.state == TrialState.FAIL], studies.ranked(trials)
    if failed and not finished:
        raise UserError(f"no trial finished; the first failed with: {failed[0].user_attrs.get('error', 'unknown')}")
    if finished and search.finalists and not finalists:
        raise UserError(
            f"study {search.study_name!r}: none of its finished trials is left to confirm, so it has no winner; "
            "allowed: `mlflow runs restore` what was deleted, more trials (search.n_trials), another search.study_name"
        )


def _baseline(resolved: Resolved, tracker: Tracker, console: Console) -> evaluation.Evaluation:
    """Evaluate the untrained model once for all trials, in a run of its own."""
    path = tracker.run_dir / _BASELINE
    result = _kept(path, console)
    if result is None:
        console.say("evaluating the untrained model, once for all trials")
        for line in contents.remarks(tasks.of(resolved.config), resolved.config):
            console.say(line)
        result = runs.evaluate(resolved, "", runs.Nested(tracker.run_id, "baseline"))
        evaluation.write(path, result)
        tracker.publish(_BASELINE)
    result = _once_each(result, resolved)
    console.say(f"baseline  {result.summary()}")
    return result


def _kept(path: Path, console: Console) -> evaluation.Evaluation | None:
    """Return the evaluation in a file; None where there is none, or none that is whole."""
    if not path.exists():
        return None
    try:
        return evaluation.read(path)
    except UserError as error:
        console.warn(f"{error}; it is made again")
        return None


def _shared_baseline(resolved: Resolved, parent: str) -> evaluation.Evaluation:
    client = tracking.connect(resolved.config.tracking.uri)
    return _once_each(evaluation.read(tracking.artifact(client, parent, _BASELINE)), resolved)


def _once_each(found: evaluation.Evaluation, resolved: Resolved) -> evaluation.Evaluation:
    """Return an evaluation without problems that repeat others, which earlier versions asked as well."""
    asked = {problem.id for problem in contents.evaluation_problems(tasks.of(resolved.config), resolved.config)[0]}
    return replace(found, outcomes=tuple(outcome for outcome in found.outcomes if outcome.problem_id in asked))


def _obey(tracker: Tracker, console: Console) -> None:
    """Do what somebody asks of the study by the tag `grpo.command` of its run: it may stop, as by Ctrl-C."""
    if not (command := tracker.command()):
        return
    stops = command.lower() == "stop"
    commands.answer_with(tracker, console, command, "stopped" if stops else "not done; allowed: stop")
    if stops:
        interrupts.stop(signal.SIGINT)


def _run_all(work: Search, study: optuna.Study, launcher: Launcher, console: Console, obey: Callable[[], None]) -> None:
    """Run trials, and wait for those of other processes; one whose process died goes back into the queue."""

    def between() -> None:
        obey()
        work.revive()
        launcher.look_after()

    said = False
    while True:
        work.run(between)
        if not study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            return
        if not said:
            console.say("waiting for trials of other processes")
            said = True
        obey()
        time.sleep(0.5)


def _leave(study: optuna.Study, found: Outcome, tracker: Tracker, config: Config, console: Console) -> None:
    """Leave the table, the winner's figures and the report in the parent run."""
    trials, finalists, own, k = studies.begun_trials(study), found.finalists, found.own, config.search.k
    outcome.keep(study, found)
    tracker.text("study/trials.csv", report.trials_table(trials))
    if finalists:
        winner = finalists[0]
        values = {
            f"study/confirmed_pass_at_{k}": winner.confirmed.value,
            f"study/confirmed_pass_at_{k}_low": winner.confirmed.low,
            f"study/confirmed_pass_at_{k}_high": winner.confirmed.high,
            f"study/selected_pass_at_{k}": winner.selected.value,
        }
        if own is not None:
            values[f"study/own_pass_at_{k}"] = own.confirmed.value
        tracker.metrics(values, len(trials))
    try:
        tracker.text(study_page.NAME, study_page.page(study, found, config, tracker.run_dir, tracker.url))
    except Exception as error:  # a study is not lost for the sake of its page, which `report` writes again
        console.warn(f"{study_page.NAME} could not be written: {one_line(error)}")


def _honour(resolved: Resolved, winner: Finalist, tracker: Tracker, console: Console) -> None:
    """Leave the winner's config, as its own run had it, and make its model the champion."""
    config, run_id = resolved.config, winner.trial.user_attrs[studies.RUN_ID]
    own = settings.of_run(resolved, find(run_id, config.tracking.uri).config, winner.trial.params)
    tracker.text("study/best_config.yaml", settings.best_config(own.config))
    champion.tell_of_another(config.tracking.uri, config.search.study_name, tracker.run_id, console)
    chosen = champion.register(config.tracking.uri, config.search.study_name, winner, config.search.objective, tracker)
    tracker.tags({"study.winner_run": run_id, "study.champion_run": chosen, "study.confirmed_on": winner.where})
