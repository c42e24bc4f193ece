"""Which way of computing log-probabilities is right for a model: found out by trial, the fastest first.

    packed   prompts once, all rows in one without padding (`shared_prefix`); written out where `llama_pass` serves
    padded   rows padded on the right (`padded`)
    alike    rows of the same length together, so that none is padded

A model may fail at any of them in any way of its own, so nothing is believed from its name: each way is compared with
the plain pass (`trial`), and what differs is not used. A model that no way serves cannot be trained here (`Unfit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grpo_mlflow.forward import llama_pass, shared_prefix, trial, tuning
from grpo_mlflow.forward.attention import Packed, allow_packing, packed_forward
from grpo_mlflow.forward.padded import completion_logprobs
from grpo_mlflow.forward.trial import Examples, Trial

Way = Literal["packed", "padded", "alike"]
_SAME = 1e-5  # relative: scaled logits are the output layer's, up to rounding


class Unfit(Exception):
    """A model whose log-probabilities cannot be computed here; says why."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """A right way.

    `written_out`: `llama_pass` gives the same, where it serves. `scale`: the model's logits over what its output layer
    gives. `cap`: what the model caps them at, softly; None: it does not. `reason`: why prompts are not computed once;
    None where they are.
    """

    way: Way
    written_out: bool = False
    scale: float = 1.0
    cap: float | None = None
    reason: str | None = None


_KNOWN: WeakKeyDictionary[Any, Scoring] = WeakKeyDictionary()


def scoring(model: Any) -> Scoring:
    """Return a right way for a model, found out once with a few tokens unless `know` has said it.

    Raises:
        Unfit: there is none.
    """
    if model not in _KNOWN:
        _KNOWN[model] = decide(model, trials(model, [trial.few(vocabulary_of(model))]))
    return _KNOWN[model]


def know(model: Any, found: Scoring) -> None:
    """Let `scoring` return this from now on; raise NotImplementedError where the model cannot be packed after all."""
    if found.way == "packed":
        require_packing(model)
    _KNOWN[model] = found


def vocabulary_of(model: Any) -> int:
    """Return how many tokens the model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])


def trials(model: Any, examples: Sequence[Examples], *, differentiated: bool = True) -> list[Trial]:
    """Compute the examples plainly, see `trial.take`.

    Raises:
        Unfit: tokens feel those that follow, so there is nothing to be right.
    """
    found = [trial.take(model, each, differentiated=differentiated) for each in examples]
    for each in found:
        if trial.looks_ahead(model, each):
            longest = max(map(len, each.examples.rows))
            raise Unfit(f"in texts of {longest} tokens, what follows a token changes what was predicted before it")
    return found


def decide(model: Any, tried: Sequence[Trial], *, written_out: bool = True) -> Scoring:
    """Return the fastest way that all trials find right; `written_out`: whether `llama_pass` may be it.

    Raises:
        Unfit: there is none.
    """
    reason = None
    try:
        packed = _prepare(model)
        written = replace(packed, written_out=True)
        may = written_out and llama_pass.serves(model) and llama_pass.is_exact(model)
        # Attention is the same in both, so each of its kernels is tried in one of them; where the model's modules are
        # used, their gradients are left to transformers.
        if may and _against_short(model, tried, written) is None and _against_long(model, tried, packed) is None:
            return written
        if _against_packed(model, tried, packed) is None:
            return packed
        reason = against_packing(model, tried)
    except Exception as error:  # a model may fail at this in any way of its own
        reason = said(error)
    for way, compute in _OF_ROWS.items():
        wrong = _wrong(model, tried, lambda each: compute(model, each))  # noqa: B023 - called at once
        if wrong is None:
            return Scoring(way, reason=reason)
    raise Unfit(f"no way to compute its log-probabilities gives what it gives for a single row: {wrong}")


def is_right(model: Any, found: Scoring, tried: Sequence[Trial]) -> bool:
    """Return whether all trials find a way right."""
    if found.way == "packed":
        wrong = _against_packed(model, tried, found)
    else:
        wrong = _wrong(model, tried, lambda each: _OF_ROWS[found.way](model, each))
    return wrong is None


def _against_packed(model: Any, tried: Sequence[Trial], packed: Scoring) -> str | None:
    """Return what is wrong with packed rows, None if nothing is."""
    return _against_short(model, tried, packed) or _against_long(model, tried, packed)


def _against_short(model: Any, tried: Sequence[Trial], packed: Scoring) -> str | None:
    return _wrong(model, tried, lambda each: _packed(model, each, packed))


def _against_long(model: Any, tried: Sequence[Trial], packed: Scoring) -> str | None:
    """Return what is wrong with log-probabilities of packed rows where they are computed as long ones are."""
    for values in (trial.LONG_ROWS, trial.LONG_COMPLETIONS):
        with tuning.set_to(values):
            wrong = _wrong(model, tried, lambda each: _packed(model, each, packed), differentiated=False)
        if wrong is not None:
            return wrong
    return None


