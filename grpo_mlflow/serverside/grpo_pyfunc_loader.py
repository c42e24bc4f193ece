"""Loads a checkpoint for MLflow, which finds this file in the folder `code/` of the checkpoint.

It imports torch and transformers only, so that a model can be loaded and served where nothing else is installed. All
that one model has and another has not comes from its MLmodel file, as `model_config`: Python imports this module once
for all the models of a process.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor

Messages = list[dict[str, Any]]
_BATCH = 16  # rows that are sampled together
_WANTED = (
    "a text, a list of texts, chat messages, or rows with the key `prompt` (a text) or `messages` (a list of "
    "{role, content})"
)


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Model:
    return Model(Path(path), model_config or {})


class Model:
    """Samples answers.

    Args:
        settings: `config` of the MLmodel file, with what `mlflow.pyfunc.load_model(model_config=...)` changes in it.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._settings, self._lock = settings, threading.Lock()
        device = settings.get("device", "auto")
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        code = bool(settings.get("trust_remote_code", False))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=code)
        self.tokenizer.padding_side = "left"  # else an answer would begin behind the padding of its prompt
        dtype = getattr(torch, settings.get("dtype", "float32"))
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=code)
        self.model.to(self._device).eval()
        self._ends = list(settings["end_token_ids"])
        self._pad = int(settings["pad_token_id"])
        # else the sampling that the model's authors recommend would act beside that of the run
        self.model.generation_config = GenerationConfig(eos_token_id=self._ends, pad_token_id=self._pad)

    def get_raw_model(self) -> Any:
        return self.model

    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Return one answer per row; the defaults of `params` stand in the signature.

        Raises:
            ValueError: a row is none of those that are allowed, or leaves no room for an answer.
        """
        rows = [self._encoded(messages) for messages in conversations(data, self._settings.get("system_prompt"))]
        chosen = dict(params or {})
        answers = [""] * len(rows)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))  # rows of like lengths need little padding
        with self._lock, torch.random.fork_rng(enabled=chosen.get("seed") is not None):  # threads share the draws
            if chosen.get("seed") is not None:
                torch.manual_seed(int(chosen["seed"]))
            for start in range(0, len(order), _BATCH):
                batch = order[start : start + _BATCH]
                for row, answer in zip(batch, self._sampled([rows[row] for row in batch], chosen), strict=True):
                    answers[row] = answer
        return answers

    def _encoded(self, messages: Messages) -> list[int]:
        """Return the token ids of a prompt as the run had them: by its chat template, else the texts alone."""
        if self.tokenizer.chat_template:
            settings = self._settings.get("chat_template_kwargs", {})
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, **settings
            )
        else:
            ids = self.tokenizer("\n\n".join(str(message["content"]) for message in messages)).input_ids
        return list(ids)

    @torch.inference_mode()
    def _sampled(self, rows: Sequence[Sequence[int]], params: Mapping[str, Any]) -> list[str]:
        width = max(map(len, rows))
        ids = torch.tensor([[self._pad] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        processors = [_Known(known)] if (known := self._settings.get("known_tokens")) is not None else []
        found = self.model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=self._generation(width, params),
            logits_processor=processors,
        )
        completions = [self._until_end(row[width:].tolist()) for row in found]
        texts: list[str] = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        return texts

    def _generation(self, width: int, params: Mapping[str, Any]) -> GenerationConfig:
        most = int(params.get("max_new_tokens", 256))
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and (most := min(most, positions - width)) < 1:
            raise ValueError(f"a prompt has {width} tokens, and the model {positions} positions: no room to answer")
        temperature = float(params.get("temperature", 1.0))
        drawn = {
            "temperature": temperature,
            "top_p": float(params.get("top_p", 1.0)),
            "top_k": max(0, int(params.get("top_k", 0))),
        }
        return GenerationConfig(
            max_new_tokens=most,
            do_sample=temperature > 0,
            repetition_penalty=float(params.get("repetition_penalty", 1.0)),
            eos_token_id=self._ends,
            pad_token_id=self._pad,
            **(drawn if temperature > 0 else {}),
        )

    def _until_end(self, ids: list[int]) -> list[int]:
        """Return the ids up to the first that ends a completion; padding comes after it."""
        end = next((place for place, token in enumerate(ids) if token in self._ends), len(ids))
        return ids[:end]


class _Known(LogitsProcessor):  # type: ignore[misc]
    """Excludes the rows of the output layer that stand for no token, as the run did."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self._count :] = -torch.inf
        return scores


def conversations(data: Any, system_prompt: str | None = None) -> list[Messages]:
    """Return the chat messages of each row of what `predict` is given.

    A text is what a user says; it stands after the run's system prompt, if that had one. Messages are taken as given.

    Raises:
        ValueError: a row is neither.
    """
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # a data frame of pandas
        data = data.to_dict("records")
    elif hasattr(data, "tolist"):
        data = data.tolist()
    if isinstance(data, Mapping):
        data = _rows_of(data)
    elif isinstance(data, str) or (isinstance(data, Sequence) and data and all(map(_is_message, data))):
        data = [data]
    if not isinstance(data, Sequence):
        raise ValueError(f"input of type {type(data).__name__}; allowed: {_WANTED}")
    return [_messages(row, system_prompt) for row in data]


def _rows_of(data: Mapping[str, Any]) -> list[Any]:
    """Return the rows of a mapping: one, or one per text of a list of prompts."""
    prompts: Any = data.get("prompt")
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    return list(prompts) if isinstance(prompts, (list, tuple)) else [data]


def _messages(row: Any, system_prompt: str | None) -> Messages:
    if isinstance(row, Mapping):
        named = [row[key] for key in ("messages", "prompt") if _given(row.get(key))]
        values = named or list(row.values())[: len(row) == 1]  # a column without a name, as of a plain list of texts
        row = values[0] if values else None
    row = row.tolist() if hasattr(row, "tolist") else row
    if isinstance(row, str):
        before = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        return [*before, {"role": "user", "content": row}]
    if isinstance(row, (list, tuple)) and row and all(map(_is_message, row)):
        return [dict(message) for message in row]
    raise ValueError(f"a row of type {type(row).__name__}; allowed: {_WANTED}")


def _given(value: Any) -> bool:
    """Return whether a cell of a table holds something: pandas writes NaN into those of rows without a value."""
    return value is not None and not isinstance(value, float)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value
