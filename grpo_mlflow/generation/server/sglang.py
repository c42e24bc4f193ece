"""SGLang's native server: `/generate` for completions and scores, `/update_weights_from_disk` for weights.

Read in SGLang 0.5.23: `n` copies of a request share one sampling seed, so with deterministic inference all K
completions would be the same; K requests in one call, each with its own seed, are asked for instead. Seeds act only
with `--enable-deterministic-inference`. Log-probabilities know the temperature and penalties, not top-k and top-p.
The repetition penalty falls on the last token of the prompt and on the generated ones but the newest (it is scheduled
ahead of the sampled token), so no other engine can price it. A prompt with a token outside the vocabulary hangs the
server. Its OpenAI endpoint cannot score a prompt. An update of weights flushes the prefix cache, and answers 400 if
requests that still run kept it from doing so.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from grpo_mlflow.generation.server.engine import (
    NO_SCORES,
    Ask,
    Command,
    Draw,
    Incapable,
    Remedies,
    Start,
    adapter_label,
    draw_of,
)
from grpo_mlflow.runtime.http.client import Client, Fault, Refusal, Unfit

_LORA = (
    "it needs --enable-lora, --lora-target-modules all and a --max-lora-rank of model.lora.rank or more, and must see "
    "the folder generation.sync_dir"
)


class SGLang:
    """Speaks to one SGLang server."""

    remedies = Remedies(
        install="for a GPU `python3 -m venv .venv-sglang && .venv-sglang/bin/pip install sglang` makes an SGLang "
        "environment",
        context="--context-length",
        seeds="without --enable-deterministic-inference SGLang ignores seeds",
    )

    @staticmethod
    def command(start: Start) -> Command:
        """See `EngineClass.command`."""
        words = ["-m", "sglang.launch_server", "--model-path", start.model, "--host", start.host]
        words += ["--port", str(start.port), "--dtype", start.dtype, "--enable-deterministic-inference"]
        if start.trust_remote_code:
            words.append("--trust-remote-code")
        if start.on_cpu:
            words += ["--device", "cpu"]
        if start.memory is not None:
            words += ["--mem-fraction-static", f"{start.memory:g}"]
        if start.lora_rank:
            words += ["--enable-lora", "--max-lora-rank", str(start.lora_rank), "--lora-target-modules", "all"]
        return Command(words, {})

    def __init__(self, client: Client) -> None:
        self.client = client
        self._adapter: str | None = None

    async def connect(self) -> str:
        served = str((await self.client.get("/model_info"))["model_path"])
        await self.client.post("/continue_generation", {})  # a trainer that was killed in `load` has left it paused
        return served

    async def require_loads(self, tied: bool) -> None:
        """Return at once: every server loads weights."""

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
            if meta.get("prompt_tokens") not in (None, len(ask.token_ids)):  # it says no more of the prompt
                raise Fault("completions of another prompt than the one asked for")
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

    async def load_adapter(self, folder: Path, label: str) -> None:
        """See `Engine.load_adapter`. A name of its own for each version, since SGLang replaces no loaded adapter."""
        body = {"lora_name": label, "lora_path": str(folder)}
        try:
            await self.client.post("/load_lora_adapter", body)
        except Refusal as refusal:
            if "already" not in str(refusal):  # it is: the answer was lost
                raise Unfit(f"it does not take the adapter ({refusal}): {_LORA}", "generation.sync=reload") from refusal
        before, self._adapter = self._adapter, label
        if before not in (None, label):
            with suppress(Refusal):  # a server that was restarted has forgotten it
                await self.client.post("/unload_lora_adapter", {"lora_name": before})

    async def label(self) -> str | None:
        if self._adapter is not None:
            return await adapter_label(self.client, self._adapter)
        return str((await self.client.get("/model_info"))["weight_version"])

    async def sums(self, seed: int) -> None:
        """Return None: it has no request for it."""

    async def adapter_sums(self) -> None:
        """Return None: it has no request for it."""

    async def tokenize(self, text: str) -> list[int]:
        answer = await self.client.post("/tokenize", {"prompt": text, "add_special_tokens": False})
        return [int(i) for i in answer["tokens"]]

    async def _generate(self, **body: Any) -> list[dict[str, Any]]:
        chosen = {} if self._adapter is None else {"lora_path": self._adapter}
        try:
            answer = await self.client.post("/generate", {**body, **chosen, "return_logprob": True})
        except Refusal as refusal:
            if self._adapter is not None and self._adapter in str(refusal):  # lost by a restart: to be loaded again
                raise Fault(str(refusal)) from refusal
            raise
        if not isinstance(answer, list) or not answer:
            raise Incapable("/generate answers without completions")
        return answer
