"""What the MLflow UI shows as the description of a run, in Markdown: the verdict first, then what to do next.

Only some lines are shown before a reader asks for more, so the first says what matters.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from grpo_mlflow.config import Config
from grpo_mlflow.runs import messages, next_steps
from grpo_mlflow.runs.description import SETTINGS
from grpo_mlflow.runs.next_steps import Place
from grpo_mlflow.tracking import Tracker, checkpoint_address, pages
from grpo_mlflow.training.checkpoint import name_of
from grpo_mlflow.training.evaluation import Evaluation
from grpo_mlflow.training.progress import Progress


def of(first: str, further: Mapping[str, str]) -> str:
    """Return a description: a line, then what else there is to say, if anything, by its heading."""
    points = "\n".join(f"- {heading}: {text}" for heading, text in further.items() if text)
    return f"{first}\n\n{points}" if points else first


def code(command: str) -> str:
    """Return a command as Markdown shows it, to be copied."""
    return f"`{command}`"


def run_link(text: str, tracker: Tracker, run_id: str) -> str:
    """Return a link to a run of the same experiment."""
    return f"[{text}]({pages.of_run(tracker.experiment_id, run_id)})"


def under_way(config: Config, tracker: Tracker, parent: str | None = None) -> str:
    """Describe a training run that has begun."""
    train, data = config.train, config.data
    first = (
        f"**Under way**: {config.model.train_id} learns {data.task}, {train.iterations} iterations of "
        f"{data.problems_per_iteration} problems x {data.rollouts_per_problem} rollouts."
    )
    further = {
        "part of": _study(tracker, parent),
        "save or stop": "set the tag `grpo.command` to `save` or `stop`",
        "go on, should it die": code(next_steps.resume(config, Place.of(tracker))),
    }
    return of(first, further)


def trained(config: Config, ended: Progress, tracker: Tracker, *, parent: str | None, most: int | None) -> str:
    """Describe a training run that has reached its end (`messages.conclude`)."""
    place, best = Place.of(tracker), name_of(ended.best_trained_iteration or ended.iteration)
    longer = next_steps.longer(config, place, most)
    further = {
        "part of": _study(tracker, parent),
        "best": messages.best_of(ended) or "",
        "look at": "; ".join(ended.watch.told.values()),
        "curves and answers": "report.html under Artifacts",
        "load its best checkpoint": code(f'mlflow.pyfunc.load_model("{checkpoint_address(tracker.run_id, best)}")'),
        "measure it": code(next_steps.measure(tracker.run_id, config, tracker.url)),
        "continue": code(longer) if longer else "",
        "repeat": code(next_steps.train_with(tracker.run_dir / SETTINGS, config, tracker.url, config.seed)),
    }
    verdict = messages.verdict(config, ended)
    first = (
        f"**Held-out pass@1 {verdict[0]}**: {verdict[1]} (95% intervals, {len(ended.last_rates)} problems)."
        if verdict
        else f"**Trained** for {ended.iteration} iterations."
    )
    return of(first, further)


def measured(found: Evaluation, config: Config, source: str, tracker: Tracker, owner: tuple[str, str] | None) -> str:
    """Describe an evaluation of a model, or of the checkpoint of a run (`owner`: its id, and the checkpoint's name)."""
    first = f"**{found.summary()}** on {config.data.task}, {len(found.outcomes)} problems x {config.eval.replicates}."
    model = f"{run_link(f'run {owner[0]}', tracker, owner[0])}, {owner[1]}" if owner else code(source)
    run_id, which = owner or (source, None)
    command = next_steps.measure(run_id, config, tracker.url, which)
    settings = shlex.quote(str(tracker.run_dir / SETTINGS))
    return of(first, {"model": model, "repeat": code(f"{command} --config {settings}")})


def ended(message: str, reason: str = "") -> str:
    """Describe a run that ended early by what was said of it: lines, and commands with two spaces before."""
    lines = [line for line in message.splitlines() if line]
    shown = [f"- {code(line.strip())}" if line.startswith("  ") else line for line in lines[1:]]
    first = f"**{lines[0][0].upper()}{lines[0][1:]}**"
    return "\n\n".join([first, *([code(reason)] if reason else []), *shown])


def _study(tracker: Tracker, parent: str | None) -> str:
    return run_link("the study", tracker, parent) if parent else ""
