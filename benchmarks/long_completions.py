"""Peak memory of completions of 16,384 tokens, beside what `doctor` plans for them (docs/scaling.md).

    python -m benchmarks.long_completions

A small random model samples two completions, then takes an optimizer step on two; each phase in a process of its own,
on this CPU in float32. Peaks are RssAnon over what the process held before the model was made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peaks import MALLOC, MB, Peaks
from grpo_mlflow.config import TrainConfig, resolve
from grpo_mlflow.forward import ways
from grpo_mlflow.generation import LocalGenerator, Sampling
from grpo_mlflow.generation.local import ways as sampling
from grpo_mlflow.model import tiny
from grpo_mlflow.model.memory import Shape
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.model.recomputing import recompute_activations
from grpo_mlflow.runs import plan
from grpo_mlflow.training.learner import Learner, Sizes
from grpo_mlflow.types import Completion, Group, Problem, Prompt, Rollout, Verdict

RESULTS = Path(__file__).parent / "results/long_completions.json"
NEW, PROMPT, K = 16_384, 64, 2
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": NEW + 2 * PROMPT,
    "tie_word_embeddings": True,
}
PHASES = {
    "sampling": False,
    "update": False,
    "update, gradient checkpointing": True,
}


def _policy(checkpointing: bool) -> Policy:
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    if checkpointing:
        recompute_activations(model)
    found = Policy(model, tiny.make_tokenizer(), torch.device("cpu"), torch.float32, (), 0)  # no end: full length
    ways.know(model, ways.Scoring("packed"))
    sampling.know(found, sampling.Sampler("packed", written_out=False))
    return found


def _group() -> Group:
    draw = torch.Generator().manual_seed(0)
    prompt = Prompt("p", (), tuple(torch.randint(5, 200, (PROMPT,), generator=draw).tolist()))
    rollouts = []
    for reward in (0.0, 1.0):
        ids = tuple(torch.randint(5, 200, (NEW,), generator=draw).tolist())
        completion = Completion(
            token_ids=ids, text="", behaviour_logprobs=(-8.3,) * NEW, finish_reason="length", policy_version=0
        )
        rollouts.append(Rollout(prompt, completion, Verdict(reward, {}, reward == 1.0, None)))
    return Group(Problem("p", 0, ()), tuple(rollouts), (-0.5, 0.5))


def _planned(phase: str) -> float:
    """Return the bytes that `doctor` counts for the phase."""
    words = [f"model.gradient_checkpointing={PHASES[phase]}", "model.train_id=here", "train.batch_size=2"]
    words += [f"generation.max_new_tokens={NEW}", f"data.rollouts_per_problem={K}", "data.problems_per_iteration=1"]
    config = resolve("", [*words, "generation.backend=local", "model.dtype=float32", "train.kl_coef=0"]).config
    shape = Shape.of({**SIZES, "model_type": "llama"})
    found = plan.need(shape, plan.workload(config, PROMPT), config)
    return found.device["weights"] + found.cache if phase == "sampling" else sum(found.device.values())


def measure(phase: str) -> None:
    """Print the peak of a phase in MB, in a process of its own."""
    torch.set_num_threads(1)
    peaks = Peaks()
    with peaks.phase(phase):
        policy = _policy(PHASES[phase])
        if phase == "sampling":
            generator = LocalGenerator(policy, 1)
            prompt = Prompt("p", (), tuple(range(5, 5 + PROMPT)))
            [sampled] = generator.generate([prompt], K, Sampling(NEW), 0, ("train", 0))
            assert [len(each.token_ids) for each in sampled] == [NEW] * K
        else:
            settings = TrainConfig(batch_size=K, grad_accum_steps="auto", kl_coef=0.0)
            learner = Learner(policy, None, Accelerator(cpu=True), settings, Sizes(1.0, NEW, K, 10))
            for iteration in range(2):  # from the second on, the optimizer's state is there
                learner.update([_group()], 0, iteration)
    print(json.dumps(peaks.found[phase][0]))


def main() -> int:
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return 0
    results = {}
    print(f"| {K} completions of {NEW:,} tokens | measured, MB | planned, MB | measured / planned |")
    print("| --- " * 4 + "|")
    for phase in PHASES:
        command = [sys.executable, "-m", "benchmarks.long_completions", phase]
        output = subprocess.run(
            command, env={**os.environ, **MALLOC}, check=True, capture_output=True, text=True
        ).stdout
        measured, planned = json.loads(output.splitlines()[-1]), _planned(phase) / MB
        results[phase] = {"measured": round(measured, 1), "planned": round(planned, 1)}
        print(f"| {phase} | {measured:.0f} | {planned:.0f} | {measured / planned:.2f} |", flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
