"""vLLM's OpenAI server: token ids in and out, weights loaded in place through its development endpoints.

Found by running vLLM 0.32: with one seed, completion j of n equals the single completion drawn with seed + j;
`processed_logprobs` are those of the distribution drawn from (temperature, penalty, top-k, top-p); HTTP 200 of a reload
proves nothing, which is why every load is followed by the canary.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from grpo_mlflow.generation.server.checksums import TensorSum, WeightSums
from grpo_mlflow.generation.server.engine import (
    NO_SCORES,
    SERVERSIDE,
    WITHOUT_LOADS,
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
    "it needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and a --max-lora-rank of model.lora.rank or more, and "
    "must see the folder generation.sync_dir"
)
_DEV_MODE = "it was started without its development endpoints (VLLM_SERVER_DEV_MODE=1), which load new weights"
_PACKED = (
    "it was started on a CPU without our worker extension (--worker-extension-cls): vLLM's own loader leaves the old "
    "output layer of a model with tied embeddings there"
)
_CPU_CACHE_GIB = 1.0
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
log = logging.getLogger(__name__)


class _Absent(Exception):
    """The server's worker lacks a method of our extension."""


class VLLM:
    """Speaks to one vLLM server."""

    remedies = Remedies(
        install="for a GPU `python3 -m venv .venv-vllm && .venv-vllm/bin/pip install vllm` makes a vLLM environment, "
        "for a CPU `make server`",
        context="--max-model-len",
        run="`make server` starts one on a CPU",
        variables={"--api-key": "VLLM_API_KEY", "--hf-token": "HF_TOKEN"},
        old_weights="vLLM on a CPU with tied embeddings, started without our worker extension (docs/servers.md)",
    )

    @staticmethod
    def command(start: Start) -> Command:
        """See `EngineClass.command`."""
        words = ["-m", "vllm.entrypoints.openai.api_server", "--model", start.model, "--served-model-name", "policy"]
        words += ["--host", start.host, "--port", str(start.port), "--dtype", start.dtype]
        words += ["--max-model-len", "auto"]  # else a model whose whole context exceeds the cache does not start
        words += ["--logprobs-mode", "processed_logprobs", "--worker-extension-cls", "grpo_vllm_worker.WeightLoader"]
        environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(SERVERSIDE)}
        flags = {"--trust-remote-code": start.trust_remote_code, "--enable-sleep-mode": start.sleeps}
        words += [flag for flag, is_on in flags.items() if is_on]
        if start.on_cpu:
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(start.memory or _CPU_CACHE_GIB))  # a fraction fails
            # Compiling costs a minute at each start. A prefill in chunks together with a seed ends vLLM's CPU engine.
            words += ["--enforce-eager", "--max-num-batched-tokens", "32768"]
        elif start.memory is not None:
            words += ["--gpu-memory-utilization", f"{start.memory:g}"]
        if start.lora_rank:
            environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
            enough = next((rank for rank in _RANKS if rank >= start.lora_rank), start.lora_rank)
            words += ["--enable-lora", "--max-lora-rank", str(enough)]
        return Command(words, environment)

    def __init__(self, client: Client) -> None:
        self.client, self._model = client, ""
        self._adapter: str | None = None
        self._salt: dict[str, str] = {}
        self._absent: set[str] = set()  # methods of our worker extension that the server's worker lacks
        self._said_why = self._packs = False  # it packs layers at start, as on a CPU

    async def connect(self) -> str:
        served = (await self.client.get("/v1/models"))["data"]
        base = [entry for entry in served if not entry.get("parent")]  # adapters have one
        if not base:
            raise Incapable("/v1/models lists no model")
        self._model = base[0]["id"]
        self._absent.clear()  # it may have been started again, with the extension
        self._packs = False
        await self._resume_if_paused()
        return f"{base[0].get('root') or self._model}"

    def request(self, ask: Ask) -> dict[str, Any]:
        """Return the body of the request to /v1/completions."""
        return {
            "model": self._adapter or self._model,
            "prompt": list(ask.token_ids),
            "n": ask.k,
            "max_tokens": ask.sampling.max_new_tokens,
            "temperature": ask.sampling.temperature,
            "top_p": ask.sampling.top_p,
            "top_k": ask.sampling.top_k if ask.sampling.top_k > 0 else -1,
            "min_p": 0.0,
            "repetition_penalty": ask.sampling.repetition_penalty,
            "seed": ask.seed,
            "stop_token_ids": list(ask.stop_ids),
            "skip_special_tokens": False,
            "return_token_ids": True,
            "logprobs": 0 if ask.logprobs else None,
            **self._salt,
        }

    async def complete(self, ask: Ask) -> list[Draw]:
        choices = sorted(await self._completions(self.request(ask)), key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(len(choices))):
            raise Fault("completions out of number")
        return [
            draw_of(
                choice.get("token_ids"),
                (choice.get("logprobs") or {}).get("token_logprobs"),
                choice.get("finish_reason"),
                ask,
                prompt=choice.get("prompt_token_ids"),
            )
            for choice in choices
        ]

    async def _resume_if_paused(self) -> None:
        """Undo the pause of a trainer that was killed while it loaded weights: nothing would be answered."""
        try:
            paused = (await self.client.get("/is_paused"))["is_paused"]
        except Refusal:  # no development endpoints, and so no pauses
            return
        if paused:
            await self.client.post("/resume")

    async def require_loads(self, tied: bool) -> None:
        """See `Engine.require_loads`."""
        try:
            await self.client.get("/is_paused")
        except Refusal as refusal:
            raise _without_development(refusal) from refusal
        if not tied:
            return
        with suppress(_Absent):
            await self._extension("grpo_load_weights", {"path": os.devnull})  # no model's folder: it says so
        if self._packs:
            raise Unfit(_PACKED, WITHOUT_LOADS)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        served = self._adapter or self._model
        body: dict[str, Any] = {"model": served, "prompt": list(token_ids), "echo": True, "max_tokens": 0}
        body |= {"logprobs": 0, **self._salt}
        logprobs = (await self._completions(body))[0].get("logprobs")
        if logprobs is None:
            raise Incapable(NO_SCORES)
        return [float(value) for value in logprobs["token_logprobs"][1 : len(token_ids)]]

    async def load(self, folder: Path, label: str) -> None:
        # Prefixes cached under another salt are never read. In bfloat16 those of the weights before one small step
        # could not be told by their log-probabilities if the cache were not forgotten.
        self._salt = {"cache_salt": label}
        try:
            await self._develop("/pause", query={"mode": "wait"})
            await self._load(folder)
            if not (await self._develop("/reset_prefix_cache"))["success"]:
                raise Fault("/reset_prefix_cache refused: requests are in flight")
            await self._develop("/update_weight_version", {"new_version": label})
        finally:
            await self._develop("/resume")

    async def _load(self, folder: Path) -> None:
        """Load through our worker extension; a server without it has vLLM's own loader."""
        try:
            answer = await self._extension("grpo_load_weights", {"path": str(folder)})
        except _Absent:
            await self._rpc("reload_weights", {"weights_path": str(folder)})
            return
        failed = [result["error"] for result in answer["results"] if not result["ok"]]
        if failed:
            raise Refusal(f"it cannot load the weights: {failed[0]}; it must see the folder generation.sync_dir")

    async def sums(self, seed: int) -> WeightSums | None:
        """See `Engine.sums`; with tensor parallelism None, see the worker extension."""
        told = await self._told("grpo_checksums", {"seed": seed})
        return None if told is None else _sums_of(told["tensors"], told["parts"], told["dtype"])

    async def adapter_sums(self) -> Sequence[WeightSums] | None:
        """See `Engine.adapter_sums`. An adapter is where it can be summed once it was loaded or asked for."""
        told = await self._told("grpo_adapter_checksums", {})
        return None if told is None else [_sums_of(tensors, {}, told["dtype"]) for tensors in told["adapters"]]

    async def _told(self, method: str, kwargs: dict[str, Any]) -> Any:
        """Return what the one worker says of its weights, None where there are several or it cannot say."""
        try:
            answer = await self._extension(method, kwargs)
        except (_Absent, Refusal):  # or no development endpoints
            return None
        workers = answer["results"]
        if len(workers) != 1:
            return None
        if "error" in workers[0]:
            if not self._said_why:
                self._said_why = True
                log.warning("the server cannot sum its weights, so its scores prove them: %s", workers[0]["error"])
            return None
        return workers[0]

    async def _extension(self, method: str, kwargs: dict[str, Any]) -> Any:
        """Return the answer of a method of our worker extension.

        Raises:
            _Absent: the server's worker lacks it. It is not asked again: such a request costs the connection.
        """
        if self._absent & {method, "grpo_load_weights"}:  # without the first of its methods, it has none
            raise _Absent
        try:
            return await self._rpc(method, kwargs)
        except Fault as fault:
            if "has no attribute" not in str(fault) or method not in str(fault):
                raise
            self._absent.add(method)
            self._packs = "CPUWorker" in str(fault)
            raise _Absent from fault

    async def load_adapter(self, folder: Path, label: str) -> None:
        """See `Engine.load_adapter`. A name of its own for each version: the prefix cache goes by name and path.

        `load_inplace` is not used: vLLM 0.32 keeps the flag, and reads the files again with every step.
        """
        try:
            await self.client.post("/v1/load_lora_adapter", {"lora_name": label, "lora_path": str(folder)})
        except Refusal as refusal:
            if "already" not in str(refusal):  # it has: the answer was lost
                raise Unfit(f"it does not take the adapter ({refusal}): {_LORA}", "generation.sync=reload") from refusal
        except Fault as fault:
            if "max_lora_rank" in str(fault) or "LoRA is not enabled" in str(fault):
                raise Unfit(f"{fault}: {_LORA}", "generation.sync=reload") from fault
            raise
        before, self._adapter = self._adapter, label
        if before not in (None, label):
            with suppress(Refusal):  # a server that was restarted has forgotten it
                await self.client.post("/v1/unload_lora_adapter", {"lora_name": before})

    async def _rpc(self, method: str, kwargs: dict[str, Any]) -> Any:
        # An unknown method is answered by 500, after which the server closes the connection.
        return await self._develop("/collective_rpc", {"method": method, "kwargs": kwargs}, last=True)

    async def _develop(
        self, path: str, body: Any = None, query: dict[str, object] | None = None, last: bool = False
    ) -> Any:
        try:
            return await self.client.post(path, body, query, last)
        except Refusal as refusal:
            raise _without_development(refusal) from refusal

    async def label(self) -> str | None:
        if self._adapter is not None:
            return await adapter_label(self.client, self._adapter)
        try:
            return str((await self.client.get("/weight_info"))["weight_version"])
        except Refusal:  # no development endpoints
            return None

    async def tokenize(self, text: str) -> list[int]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        return [int(i) for i in (await self.client.post("/tokenize", body))["tokens"]]

    async def _completions(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        try:
            answer = await self.client.post("/v1/completions", body)
        except Refusal as refusal:
            if refusal.status == 404 and body["model"] in str(refusal):
                raise Fault(str(refusal)) from refusal  # restarted under another name, which the next try asks for
            raise
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not choices:
            raise Incapable("/v1/completions answers without completions")
        return list(choices)


def _sums_of(tensors: dict[str, list[Any]], parts: dict[str, list[str]], dtype: str) -> WeightSums:
    return WeightSums({name: TensorSum(*values) for name, values in tensors.items()}, parts, dtype)


def _without_development(refusal: Refusal) -> Refusal:
    """Return what a refusal of a development endpoint means: 404 says that there are none."""
    return Unfit(_DEV_MODE, WITHOUT_LOADS) if refusal.status == 404 else refusal
