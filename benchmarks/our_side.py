"""Our side of `benchmarks.compare_trl`: sample, reward, score under the reference, one optimizer step per turn."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import torch
from accelerate import Accelerator

from benchmarks import workloads
from benchmarks.workloads import KL_COEF, LR, Workload
from grpo_mlflow.config import TrainConfig
from grpo_mlflow.generation import LocalGenerator, Sampling
from grpo_mlflow.model import policy
from grpo_mlflow.runtime.allocator import keep_freed
from grpo_mlflow.training import rollouts
from grpo_mlflow.training.learner import Learner, Sizes
from grpo_mlflow.training.throughput import Costs, gemm_peak
from grpo_mlflow.types import Group, Problem, Verdict


class Hashes:
    """The workload as a task: problems by number, rewards by the hash of the text."""

    name = "hashes"

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def problem(self, _: str, seed: int) -> Problem:
        return Problem(f"p{seed}", seed, ({"role": "user", "content": self._workload.prompt(seed)},))

    def verify(self, problem: Problem, text: str) -> Verdict:
        return Verdict(self._workload.reward(problem.seed, text), {}, False, None)


def side(workload: Workload, folder: str, threads: int, iterations: int, dtype: str) -> None:
    torch.set_num_threads(threads)
    keep_freed()
    device = torch.device("cpu")
    actor, reference = (policy.load(folder, device, dtype) for _ in range(2))
    actor.tokenizer.chat_template = None  # both sides take the text as it is
    reference.model.requires_grad_(False)
    total = workload.prompts * workload.k
    config = TrainConfig(batch_size=total, kl_coef=KL_COEF, lr=LR)  # all rows at once, as the other side
    sizes = Sizes(1.0, workload.tokens, total, iterations)
    learner = Learner(actor, reference, Accelerator(cpu=True), config, sizes)
    sampler = replace(actor, eos_ids=()) if workload.fixed else actor
    generator, task = LocalGenerator(sampler, workload.prompts), Hashes(workload)
    costs, all_groups = Costs.of(actor.model), list[Group]()
    phases: dict[str, list[float]] = {"generate": [], "update": []}
    floors = dict.fromkeys(phases, 0.0)
    for iteration, turn in enumerate(workloads.turns()):
        began = time.perf_counter()
        numbers = range(iteration * workload.prompts, (iteration + 1) * workload.prompts)
        problems = [task.problem("train", number) for number in numbers]
        sampling, key = Sampling(workload.tokens), ("train", iteration)
        judged = rollouts.collect(task, actor, generator, problems, k=workload.k, sampling=sampling, seed=0, key=key)
        groups = rollouts.form_groups(problems, judged, "group")
        sampled = time.perf_counter()
        learner.update(groups, 0, iteration)
        ended = time.perf_counter()
        turn.done()
        if iteration:  # the first one is not counted
            phases["generate"].append(sampled - began)
            phases["update"].append(ended - sampled)
            floors["generate"] += costs.forward(groups)
            floors["update"] += 4 * costs.forward(group for group in groups if not group.is_flat)
            all_groups += groups
    counted = len(all_groups) // workload.prompts
    lengths = [len(r.completion.token_ids) for group in all_groups for r in group.rollouts]
    workloads.leave(
        phases={name: statistics.median(seconds) for name, seconds in phases.items()},  # as the turns are
        useful_gflop={name: flops / counted / 1e9 for name, flops in floors.items()},
        peak_gflops=gemm_peak(device, actor.dtype) / 1e9,
        tokens=sum(lengths) / counted,
        mean_length=sum(lengths) / len(lengths),
    )


if __name__ == "__main__":
    workloads.main(side)
