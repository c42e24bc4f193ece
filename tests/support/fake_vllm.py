"""The tongue of vLLM 0.32: completion j of n is drawn with seed + j, unknown remote calls are an error of 500."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_mlflow.serverside.grpo_vllm_worker import checksum
from tests.support.dialect import Answer

if TYPE_CHECKING:
    from tests.support.fake_server import FakeServer

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
RANK = 16
EXTENSION = ("grpo_load_weights", "grpo_checksums", "grpo_adapter_checksums")


class VLLM:
    """See `dialect.Dialect`."""

    sample, load, label = "/v1/completions", "/collective_rpc", "/weight_info"
    loading: tuple[str, ...] = ("/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume")
    model_option = "--model"
    shaped_logprobs = names_model = True
    ids = "token_ids"

    def penalised(self, prompt: list[int], generated: list[int]) -> list[int]:
        return [*prompt, *generated]

    def refusal(self, message: str) -> Any:
        return {"error": {"message": message, "type": "BadRequestError", "code": 400}}

    def completions(self, content: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = content["choices"]
        return found

    def answer_with(self, completions: list[dict[str, Any]]) -> Any:
        return {"choices": completions}

    def logprobs(self, completion: dict[str, Any]) -> list[float]:
        found: list[float] = completion["logprobs"]["token_logprobs"]
        return found

    def set_logprobs(self, completion: dict[str, Any], values: Any) -> None:
        completion["logprobs"] = None if values is None else {"token_logprobs": values}

    def set_finish(self, completion: dict[str, Any], reason: str) -> None:
        completion["finish_reason"] = reason

    def answer(self, server: FakeServer, path: str, body: dict[str, Any]) -> Answer | None:
        if path == "/health":
            return 200, b""
        if path == "/v1/models":
            return 200, server.models()
        if server.asleep and path != "/wake_up":
            return 400, self.refusal("asked while asleep")
        if path == "/tokenize":
            return 200, {"tokens": server.tokens(body["prompt"]), "count": 0, "max_model_len": server.quirks.context}
        if path == "/v1/completions":
            return self._completions(server, body)
        if path == "/v1/load_lora_adapter" and not server.quirks.without_lora:
            name, folder = body["lora_name"], Path(body["lora_path"])
            if name in server.adapters:
                message = f"The lora adapter '{name}' has already been loaded."
                return 400, {"error": {"message": message, "type": "InvalidUserInput", "code": 400}}
            if not (folder / "adapter_config.json").is_file():
                message = f"Loading lora {name} failed: No adapter found for {folder}"
                return 404, {"error": {"message": message, "type": "NotFoundError", "code": 404}}
            server.take_adapter(name, folder)
            return 200, f"Success: LoRA adapter '{name}' added successfully.".encode()
        if path == "/v1/unload_lora_adapter" and not server.quirks.without_lora:
            if server.adapters.pop(body["lora_name"], None) is None:
                message = f"The lora adapter '{body['lora_name']}' cannot be found."
                return 404, {"error": {"message": message, "type": "NotFoundError", "code": 404}}
            return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully.".encode()
        if server.quirks.without_development:
            return None
        if path == "/pause":
            server.paused = True
            return 200, {"status": "paused"}
        if path == "/resume":
            server.paused = False
            return 200, {"status": "resumed"}
        if path in ("/sleep", "/wake_up"):
            server.asleep = path == "/sleep"
            return 200, b""
        if path == "/is_paused":
            return 200, {"is_paused": server.paused}
        if path == "/reset_prefix_cache":
            server.flush()
            return 200, {"success": True}
        if path == "/weight_info":
            return 200, {"weight_version": server.label}
        if path == "/update_weight_version":
            server.label = body["new_version"]
            return 200, {"success": True, "new_version": server.label}
        if path == "/collective_rpc":
            if body["method"] == "reload_weights":
                server.reload(Path(body["kwargs"]["weights_path"]))
                return 200, {"results": [None]}
            if body["method"] not in EXTENSION or server.quirks.without_extension:
                kind = "CPUWorker" if server.quirks.on_cpu else "Worker"
                message = f"Worker failed with error ''{kind}' object has no attribute '{body['method']}''"
                return 500, {"error": {"message": message, "type": "InternalServerError", "code": 500}}
            if body["method"] == "grpo_checksums":
                return 200, {"results": [self._sums(server, body["kwargs"]["seed"])]}
            if body["method"] == "grpo_adapter_checksums":
                return 200, {"results": [self._adapter_sums(server)]}
            folder = Path(body["kwargs"]["path"])
            if not (folder / "config.json").is_file():
                return 200, {"results": [{"ok": False, "error": f"no model folder at {folder}"}]}
            server.reload(folder)
            return 200, {"results": [{"ok": True}]}
        return None

    def _sums(self, server: FakeServer, seed: int) -> dict[str, Any]:
        """Sums over the model's tensors, those of the layers that vLLM fuses together under one name."""
        tensors: dict[str, list[Any]] = {}
        for name, weight in server.weights():
            fused = next((whole for whole, parts in FUSED.items() if name.split(".")[-2] in parts), None)
            shown = name if fused is None else ".".join([*name.split(".")[:-2], fused, name.split(".")[-1]])
            step = max(1, weight.shape[1] // 8) if weight.ndim == 2 else 1
            first = seed % step
            total = checksum(weight[:, first::step] if weight.ndim == 2 else weight, first, step)
            total += tensors[shown][0] if shown in tensors else 0
            tensors[shown] = [total % 2**64, str(weight.dtype).removeprefix("torch."), first, step]
        return {"tensors": tensors, "parts": FUSED, "dtype": str(server.dtype).removeprefix("torch.")}

    def _adapter_sums(self, server: FakeServer) -> dict[str, Any]:
        """Sums over each adapter, which is kept with zeros up to the largest rank, the output layer's too."""
        dtype, adapters = str(server.dtype).removeprefix("torch."), []
        for weights in server.adapter_weights():
            tensors: dict[str, list[Any]] = {"lm_head.lora_A.weight": [0, dtype, 0, 1]}
            for name, weight in weights:
                rows, columns = weight.shape
                stack = weight.new_zeros((RANK, columns) if ".lora_A." in name else (rows, RANK))
                stack[:rows, :columns] = weight
                tensors[name] = [checksum(stack), dtype, 0, 1]
            adapters.append(tensors)
        return {"adapters": adapters, "dtype": dtype}

    def _completions(self, server: FakeServer, body: dict[str, Any]) -> Answer:
        if body["model"] not in (server.name, *server.adapters):
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        if server.quirks.text_only:
            return 200, {"choices": [{"index": 0, "text": "Hello", "finish_reason": "length"}]}
        prompt, choices, adapter = body["prompt"], [], body["model"] if body["model"] != server.name else None
        if body.get("echo"):
            scores = (
                None if server.quirks.without_scores else {"token_logprobs": [None, *server.score(prompt, adapter)]}
            )
            return 200, {"choices": [{"index": 0, "logprobs": scores}]}
        parameters = {**body, "max_new_tokens": body["max_tokens"]}
        for j in range(body["n"]):
            ids, logprobs, reason = server.sample(prompt, parameters, body["seed"] + j, adapter)
            choices.append(
                {
                    "index": j,
                    "text": server.tokenizer.decode(ids),
                    "finish_reason": reason,
                    "token_ids": None if server.quirks.without_token_ids or not body.get("return_token_ids") else ids,
                    "prompt_token_ids": prompt,
                    "logprobs": None
                    if server.quirks.without_logprobs or body.get("logprobs") is None
                    else {"token_logprobs": logprobs},
                }
            )
        return 200, {
            "object": "text_completion",
            "model": server.name,
            "choices": choices[::-1],
        }  # order is ours to find
