"""Run an iteration on this CPU and compare it with the formula of `benchmarks.plan`."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from benchmarks.plan import Machine, plan
from grpo_mlflow.config import TrainConfig
from grpo_mlflow.generation import LocalGenerator, Sampling
from grpo_mlflow.model import policy
from grpo_mlflow.model.memory import Shape, Workload
from grpo_mlflow.training import rollouts
from grpo_mlflow.training.learner import Learner, Sizes
from grpo_mlflow.training.throughput import gemm_peak
from grpo_mlflow.types import Problem, Rollout, Verdict


def measure(folder: Path, work: Workload, threads: int) -> dict[str, float]:
    """Run an iteration of random rollouts' length `work.completion` on this CPU: predicted and measured."""
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    rates = [gemm_peak(device, torch.float32)]
    before = _resident()
    actor = policy.load(folder, device)
    problems = [Problem(f"p{i}", i, ({"role": "user", "content": "x"},)) for i in range(work.problems)]
    ids = actor.tokenizer("What is 12 + 34? The answer is 46. ", add_special_tokens=False).input_ids
    tokens = tuple((ids * math.ceil(work.prompt / len(ids)))[: work.prompt - 1])
    prompts = [
        replace(actor.prompt(problem), token_ids=(*tokens, ids[i % len(ids)])) for i, problem in enumerate(problems)
    ]
    total = work.problems * work.k
    config = TrainConfig(batch_size=work.rows, grad_accum_steps="auto", kl_coef=0.0, lr=1e-6)
    learner = Learner(actor, None, Accelerator(cpu=True), config, Sizes(1.0, work.completion, total, 10))
    generator = LocalGenerator(replace(actor, eos_ids=()), work.problems)
    found: dict[str, float] = {}
    for iteration in range(2):  # the second one is timed: the first also warms up
        began = time.perf_counter()
        sampled = generator.generate(prompts, work.k, Sampling(work.completion), 0, ("train", iteration))
        middle = time.perf_counter()
        judged = [
            [
                Rollout(prompt, completion, Verdict(float(j % 2), {}, False, None))
                for j, completion in enumerate(completions)
            ]
            for prompt, completions in zip(prompts, sampled, strict=True)
        ]
        learner.update(rollouts.form_groups(problems, judged, "group"), 0, iteration)
        found = {"generate, s": middle - began, "update, s": time.perf_counter() - middle}
    found["memory, MB"] = (_resident(peak=True) - before) / 2**20
    gemm_peak.cache_clear()
    rates.append(gemm_peak(device, torch.float32))  # other work on the machine may have disturbed the first
    machine = Machine("this CPU", max(rates), _bandwidth(), share=0.7)
    expected = plan(Shape.read(folder), work, machine)
    wanted = {
        "generate, s": expected.generate_seconds,
        "update, s": expected.update_seconds,
        "memory, MB": expected.training_bytes / 2**20,
    }
    print(f"{folder.name}: {work.problems} x {work.k} x ({work.prompt} + {work.completion}), rows {work.rows}")
    print(f"a matrix product runs at {machine.flops / 1e9:.0f} GFLOP/s, a copy at {machine.bandwidth / 1e9:.1f} GB/s")
    for name, value in found.items():
        ratio = wanted[name] / value
        print(f"  {name:<12} formula {wanted[name]:9.2f}  measured {value:9.2f}  formula/measured {ratio:.2f}")
    return {name: wanted[name] / value for name, value in found.items()}


def _bandwidth() -> float:
    """Return the bytes per second that a copy reads and writes: the best of a few."""
    source, best = torch.ones(1 << 26), math.inf
    target = torch.empty_like(source)
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - began)
    return 2.0 * 4 * source.numel() / best


def _resident(peak: bool = False) -> float:
    """Return the bytes of memory that this process has, or has had at most."""
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return float(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
