"""What a run says in words: its opening line, the warm-up's progress, how it ended, how to go on."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence

from grpo_mlflow import errors
from grpo_mlflow.algorithm import statistics
from grpo_mlflow.config import Config, checks, remedies
from grpo_mlflow.forward import layers
from grpo_mlflow.generation.local import ways
from grpo_mlflow.model import policy, tiny
from grpo_mlflow.program import program
from grpo_mlflow.runs import next_steps, views
from grpo_mlflow.runs.next_steps import Place
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.tracking import Tracker, pages
from grpo_mlflow.training.checkpoint import CheckpointStore
from grpo_mlflow.training.progress import Progress


def warmup_progress(console: Console) -> tiny.Progress:
    started = time.perf_counter()

    def progress(step: int, steps: int, loss: float) -> None:
        if step == 1:
            console.say("making the embedded model (once; it is cached)")
            console.start("warm-up", steps)
        console.advance(step, {"loss": f"{loss:.3f}"})
        if step % 100 == 0 or step == steps:
            console.say(f"warm-up {step}/{steps}  loss {loss:.3f}  {time.perf_counter() - started:.0f}s")
        if step == steps:
            console.stop()

    return progress


def loading(model: str) -> str:
    return f"loading and checking {model}"


def introduce(config: Config, actor: policy.Policy, seconds: float) -> str:
    size = sum(layers.numbers(p) for p in actor.model.parameters())
    trained = sum(p.numel() for p in actor.model.parameters() if p.requires_grad)
    of_these = f", {trained / 1e6:.2f} M of them trained" if trained < size else ""
    data = config.data
    return (
        f"{config.model.train_id} ({size / 1e6:.2f} M parameters{of_these}, {actor.device}, ready in {seconds:.0f}s) "
        f"learns {data.task}: {config.train.iterations} iterations of {data.problems_per_iteration} problems x "
        f"{data.rollouts_per_problem} rollouts, optimizer steps in each: {config.steps_per_iteration}"
    )


def sampled_how(config: Config, actor: policy.Policy) -> str | None:
    """Return a line where this process samples in a slower way, and why; None where it does not."""
    backends = (config.generation.backend, config.eval.backend or config.generation.backend)
    if "local" not in backends or not actor.written_out:
        return None
    found = ways.sampler(actor)
    if found.way == "recomputed":
        return f"sampling computes all tokens again for each new one, slowly (a server does not): {found.reason}"
    return f"sampling uses the model's own cache: {found.reason}" if found.way == "cache" else None


def verdict(config: Config, ended: Progress) -> list[str]:
    """Return the held-out result, and the change and how sure it is; nothing without evaluations."""
    if not ended.first_rates:
        return []
    rates = ended.first_rates, ended.last_rates
    before, after = (statistics.rate_interval(each, config.eval.replicates) for each in rates)
    change = statistics.paired_difference(ended.last_rates, ended.first_rates)
    return [f"{before}  ->  {after}", statistics.in_words(change)]


def best_of(ended: Progress) -> str | None:
    """Return the best evaluation; None without one."""
    if ended.best_score is None:
        return None
    what = "(picked on these problems, so a little optimistic)"
    if ended.best_iteration == 0:
        what = "(the model before training; no checkpoint is better)"
    return f"{ended.best_score:.3f} at iteration {ended.best_iteration} {what}"


def conclude(config: Config, ended: Progress, tracker: Tracker, most: int | None = None) -> str:
    """Return how a run ended, and the commands that look at it and go on; `most` iterations are there to train on."""
    lines = [*_outcome(config, ended), f"run               {tracker.run_id}", f"files             {tracker.run_dir}"]
    if tracker.url is not None:
        page = pages.of_run(tracker.experiment_id, tracker.run_id)
        all_runs = pages.of_view(tracker.experiment_id, views.TRAINING.key)
        lines += headed("open it", next_steps.looking(tracker.url, page), 18)
        lines.append(f"compare runs      {next_steps.looking(tracker.url, all_runs)[-1]}")
        if longer := next_steps.longer(config, Place.of(tracker), most):
            lines.append(f"continue          {longer}")
    return "\n".join(lines)


def conclude_unkept(config: Config, ended: Progress) -> str:
    """Return how a run ended of which nothing is kept, so that no command can go on with it."""
    return "\n".join(_outcome(config, ended))


def _outcome(config: Config, ended: Progress) -> list[str]:
    lines = [""]
    if found := verdict(config, ended):
        lines += [
            f"held-out pass@1   {found[0]}   (95% intervals, {len(ended.last_rates)} problems)",
            f"change            {found[1]}",
        ]
    if best := best_of(ended):
        lines.append(f"best              {best}")
    lines += [f"look at           {text}" for text in ended.watch.told.values()]
    lines.append(f"training time     {ended.seconds:.0f}s")
    return lines


def headed(heading: str, texts: Sequence[str], width: int) -> list[str]:
    """Return lines, the first with a heading, below each other after a column of this width."""
    return [f"{'' if number else heading:<{width}}{text}" for number, text in enumerate(texts)]


def how_to_resume(config: Config, kind: str, tracker: Tracker, how: str) -> str:
    if kind != "train" or not tracker.run_id:
        return f"\n{kind} {how}"
    saved = CheckpointStore(tracker.run_dir / "checkpoints", 1).all()
    if not saved:
        return f"\ntraining {how} before its first checkpoint"
    return (
        f"\ntraining {how}; {saved[-1].path.name} is whole. Go on from it, in the same run, with:\n"
        f"  {next_steps.resume(config, Place.of(tracker))}"
    )


def how_to_go_around(config: Config, kind: str, tracker: Tracker, error: errors.PromptTooLong) -> str:
    """Return commands that go on without a prompt that is too long; a resumed run would meet it again."""
    saved = CheckpointStore(tracker.run_dir / "checkpoints", 1).all()
    if kind != "train" or not saved:
        return how_to_resume(config, kind, tracker, "failed")
    path, data = saved[-1].path, config.data
    before = error.seed - data.train_seed_start
    after = data.num_train_seeds - before - 1
    seeds = f"data.num_train_seeds={max(before, after)}"
    if after > before:
        seeds = f"data.train_seed_start={error.seed + 1} {seeds}"
    choices = [("with shorter completions", f"generation.max_new_tokens={error.room}")] if error.room > 0 else []
    choices += [("without this problem", seeds)] if max(before, after) else []
    words = [f"model.train_id={path}"]
    if config.train.kl_coef > 0 and config.model.ref_id is None:  # the reference stays what it was
        words.append(f"model.ref_id={config.model.train_id}")
    words += ["resume=null"] if config.resume else []
    command = f"{program()} train {shlex.join(['--config', f'{path}/trainer/config.yaml', *words])}"
    lines = [
        f"\ntraining failed; {path.name} is whole. Resumed, the run would meet this prompt again. Go on in a new run"
    ]
    for what, setting in choices:
        if not checks.errors(remedies.changed(config, setting)):
            lines += [f"{what}:", f"  {command} {setting}{next_steps.store(config, tracker.url)}"]
    return "\n".join(lines if len(lines) > 1 else [*lines, "with other problems"])
