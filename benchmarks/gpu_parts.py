"""The parts of `benchmarks.gpu`. Each yields rows of figures as it measures them, and can be called alone.

Models have random weights. They are written to a folder once, and every part reads them as training reads a model.
A row has a `case` and figures: tokens_per_s, peak_gib, mfu (a share), max_difference, mean_difference, and others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.gpu_shapes import operations, peak_rate
from grpo_mlflow.config import LoraConfig, TrainConfig
from grpo_mlflow.forward.padded import completion_logprobs
from grpo_mlflow.generation import LocalGenerator, Sampling
from grpo_mlflow.model import lora
from grpo_mlflow.model.devices import choose_device
from grpo_mlflow.model.memory import Shape
from grpo_mlflow.model.policy import Policy, load
from grpo_mlflow.model.recomputing import recompute_activations
from grpo_mlflow.model.tiny import make_tokenizer
from grpo_mlflow.training.batching import Row, rows_of
from grpo_mlflow.training.learner import Learner, Sizes
from grpo_mlflow.training.scoring import Scorer
from grpo_mlflow.training.throughput import gemm_peak, peak_memory
from grpo_mlflow.types import Completion, Group, Problem, Prompt, Rollout, Verdict

Figures = dict[str, Any]
_LR = 1e-4
# The largest differences from float32 on the CPU that count as rounding. The first is what `shared_prefix` allows; the
# other is five times what bfloat16 gives on the CPU, and far below what unrelated log-probs differ by, about 1.
_ALLOWED = {"float32": 1e-3, "bfloat16": 0.1}


def make(shape: Shape, root: Path, device: torch.device) -> Path:
    """Return a folder with a bfloat16 Qwen3 of the shape, with random weights; it is made unless `root` has it."""
    folder = root / f"{shape.name}-{shape.layers}"
    if folder.is_dir():
        return folder
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        max_position_embeddings=40960,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with device:  # a GPU draws a billion numbers at once
        model = Qwen3ForCausalLM(config)
    scratch = root / f"making-{folder.name}"
    Policy(model.to(torch.bfloat16), tokenizer, device, torch.float32, (), 0).save(scratch)
    scratch.rename(folder)  # a part that was stopped half-way leaves no model that looks complete
    return folder


def device_rates(device: str) -> Iterator[Figures]:
    """Measure the rate of large matrix products on the device."""
    chosen = choose_device(device)
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        yield {"case": f"{_name(chosen)}, {kind} products", "tflops": gemm_peak(chosen, dtype) / 1e12}


def loading(shape: Shape, root: Path, device: str) -> Iterator[Figures]:
    """Make the model, and load it as float32 weights onto the device."""
    chosen = choose_device(device)
    began = time.perf_counter()
    folder = make(shape, root, chosen)
    made = time.perf_counter()
    _forget_peak(chosen)
    model = load(folder, chosen).model
    yield {
        "case": "float32 weights",
        "peak_gib": peak_memory(chosen) / 1024,
        "weights": sum(p.numel() for p in model.parameters()),
        "seconds_to_make": made - began,
        "seconds_to_load": time.perf_counter() - made,
    }


@dataclass(frozen=True)
class _Side:
    """What one device computes in one type: log-probs of all completion tokens (M,), and one optimizer step."""

    path: str
    packed: Tensor
    padded: Tensor
    loss: float
    grad_norm: float
    changes: dict[str, Tensor]


def agreement(shape: Shape, root: Path, device: str, *, k: int, prompt: int, completion: int) -> Iterator[Figures]:
    """Compare the device, in float32 and bfloat16, with float32 on the CPU: log-probs, and one update.

    Two prompts with k completions of up to `completion` tokens. Changes of weights are told in units of the learning
    rate: AdamW's first step changes a weight by about one, so 2 is the most that two changes can differ by.

    Raises:
        ArithmeticError: log-probs differ by more than rounding explains.
    """
    cpu, chosen = torch.device("cpu"), choose_device(device)
    folder = make(shape, root, chosen)
    groups = [make_group(shape, i, k=k, prompt=prompt + 3 * i, completion=completion) for i in range(2)]
    expected = _side(folder, cpu, "float32", groups)
    yield {"case": "cpu float32", "loss": expected.loss, "grad_norm": expected.grad_norm, "path": expected.path}
    wrong = []
    for where, dtype in dict.fromkeys([(chosen, "float32"), (chosen, "bfloat16"), (cpu, "bfloat16")]):
        found = _side(folder, where, dtype, groups)
        case, largest = f"{where.type} {dtype}", 0.0
        for path, values in (("packed", found.packed), ("padded", found.padded)):
            figures = _differences(values, expected.packed)
            largest = max(largest, figures["max_difference"])
            yield {"case": f"{case}, log-probs, {path} rows", **figures, "path": found.path}
        yield {
            "case": f"{case}, change of weights / lr",
            **_change_differences(found.changes, expected.changes),
            "loss_difference": abs(found.loss - expected.loss),
            "grad_norm_relative": abs(found.grad_norm / expected.grad_norm - 1),
        }
        if largest > _ALLOWED[dtype]:
            wrong.append(f"{case}: log-probs differ by {largest:.2g}; allowed: {_ALLOWED[dtype]:g}")
    if wrong:
        raise ArithmeticError("; ".join(wrong))


def _of_all_tokens(policy: Policy) -> Policy:
    """Return the policy with all tokens of the model: rows here hold any, while the tokenizer is a small one."""
    return replace(policy, sampled=None)


def _side(folder: Path, device: torch.device, dtype: str, groups: Sequence[Group]) -> _Side:
    policy, rows = _of_all_tokens(load(folder, device, dtype)), rows_of(groups)
    lengths = torch.tensor([len(row.completion_ids) for row in rows])
    most = int(lengths.max())
    mask = torch.arange(most)[None, :] < lengths[:, None]
    ids = torch.zeros(len(rows), max(row.width for row in rows), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : row.width] = torch.tensor([*row.prompt_ids, *row.completion_ids])
    starts = torch.tensor([len(row.prompt_ids) for row in rows], device=device)
    scorer = Scorer(policy, 1.0)
    with torch.no_grad():
        packed, _ = scorer.score(rows)
        with policy.autocast():
            padded, _ = completion_logprobs(policy.model, ids.to(device), starts, most, 1.0)
    learner = _learner(policy, len(rows), len(rows), most)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    metrics = learner.update(groups, 0, 0)
    return _Side(
        scorer.reason or "packed",
        packed.cpu()[mask],
        padded.cpu()[mask],
        metrics["loss_total"] or 0.0,
        metrics["grad_norm"] or 0.0,
        {name: (p.detach() - before[name]).cpu() / _LR for name, p in policy.model.named_parameters()},
    )


def sampling(
    shape: Shape, root: Path, device: str, *, dtypes: Sequence[str], k: int, prompts: Sequence[int], new: int
) -> Iterator[Figures]:
    """Sample k completions of `new` tokens for one prompt of each length; score them again, and compare."""
    chosen = choose_device(device)
    loaded = _of_all_tokens(load(make(shape, root, chosen), chosen))
    for dtype, length in product(dtypes, prompts):
        policy = replace(loaded, dtype=getattr(torch, dtype), eos_ids=())  # no completion ends early
        generator, scorer = LocalGenerator(policy, 1), Scorer(policy, 1.0)
        prompt = Prompt("p", (), _tokens(shape, length, length))
        generator.generate([prompt], k, Sampling(4), 0, ("warm-up",))
        _forget_peak(chosen)
        began = time.perf_counter()
        (completions,) = generator.generate([prompt], k, Sampling(new), 0, ("timed",))
        seconds, peak = time.perf_counter() - began, peak_memory(chosen) / 1024
        rows = [Row(prompt.token_ids, c.token_ids, c.behaviour_logprobs, 0.0, False) for c in completions]
        with torch.no_grad():
            again, _ = scorer.score(rows)
        yield {
            "case": f"{dtype}, {k} x ({length} + {new})",
            "tokens_per_s": k * new / seconds,
            "peak_gib": peak,
            **_differences(torch.tensor([c.behaviour_logprobs for c in completions]), again.cpu()),
            "path": scorer.reason or "packed",
        }


def update(
    shape: Shape, root: Path, device: str, *, rank: int | None, lengths: Sequence[int], peak: float | None
) -> Iterator[Figures]:
    """Train on two sequences of each length, one in a micro-batch, with activations recomputed, in bfloat16.

    `rank` is that of an adapter (None: all weights are trained); `peak` the device's operations per second. Timed are
    two optimizer steps after one that is not.
    """
    chosen = choose_device(device)
    policy = _of_all_tokens(load(make(shape, root, chosen), chosen, "bfloat16"))
    if rank is not None:
        lora.add(policy.model, LoraConfig(rank=rank), 0)
    recompute_activations(policy.model)
    parameters = list(policy.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters) - trained
    peak = peak or peak_rate(_name(chosen))
    learner = _learner(policy, 1, 2, max(lengths))
    for length in lengths:
        start = min(256, length // 4)
        group = make_group(shape, length, k=2, prompt=start, completion=length - start, ragged=False)
        learner.update([group], 0, 0)
        _forget_peak(chosen)
        began = time.perf_counter()
        metrics = [learner.update([group], 0, 1 + i) for i in range(2)]  # reading metrics waits for the device
        seconds = (time.perf_counter() - began) / 2
        figures: Figures = {
            "case": f"2 x {length} tokens",
            "tokens_per_s": 2 * length / seconds,
            "peak_gib": peak_memory(chosen) / 1024,
            "path": Scorer(policy, 1.0).reason or "packed",
            "grad_norm": metrics[-1]["grad_norm"],
        }
        if peak:
            figures["mfu"] = 2 * operations(shape, trained, frozen, length) / seconds / peak
        yield figures


def make_group(shape: Shape, number: int, *, k: int, prompt: int, completion: int, ragged: bool = True) -> Group:
    """Return a group of k rollouts of random tokens, whose prompt has `prompt` tokens.

    Completions have up to three tokens fewer than `completion` if `ragged`. Their behaviour log-probs are those of
    a uniform distribution, from which that of random weights is not far.
    """
    problem = Problem(f"p{number}", number, ())
    asked = Prompt(problem.id, (), _tokens(shape, prompt, number))
    rollouts = []
    for j in range(k):
        ids = _tokens(shape, completion - (j % 4 if ragged else 0), number, j)
        behaviour = (-math.log(shape.vocabulary),) * len(ids)
        verdict = Verdict(float(j % 2), {}, False, None)  # different rewards: no signal would be no update
        rollouts.append(Rollout(asked, Completion(ids, "", behaviour, "length", 0), verdict))
    return Group(problem, tuple(rollouts), tuple(-0.5 if j % 2 else 1.0 for j in range(k)))


def _tokens(shape: Shape, count: int, *key: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(key).integers(shape.vocabulary, size=count).tolist())


def _learner(policy: Policy, batch_size: int, rollouts: int, completion: int) -> Learner:
    # accelerate keeps the device of the first Accelerator of a process for all later ones
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=policy.device.type == "cpu", mixed_precision="no")
    config = TrainConfig(batch_size=batch_size, kl_coef=0.0, lr=_LR)
    return Learner(policy, None, accelerator, config, Sizes(1.0, completion, rollouts, 100))


def _differences(found: Tensor, expected: Tensor) -> Figures:
    difference = (found.double() - expected.double()).abs()
    return {"max_difference": float(difference.max()), "mean_difference": float(difference.mean())}


def _change_differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Figures:
    differences = [(change - expected[name]).abs() for name, change in found.items()]
    count = sum(difference.numel() for difference in differences)
    return {
        "max_difference": max(float(difference.max()) for difference in differences),
        "mean_difference": sum(float(difference.sum(dtype=torch.float64)) for difference in differences) / count,
    }


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call] # without it the allocator may not be there yet
        torch.cuda.reset_peak_memory_stats(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
