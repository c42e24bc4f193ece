"""What a model and its training hold in memory, in bytes by part: formulas of a model's shape, without its weights.

`benchmarks/plan.py` prints the tables of docs/scaling.md with them, `doctor` what a config needs here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import try_to_load_from_cache

from grpo_mlflow.errors import ModelError
from grpo_mlflow.forward import tuning

NF4_BYTES = 1 / 2 + 4 / 64  # per number: four bits, and a float32 for each block of 64
EIGHT_BITS = 2 * (1 + 4 / 256)  # per weight: two moments of a byte, and a float32 for each block of 256
SMALLEST_IN_8_BITS = 4096  # numbers in a tensor; the moments of smaller ones are float32
_CODES = 2 * 4 * 256  # bytes per tensor with moments in 8 bits: what each code means, as a checkpoint restores it


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
    normed: bool = False  # queries and keys, as of Qwen3

    @classmethod
    def read(cls, source: str | Path) -> Shape:
        """Return the shape in the config.json of a model folder, or of a hub id that is in the cache.

        Raises:
            ModelError: there is none, or of another kind of model.
        """
        file = Path(source) / "config.json"
        if not file.is_file():
            cached = try_to_load_from_cache(str(source), "config.json") if str(source).count("/") == 1 else None
            if not isinstance(cached, str):
                raise ModelError(f"model {str(source)!r}: no config.json; allowed: a model folder, or a cached hub id")
            file = Path(cached)
        try:
            return cls.of(json.loads(file.read_text(encoding="utf-8")), Path(source).name)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"model {str(source)!r}: its config.json describes no model of the Llama family ({error!r})"
            ) from error

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str = "") -> Shape:
        """Return the shape that settings of transformers describe; raise KeyError where they are of another kind."""
        heads = config["num_attention_heads"]
        return cls(
            name,
            config["hidden_size"],
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
            config["intermediate_size"],
            config["vocab_size"],
            config.get("tie_word_embeddings", False),
            config["model_type"] == "qwen2",
            config["model_type"] == "qwen3",
        )

    @property
    def qkv(self) -> int:
        """Width of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_width

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers in each layer, by their names."""
        query, key = self.heads * self.head_width, self.kv_heads * self.head_width
        outside, inside = (self.hidden, self.inner), (self.inner, self.hidden)
        return {
            **{"q_proj": (self.hidden, query), "k_proj": (self.hidden, key), "v_proj": (self.hidden, key)},
            **{"o_proj": (query, self.hidden), "gate_proj": outside, "up_proj": outside, "down_proj": inside},
        }

    @property
    def body(self) -> int:
        """Weights of all matrices but embedding and output layer: what each token passes."""
        return self.layers * sum(a * b for a, b in self.linear.values())

    @property
    def embeddings(self) -> int:
        """Weights of the embedding, and of the output layer where it has its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def small(self) -> int:
        """Weights that are no matrices: norms and biases."""
        normed = 2 * self.head_width if self.normed else 0
        return self.layers * (2 * self.hidden + (self.qkv if self.biased else 0) + normed) + self.hidden

    @property
    def parameters(self) -> int:
        return self.body + self.embeddings + self.small

    def adapter(self, rank: int, targets: Literal["all-linear"] | tuple[str, ...] = "all-linear") -> int:
        """Return the weights of an adapter."""
        chosen = self.linear if targets == "all-linear" else {n: self.linear[n] for n in targets if n in self.linear}
        return self.layers * rank * sum(a + b for a, b in chosen.values())

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
    """An iteration: `problems` x `k` completions; lengths are means. A micro-batch holds `rows` of one problem.

    `rank`: of the adapter; 0: all weights are trained. `low_base`: frozen matrices are bfloat16. `nf4`: those of an
    adapter's base are in 4 bits. `sharded`: weights, gradients and state are split over the processes, and so is a
    reference without a device of its own, `reference_device`.
    """

    problems: int
    k: int
    prompt: int
    completion: int
    rows: int
    reference: bool = True
    bfloat16: bool = True
    checkpointing: bool = False
    rank: int = 0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    low_base: bool = False
    nf4: bool = False
    optimizer: str = "adamw"
    offload: bool = False
    sharded: bool = False
    float32_head: bool = False
    reference_device: str | None = None


def held(weight: Any) -> int:
    """Return the bytes of a weight, with the scales of one in 4 bits."""
    scales = getattr(getattr(weight, "quant_state", None), "absmax", None)
    return int(weight.nbytes) + (0 if scales is None else int(scales.nbytes))


def frozen(shape: Shape, work: Workload) -> float:
    """Return the bytes of a model that is not trained: an adapter's base, or a reference."""
    matrices = 2 if work.low_base else 4
    body = NF4_BYTES if work.nf4 and work.rank else matrices
    return body * shape.body + matrices * shape.embeddings + 4.0 * shape.small


