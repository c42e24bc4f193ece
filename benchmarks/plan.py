"""Plan a run by formula: what an iteration of a model needs in memory, operations and time (docs/scaling.md).

    python -m benchmarks.plan                            # the tables of docs/scaling.md
    python -m benchmarks.plan --measure MODEL_FOLDER     # an iteration on this CPU, against the formula

One iteration: each prompt is prefilled once, each token of a completion sampled once (2 operations per weight), then
trained on (6 per weight, each prompt of a group once), with a forward pass of the reference on top where there is a KL
term. An output layer counts where a token is predicted; attention counts 4 x width per layer and pair of tokens.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo_mlflow.forward import tuning

GIB = 2**30
KEPT_LOGITS = 4 * (tuning.KEPT_LOGPROBS + 2 * tuning.LOGITS_SLICE)  # bytes, at most, that `token_head.py` holds


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer with a gated feed-forward layer: Llama, Qwen2, Qwen3, SmolLM2."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    vocabulary: int
    tied: bool
    biased: bool  # of queries, keys and values

    @classmethod
    def read(cls, folder: Path) -> Shape:
        """Return the shape in a model folder's config.json."""
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        heads = config["num_attention_heads"]
        return cls(
            folder.name,
            config["hidden_size"],
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
            config["intermediate_size"],
            config["vocab_size"],
            config.get("tie_word_embeddings", False),
            config["model_type"] == "qwen2",
        )

    @property
    def qkv(self) -> int:
        """Width of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_width

    @property
    def body(self) -> int:
        """Weights of all matrices but embedding and output layer: what each token passes."""
        attention = self.hidden * self.qkv + self.heads * self.head_width * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def parameters(self) -> int:
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        small = self.layers * (2 * self.hidden + (self.qkv if self.biased else 0)) + self.hidden
        return self.body + embeddings + small

    @property
    def kv_per_token(self) -> int:
        """Numbers that a cached token holds."""
        return 2 * self.layers * self.kv_heads * self.head_width

    @property
    def activations_per_token(self) -> int:
        """Numbers that a token of a micro-batch keeps for the backward pass.

        Per layer: the two norms their input, its normalised form and their output (3 x hidden each); queries, keys and
        values before and after rotation, and queries, keys and values as attention's inputs; its output, merged (2);
        gate, its activation, the other projection and their product (4 x inner).
        """
        attention = 3 * self.qkv + 2 * self.heads * self.head_width
        return self.layers * (6 * self.hidden + attention + 4 * self.inner)


@dataclass(frozen=True)
class Workload:
    """An iteration: `problems` x `k` completions; lengths are means. A micro-batch holds `rows` of one problem."""

    problems: int
    k: int
    prompt: int
    completion: int
    rows: int
    reference: bool = True
    bfloat16: bool = True
    checkpointing: bool = False


@dataclass(frozen=True)
class Machine:
    """One device: operations per second of matrix products, bytes per second of memory, and the share of both got."""

    name: str
    flops: float
    bandwidth: float
    share: float


@dataclass(frozen=True)
class Plan:
    """Bytes on each trainer's device, bytes of a server's, operations of an iteration over all processes, seconds."""

    training: dict[str, float]
    serving: dict[str, float]
    generate_flops: float
    update_flops: float
    generate_seconds: float
    update_seconds: float

    @property
    def training_bytes(self) -> float:
        return sum(self.training.values())

    @property
    def serving_bytes(self) -> float:
        return sum(self.serving.values())


def forward_flops(shape: Shape, work: Workload) -> float:
    """Return the operations of one forward pass over an iteration's groups, each prompt once."""
    pair = 4.0 * shape.heads * shape.head_width * shape.layers
    head = 2.0 * shape.vocabulary * shape.hidden
    prompt = 2.0 * shape.body * work.prompt + pair * work.prompt**2 / 2
    seen = work.completion - 1
    completion = 2.0 * shape.body * seen + head * work.completion + pair * seen * (work.prompt + work.completion / 2)
    return work.problems * (prompt + work.k * completion)


