"""Which architectures of transformers are computed right, in which way, and why not in a faster one.

    python -m benchmarks.architectures                               # all, a line each; some minutes on one core
    python -m benchmarks.architectures --docs docs/models.md         # and the table of that page, by way and reason

Every causal language model that transformers knows is made small, with random weights: flat, as they are initialised,
and sharp, four times as large. Windows and chunks are shorter than the rows that are tried. The self-check of a run
chooses the ways (`runs.self_check`). Then other rows, which it has not seen, are computed in the ways it chose and
compared with the plain pass: `wrong` counts the models for which they differ.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from grpo_mlflow.errors import UserError
from grpo_mlflow.forward import trial, ways
from grpo_mlflow.generation.local import ways as sampling
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runs import self_check

_MOST, _VOCABULARY, _LARGEST = 96, 128, 3_000_000
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 24),
    **{"vocab_size": _VOCABULARY, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "rotary_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "n_group": 1, "topk_group": 1},
    **{"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8},
    **{"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "mamba_chunk_size": 8},
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_LATENT |= {"head_dim": None, "num_key_value_heads": 4}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
_LONGROPE |= {"original_max_position_embeddings": 32, "factor": 8.0}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
_HALF_ATTENTION = {"layer_types": ["conv", "full_attention"] * 2}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3", "glm4_moe_lite", "youtu"), _LATENT),
    "falcon_h1": {"mamba_d_head": 8},
    "falcon": {"head_dim": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 24},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 32},
    "lfm2": _HALF_ATTENTION,
    "lfm2_moe": _HALF_ATTENTION,
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "chunk_size": 8},
    "longrope": {"_of": "phi3", "original_max_position_embeddings": 32, "rope_parameters": _LONGROPE},
    "dynamic": {"_of": "llama", "max_position_embeddings": 32, "rope_parameters": _DYNAMIC},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid"] * 3},
}


@dataclass(frozen=True, slots=True)
class Row:
    """What was found for one architecture, of flat and of sharp weights where they differ."""

    name: str
    scoring: str
    sampling: str
    reason: str
    seconds: float
    right: bool


def names() -> list[str]:
    """Return the causal language models of transformers, and two that change with the length of the text."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *SPECIAL})


def build(name: str, sharp: bool) -> Any:
    """Return a small model; raise whatever transformers does where it cannot be made small like this."""
    special = dict(SPECIAL.get(name, {}))
    kind = CONFIG_MAPPING[special.pop("_of", name)]
    known = inspect.signature(kind.__init__).parameters
    sizes = {key: value for key, value in SIZES.items() if key in known or hasattr(kind, key)} | special
    config = kind(**{key: value for key, value in sizes.items() if value is not None})
    with torch.device("meta"):
        numbers = sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())
    if numbers > _LARGEST:
        raise ValueError(f"{numbers / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and sharp:
                parameter.mul_(4.0)
    return model


def examine(name: str, model: Any) -> Row:
    """Let the self-check choose, and compare what it chose on rows that it has not seen."""
    began = time.perf_counter()
    policy = Policy(model, None, torch.device("cpu"), torch.float32, (2,), 0, name=name)
    try:
        scoring, sampler = self_check.find(policy, _MOST)
    except UserError as error:
        found = str(error).partition(": ")[2].partition("; allowed")[0]
        return Row(name, "refused", "refused", found, time.perf_counter() - began, right=True)
    seconds = time.perf_counter() - began
    others = unseen(model)
    right = ways.is_right(model, scoring, others) and sampling.is_right(policy, sampler, others)
    reasons = dict.fromkeys(reason for reason in (scoring.reason, sampler.reason) if reason)
    way = f"{scoring.way}, written out" if scoring.written_out else scoring.way
    return Row(name, way, sampler.way, "; sampling: ".join(reasons), seconds, right)


def unseen(model: Any) -> list[trial.Trial]:
    """Return what the plain pass gives for other rows than the self-check's."""
    return ways.trials(model, [trial.few(_VOCABULARY, seed=11), trial.long(_VOCABULARY, 50, 30, seed=12)])


def survey(chosen: list[str]) -> Iterator[tuple[Row | None, str]]:
    """Yield what was found for each architecture, or why it was not made."""
    for name in chosen:
        try:
            models = [build(name, sharp) for sharp in (False, True)]
            models[0](input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
        except Exception as error:  # a model that is no text model, or wants other sizes
            yield None, f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
            continue
        flat, sharp = (examine(name, model) for model in models)
        same = (flat.scoring, flat.sampling) == (sharp.scoring, sharp.sampling)
        row = Row(
            name,
            flat.scoring if same else f"{flat.scoring} (flat), {sharp.scoring}",
            flat.sampling if same else f"{flat.sampling} (flat), {sharp.sampling}",
            sharp.reason,
            max(flat.seconds, sharp.seconds),
            flat.right and sharp.right,
        )
        yield row, f"| `{row.name}` | {row.scoring} | {row.sampling} | {row.reason} | {row.seconds:.1f} |"


def grouped(rows: list[Row]) -> list[str]:
    """Return a table with a line for each way and reason."""
    lines = ["| log-probabilities | sampling | why not faster | seconds | architectures |", "| --- " * 5 + "|"]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.scoring, row.sampling)):
        reason = re.sub(r"[0-9.]+e\+[0-9]+ times", "N times", row.reason)  # depends on the weights
        reason = re.sub(r"^[0-9]+ of its [0-9]+ layers", "N of its layers", reason)
        reason = re.sub(r"window of [0-9]+", "window of N", reason)
        groups.setdefault((row.scoring, row.sampling, reason), []).append(row)
    for (scoring, sampled, reason), found in groups.items():
        seconds = sorted(row.seconds for row in found)
        span = f"{seconds[0]:.1f}" if len(found) == 1 else f"{seconds[0]:.1f} to {seconds[-1]:.1f}"
        names_of = ", ".join(row.name for row in found)
        lines.append(f"| {scoring} | {sampled} | {reason} | {span} | {names_of} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types; default: all")
    parser.add_argument("--docs", type=Path, help="a page whose table is to be written anew")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    rows: list[Row] = []
    left_out: list[str] = []
    print("| architecture | log-probabilities | sampling | why not faster | seconds |\n" + "| --- " * 5 + "|")
    for row, line in survey(arguments.names or names()):
        if row is None:
            left_out.append(line)
        else:
            rows.append(row)
            print(line, flush=True)
    wrong = [row.name for row in rows if not row.right]
    print(f"\n{len(rows)} architectures, wrong: {', '.join(wrong) or 'none'}; not made small: {len(left_out)}")
    print("\n".join(left_out))
    if arguments.docs:
        text = arguments.docs.read_text()
        start = text.index("| log-probabilities | sampling |")
        arguments.docs.write_text(text[:start] + "\n".join(grouped(rows)) + "\n")


if __name__ == "__main__":
    main()
