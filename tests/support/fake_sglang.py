"""The tongue of SGLang 0.5.23: all n completions have the same seed, top-k and top-p are not priced."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.dialect import Answer, Refused

if TYPE_CHECKING:
    from tests.support.fake_server import FakeServer

NO_LORA = "LoRA is not enabled. Please set `--enable-lora` to enable LoRA."
KNOWN = {
    *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_token_ids"),
    *("skip_special_tokens", "sampling_seed", "n"),
}


class SGLang:
    """See `dialect.Dialect`."""

    sample, load, label = "/generate", "/update_weights_from_disk", "/model_info"
    loading: tuple[str, ...] = ("/pause_generation", "/update_weights_from_disk", "/continue_generation")
    model_option = "--model-path"
    shaped_logprobs = names_model = False
    ids = "output_ids"

    def penalised(self, prompt: list[int], generated: list[int]) -> list[int]:
        return [prompt[-1], *generated[:-1]] if generated else []  # the newest is not known yet when it counts

    def refusal(self, message: str) -> Any:
        return {"error": {"message": message}}

    def completions(self, content: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = content
        return found

    def answer_with(self, completions: list[dict[str, Any]]) -> Any:
        return completions

    def logprobs(self, completion: dict[str, Any]) -> list[float]:
        return [triple[0] for triple in completion["meta_info"]["output_token_logprobs"]]

    def set_logprobs(self, completion: dict[str, Any], values: Any) -> None:
        triples = None if values is None else [[value, 0, None] for value in values]
        completion["meta_info"]["output_token_logprobs"] = triples

    def set_finish(self, completion: dict[str, Any], reason: str) -> None:
        completion["meta_info"]["finish_reason"] = {"type": reason}

    def answer(self, server: FakeServer, path: str, body: dict[str, Any]) -> Answer | None:
        if path == "/health":
            return 200, b""
        if path == "/model_info":
            named = {"model_path": server.root, "served_model_name": server.root, "tokenizer_path": str(server.folder)}
            return 200, {**named, "is_generation": True, "weight_version": server.label, "load_format": "auto"}
        if path == "/tokenize":
            tokens = server.tokens(body["prompt"])
            return 200, {"tokens": tokens, "count": len(tokens), "max_model_len": server.quirks.context}
        if path == "/generate":
            return 200, [self._generate_one(server, *pair, body) for pair in self._pairs(body)]
        if path == "/v1/models":
            return 200, server.models()
        if path == "/load_lora_adapter":
            name, folder = body["lora_name"], Path(body["lora_path"])
            wrong = NO_LORA if server.quirks.without_lora else ""
            if not wrong and name in server.adapters:
                wrong = f"Failed to load LoRA adapter {name} because it is already loaded"
            if not wrong and not (folder / "adapter_config.json").is_file():
                wrong = f"[Errno 2] No such file or directory: '{folder}/adapter_config.json'"
            if wrong:
                return 400, self._adapters(None, wrong)
            server.take_adapter(name, folder)
            return 200, self._adapters({name: str(folder)}, None)
        if path == "/unload_lora_adapter":
            wrong = NO_LORA if server.quirks.without_lora else ""
            if not wrong and server.adapters.pop(body["lora_name"], None) is None:
                wrong = f"LoRA with name {body['lora_name']} does not exist. Loaded LoRAs: odict_keys([])"
            return (400, self._adapters(None, wrong)) if wrong else (200, self._adapters({}, None))
        if path == "/flush_cache":
            server.flush()
            return 200, b"Cache flushed.\nPlease check backend logs for more details. (When there are running or ...)\n"
        if path in ("/pause_generation", "/continue_generation"):
            server.paused = path == "/pause_generation"
            done = "paused" if server.paused else "continued"
            return 200, {"message": f"Generation {done} successfully.", "status": "ok"}
        if path == "/update_weights_from_disk":
            folder = Path(body["model_path"])
            if not (folder / "config.json").is_file():
                message = f"Failed to get weights iterator: Repo id must use alphanumeric chars: '{folder}'.."
                return 400, {"success": False, "message": message, "num_paused_requests": 0}
            server.reload(folder)
            if body.get("flush_cache", True):
                if server.at_once and not server.paused:
                    message = (
                        "Weights were updated, but the cache was not flushed because requests are still running or "
                        "queued. Retract or finish them, then call /flush_cache."
                    )
                    return 400, {"success": False, "message": message, "num_paused_requests": 0}
                server.flush()
            message = "Succeeded to update model weights."
            if version := body.get("weight_version"):
                server.label, message = version, f"{message} Weight version updated to {version}."
            return 200, {"success": True, "message": message, "num_paused_requests": 0}
        return None

    def _adapters(self, loaded: dict[str, str] | None, wrong: str | None) -> dict[str, Any]:
        where = {"rid": None, "http_worker_ipc": None}
        return {**where, "success": wrong is None, "error_message": wrong, "loaded_adapters": loaded}

    def _pairs(self, body: dict[str, Any]) -> list[tuple[list[int], dict[str, Any]]]:
        """Return each prompt with its parameters, n copies of each: with the same seed, as SGLang does."""
        pairs = zip(body["input_ids"], body["sampling_params"], strict=True)
        return [pair for pair in pairs for _ in range(pair[1].get("n", 1))]

    def _generate_one(
        self, server: FakeServer, prompt: list[int], parameters: dict[str, Any], body: dict[str, Any]
    ) -> dict[str, Any]:
        if unknown := parameters.keys() - KNOWN:
            raise Refused(f"unknown field `{min(unknown)}`, expected one of `max_new_tokens`, `stop`, ...")
        if parameters.get("top_k") == 0:
            raise Refused("top_k must be -1 (disable) or at least 1, got 0.")
        if not 0 < (penalty := parameters.get("repetition_penalty", 1.0)) <= 2:
            raise Refused(f"repetition_penalty must be in (0, 2] (1.0 = no penalty), got {penalty}.")
        adapter = body.get("lora_path")
        if adapter is not None and adapter not in server.adapters:
            raise Refused(
                f"LoRA adapter '{adapter}' was requested, but LoRA is not enabled."
                if server.quirks.without_lora
                else f"Got LoRA adapter that has never been loaded: {adapter}\nAll loaded adapters: dict_keys([])."
            )
        ids, logprobs, reason = server.sample(prompt, parameters, parameters.get("sampling_seed", 42), adapter)
        kind: dict[str, Any] = {"type": reason}
        kind |= {"matched": ids[-1]} if reason == "stop" else {"length": len(ids)}
        meta: dict[str, Any] = {"finish_reason": kind, "weight_version": server.label, "cached_tokens": 0}
        meta |= {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        meta["weight_versions"] = [{"version": server.label, "start": 0, "end": len(ids)}]
        if body.get("return_logprob"):
            meta["input_token_logprobs"] = []
            if not server.quirks.without_logprobs:
                meta["output_token_logprobs"] = [[p, i, None] for p, i in zip(logprobs, ids, strict=True)]
            if server.quirks.without_scores:
                del meta["input_token_logprobs"]
            elif body.get("logprob_start_len") == 0:
                priced = [None, *server.score(prompt, adapter)]
                meta["input_token_logprobs"] = [[p, i, None] for p, i in zip(priced, prompt, strict=True)]
        answer = {"text": server.tokenizer.decode(ids), "meta_info": meta}
        return answer if server.quirks.without_token_ids else {**answer, "output_ids": ids}
