"""Every way in which a run will compute its model proves itself on the loaded weights, before the run is opened.

The trials are those of `forward.ways` and `generation.local.ways`: a few tokens, in float32 and in the run's own type;
a longer row where that is cheap; and rows across each length at which the config says that the model changes its ways
(a window, a chunk, angles that are stretched), as far as the run's rows reach. The next such length is the limit of
what was proven, and the policy says so. What was found is kept in the cache folder for the same model, code and
lengths.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from grpo_mlflow.errors import ModelError, UserError, one_line
from grpo_mlflow.forward import attention, layers, llama_pass, trial, ways
from grpo_mlflow.generation.local import ways as sampling
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.files import cache_root, write_whole

_CHEAP = 5_000_000_000  # weights times tokens: less than a second
_DIFFERENTIATED = 4 * _CHEAP  # a row up to this is compared with its gradients, too; beyond, they take much memory
_LONGEST = 256  # tokens of a row that is tried for its length alone
_NEW = 24  # of them in the completion
# Settings with a length beyond which a model computes something else; other chunks only split a sum.
_NAMED = re.compile(
    r"window(?!_layers|_pattern)|att\w*chunk|chunk_length|block_size|index_topk|local_attention|floor_scale"
)
_SPLIT = re.compile("chunk_size")
_STRETCHED = ("longrope", "dynamic", "'su'", "llama_4_scaling")  # angles or scores that go by the length of a text
_KERNELS = (
    "bitsandbytes",
    "flash-attn",
    "causal-conv1d",
    "mamba-ssm",
    "flash-linear-attention",
    "kernels",
    "xformers",
    "peft",
)


def prove(policy: Policy, most: int) -> tuple[Policy, float]:
    """Find out how to compute rows of at most `most` tokens.

    Returns:
        The policy with the length up to which that holds, and the seconds that it took.

    Raises:
        ModelError: there is no right way, at all or beyond some length.
        UserError: memory is too short to try.
    """
    began = time.perf_counter()
    proven = replace(policy, longest=_next_switch(policy, most))
    kept = cache_root() / "ways" / f"{_key(policy, most)}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):  # none, or none that this version understands
        found = json.loads(kept.read_text())
        ways.know(policy.model, ways.Scoring(**found["scoring"]))
        sampling.know(policy, sampling.Sampler(**found["sampling"]))
        return proven, time.perf_counter() - began
    scoring, sampler = find(policy, most)
    ways.know(policy.model, scoring)
    sampling.know(policy, sampler)
    with suppress(OSError):  # a cache that only others may write to
        write_whole(kept, json.dumps({"scoring": asdict(scoring), "sampling": asdict(sampler)}))
    return proven, time.perf_counter() - began


def find(policy: Policy, most: int) -> tuple[ways.Scoring, sampling.Sampler]:
    """Try all ways anew, and return those that are right; see `prove`."""
    model, vocabulary = policy.model, policy.vocabulary
    try:
        tried = ways.trials(model, [trial.few(vocabulary)])
        for prompt, new in _lengths(policy, most):
            tried += _beyond(policy, trial.long(vocabulary, prompt, new), most)
        if policy.dtype != torch.float32:
            tried += [_in_own_type(policy, each) for each in tried]
        return ways.decide(model, tried, written_out=policy.written_out), sampling.decide(policy, tried)
    except ways.Unfit as error:
        raise ModelError(f"model {policy.name!r}: {error}; allowed: another model") from error
    except UserError:
        raise
    except Exception as error:  # a model may fail in any way of its own, and memory may be short
        raise UserError(
            f"model {policy.name!r}: its forward pass fails on a few rows of up to {most} tokens: "
            f"{type(error).__name__}: {one_line(error)}; allowed: a model that this machine has the memory and the "
            "kernels for"
        ) from error


def _in_own_type(policy: Policy, exact: trial.Trial) -> trial.Trial:
    """Return a trial in the run's own type; raise Unfit where that holds no numbers of this size."""
    found = trial.in_type(policy.model, exact, policy.dtype)
    if found.noise == float("inf"):
        kind = str(policy.dtype).removeprefix("torch.")
        raise ways.Unfit(f"with model.dtype = {kind} its log-probabilities are not finite")
    return found


