"""SGLang's native server: `/generate` for completions and scores, `/update_weights_from_disk` for weights.

Read in SGLang 0.5.23: `n` copies of a request share one sampling seed, so with deterministic inference all K
completions would be the same; K requests in one call, each with its own seed, are asked for instead. Seeds act only
with `--enable-deterministic-inference`. Log-probabilities know the temperature, not top-k, top-p and penalties. A
prompt with a token outside the vocabulary hangs the server. Its OpenAI endpoint cannot score a prompt. An update of
weights flushes the prefix cache, and answers 400 if requests that still run kept it from doing so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_mlflow.generation.client import Client, Fault, Refusal
from grpo_mlflow.generation.engine import NO_SCORES, Ask, Draw, Incapable, draw_of


class SGLang:
    """Speaks to one SGLang server."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def connect(self) -> str:
        return str((await self.client.get("/model_info"))["model_path"])

    async def complete(self, ask: Ask) -> list[Draw]:
        shared = {
            "max_new_tokens": ask.sampling.max_new_tokens,
            "temperature": ask.sampling.temperature,
            "top_p": ask.sampling.top_p,
            "top_k": ask.sampling.top_k if ask.sampling.top_k > 0 else -1,
            "repetition_penalty": ask.sampling.repetition_penalty,
            "stop_token_ids": list(ask.stop_ids),
            "skip_special_tokens": False,
        }
        answers = await self._generate(
            input_ids=[list(ask.token_ids)] * ask.k,
            sampling_params=[{**shared, "sampling_seed": ask.seed + j} for j in range(ask.k)],
        )
        draws = []
        for answer in answers:
            meta = answer.get("meta_info") or {}
            triples = meta.get("output_token_logprobs")
            draws.append(
                draw_of(
                    answer.get("output_ids"),
                    None if triples is None else [triple[0] for triple in triples],
                    (meta.get("finish_reason") or {}).get("type"),
                    ask,
                )
            )
        return draws

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        answer = await self._generate(
            input_ids=[list(token_ids)],
            sampling_params=[{"max_new_tokens": 1, "temperature": 1.0}],
            logprob_start_len=0,
        )
        triples = answer[0]["meta_info"].get("input_token_logprobs")
        if triples is None:
            raise Incapable(NO_SCORES)
        return [float(triple[0]) for triple in triples[1:]]

    async def load(self, folder: Path, label: str) -> None:
        body = {"model_path": str(folder), "weight_version": label, "flush_cache": True}
        try:
            await self.client.post("/pause_generation", {"mode": "abort"})
            answer = await self.client.post("/update_weights_from_disk", body)
        except Refusal as refusal:
            if "not flushed" in str(refusal):
                raise Fault(str(refusal)) from refusal
            message = f"it cannot load the weights ({refusal}); it must see the folder generation.sync_dir"
            raise Refusal(message) from None
        finally:
            await self.client.post("/continue_generation", {})
        if not answer["success"]:
            raise Fault(f"/update_weights_from_disk: {answer['message']}")

    async def label(self) -> str | None:
        return str((await self.client.get("/model_info"))["weight_version"])

    async def tokenize(self, text: str) -> list[int]:
        answer = await self.client.post("/tokenize", {"prompt": text, "add_special_tokens": False})
        return [int(i) for i in answer["tokens"]]

    async def _generate(self, **body: Any) -> list[dict[str, Any]]:
        answer = await self.client.post("/generate", {**body, "return_logprob": True})
        if not isinstance(answer, list) or not answer:
            raise Fault("/generate answers without completions")
        return answer
