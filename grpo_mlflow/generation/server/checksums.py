"""The weights that a server computes with, compared tensor by tensor with those that it was sent.

Exact in every number format: the sent weights are rounded to the server's, and sums of bits are compared. That tells a
layer that kept its old weights even where one step moves log-probabilities by less than rounding does.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from grpo_mlflow.model import sharding
from grpo_mlflow.serverside.grpo_vllm_worker import checksum

_OUTER = ("model.", "transformer.", "language_model.")  # what models are wrapped in, here and there
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TensorSum:
    """A `checksum` of a server's tensor: number format, and the columns `first`, `first` + `step`, ... it covers."""

    total: int
    dtype: str
    first: int
    step: int


@dataclass(frozen=True, slots=True)
class WeightSums:
    """What a server computes with.

    `tensors` by name; `parts`: the layers that are fused there, with the names of those that they were fused of;
    `dtype`: the number format that weights are rounded to when they are loaded.
    """

    tensors: Mapping[str, TensorSum]
    parts: Mapping[str, Sequence[str]]
    dtype: str


class Comparison:
    """Compares one server's sums with folders of weights. What cannot be compared is said once, and left out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._strange: set[str] | None = None  # kinds of tensors that this server keeps in another layout
        self._said = False

    @property
    def is_complete(self) -> bool:
        """Whether no kind of tensor was left out so far."""
        return not self._strange

    def wrong(self, folder: Path, sums: WeightSums) -> list[str] | None:
        """Return the names of the server's tensors that are not those of a model folder; None: they do not compare."""
        sent = _Folder(folder, self._device)
        with sent:
            return self._strangers_left_out(self._compare(sent, sums))

    def wrong_base(self, model: Any, sums: WeightSums) -> list[str] | None:
        """As `wrong`, for the base of a model with an adapter; not compared while other processes keep their shards."""
        try:
            return self._strangers_left_out(self._compare(_Base(model), sums))
        except sharding.NotLeading:
            return None

    def wrong_adapter(self, folder: Path, sums: WeightSums) -> list[str] | None:
        """As `wrong`, for an adapter's folder. An adapter has one layout only, so that nothing is left out."""
        config = json.loads((folder / "adapter_config.json").read_text())
        if config.get("rank_pattern") or config.get("alpha_pattern"):
            self._say("the layers of its adapter are scaled differently")
            return None
        rank = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
        found = self._compare(_Adapter(folder, config["lora_alpha"] / rank), sums)
        return None if found is None else [name for name, right in found.items() if not right]

    def _compare(self, sent: _Sent, sums: WeightSums) -> dict[str, bool] | None:
        """Return for each of the server's tensors whether it is what was sent."""
        right = {}
        for name, found in sums.tensors.items():
            parts = sent.parts_of(name, sums.parts)
            if parts is None:
                self._say(f"{name} is called otherwise here")
                return None
            right[name] = sum(sent.total(part, found, sums.dtype) for part in parts) % 2**64 == found.total
        if sent.left:
            self._say(f"it has no {min(sent.left)}")
            return None
        return right

    def _strangers_left_out(self, right: Mapping[str, bool] | None) -> list[str] | None:
        if right is None:
            return None
        if self._strange is None:
            kinds = dict[str, list[bool]]()
            for name, is_right in right.items():
                kinds.setdefault(_kind(name), []).append(is_right)
            self._learn(kinds)
        return [name for name, is_right in right.items() if not is_right and _kind(name) not in (self._strange or ())]

    def _learn(self, kinds: Mapping[str, Sequence[bool]]) -> None:
        """Leave out what differs in all layers alike while the rest is right: another layout, not old weights."""
        strange = {kind for kind, right in kinds.items() if len(right) > 1 and not any(right)}
        self._strange = strange if any(any(right) for right in kinds.values()) else set()
        if self._strange:
            log.warning("the server keeps %s in a layout of its own: not compared", ", ".join(sorted(self._strange)))

    def _say(self, why: str) -> None:
        if not self._said:
            self._said = True
            log.warning("the server's tensors cannot be compared with the trainer's (%s): its scores are", why)


