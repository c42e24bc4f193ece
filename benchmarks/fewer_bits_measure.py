"""Memory by part of one variant of `benchmarks.fewer_bits`, and the price of an output layer in float32."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from grpo_mlflow.config import Config, resolve
from grpo_mlflow.generation import LocalGenerator, Sampling
from grpo_mlflow.model import loading, memory, policy
from grpo_mlflow.model.memory import Shape
from grpo_mlflow.model.policy import Policy, Stored
from grpo_mlflow.runs import plan
from grpo_mlflow.training import rollouts
from grpo_mlflow.training.batching import rows_of
from grpo_mlflow.training.learner import Learner, Sizes
from grpo_mlflow.training.scoring import Scorer
from grpo_mlflow.types import Completion, Group, Problem, Prompt, Rollout, Verdict

CPU = torch.device("cpu")


def of(folder: Path, words: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return the bytes of each part: by how much the process grew, and as planned.

    Gradients live between backward and the step only: they are counted there, tensor by tensor.
    """
    config = resolve("", ["data.task=arithmetic", f"model.train_id={folder}", "train.kl_coef=0", *words]).config
    _update(loading.trained(config, folder, CPU), None, config)  # loads libraries, and what they keep
    sizes = [_resident()]
    actor = loading.trained(config, folder, CPU)
    sizes.append(_resident())
    reference = loading.reference(config, actor, lambda: folder)
    sizes.append(_resident())
    _update(actor, reference, config)  # weights that were views of the file are now the process's own
    before = _resident()
    gradients, learner = _update(actor, reference, config)
    sizes += [before, _resident()]
    assert learner.step == 1
    shape, work = Shape.read(folder), plan.workload(config, 8)
    parts, host = memory.training(shape, work), memory.host(shape, work)
    planned = {
        "model": parts["weights"] + parts["frozen base"],
        "reference": parts["reference"],
        "optimizer state": parts["optimizer state"]
        + host.get("optimizer state", 0.0)
        + host.get("copies of weights", 0.0),
    }
    grown = [after - before for before, after in pairwise(sizes)]
    del grown[2]  # by the first update
    found = {name: (grown[number], size) for number, (name, size) in enumerate(planned.items())}
    return {**found, "gradients": (gradients, parts["gradients"])}


def _update(actor: Policy, reference: Policy | None, config: Config) -> tuple[float, Learner]:
    """Take an optimizer step; return the bytes of its gradients, and who has the state."""
    learner = Learner(actor, reference, Accelerator(cpu=True), config.train, Sizes(1.0, 4, 4, 10))
    gradients: list[int] = []
    learner.optimizer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(sum(p.grad.nbytes for p in actor.model.parameters() if p.grad is not None))
    )
    learner.update(_groups(2), 0, 0)
    return float(gradients[0]), learner


def _resident() -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed
    return float(psutil.Process().memory_info().rss)


def _groups(count: int) -> list[Group]:
    """Groups of two short completions, one of them right."""
    found = []
    for number in range(count):
        prompt = Prompt(f"p{number}", (), tuple(range(5, 13)))
        own = [
            Rollout(
                prompt,
                Completion((7, 8 + right), "", (-1.0, -1.0), "length", 0),
                Verdict(float(right), {}, bool(right), None),
            )
            for right in range(2)
        ]
        found.append(Group(Problem(prompt.problem_id, number, ()), tuple(own), (-0.5, 0.5)))
    return found


def head(folder: Path, repeats: int = 3) -> dict[str, dict[str, float]]:
    """Return CPU seconds of sampling and of an update, and |sampled - scored| log-probabilities, with and without."""
    torch.set_num_threads(1)
    kinds = {"bfloat16": False, "float32": True}
    actors = {
        name: policy.load(folder, CPU, "bfloat16", stored=Stored(float32_head=exactly))
        for name, exactly in kinds.items()
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    gaps: dict[str, list[float]] = {name: [] for name in kinds}
    for repeat in range(repeats + 1):
        for name, actor in actors.items():
            generate, update, gap = _iteration(actor, repeat)
            if repeat:  # the first one also warms up
                seconds[name].append((generate, update))
                gaps[name] += gap
    found = {}
    for name in kinds:
        generate, update = (statistics.median(each) for each in zip(*seconds[name], strict=True))
        found[name] = {
            "CPU seconds of sampling": generate,
            "CPU seconds of an update": update,
            "mean |sampled - scored|": statistics.mean(gaps[name]),
            "largest": max(gaps[name]),
            "tokens": float(len(gaps[name])),
        }
        print(name, found[name], flush=True)
    return found


def _iteration(actor: Policy, number: int) -> tuple[float, float, list[float]]:
    config = resolve("tiny", ["train.kl_coef=0", "train.lr=1e-9", "train.batch_size=8"]).config.train
    problems = [
        Problem(f"p{i}", i, ({"role": "user", "content": f"What is {i + 3} + {2 * i + 5}?"},)) for i in range(4)
    ]
    prompts = [actor.prompt(problem) for problem in problems]
    learner = Learner(actor, None, Accelerator(cpu=True), config, Sizes(1.0, 32, 32, 10))
    began = time.process_time()
    drawn = LocalGenerator(actor, 4).generate(prompts, 8, Sampling(32), 0, ("train", number))
    middle = time.process_time()
    judged = [
        [Rollout(prompt, each, Verdict(float(j % 2), {}, False, None)) for j, each in enumerate(own)]
        for prompt, own in zip(prompts, drawn, strict=True)
    ]
    groups = rollouts.form_groups(problems, judged, "group")
    rows = rows_of(groups)
    with torch.no_grad():
        scored, _ = Scorer(actor, 1.0).score(rows)
    gap = [
        abs(a - b)
        for own, row in zip(scored.tolist(), rows, strict=True)
        for a, b in zip(own, row.behaviour_logprobs, strict=False)
    ]
    before = time.process_time()
    learner.update(groups, 0, number)
    return middle - began, time.process_time() - before, gap
