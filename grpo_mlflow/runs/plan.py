"""What a config needs of memory, part by part, and which settings make it fit: the formulas of `model.memory`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from grpo_mlflow.config import Config
from grpo_mlflow.model import memory
from grpo_mlflow.model.memory import Shape, Workload

_UPDATE = ("activations", "logits", "output layer", "bfloat16 copies", "gradients", "buckets of DDP", "gathered layers")
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes by part: on the trainer's device, in host memory (an optimizer, a reference), in a server of the run.

    Sampling and the update take turns, so only the larger of what each of them needs for itself counts.
    """

    device: Mapping[str, float]
    host: Mapping[str, float]
    server: Mapping[str, float]
    cache: float  # of sampling in this process: keys and values, and all weights where those are in shards

    @property
    def total(self) -> float:
        """Return the most bytes on the device at once."""
        update = sum(self.device.get(name, 0.0) for name in _UPDATE)
        return sum(self.device.values()) - update + max(update, self.cache)


def workload(config: Config, prompt: int, processes: int = 1) -> Workload:
    """Return the work of an iteration of a config, with completions of full length.

    Args:
        prompt: tokens of a prompt.
        processes: that train; one alone shares out nothing.
    """
    model, train, completion = config.model, config.train, config.generation.max_new_tokens
    rows, most = train.batch_size, train.max_tokens_per_batch
    if most is not None:
        rows = max(1, min(rows, (most - prompt) // completion))
    return Workload(
        problems=config.data.problems_per_iteration,
        k=config.data.rollouts_per_problem,
        prompt=prompt,
        completion=completion,
        rows=rows,
        reference=train.kl_coef > 0,
        reference_device=model.ref_device,
        bfloat16=model.dtype == "bfloat16",
        checkpointing=model.gradient_checkpointing,
        rank=model.lora.rank or 0,
        targets=model.lora.targets,
        low_base=model.frozen_dtype == "bfloat16",
        nf4=model.quantization == "nf4",
        optimizer=train.optimizer,
        offload=train.optimizer_offload == "cpu",
        float32_head=model.cast_lm_head_to_fp32,
        sharded=train.sharding == "full" and processes > 1,
    )


def need(shape: Shape, work: Workload, config: Config, processes: int = 1) -> Need:
    """Return what the work needs on each of the processes' devices."""
    local = config.generation.backend == "local"
    row, most = work.prompt + work.completion, config.generation.max_tokens_per_batch
    at_once = min(config.generation.batch_size, work.problems) * work.k * row
    at_once = at_once if most is None else min(at_once, max(row, most))
    computed = 2 if work.bfloat16 else 4
    gathered = computed * shape.parameters if work.sharded else 0
    server = config.generation.server
    return Need(
        memory.training(shape, work, processes),
        memory.host(shape, work, processes),
        memory.serving(shape, work, server.replicas) if server.manage else {},
        float(local * (gathered + computed * shape.kv_per_token * at_once)),
    )


def told(found: Need) -> str:
    """Return the parts in one line, the largest first."""
    return ", ".join(
        [_parts(found.device), *([f"sampling {found.cache / GIB:.2f}"] if found.cache else [])]
        + [f"{name}: {_parts(parts)}" for name, parts in (("host", found.host), ("server", found.server)) if parts]
    )


def _parts(parts: Mapping[str, float]) -> str:
    held = sorted(((size, name) for name, size in parts.items() if size), reverse=True)
    return ", ".join(f"{name} {size / GIB:.2f}" for size, name in held)


Change = Callable[[Workload], Workload | None]  # None: it is so already, or makes no difference
Step = tuple[str, Change]
# What makes a run smaller, in the order in which to try: what changes no result, what rounds, what trains otherwise.
STEPS: Sequence[Step] = (
    (
        "model.gradient_checkpointing=true",
        lambda work: None if work.checkpointing else replace(work, checkpointing=True),
    ),
    ("train.batch_size=1 train.grad_accum_steps=auto", lambda work: None if work.rows == 1 else replace(work, rows=1)),
    (
        "model.frozen_dtype=bfloat16",
        lambda work: replace(work, low_base=True) if (work.rank or work.reference) and not work.low_base else None,
    ),
    (
        "train.optimizer=adamw8bit",
        lambda work: replace(work, optimizer="adamw8bit") if work.optimizer == "adamw" else None,
    ),
    ("train.optimizer_offload=cpu", lambda work: None if work.offload else replace(work, offload=True)),
    ("train.kl_coef=0", lambda work: replace(work, reference=False) if work.reference and not work.rank else None),
    ("model.lora.rank=16", lambda work: None if work.rank else replace(work, rank=16)),
    (
        "model.quantization=nf4",
        lambda work: replace(work, nf4=True) if work.rank and not (work.nf4 or work.sharded) else None,
    ),
)

ON_HOST = tuple(step for step in STEPS if step[0] != "train.optimizer_offload=cpu")  # where all is in host memory


def to_fit(
    work: Workload, size: Callable[[Workload], float], free: float, steps: Sequence[Step] = STEPS
) -> tuple[list[str], bool]:
    """Return the settings that make the work smaller, until it fits into `free` bytes, and whether it then does.

    A setting that saves less than a hundredth is left out.
    """
    chosen = []
    for words, change in steps:
        if size(work) <= free:
            break
        changed = change(work)
        if changed is not None and size(changed) < 0.99 * size(work):
            chosen.append(words)
            work = changed
    return chosen, size(work) <= free