class _Sent(Protocol):
    """Tensors that a server was sent; `left` were not asked for yet."""

    left: set[str]

    def parts_of(self, name: str, fused: Mapping[str, Sequence[str]]) -> list[str] | None:
        """Return the tensors here that a server's tensor is made of; None: there are none, though there should be."""
        ...

    def total(self, part: str, like: TensorSum, dtype: str) -> int:
        """Return the `checksum` of one, as far as `like` covers it, rounded to `dtype` before."""
        ...


class _Named:
    """Tensors by names without what models are wrapped in."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {_bare(name): name for name in names}
        self.left = set(self._names)

    def parts_of(self, name: str, fused: Mapping[str, Sequence[str]]) -> list[str] | None:
        found = [_bare(name)]
        if found[0] not in self._names:
            words = found[0].split(".")
            layer = words[-2] if len(words) > 1 else ""
            found = [".".join([*words[:-2], part, words[-1]]) for part in fused.get(layer, ())]
        self.left -= set(found)
        return found if found and all(part in self._names for part in found) else None


class _Folder(_Named):
    """The tensors of a model folder."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device

    def __enter__(self) -> None:
        files: list[Any] = [safe_open(path, framework="pt") for path in sorted(self._folder.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        super().__init__(self._files)
        config = json.loads((self._folder / "config.json").read_text())
        if config.get("tie_word_embeddings") and "lm_head.weight" not in self._names:
            outer = next((name for name in self._names if name.endswith(("embed_tokens.weight", "wte.weight"))), None)
            if outer is not None:
                self._names["lm_head.weight"] = self._names[outer]

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def total(self, part: str, like: TensorSum, dtype: str) -> int:
        name = self._names[part]
        return _total(self._files[name].get_tensor(name).to(self._device), like, dtype)


class _Base(_Named):
    """The weights of a model in memory but for its adapter."""

    def __init__(self, model: Any) -> None:
        held = dict(model.named_parameters(remove_duplicate=False)).items()
        self._model = model
        self._weights = {name.replace(".base_layer.", "."): weight for name, weight in held if ".lora_" not in name}
        super().__init__(self._weights)
        if model.config.tie_word_embeddings:
            self.left.discard("lm_head.weight")

    def total(self, part: str, like: TensorSum, dtype: str) -> int:
        return _total(sharding.gathered(self._model, self._weights[self._names[part]]), like, dtype)


class _Adapter:
    """The tensors of an adapter's folder, as a server computes with them: B times the scaling, nothing elsewhere."""

    def __init__(self, folder: Path, scaling: float) -> None:
        self._scaling = scaling
        weights = load_file(folder / "adapter_model.safetensors")
        self._weights = {_bare(name.removeprefix("base_model.model.")): weight for name, weight in weights.items()}
        self.left = set(self._weights)

    def parts_of(self, name: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
        self.left.discard(_bare(name))
        return [_bare(name)] if _bare(name) in self._weights else []

    def total(self, part: str, like: TensorSum, dtype: str) -> int:
        weight = self._weights[part].to(getattr(torch, dtype))
        return _total(weight * self._scaling if ".lora_B." in part else weight, like, dtype)


def _total(weight: Tensor, like: TensorSum, dtype: str) -> int:
    chosen = weight if weight.ndim < 2 else weight.reshape(len(weight), -1)[:, like.first :: like.step]
    return checksum(chosen.to(getattr(torch, dtype)).to(getattr(torch, like.dtype)), like.first, like.step)


def digest(folder: Path, dtype: torch.dtype) -> int:
    """Return a sum over all weights in a folder, rounded to `dtype`: equal for weights that a server cannot tell."""
    total = 0
    for weight in _tensors(folder):
        total = (31 * total + checksum(weight.to(dtype))) % 2**64
    return total


def _tensors(folder: Path) -> Iterator[Tensor]:
    for path in sorted(folder.glob("*.safetensors")):
        file: Any = safe_open(path, framework="pt")
        for name in sorted(file.keys()):
            yield file.get_tensor(name)


def _bare(name: str) -> str:
    while outer := next((each for each in _OUTER if name.startswith(each)), None):
        name = name.removeprefix(outer)
    return name


def _kind(name: str) -> str:
    """Return a name without the number of the layer."""
    return re.sub(r"\.\d+\.", ".*.", name)