def _wrong(
    model: Any, tried: Sequence[Trial], compute: Callable[[Examples], Sequence[Tensor]], *, differentiated: bool = True
) -> str | None:
    """Return what is wrong with a way, None if nothing is."""
    for each in tried:
        try:
            with each.computing(model):
                if differentiated and each.gradients:
                    found, gradients = trial.gradients(model, lambda: compute(each.examples))  # noqa: B023 - at once
                    wrong = each.against_chosen(found) or each.against_gradients(gradients)
                else:
                    with torch.no_grad():
                        wrong = each.against_chosen(compute(each.examples))
        except Exception as error:  # as above
            return said(error)
        if wrong:
            return wrong
    return None


def _packed(model: Any, examples: Examples, packed: Scoring) -> list[Tensor]:
    batch = shared_prefix.Prefixes(examples.prompts, examples.completions, examples.owners, model.device)
    chosen, _ = shared_prefix.logprobs(model, batch, 1.0 / packed.scale, written_out=packed.written_out, cap=packed.cap)
    return [row[: len(own)] for row, own in zip(chosen, examples.completions, strict=True)]


def _padded(model: Any, examples: Examples) -> list[Tensor]:
    return list(_of_rows(model, examples, range(len(examples.rows))))


def _alike(model: Any, examples: Examples) -> list[Tensor]:
    lengths = [len(row) for row in examples.rows]
    found: dict[int, Tensor] = {}
    for length in set(lengths):
        index = [row for row, own in enumerate(lengths) if own == length]
        found |= dict(zip(index, _of_rows(model, examples, index), strict=True))
    return [found[row] for row in range(len(lengths))]


def _of_rows(model: Any, examples: Examples, index: Sequence[int]) -> Iterator[Tensor]:
    rows, completions = ([part[i] for i in index] for part in (examples.rows, examples.completions))
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    starts = torch.tensor([len(row) - len(own) for row, own in zip(rows, completions, strict=True)], device=ids.device)
    chosen, _ = completion_logprobs(model, ids, starts, max(map(len, completions)), 1.0)
    return (row[: len(own)] for row, own in zip(chosen, completions, strict=True))


_OF_ROWS: dict[Way, Callable[[Any, Examples], list[Tensor]]] = {"padded": _padded, "alike": _alike}

# Why prompts are not computed once


def require_packing(model: Any) -> None:
    """Let the model be packed; raise NotImplementedError where its attention cannot be replaced."""
    if not allow_packing(model):
        kind = model.config._attn_implementation
        raise NotImplementedError("its attention " + ("cannot be replaced" if kind == "sdpa" else f"is {kind}"))


def _prepare(model: Any) -> Scoring:
    """Let the model be packed, and say how its logits follow from its output layer's.

    Raises:
        NotImplementedError: it cannot be packed.
    """
    require_packing(model)
    given, wanted = _logits(model, shared_prefix.output_layer(model))
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    # The cap first: as long as logits are small, a multiple of 1 seems right, too.
    for packed in (Scoring("packed", cap=cap), Scoring("packed", scale=_ratio(given, wanted))):
        logits = given * packed.scale
        if packed.cap is not None:
            logits = (logits / packed.cap).tanh() * packed.cap
        if float((logits - wanted).abs().max()) <= _SAME * float(wanted.abs().max()):
            return packed
    raise NotImplementedError(
        "its logits are neither those of its output layer nor a multiple, nor capped by its config"
    )


def _ratio(given: Tensor, wanted: Tensor) -> float:
    """Return what logits are to be multiplied with to be those wanted."""
    scale = float((given * wanted).sum() / (given * given).sum())
    return 1.0 if abs(scale - 1) < _SAME or not scale > 0 else scale


@torch.no_grad()
def _logits(model: Any, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return what the output layer gives for a row, and the model's logits; raise NotImplementedError if these are of
    other tokens."""
    given: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, output: given.append(output))
    try:
        with trial.exactly(model):
            logits = trial.plain(model, trial.few(vocabulary_of(model)).prompts[0])
    finally:
        hook.remove()
    own = given[0][0].float()
    if own.shape != logits.shape:
        raise NotImplementedError("its logits are not those of its output layer")
    return own, logits


class _Counting(Packed):
    """Notes the layers whose attention it is asked for."""

    def __init__(self, packed: Packed) -> None:
        self._packed, self.longest = packed, packed.longest
        self.layers: set[int] = set()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `Packed.attend`."""
        self.layers.add(layer)
        return self._packed.attend(layer, query, key, value, scaling)


@torch.no_grad()
def against_packing(model: Any, tried: Sequence[Trial]) -> str:
    """Return why packed rows are wrong: which of the model's layers do not leave attention to others."""
    examples = max((each.examples for each in tried), key=lambda each: max(map(len, each.rows)))
    batch = shared_prefix.Prefixes(examples.prompts, examples.completions, examples.owners, model.device)
    counting = _Counting(batch)
    try:
        require_packing(model)
        with trial.exactly(model):
            packed_forward(model, batch.ids, batch.positions, counting, 0)
    except Exception as error:  # as in `decide`
        return said(error)
    found = len(counting.layers)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", found)
    if not found:
        return "its layers look at other tokens in ways of their own"
    if found < layers:
        return f"{layers - found} of its {layers} layers look at other tokens by something else than attention"
    return "its attention depends on more than query, key and value"


def said(error: Exception) -> str:
    """Return an error in one line; raise it where memory is short, which says nothing about a way."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        raise error
    text = " ".join(str(error).split())
    return text if isinstance(error, NotImplementedError) and text else f"{type(error).__name__}: {text}"
