"""The constants by which passes on a CPU choose the faster of two ways, or trade memory for time.

None changes a result beyond rounding. The values suit two cores with AVX2. To see whether they suit another machine:

    python -m benchmarks.constants [NAME ...]

It times both ways around each value. Code reads a constant when it decides (`tuning.NAME`), so a change here is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# Output rows of a weight. From this size on, its product with a few columns runs as a batch of blocks (`llama_step`).
# Too low, and small products pay for being split; too high, and the output layer runs at two thirds of its speed.
BLOCKED_FROM_ROWS = 8192

# Output rows in one such block. Too small, and each block costs more to start than to compute; too large, and a block
# no longer fits a core's cache.
BLOCK_ROWS = 128

# Weights in one matrix. Up to this size, query, key and value become one product, of weights that are copied once for
# each call of the sampler. Too low, and small models start three products where one would do; too high, and a call
# spends more time and memory on the copy than the calls of a short completion get back.
JOINED_UP_TO_WEIGHTS = 1 << 20

# Tokens saved. From this many on, what all prompts begin with is computed once (`prefix_tree`). Too low, and the extra
# call of attention in each layer costs more than the tokens; too high, and shared tokens are computed for each prompt.
PREFIX_TOKENS_SAVED = 16

# Times the shared tokens. What all prompts begin with is computed once only if no prompt continues for longer than
# this. Too high, and long prompts pay for masked attention, which is slower than causal; too low, and shared tokens
# are computed for each prompt.
PREFIX_LONGEST_REST = 8

# Attention scores of one head of one sequence (its tokens times the tokens it attends to). Up to this many, attention
# is plain matrix products, beyond it the fused kernel. Too low, and short completions wait for a kernel made for long
# ones; too high, and all scores of long ones are written to memory.
PLAIN_ATTENTION_SCORES = 4096

# Tokens of the longest completion of a micro-batch. From this many on, completions attend one by one, without a mask
# (`long_rows`). Too low, and short completions start many small kernels; too high, and a mask holds, and kernels read,
# a number for each pair of tokens.
ALONE_FROM_TOKENS = 1024

# Times the longest completion. Completions attend one by one only if no prompt is longer than this. Too high, and the
# attention of long prompts is computed for each of their completions; too low, and long completions have masks.
ALONE_LONGEST_PROMPT = 1

# Logits (4 bytes each) that the output layer computes at a time in the update (`token_head`). Too small, and each
# product is short and reads the weight again; too large, and peak memory grows by several slices.
LOGITS_SLICE = 1 << 24

# Log-probs (4 bytes each) of a micro-batch. Up to this many are kept for the backward pass. Too low, and the output
# layer's forward product runs twice; too high, and the vocabulary sets the peak memory of the update.
KEPT_LOGPROBS = 1 << 26

# Tokens by which the buffers of keys and values grow (`kv_cache`). Too small, and buffers are copied often; too large,
# and memory lies unused when completions end.
CACHE_GROWTH = 64

# Keys that a row attends to, times the numbers in one. Up to this many, attention in sampling multiplies number by
# number and adds up; beyond it, it runs matrix products. Too low, and products of tiny matrices take longer to start
# than to compute; too high, and long rows miss the speed of matrix products.
SUMMED_NUMBERS = 2048

# Prompt tokens, counted once for each row. Up to this many, each row gets its own copy of its prompt's keys and values;
# beyond it, the rows of a prompt share one. Too low, and short prompts pay for the sharing's additional operations; too
# high, and each step reads the same keys and values K times, and holds them K times.
COPIED_TOKENS = 4096

# Share of the rows of a batch. Once more of them differ than this, each row is computed on its own (`Branches` of
# `decoding`). Too low, and equal rows are computed several times; too high, and each step looks for equal rows, and
# moves keys and values when rows diverge, for little.
DISTINCT_SHARE = 0.75

# Share of the rows that a decoder holds. Rows that have ended are computed along until they exceed this share. Too low,
# and all keys and values are copied each time a row ends; too high, and every step computes rows that nobody needs.
UNUSED_SHARE = 0.1


@contextmanager
def set_to(values: Mapping[str, float]) -> Iterator[None]:
    """Let constants have other values inside the block."""
    before = {name: globals()[name] for name in values}
    globals().update(values)
    try:
        yield
    finally:
        globals().update(before)
