"""Plan a run by formula: what an iteration of a model needs in memory, operations and time (docs/scaling.md).

    python -m benchmarks.plan                            # the tables of docs/scaling.md
    python -m benchmarks.plan --model FOLDER_OR_ID       # bytes by part of a model, from its config.json alone
    python -m benchmarks.plan --measure MODEL_FOLDER     # an iteration on this CPU, against the formula

One iteration: each prompt is prefilled once, each token of a completion sampled once (2 operations per weight), then
trained on (6 per weight, each prompt of a group once), with a forward pass of the reference on top where there is a KL
term. An output layer counts where a token is predicted; attention counts 4 x width per layer and pair of tokens.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from grpo_mlflow.model import memory
from grpo_mlflow.model.memory import Shape, Workload
from grpo_mlflow.runs.plan import STEPS

GIB = 2**30


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
    rollouts = work.problems * work.k / processes
    forward = forward_flops(shape, work)
    update = (3 + work.reference) * forward
    steps = work.completion
    moved = steps * computed * (number + rollouts * shape.kv_per_token * (work.prompt + work.completion / 2))
    rate, speed = machine.flops * machine.share, machine.bandwidth * machine.share
    optimizer = 4.0 * 7 * number / speed  # reads and writes of weights, gradients and both moments
    return Plan(
        memory.training(shape, work, processes),
        memory.serving(shape, work, processes),
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
    return "\n\n".join("\n".join(table) for table in (_memory(), _sharded(), _small_card(), _time()))


def _table(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]


def _memory() -> list[str]:
    lines = _table(
        *("model", "processes", "weights, gradients, AdamW", "reference", "copies, buckets", "activations, logits"),
        *("trainer", "with checkpointing", "server"),
    )
    for shape in QWEN:
        for processes in (1, 8):
            found = plan(shape, GSM8K, H100, processes)
            lean = plan(shape, replace(GSM8K, checkpointing=True), H100, processes)
            part = {name: size / GIB for name, size in found.training.items()}
            own = part["activations"] + part["logits"] + part["output layer"]
            lines.append(
                f"| {shape.name} | {processes} | {_trained(part):.1f} | "
                f"{part['reference']:.1f} | {part['bfloat16 copies'] + part['buckets of DDP']:.1f} | "
                f"{own:.1f} | {found.training_bytes / GIB:.0f} | "
                f"{lean.training_bytes / GIB:.0f} | {found.serving_bytes / GIB:.0f} |"
            )
    return lines


def _trained(part: dict[str, float]) -> float:
    return part["weights"] + part["gradients"] + part["optimizer state"]


def _sharded() -> list[str]:
    """Return what 7B in full needs on one GPU, and on each of several over which all of it is split."""
    lines = _table(
        *("7B in full", "weights, gradients, AdamW", "reference in bfloat16", "copies, gathered layers"),
        *("activations, logits", "each GPU", "host"),
    )
    one = replace(GSM8K, checkpointing=True, low_base=True)
    several, offloaded = replace(one, sharded=True), replace(one, offload=True)
    for words, work, processes in (
        ("1 GPU", one, 1),
        ("1 GPU, `train.optimizer_offload=cpu`", offloaded, 1),
        ("the same, `train.kl_coef=0`", replace(offloaded, reference=False), 1),
        ("2 GPUs, sharded", several, 2),
        ("2 GPUs, sharded, `train.optimizer_offload=cpu`", replace(several, offload=True), 2),
        ("8 GPUs, sharded", several, 8),
    ):
        part = {name: size / GIB for name, size in memory.training(QWEN[-1], work, processes).items()}
        copies = part["bfloat16 copies"] + part["gathered layers"]
        own = part["activations"] + part["logits"] + part["output layer"]
        held = sum(memory.host(QWEN[-1], work).values()) / GIB
        lines.append(
            f"| {words} | {_trained(part):.1f} | {part['reference']:.1f} | {copies:.1f} | {own:.1f} | "
            f"{sum(part.values()):.0f} | {held:.0f} |"
        )
    return lines


def _small_card() -> list[str]:
    """Return which settings bring 1.5B onto a GPU of 24 GiB, one after the other."""
    lines = _table("1.5B, one GPU", "GiB", "fits 24 GiB, less 2 for fragments")

    def size(changed: Workload) -> float:
        return sum(memory.training(QWEN[1], changed).values())

    work, words = GSM8K, "as above"
    for step in (None, *STEPS):
        if step is not None:
            changed = step[1](work)
            if changed is None or size(changed) >= 0.99 * size(work):
                continue
            work, words = changed, f"and `{step[0]}`"
        lines.append(f"| {words} | {size(work) / GIB:.1f} | {'yes' if size(work) <= 22 * GIB else 'no'} |")
    return lines


def _time() -> list[str]:
    lines = _table("model", "processes", "generate, PFLOP", "update, PFLOP", "generate, s", "update, s")
    for shape in QWEN:
        for processes in (1, 8):
            found = plan(shape, GSM8K, H100, processes)
            lines.append(
                f"| {shape.name} | {processes} | {found.generate_flops / 1e15:.2f} | {found.update_flops / 1e15:.2f} | "
                f"{found.generate_seconds:.1f} | {found.update_seconds:.1f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder, or hub id in the cache")
    parser.add_argument("--measure", type=Path, help="model folder")
    parser.add_argument("--problems", type=int, default=2)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=120)
    parser.add_argument("--completion", type=int, default=32)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if given.model is not None:
        for name, size in memory.training(Shape.read(given.model), GSM8K).items():
            print(f"{name:<16} {size / GIB:8.2f} GiB")
        return
    if given.measure is None:
        print(tables())
        return
    from benchmarks.plan_measure import measure  # it imports torch, which the formula does not need

    work = Workload(given.problems, given.k, given.prompt, given.completion, given.rows, False, False)
    measure(given.measure, work, given.threads)


if __name__ == "__main__":
    main()
