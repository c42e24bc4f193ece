"""What a model in shards takes of each process's memory, by what is done with it (docs/scaling.md).

    python -m benchmarks.sharding --processes 2           # starts them itself, on this CPU

Each process holds a random model of the size given, as `train.sharding=full` does. Its memory (RssAnon, every
millisecond) is measured while it loads, takes an optimizer step, saves, writes the weights of a server, samples, and
writes a checkpoint's optimizer state. Figures are the peak over what it held when the phase began, in MB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peaks import MALLOC, MB, Peaks
from grpo_mlflow.config import LoraConfig, TrainConfig
from grpo_mlflow.forward import ways
from grpo_mlflow.generation import LocalGenerator, Sampling, weights
from grpo_mlflow.generation.local import ways as sampling
from grpo_mlflow.model import lora, reading, sharding, shards, tiny
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.training.learner import Learner, Sizes
from grpo_mlflow.types import Prompt
from tests.support.groups import K, make_groups


def make(given: argparse.Namespace) -> Policy:
    """Return a random model, whole in the first process and without numbers in the others."""
    config = LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 8 // 3,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64,
        num_key_value_heads=given.hidden // 64,
        tie_word_embeddings=False,
    )
    if dist.get_rank():
        model = reading.empty_model("", config, trust_remote_code=False, attn_implementation=None).eval()
    else:
        model = LlamaForCausalLM(config).eval()
    if given.adapter:
        lora.add(model, LoraConfig(rank=16), 0)
    found = Policy(model, tiny.make_tokenizer(), torch.device("cpu"), torch.float32, (1,), 0)
    ways.know(model, ways.Scoring("packed"))
    sampling.know(found, sampling.Sampler("packed", written_out=True))
    return found


def measure(given: argparse.Namespace, folder: Path, peaks: Peaks) -> str:
    """Go through all phases in one of the processes; return what the model is."""
    accelerator = Accelerator(cpu=True)
    with peaks.phase("load"):
        policy = make(given)
        size = sum(each.numel() for each in policy.model.parameters())
        layer = max(sum(each.numel() for each in part.parameters()) for part in shards.layers_of(policy.model))
        shards.spread(policy.model, policy.device, policy.dtype)
    settings = TrainConfig(batch_size=4, grad_accum_steps="auto", kl_coef=0.0)
    learner = Learner(policy, None, accelerator, settings, Sizes(1.0, 16, 2 * K, 10))
    with peaks.phase("update"):
        learner.update(make_groups(2), 0, 0)
    with peaks.phase("save"):
        policy.save(folder / "saved")
    with peaks.phase("save for a server"):
        policy.save_plain(folder / "plain")
    with peaks.phase("save the optimizer's state"):
        learner.offer()
        if dist.get_rank():
            sharding.take_part(policy.model)
        else:
            with sharding.leading(policy.model):
                learner.save(folder / "optimizer.safetensors")
    generator = LocalGenerator(policy, 4)
    prompts = [Prompt(f"p{number}", (), (5, 6, 7 + number)) for number in range(4)]
    with peaks.phase("gather all weights"), weights(generator):
        pass
    with peaks.phase("gather all weights and sample"), weights(generator):
        generator.generate(prompts, 4, Sampling(8), 0, ("train", 0))
    outer = 8 * given.vocabulary * given.hidden / MB
    return f"model {4 * size / MB:.0f} MB, a layer {4 * layer / MB:.0f} MB, outside of layers {outer:.0f} MB, float32"


def work(given: argparse.Namespace, folder: Path) -> None:
    """Measure in one of the processes; the first prints."""
    torch.set_num_threads(1)
    peaks = Peaks()
    what = measure(given, folder, peaks)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, peaks.found)
    if dist.get_rank() == 0:
        print(what)
        print("| phase | " + " | ".join(f"process {rank}: peak (kept), MB" for rank in range(len(every))) + " |")
        print("| --- " * (len(every) + 1) + "|")
        for name in peaks.found:
            cells = [f"{found[name][0]:.0f} ({found[name][1]:.0f})" for found in every]
            print(f"| {name} | {' | '.join(cells)} |")
    dist.barrier()
    dist.destroy_process_group()


def _started(given: argparse.Namespace) -> int:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(given.processes)]
    command = [sys.executable, *launch, "-m", "benchmarks.sharding", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.call(command, env={**os.environ, **MALLOC, "SHARDING_FOLDER": folder})


def main() -> int:
    """Measure, or start the processes that do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--adapter", action="store_true", help="train an adapter of rank 16, not all weights")
    given = parser.parse_args()
    if "RANK" not in os.environ:
        return _started(given)
    work(given, Path(os.environ["SHARDING_FOLDER"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
