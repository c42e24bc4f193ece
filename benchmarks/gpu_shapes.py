"""The models of `benchmarks.gpu`, and the operations that an update of theirs cannot do without."""

from __future__ import annotations

from grpo_mlflow.model.memory import Shape

QWEN3 = (
    Shape("Qwen3-0.6B", 1024, 28, 16, 8, 128, 3072, 151936, tied=True, biased=False),
    Shape("Qwen3-1.7B", 2048, 28, 16, 8, 128, 6144, 151936, tied=True, biased=False),
)
# The vocabulary is as large as the others', so that the output layer takes more than one slice of tokens here too.
TINY = Shape("tiny", 16, 2, 4, 2, 8, 32, 151936, tied=True, biased=False)
# Dense bfloat16 operations per second, by the data sheets of the SXM parts; looked for in the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
FORMULA = (
    "MFU = operations / seconds / peak bfloat16 rate, with operations = (6 x trained weights + 4 x frozen weights) x "
    "tokens + 6 x layers x heads x head width x length^2 for each sequence (causal attention: half of all pairs). "
    "Embeddings count once, as the output layer; what is recomputed does not count."
)


def operations(shape: Shape, trained: int, frozen: int, length: int) -> float:
    """Return the operations of `FORMULA` for one sequence of `length` tokens.

    Each weight takes 2 in the forward pass, 2 for the gradient of its input, and 2 for its own gradient if trained.
    """
    attention = 6 * shape.layers * shape.heads * shape.head_width * length**2
    return float((6 * trained + 4 * frozen) * length + attention)


def peak_rate(name: str) -> float | None:
    """Return the peak rate of the device of this name, None if it is not known."""
    return next((rate for part, rate in PEAKS.items() if part in name), None)
