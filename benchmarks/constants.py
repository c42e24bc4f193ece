"""Whether the constants of `grpo_mlflow.forward.tuning` suit this machine.

    python -m benchmarks.constants [NAME ...]

Each constant is measured at half its value, at the value and at twice the value, with random numbers in place of a
model's. Where it chooses between two ways, both are timed at a problem of that size: the value is right if way A is
faster below it and way B above it. Where it is itself a size, way A is the present value and way B the other one: the
value is right if no B is clearly faster. Ways take turns; ms are medians, MB the most that tensors held at once. Some
constants give up time for memory: for these both columns count. Leave the machine to it; if others use it too, take
`--processor` with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial

import torch
from torch import nn

from benchmarks.two_ways import Case, Clock, Way, compare
from grpo_mlflow.config import TinyConfig
from grpo_mlflow.forward import kv_cache, llama_step, prefix_tree, shared_prefix, token_head, tuning
from grpo_mlflow.generation.local.ways import sampler, start
from grpo_mlflow.model import tiny
from grpo_mlflow.model.policy import Policy

FACTORS = (0.5, 1.0, 2.0)
_HEADS, _SIZE, _LAYERS = 4, 32, 2  # the attention of the embedded model
_NEVER, _ALWAYS = 0, math.inf  # thresholds that no size, and that every size, stays within


@cache
def _policy() -> Policy:
    policy = tiny.build(TinyConfig())
    assert sampler(policy).way == "packed"  # this also lets its attention be replaced
    return policy


def _product(rows: int, a: Way, b: Way) -> Case:
    weight, columns = torch.randn(rows, 576), torch.randn(576, 16)
    return Case(f"{rows} x 576 by 16 columns", lambda: llama_step._plain(weight, None)(columns, None), a, b)


def blocked_from_rows(at: float) -> Case:
    rows = _multiple(at * tuning.BLOCKED_FROM_ROWS, tuning.BLOCK_ROWS)
    name = "BLOCKED_FROM_ROWS"
    return _product(rows, ("one product", {name: _ALWAYS}), ("blocks", {name: _NEVER}))


def block_rows(at: float) -> Case:
    sizes = tuning.BLOCK_ROWS, max(1, int(at * tuning.BLOCK_ROWS))
    a, b = ((f"{size} rows", {"BLOCK_ROWS": size, "BLOCKED_FROM_ROWS": 0}) for size in sizes)
    return _product(_multiple(4 * tuning.BLOCKED_FROM_ROWS, 2 * tuning.BLOCK_ROWS), a, b)


def joined_up_to_weights(at: float) -> Case:
    width, name = math.isqrt(int(at * tuning.JOINED_UP_TO_WEIGHTS)), "JOINED_UP_TO_WEIGHTS"
    layers, columns = [nn.Linear(width, width, bias=False) for _ in range(3)], torch.randn(width, 16)

    @torch.no_grad()
    def work() -> None:
        product = llama_step._joined(layers)
        for _ in range(32):
            product(columns)

    size = f"3 of {width} x {width}, 16 columns, 32 tokens"
    return Case(size, work, ("joined", {name: _ALWAYS}), ("apart", {name: _NEVER}))


def _update(prompts: int, shared: int, rest: int) -> Callable[[], None]:
    """Return the forward and backward pass of prompts that share their first tokens, with 4 completions each."""
    model = _policy().model
    beginning = [1] * shared
    given = [[*beginning, 2 + i, *[3] * (rest - 1)] for i in range(prompts)]
    owners = [i for i in range(prompts) for _ in range(4)]

    def work() -> None:
        batch = shared_prefix.Prefixes(given, [[5] * 8] * len(owners), owners, torch.device("cpu"))
        chosen, _ = shared_prefix.logprobs(model, batch, 1.0, written_out=True)
        torch.autograd.grad(chosen.sum(), list(model.parameters()))

    return work


_ONCE: Way = ("once", {"PREFIX_TOKENS_SAVED": 0, "PREFIX_LONGEST_REST": _ALWAYS})
_EACH: Way = ("for each", {"PREFIX_TOKENS_SAVED": _ALWAYS})


def prefix_tokens_saved(at: float) -> Case:
    shared = max(1, int(at * tuning.PREFIX_TOKENS_SAVED) // 4)
    return Case(f"5 prompts share {shared} tokens of {shared + 8}", _update(5, shared, 8), _EACH, _ONCE)


def prefix_longest_rest(at: float) -> Case:
    rest = max(1, int(8 * at * tuning.PREFIX_LONGEST_REST))
    return Case(f"16 prompts share 8 tokens of {8 + rest}", _update(16, 8, rest), _ONCE, _EACH)


def plain_attention_scores(at: float) -> Case:
    width, name = max(1, math.isqrt(int(at * tuning.PLAIN_ATTENTION_SCORES) // 2)), "PLAIN_ATTENTION_SCORES"
    levels = [prefix_tree.Level([[0] * width] * 8), prefix_tree.Level([[0] * width] * 64, [i // 8 for i in range(64)])]
    parts = [torch.randn(72 * width, _HEADS, _SIZE, requires_grad=True) for _ in range(3)]

    def work() -> None:
        found = prefix_tree.Tree(levels, torch.device("cpu")).attend(0, parts[0], parts[1], parts[2], None)
        torch.autograd.grad(found.sum(), parts)

    size = f"64 x {width} tokens that attend to {2 * width}"
    return Case(size, work, ("plain", {name: _ALWAYS}), ("kernel", {name: _NEVER}))


def _completions(before: int, own: int) -> Callable[[], None]:
    """Return attention and its gradient of 2 completions for each of 2 prompts."""
    prompts, owners = [[1] * before, [2] * before], [0, 0, 1, 1]
    batch = partial(shared_prefix.Prefixes, prompts, [[5] * (own + 1)] * 4, owners, torch.device("cpu"))
    parts = [torch.randn(2 * before + 4 * own, _HEADS, _SIZE, requires_grad=True) for _ in range(3)]

    def work() -> None:
        found = batch().attend(0, parts[0], parts[1], parts[2], None)
        torch.autograd.grad(found.sum(), parts)

    return work


_MASKED: Way = ("masked", {"ALONE_FROM_TOKENS": _ALWAYS})
_ALONE: Way = ("alone", {"ALONE_FROM_TOKENS": _NEVER, "ALONE_LONGEST_PROMPT": _ALWAYS})


def alone_from_tokens(at: float) -> Case:
    own = max(2, int(at * tuning.ALONE_FROM_TOKENS))
    return Case(f"4 x {own} tokens after {own // 2}", _completions(own // 2, own), _MASKED, _ALONE)


def alone_longest_prompt(at: float) -> Case:
    own = max(2, tuning.ALONE_FROM_TOKENS)
    before = max(1, int(at * tuning.ALONE_LONGEST_PROMPT * own))
    return Case(f"4 x {own} tokens after {before}", _completions(before, own), _ALONE, _MASKED)


def _head(logits: float, a: Way, b: Way) -> Case:
    """Return the output layer's forward and backward pass."""
    tokens, vocabulary, width = max(1, int(logits) // 32768), 32768, 128
    hidden, weight = (torch.randn(rows, width, requires_grad=True) for rows in (tokens, vocabulary))
    targets = torch.randint(vocabulary, (tokens,))

    def work() -> None:
        chosen, _ = token_head.token_logprobs(hidden, weight, None, targets, 1.0)
        torch.autograd.grad(chosen.sum(), [hidden, weight])

    return Case(f"{tokens} tokens, vocabulary {vocabulary}", work, a, b)


def logits_slice(at: float) -> Case:
    sizes = tuning.LOGITS_SLICE, int(at * tuning.LOGITS_SLICE)
    a, b = ((f"{size} logits", {"LOGITS_SLICE": size, "KEPT_LOGPROBS": _NEVER}) for size in sizes)
    return _head(4 * tuning.LOGITS_SLICE, a, b)


def kept_logprobs(at: float) -> Case:
    name = "KEPT_LOGPROBS"
    return _head(at * tuning.KEPT_LOGPROBS, ("kept", {name: _ALWAYS}), ("again", {name: _NEVER}))


def _decode(prompt: int, steps: int, room: int, a: Way, b: Way) -> Case:
    """Return the attention of 8 rows for each of 8 prompts, for so many of the `room` tokens that they may have."""
    keys, values = ([torch.randn(8, _HEADS, prompt, _SIZE) for _ in range(_LAYERS)] for _ in range(2))
    query, key, value = (torch.randn(_HEADS, _SIZE, 64).permute(2, 0, 1) for _ in range(3))

    def work() -> None:
        filled = torch.ones(8, prompt, dtype=torch.bool)
        rows = kv_cache.start(keys, values, filled, 8, room, _HEADS)
        rows.keep(torch.arange(8).repeat_interleave(8))
        for _ in range(steps):
            for layer in range(_LAYERS):
                rows.attend(layer, query, key, value, None)
            rows.advance()

    return Case(f"8 prompts x 8 rows, {prompt} + {steps} tokens", work, a, b)


def cache_growth(at: float) -> Case:
    steps, sizes = tuning.CACHE_GROWTH * 5 // 2, (tuning.CACHE_GROWTH, max(1, int(at * tuning.CACHE_GROWTH)))
    a, b = ((f"{size} tokens", {"CACHE_GROWTH": size}) for size in sizes)
    return _decode(32, steps, 2 * steps, a, b)


def summed_numbers(at: float) -> Case:
    keys, name = max(2, int(at * tuning.SUMMED_NUMBERS) // _SIZE), "SUMMED_NUMBERS"
    ways = (
        (kind, {name: value, "COPIED_TOKENS": _ALWAYS}) for kind, value in (("sums", _ALWAYS), ("products", _NEVER))
    )
    return _decode(keys // 2, keys - keys // 2, keys - keys // 2, *ways)


def copied_tokens(at: float) -> Case:
    prompt, name = max(1, int(at * tuning.COPIED_TOKENS) // 64), "COPIED_TOKENS"
    return _decode(prompt, 32, 32, ("copies", {name: _ALWAYS}), ("shared", {name: _NEVER}))


def _sample(size: str, steps: int, per_prompt: int, ends: int, *ways: Way) -> Case:
    """Return steps of 8 rows for each of 8 prompts that draw so many different tokens; each step so many rows end."""
    tokens = 5 + torch.arange(64) % 8 % per_prompt

    @torch.no_grad()
    def work() -> None:
        rows = start(_policy(), [[1, 2 + i, 3, 4] for i in range(8)], 8, steps + 1)
        for step in range(steps):
            left = len(tokens) - step * ends
            rows.step(tokens[:left])
            rows.keep(torch.arange(left - ends))
            rows.logits  # noqa: B018 (its rows are looked up)

    return Case(size, work, *ways)


def distinct_share(at: float) -> Case:
    different, name = max(1, round(8 * min(1.0, at * tuning.DISTINCT_SHARE))), "DISTINCT_SHARE"
    size = f"{8 * different} of 64 rows differ, 16 tokens"
    return _sample(size, 16, different, 0, ("merged", {name: 1.0}), ("apart", {name: 0.0}))


def unused_share(at: float) -> Case:
    shares = tuning.UNUSED_SHARE, at * tuning.UNUSED_SHARE
    ways = ((f"{share:g}", {"UNUSED_SHARE": share, "DISTINCT_SHARE": 0.0}) for share in shares)
    return _sample("64 rows, one ends each step, 48 tokens", 48, 8, 1, *ways)


def _multiple(number: float, of: int) -> int:
    return max(1, round(number / of)) * of


MEASUREMENTS: dict[str, Callable[[float], Case]] = {
    case.__name__.upper(): case
    for case in (
        *(blocked_from_rows, block_rows, joined_up_to_weights, prefix_tokens_saved, prefix_longest_rest),
        *(
            plain_attention_scores,
            alone_from_tokens,
            alone_longest_prompt,
            logits_slice,
            kept_logprobs,
            cache_growth,
            summed_numbers,
            copied_tokens,
        ),
        *(distinct_share, unused_share),
    )
}
SIZES = {"BLOCK_ROWS", "LOGITS_SLICE", "CACHE_GROWTH", "UNUSED_SHARE"}  # at their value both ways would be the same


def table(names: Iterable[str], seconds: float, fewest: int = 3, clock: Clock = time.perf_counter) -> Iterator[str]:
    """Yield the lines of the table, each as soon as it is measured."""
    yield "| constant | value | at | way A | ms | MB | way B | ms | MB | faster |"
    yield "| --- " * 10 + "|"
    for name in names:
        for at in FACTORS:
            if at == 1 and name in SIZES:
                continue
            case = MEASUREMENTS[name](at)
            found = compare(case, seconds, fewest, clock=clock)
            ways = zip((case.a, case.b), found.ms, found.peak, strict=True)
            cells = [cell for way, ms, peak in ways for cell in (way[0], f"{ms:.3g}", f"{peak / 2**20:.1f}")]
            yield f"| {' | '.join([name, str(getattr(tuning, name)), case.size, *cells, found.winner])} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each line of the table")
    parser.add_argument("--processor", action="store_true", help="processor time of all threads, not wall time")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(MEASUREMENTS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; allowed: {', '.join(MEASUREMENTS)}")
    print(f"{torch.get_num_threads()} threads, {'processor' if given.processor else 'wall'} time", flush=True)
    clock = time.process_time if given.processor else time.perf_counter
    for line in table(given.names or MEASUREMENTS, given.seconds, clock=clock):
        print(line, flush=True)
