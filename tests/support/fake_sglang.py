"""The tongue of SGLang 0.5.23: all n completions have the same seed, log-probabilities know only the temperature."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.dialect import Answer, Refused

if TYPE_CHECKING:
    from tests.support.fake_server import FakeServer


class SGLang:
    """See `dialect.Dialect`."""

    sample, load, label = "/generate", "/update_weights_from_disk", "/model_info"
    loading: tuple[str, ...] = ("/pause_generation", "/update_weights_from_disk", "/continue_generation")
    model_option = "--model-path"
    shaped_logprobs = names_model = False
    ids = "output_ids"

    def refusal(self, message: str) -> Any:
        return {"message": message, "type": "BadRequestError", "code": 400}

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
            return 200, {"model_path": server.root, "served_model_name": server.root, "weight_version": server.label}
        if path == "/tokenize":
            return 200, {"tokens": server.tokens(body["prompt"]), "count": 0, "max_model_len": server.quirks.context}
        if path == "/generate":
            return 200, [self._generate_one(server, *pair, body) for pair in self._pairs(body)]
        if path == "/v1/models":
            return 200, server.models()
        if path == "/load_lora_adapter":
            name, folder = body["lora_name"], Path(body["lora_path"])
            wrong = "LoRA is not enabled. Please set `--enable-lora`." if server.quirks.without_lora else ""
            wrong = wrong or (f"LoRA with name {name} already exists." if name in server.adapters else "")
            if wrong or not (folder / "adapter_config.json").is_file():
                return 400, {"success": False, "error_message": wrong or f"Failed to load LoRA adapter {name}"}
            server.take_adapter(name, folder)
            return 200, {"success": True, "error_message": "", "loaded_adapters": {name: str(folder)}}
        if path == "/unload_lora_adapter":
            if server.adapters.pop(body["lora_name"], None) is None:
                message = f"LoRA with name {body['lora_name']} does not exist. Loaded LoRAs: odict_keys([])"
                return 400, {"success": False, "error_message": message}
            return 200, {"success": True, "error_message": "", "loaded_adapters": {}}
        if path == "/flush_cache":
            server.flush()
            return 200, b"Cache flushed.\nPlease check backend logs for more details.\n"
        if path in ("/pause_generation", "/continue_generation"):
            server.paused = path == "/pause_generation"
            return 200, {"message": "Generation paused or continued successfully.", "status": "ok"}
        if path == "/update_weights_from_disk":
            folder = Path(body["model_path"])
            if not (folder / "config.json").is_file():
                return 400, {"success": False, "message": f"Failed to get {folder}", "num_paused_requests": 0}
            server.reload(folder)
            if body.get("flush_cache", True):
                if server.at_once and not server.paused:
                    message = "Weights were updated, but the cache was not flushed because requests are still running."
                    return 400, {"success": False, "message": message, "num_paused_requests": 0}
                server.flush()
            server.label = body.get("weight_version") or server.label
            return 200, {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}
        return None

    def _pairs(self, body: dict[str, Any]) -> list[tuple[list[int], dict[str, Any]]]:
        """Return each prompt with its parameters, n copies of each: with the same seed, as SGLang does."""
        pairs = zip(body["input_ids"], body["sampling_params"], strict=True)
        return [pair for pair in pairs for _ in range(pair[1].get("n", 1))]

    def _generate_one(
        self, server: FakeServer, prompt: list[int], parameters: dict[str, Any], body: dict[str, Any]
    ) -> dict[str, Any]:
        if parameters.get("top_k") == 0:
            raise Refused("top_k must be -1 (disable) or at least 1, got 0.")
        adapter = body.get("lora_path")
        if adapter is not None and adapter not in server.adapters:
            raise Refused(f"The following requested LoRA adapters are not loaded: {adapter}")
        ids, logprobs, reason = server.sample(prompt, parameters, parameters.get("sampling_seed", 42), adapter)
        kind: dict[str, Any] = {"type": reason}
        kind |= {"matched": ids[-1]} if reason == "stop" else {"length": len(ids)}
        meta: dict[str, Any] = {"finish_reason": kind, "weight_version": server.label, "cached_tokens": 0}
        if body.get("return_logprob"):
            if not server.quirks.without_logprobs:
                meta["output_token_logprobs"] = [[p, i, None] for p, i in zip(logprobs, ids, strict=True)]
            if body.get("logprob_start_len") == 0 and not server.quirks.without_scores:
                priced = [None, *server.score(prompt, adapter)]
                meta["input_token_logprobs"] = [[p, i, None] for p, i in zip(priced, prompt, strict=True)]
        answer = {"text": server.tokenizer.decode(ids), "meta_info": meta}
        return answer if server.quirks.without_token_ids else {**answer, "output_ids": ids}
