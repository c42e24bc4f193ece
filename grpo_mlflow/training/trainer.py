"""The training loop.

Everything is counted by policy version: version n is the model after n iterations. At step n of the MLflow axis stand
the evaluation of version n, the rewards of the rollouts that version n sampled, and the update that turns it into
version n + 1. A checkpoint `iter_n` holds version n and all that is needed to go on from it exactly.

One turn of `run`, where each name without an underscore is a part (`parts.Parts`) or a function of this package:

    interrupts.check()                              a signal ends the run here, or in a phase of several processes
    commands.obey(parts, version)                   what somebody asks of the run in MLflow: save, stop, prune
    if _evaluation_due(version):                    _evaluate
        source.settle()
        evaluator.sync(version)
        found = evaluation.evaluate(task, policy, evaluator)
        evaluation.track(tracker, found)
        on_evaluation(progress, found)              a study may prune the run
    if _checkpoint_due(version):                    _save
        source.settle()
        state.save(version)
    collected = source.groups(version)              iterate, phase `generate`
    source.begin(version + 1)                       sampled during the update with generation.async_rollouts=1
    metrics = learner.update(collected.groups)      phase `update`: the weights are those of version + 1
    iteration.track(tracker, metrics)
    observations.of_iteration(metrics)              told once each, as those of evaluations
    progress = progress.after_iteration()
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from grpo_mlflow.algorithm.statistics import mean
from grpo_mlflow.errors import Pruned, one_line
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.training import commands, evaluation, iteration, observations, outlook, rollout_metrics, state
from grpo_mlflow.training.evaluation import Evaluation
from grpo_mlflow.training.iteration import Iteration, Phases
from grpo_mlflow.training.parts import Parts
from grpo_mlflow.training.progress import Progress
from grpo_mlflow.training.throughput import Meter

OnEvaluation = Callable[[Progress, Evaluation], None]


class Trainer:
    """Runs iterations on parts that it is given.

    Args:
        progress: where a resumed run stands; None for a run from the beginning.
        on_evaluation: called by the first process after each evaluation; it may raise `Pruned`.
        on_tracked: called by the first process before that, when the evaluation is tracked; it must return at once.
        baseline: the evaluation of version 0, if it is known.
    """

    def __init__(
        self,
        parts: Parts,
        progress: Progress | None = None,
        *,
        on_evaluation: OnEvaluation | None = None,
        on_tracked: Callable[[Progress], None] | None = None,
        baseline: Evaluation | None = None,
    ) -> None:
        self._parts, self._config = parts, parts.config
        self._on_evaluation, self._on_tracked, self._baseline = on_evaluation, on_tracked, baseline
        self._meter = Meter(parts.policy, parts.config, parts.processes.count)
        self.progress = progress or Progress()
        self._saved = self.progress.iteration if progress else None
        self._resumed = progress is not None
        self._untidy = self._resumed  # the process that saved it may have been killed right after
        self._cost = Counter[str]()  # of judging, since it was logged
        self._outlook_told, self._evaluation_seconds = False, 0.0
        self._steps = parts.learner.step  # that lead to the weights of `progress.iteration`

    def run(self) -> Progress:
        """Train up to `train.iterations`.

        Whatever else ends the run leaves a checkpoint of the last version, unless an optimizer step had begun on it.
        """
        source, console, total = self._parts.source, self._parts.console, self._config.train.iterations
        left = outlook.work(self._config, self.progress.iteration, evaluated=self.progress.evaluated)
        if plan := outlook.planned(self._config, left):
            console.say(plan)
        console.start("training", total, self.progress.iteration)
        try:
            while True:
                interrupts.check()
                version = self.progress.iteration
                commands.obey(self._parts, version, self._checkpoint, is_trial=self._on_evaluation is not None)
                if self._evaluation_due(version) and not self.progress.evaluated:
                    self._evaluate(version)
                if self._checkpoint_due(version):
                    self._checkpoint()
                if version >= total:
                    with interrupts.deferred():
                        self._tidy()
                    self._track_generators(version)
                    return self.progress
                self.iterate(version)
        except (KeyboardInterrupt, Pruned):  # somebody does not want to wait, or does not want the run
            raise
        except BaseException:
            self._keep()
            raise
        finally:
            source.stop()
            console.stop()

    # An iteration

    def iterate(self, version: int) -> None:
        """Sample rollouts with version `version` and update it to the next."""
        source, learner, processes = self._parts.source, self._parts.learner, self._parts.processes
        start, phases = time.perf_counter(), Phases()
        self._parts.task.at(version, self._config.train.iterations)
        with phases.measure("generate"):
            collected = source.groups(version)
            source.begin(version + 1)
        logged = self._judging()  # now: where a process is gone, the weights are still those of a version
        with interrupts.deferred():  # from the first optimizer step on, only a whole iteration can be saved
            with phases.measure("update"), processes.collective():
                metrics = learner.update(collected.groups, self._config.seed, version)
            # before all that may fail: the version is whole now, whatever becomes of its figures
            before = self.progress.seconds
            tokens, seconds = rollout_metrics.tokens(collected.sampled), time.perf_counter() - start
            self.progress, self._steps = self.progress.after_iteration(tokens, seconds), learner.step
            trained = metrics.pop("tokens_trained") or 0.0
            metrics |= collected.metrics() | logged
            done = Iteration(version, collected, metrics, trained, phases.seconds, time.perf_counter() - start)
            if processes.is_first:
                self._track(done)
            seen = observations.of_iteration(metrics, self._own_rollouts)
            watch = self.progress.watch.after_iteration(seen, version)
            self._tell(watch.news(self.progress.watch))
            seconds = before + time.perf_counter() - start
            self.progress = replace(self.progress, watch=watch, seconds=seconds)
        if not self._outlook_told:
            self._outlook_told = True
            left = outlook.work(self._config, self.progress.iteration)
            if told := outlook.expected(left, done.seconds, self._evaluation_seconds):
                self._parts.console.say(told)

    # Evaluation

    def _evaluation_due(self, version: int) -> bool:
        settings = self._config.eval
        return settings.enabled and (version % settings.interval == 0 or version >= self._config.train.iterations)

    def _evaluate(self, version: int) -> None:
        parts, start = self._parts, time.perf_counter()
        parts.task.at(version, self._config.train.iterations)
        found = self._baseline if version == 0 and self._baseline is not None else self._measure(version)
        seconds = time.perf_counter() - start
        self._evaluation_seconds = self._evaluation_seconds if found is self._baseline else seconds
        logged = self._judging()
        with interrupts.deferred():
            evaluation.track(parts.tracker, found, version, seconds, self._config.tracking.samples)
            if logged:
                parts.tracker.metrics({f"eval/{name}": value for name, value in logged.items()}, version)
            evaluated = self.progress.after_evaluation(found, time.perf_counter() - start)
            if self._on_tracked is not None and parts.processes.is_first:
                self._on_tracked(evaluated)
        if (hook := self._on_evaluation) is not None:
            parts.processes.decided(lambda: hook(evaluated, found))
        # Only now: a run stopped before its study has heard of the evaluation repeats it, with the same outcome.
        at_the_end = version >= self._config.train.iterations
        seen = observations.of_evaluation(evaluated.first_rates, evaluated.last_rates, at_the_end)
        before, watch = evaluated.watch, evaluated.watch.after_evaluation(seen, version)
        self.progress = replace(evaluated, watch=watch)
        self._saved = None  # a checkpoint of this version saved before lacks the score
        parts.console.say(f"eval {version:>4}  {found.summary()}  {seconds:.1f}s")
        self._tell(watch.news(before))

    def _measure(self, version: int) -> Evaluation:
        parts = self._parts
        assert parts.evaluator is not None, "eval.enabled brings one"
        parts.source.settle()  # they may share a server, which is about to get other weights
        parts.evaluator.sync(version)
        return evaluation.evaluate(parts.task, parts.policy, parts.evaluator, self._config, parts.processes)

    # Checkpoints

    def _checkpoint_due(self, version: int) -> bool:
        if version == 0 or self._saved == version:
            return False
        interval, total = self._config.checkpoint.save_interval, self._config.train.iterations
        # Where the model before training is better than all, the best of the others is still what people ask for.
        is_best = self.progress.evaluated and self.progress.best_trained_iteration == version
        return is_best or version == total or (interval > 0 and version % interval == 0)

    def _checkpoint(self) -> None:
        self._parts.source.settle()  # what is sampled ahead belongs into the checkpoint
        with interrupts.deferred():
            self._save(self.progress.iteration)

    def _keep(self) -> None:
        """Save the last version before an error ends the run; what fails in this is not what the run failed of.

        Saving a whole model exchanges nothing with other processes: the first one does it alone, as soon as it knows of
        the end. It cannot where it hangs in a collective that does not fail by itself (NCCL): `Processes.watched` ends
        it there. Shards are saved only if all processes are still here.
        """
        version = self.progress.iteration
        # there is nothing to save, or the weights are between two versions
        if version in (0, self._saved) or self._parts.learner.step != self._steps:
            return
        if lack := state.lack(self._parts):
            self._parts.console.warn(f"iteration {self.progress.iteration} is not saved: {lack}")
            return
        try:
            self._parts.source.stop()
            with interrupts.deferred():
                self._save(self.progress.iteration)
        except Exception as other:
            self._parts.console.warn(f"iteration {self.progress.iteration} could not be saved: {one_line(other)}")

    def _save(self, version: int) -> None:
        if self._saved == version or version == 0:
            return
        self._saved = version
        score = mean(rates) if self.progress.evaluated and (rates := self.progress.last_rates) else None
        state.save(self._parts, self.progress, score)
        self._untidy = True
        self._tidy()

    def _tidy(self) -> None:
        """Delete the checkpoints that the last one supersedes, and say which are the last and the best."""
        tracker, store = self._parts.tracker, self._parts.store
        if not self._untidy or not self._parts.processes.is_first:
            return
        checkpoints = store.all()
        if not checkpoints or checkpoints[-1].iteration != self.progress.iteration:  # the last one is elsewhere
            return
        for name in (superseded := store.superseded()):
            tracker.remove(f"checkpoints/{name}")  # from the store first: of one that is gone here, nobody would know
            store.remove(name)
        if superseded and self._resumed:  # only a run that had ended has models, and they may be of these
            tracker.models(tracker.run_id, [])
        best = store.best()
        tags = {
            "grpo.last_checkpoint": checkpoints[-1].path.name,
            "grpo.best_checkpoint": best.path.name if best else "",
        }
        if self.progress.first_rates:  # the model before training is a candidate, too, but no checkpoint
            tags["grpo.best_beats_start"] = "true" if self.progress.best_iteration > 0 else "false"
        tracker.tags(tags)
        self._untidy = False

    # Tracking

    @property
    def _own_rollouts(self) -> bool:
        """Whether rollouts come from the policy that is trained, and not from an earlier one by design."""
        return self._config.data.source == "live" and self._config.generation.sync != "none"

    def _tell(self, news: Sequence[str]) -> None:
        for text in news:
            self._parts.console.warn(text)

    def _track(self, done: Iteration) -> None:
        parts = self._parts
        perf = done.perf({**self._generator_metrics(), **self._cost}, self._meter)
        self._cost.clear()
        iteration.track(parts.tracker, done, perf, self._config.tracking.rollouts)
        parts.console.say(done.line())
        live = {"reward": f"{done.metrics['reward_mean']:.3f}"}
        if self.progress.last_rates:
            live["pass@1"] = f"{mean(self.progress.last_rates):.3f}"
        parts.console.advance(done.version + 1, live)

    def _track_generators(self, version: int) -> None:
        """Log what the last evaluation's sampling met; that of the others stands with the iteration after."""
        met = {**self._generator_metrics(), **self._cost}
        if met:
            self._parts.tracker.metrics({f"perf/{name}": value for name, value in met.items()}, version)

    def _judging(self) -> dict[str, float]:
        """Count what judging has cost, and return what reward functions have logged since the last call.

        Both are those of all processes. Only rewards by name have something to exchange.
        """
        if not self._config.data.rewards:
            return {}
        task = self._parts.task
        sums: dict[str, tuple[float, int]] = {}
        for figures, logged in self._parts.processes.together([(dict(task.figures()), dict(task.logged()))]):
            self._cost.update(figures)
            for name, (total, count) in logged.items():
                before, number = sums.get(name, (0.0, 0))
                sums[name] = before + total, number + count
        return {f"logged_{name}": total / count for name, (total, count) in sums.items()}

    def _generator_metrics(self) -> dict[str, float]:
        """Return what the generators met since the last call, that of evaluations included."""
        own = self._parts.source.metrics()
        other = self._parts.evaluator.metrics() if self._parts.evaluator is not None else {}
        return {name: own.get(name, 0.0) + other.get(name, 0.0) for name in own | other}