def plan(shape: Shape, work: Workload, machine: Machine, processes: int = 1) -> Plan:
    """Return what an iteration needs on `processes` devices that part its problems."""
    number, computed = shape.parameters, 2 if work.bfloat16 else 4
    tokens = work.prompt + work.rows * work.completion
    kept = shape.activations_per_token
    if work.checkpointing:  # the inputs of all layers, and one layer at a time in full
        kept = shape.layers * shape.hidden + kept // shape.layers
    logits = 4.0 * work.rows * work.completion * shape.vocabulary
    training = {
        "weights": 4.0 * number,
        "gradients": 4.0 * number,
        "AdamW": 8.0 * number,
        "reference": 4.0 * number if work.reference else 0.0,
        "bfloat16 copies": 2.0 * number if work.bfloat16 else 0.0,
        "buckets of DDP": 4.0 * number if processes > 1 else 0.0,
        "activations": float(computed * kept * tokens),
        "logits": min(3 * logits, KEPT_LOGITS),
        "output layer": 4.0 * shape.vocabulary * shape.hidden,  # its gradient, before it is added to that of the others
    }
    rollouts = work.problems * work.k / processes
    cached = rollouts * work.completion + work.problems / processes * work.prompt
    serving = {"weights": float(computed * number), "KV cache": float(computed * shape.kv_per_token * cached)}
    forward = forward_flops(shape, work)
    update = (3 + work.reference) * forward
    steps = work.completion
    moved = steps * computed * (number + rollouts * shape.kv_per_token * (work.prompt + work.completion / 2))
    rate, speed = machine.flops * machine.share, machine.bandwidth * machine.share
    optimizer = 4.0 * 7 * number / speed  # reads and writes of weights, gradients and both moments
    return Plan(
        training,
        serving,
        generate_flops=forward,
        update_flops=update,
        generate_seconds=max(forward / processes / rate, moved / speed),
        update_seconds=update / processes / rate + optimizer,
    )


QWEN = (
    Shape("0.5B", 896, 24, 14, 2, 64, 4864, 151936, True, True),
    Shape("1.5B", 1536, 28, 12, 2, 128, 8960, 151936, True, True),
    Shape("7B", 3584, 28, 28, 4, 128, 18944, 152064, False, True),
)
GSM8K = Workload(problems=64, k=8, prompt=150, completion=250, rows=8)
H100 = Machine("H100 80 GB", flops=989e12, bandwidth=3.35e12, share=0.35)


def tables() -> str:
    """Return the tables of docs/scaling.md."""
    lines = [
        "| model | processes | weights, gradients, AdamW | reference | copies, buckets | activations, logits | "
        "trainer | with checkpointing | server |",
        "| --- " * 9 + "|",
    ]
    for shape in QWEN:
        for processes in (1, 8):
            found = plan(shape, GSM8K, H100, processes)
            lean = plan(shape, replace(GSM8K, checkpointing=True), H100, processes)
            part = {name: size / GIB for name, size in found.training.items()}
            own = part["activations"] + part["logits"] + part["output layer"]
            lines.append(
                f"| {shape.name} | {processes} | {part['weights'] + part['gradients'] + part['AdamW']:.1f} | "
                f"{part['reference']:.1f} | {part['bfloat16 copies'] + part['buckets of DDP']:.1f} | "
                f"{own:.1f} | {found.training_bytes / GIB:.0f} | "
                f"{lean.training_bytes / GIB:.0f} | {found.serving_bytes / GIB:.0f} |"
            )
    lines += [
        "",
        "| model | processes | generate, PFLOP | update, PFLOP | generate, s | update, s |",
        "| --- " * 6 + "|",
    ]
    for shape in QWEN:
        for processes in (1, 8):
            found = plan(shape, GSM8K, H100, processes)
            lines.append(
                f"| {shape.name} | {processes} | {found.generate_flops / 1e15:.2f} | {found.update_flops / 1e15:.2f} | "
                f"{found.generate_seconds:.1f} | {found.update_seconds:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, help="model folder")
    parser.add_argument("--problems", type=int, default=2)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=120)
    parser.add_argument("--completion", type=int, default=32)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if given.measure is None:
        print(tables())
        return
    from benchmarks.plan_measure import measure  # it imports torch, which the formula does not need

    work = Workload(given.problems, given.k, given.prompt, given.completion, given.rows, False, False)
    measure(given.measure, work, given.threads)


if __name__ == "__main__":
    main()
