"""Which way serves which kind of model; of every way that the self-check chose, other rows prove that it is right."""

from __future__ import annotations

import pytest

from benchmarks import architectures
from grpo_mlflow.forward import ways

# the model type; how log-probabilities are computed; how it is sampled; a part of the reason
KINDS = {
    "llama": ("packed, written out", "packed", ""),
    "gpt2": ("packed", "packed", ""),
    "mixtral": ("padded", "cache", "its attention has a window of 24 tokens, and rows are longer"),
    "cohere": ("packed", "packed", ""),  # logits are a multiple of what the output layer gives
    "granite": ("packed", "packed", ""),
    "nanochat": ("packed", "packed", ""),
    "nemotron": ("padded", "cache", "in ways of their own"),
    "doge": ("padded", "cache", "depends on more than query, key and value"),  # right log-probs, wrong gradients
    "diffllama": ("packed", "cache", "depends on more than query, key and value"),
    "deepseek_v3": ("packed", "packed", ""),
    "bloom": ("padded", "cache", "its attention is eager"),
    "lfm2": ("padded", "cache", "2 of its 4 layers look at other tokens by something else than attention"),
    "granitemoehybrid": ("padded", "cache", "2 of its 4 layers"),
    "falcon_h1": ("padded", "cache", "depends on more than query, key and value"),
    "jamba": ("padded", "recomputed", "its own cache fails with padded or reordered rows: ValueError"),
    "mamba": ("padded", "recomputed", "its own cache fails with padded or reordered rows: its log-probabilities are"),
    "openai-gpt": ("padded", "recomputed", "its own cache fails with padded or reordered rows: it gives none"),
    "bert": ("refused", "refused", "what follows a token changes what was predicted before it"),
    "longrope": ("refused", "refused", "angles do that are stretched beyond a length"),
    "dynamic": ("refused", "refused", "angles do that are stretched beyond a length"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_chosen_is_right(name: str) -> None:
    scoring, sampling, reason = KINDS[name]
    row = architectures.examine(name, architectures.build(name, sharp=False))
    assert (row.scoring, row.sampling) == (scoring, sampling)
    assert reason in row.reason
    assert bool(reason) is bool(row.reason)
    assert row.right


def test_a_wrong_way_is_seen_to_be_wrong() -> None:
    """The comparison with rows that the self-check has not seen can fail."""
    model = architectures.build("lfm2", sharp=False)
    tried = architectures.unseen(model)
    assert ways.is_right(model, ways.Scoring("padded"), tried)
    assert not ways.is_right(model, ways.Scoring("packed"), tried)


def test_the_command_says_what_was_not_made() -> None:
    lines = [line for _, line in architectures.survey(["llama", "whisper"])]
    assert lines[0].startswith("| `llama` | packed, written out | packed |")
    assert lines[1].startswith("whisper: ")