def _beyond(policy: Policy, examples: trial.Examples, most: int) -> list[trial.Trial]:
    """Compute long rows plainly; raise ModelError where tokens feel those that follow only in long rows."""
    tokens = sum(map(len, examples.rows))
    try:
        return ways.trials(policy.model, [examples], differentiated=_size(policy) * tokens <= _DIFFERENTIATED)
    except ways.Unfit as error:
        room = len(examples.prompts[0])
        raise ModelError(
            f"model {policy.name!r}: {error}, as angles do that are stretched beyond a length: no log-probability of a "
            f"token is right there; allowed: prompts and completions of about {room} tokens together, here they have "
            f"up to {most} (generation.max_new_tokens)"
        ) from error


def _lengths(policy: Policy, most: int) -> Iterator[tuple[int, int]]:
    """Yield the lengths of a prompt and its completion that show what a few tokens do not."""
    cheap = min(most, _LONGEST, _CHEAP // max(1, _size(policy)))
    if cheap > 2 * _NEW:
        yield cheap - _NEW, _NEW
    for switch in _switches_of(policy, _NAMED, _SPLIT):
        if switch < most:  # a row that crosses it
            prompt = max(2, switch - _NEW // 3)
            yield prompt, min(_NEW, most - prompt)


def _size(policy: Policy) -> int:
    return sum(layers.numbers(parameter) for parameter in policy.model.parameters())


def _next_switch(policy: Policy, most: int) -> int | None:
    """Return up to how many tokens a model computes as it does for rows of `most`; None: its config says no end."""
    return min((switch for switch in _switches_of(policy, _NAMED) if switch >= most), default=None)


def _switches_of(policy: Policy, *names: re.Pattern[str]) -> list[int]:
    """Return the lengths, ascending, at which the config says that the model changes what it computes."""
    config = policy.model.config.get_text_config().to_dict()
    if any(kind in str(config) for kind in _STRETCHED):
        names = (*names, re.compile("original_max_position_embeddings"))
    if "dynamic" in str(config.get("rope_parameters") or config.get("rope_scaling")):
        names = (*names, re.compile("max_position_embeddings"))
    return sorted({length for length in _lengths_in(config, names) if length > 2})


def _lengths_in(config: Mapping[str, Any], names: Sequence[re.Pattern[str]]) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _lengths_in(value, names)
        elif any(name.search(str(key)) for name in names):
            listed = value if isinstance(value, list | tuple) else [value]  # one for each layer
            yield from (each for each in listed if type(each) is int)


def _key(policy: Policy, most: int) -> str:
    """Return a hash of all that the outcome depends on."""
    config = {**policy.model.config.to_dict(), "_name_or_path": ""}
    kind = policy.model.config._attn_implementation
    parts = [
        json.dumps(config, sort_keys=True, default=str),
        "sdpa" if kind == attention.NAME else kind,  # as it was before the model was first packed
        *_versions(),
        _code(),
        _source(type(policy.model)),
        f"{_processor(policy.device)} {policy.dtype} {policy.written_out}",
        f"{most} {policy.vocabulary} {policy.has_adapter} {policy.pad_id} {llama_pass.serves(policy.model)}",
        f"{type(policy.model.get_output_embeddings()).__name__}",  # one in float32 computes something else
        *(f"{name} {tuple(each.shape)} {each.dtype} {_few(each)}" for name, each in _tensors(policy.model)),
    ]
    return _digest("\n".join(parts).encode())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _of_files(files: Iterable[Path]) -> str:
    return _digest(b"".join(file.read_bytes() for file in sorted(files)))


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def _few(tensor: torch.Tensor) -> str:
    """Return a few numbers that tell one model's weights from another's."""
    flat = tensor.reshape(-1)
    norm = float(torch.linalg.vector_norm(flat)) if flat.is_floating_point() else 0.0
    return f"{flat[:: max(1, len(flat) // 4)][:4].tolist()} {norm:.4g}"  # its last digits go by the number of threads


def _versions() -> Iterator[str]:
    """Yield the versions of the packages whose kernels a model may be computed with."""
    for name in ("torch", "transformers", *_KERNELS):
        with suppress(PackageNotFoundError):
            yield f"{name} {version(name)}"


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def _source(kind: type) -> str:
    """Return a hash of the files that a model's class came with: they have no version."""
    if kind.__module__.startswith("transformers."):
        return ""
    return _of_files(Path(inspect.getfile(kind)).parent.glob("*.py"))


@cache
def _code() -> str:
    """Return a hash of the code that computes models, and of this."""
    root = Path(__file__).parent.parent
    return _of_files([*root.glob("forward/*.py"), *root.glob("generation/local/*.py"), Path(__file__)])