def state(shape: Shape, work: Workload) -> float:
    """Return the bytes of the optimizer's state."""
    trained = shape.adapter(work.rank, work.targets) if work.rank else shape.parameters
    if work.optimizer != "adamw8bit":
        return {"adamw": 8.0, "sgd": 4.0}[work.optimizer] * trained
    sizes = _tensors(shape, work)
    low = sum(size * count for size, count in sizes if size >= SMALLEST_IN_8_BITS)
    return EIGHT_BITS * low + 8.0 * (trained - low) + _CODES


def _tensors(shape: Shape, work: Workload) -> list[tuple[int, int]]:
    """Return size and number of the trained tensors."""
    if work.rank:
        names = shape.linear if work.targets == "all-linear" else work.targets
        widths = [width for name in names if name in shape.linear for width in shape.linear[name]]
        return [(work.rank * width, shape.layers) for width in widths]
    found = [(a * b, shape.layers) for a, b in shape.linear.values()]
    found += [(shape.vocabulary * shape.hidden, 1 if shape.tied else 2), (shape.hidden, 2 * shape.layers + 1)]
    if shape.biased:
        found += [(own, shape.layers) for name, (_, own) in shape.linear.items() if name[0] in "qkv"]
    return found


def training(shape: Shape, work: Workload, processes: int = 1) -> dict[str, float]:
    """Return the bytes that a trainer's device holds, by part; what lies in host memory instead is in `host`."""
    trained = shape.adapter(work.rank, work.targets) if work.rank else shape.parameters
    computed, shards = 2 if work.bfloat16 else 4, processes if work.sharded else 1
    base = frozen(shape, work)
    tokens, kept = work.prompt + work.rows * work.completion, shape.activations_per_token
    if work.checkpointing:  # the inputs of all layers, and one layer at a time in full
        kept = shape.layers * shape.hidden + kept // shape.layers
    copied = 0.0  # what autocast makes of float32 weights, until the backward pass
    if work.bfloat16 and not work.sharded:  # sharded, layers are gathered in bfloat16 and let go
        outer = 0 if work.low_base else shape.vocabulary * shape.hidden + (0 if work.nf4 else shape.body)
        copied = 2.0 * (trained + outer if work.rank else shape.parameters)
    wide = computed if not work.float32_head else 2 if work.rank and work.low_base else 4  # else gathered as stored
    largest = max(computed * shape.body // shape.layers, wide * shape.vocabulary * shape.hidden)
    head = 4.0 * shape.vocabulary * shape.hidden  # its gradient, before it is added to that of the others
    if work.rank:  # it has none, but a copy if it is not computed in the type that it is stored in
        head = head if work.low_base and (work.float32_head or not work.bfloat16) else 0.0
    reference = 0.0 if work.rank or not work.reference or work.reference_device == "cpu" else base
    return {
        "weights": 4.0 * trained / shards,
        "frozen base": base / shards if work.rank else 0.0,
        "reference": reference / (1 if work.reference_device else shards),
        "gradients": 4.0 * trained / shards,
        "optimizer state": 0.0 if work.offload else state(shape, work) / shards,
        "bfloat16 copies": copied,
        "buckets of DDP": 4.0 * trained if processes > 1 and not work.sharded else 0.0,
        "gathered layers": 2.0 * largest if work.sharded and processes > 1 else 0.0,
        "activations": float(computed * kept * tokens),
        "logits": _logits(work.rows * work.completion * shape.vocabulary, work.bfloat16),
        "output layer": head,
    }


def _logits(numbers: int, bfloat16: bool) -> float:
    """Return the bytes that `forward.token_head` holds at most for so many logits.

    It computes a slice at a time: log-probs and what is made from them, and a gradient in bfloat16. Log-probs of all
    slices are kept for the backward pass if they are few.
    """
    one = min(numbers, tuning.LOGITS_SLICE)
    kept = numbers if numbers <= tuning.KEPT_LOGPROBS else one
    return 4.0 * (kept + one) + 2.0 * one * bfloat16


def host(shape: Shape, work: Workload, processes: int = 1) -> dict[str, float]:
    """Return the bytes of host memory that all processes take for what is kept off their devices, by part."""
    found = dict[str, float]()
    if work.reference and not work.rank and work.reference_device == "cpu":
        found["reference"] = frozen(shape, work) * processes
    if work.offload:
        trained = 4.0 * (shape.adapter(work.rank, work.targets) if work.rank else shape.parameters)
        found |= {"optimizer state": state(shape, work), "copies of weights": trained, "copies of gradients": trained}
    return found


def serving(shape: Shape, work: Workload, processes: int = 1) -> dict[str, float]:
    """Return the bytes of a server that holds one of `processes` shares of all rollouts at once."""
    computed = 2 if work.bfloat16 else 4
    cached = (work.problems * work.k * work.completion + work.problems * work.prompt) / processes
    return {
        "weights": float(computed * shape.parameters),
        "KV cache": float(computed * shape.kv_per_token * cached),
    }
