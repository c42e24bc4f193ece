"""The kinds of inference servers, by their names in `generation.backend`: a further one is a line here and its module.

The settings' allowed values come from this table, so importing it stays fast: no torch, and nothing of `generation`.
"""

from __future__ import annotations

from dataclasses import dataclass

_PACKAGE = "grpo_mlflow.generation.server"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a configuration has to know of a kind of server.

    `title` is its name for people, `engine` the class that speaks to it, as `module:class`, `python` the interpreter of
    the environment that the docs install it into. `shaped_logprobs` says whether its log-probabilities take top-k and
    top-p into account, `penalises_as_here` whether its repetition penalty falls on the tokens that the trainer's does:
    all of the prompt and the completion so far.
    """

    title: str
    engine: str
    python: str
    shaped_logprobs: bool
    penalises_as_here: bool


SERVERS = {
    "vllm_server": Kind(
        "vLLM", f"{_PACKAGE}.vllm:VLLM", ".venv-vllm/bin/python", shaped_logprobs=True, penalises_as_here=True
    ),
    "sglang_server": Kind(
        "SGLang", f"{_PACKAGE}.sglang:SGLang", ".venv-sglang/bin/python", shaped_logprobs=False, penalises_as_here=False
    ),
}
