"""What a vLLM worker learns from us: `--worker-extension-cls grpo_vllm_worker.WeightLoader`, this folder on PYTHONPATH.

vLLM's own `reload_weights` has two gaps: a path that does not exist ends the engine, and on a CPU the output layer of a
model with tied embeddings keeps its old weights, because they were packed for the matrix kernel at start. This loader
checks the path first, and packs the output layer again.
"""

from __future__ import annotations

import os
from typing import Any


class WeightLoader:
    """Mixed into vLLM's worker class, whose attributes it uses."""

    def grpo_load_weights(self, path: str) -> dict[str, Any]:
        """Load a model folder in place; say what went wrong instead of raising, which would end the engine."""
        worker: Any = self
        if not os.path.isfile(os.path.join(path, "config.json")):
            return {"ok": False, "error": f"no model folder at {path} on the server's machine"}
        try:
            worker.reload_weights(weights_path=path)
            if worker.device.type == "cpu":
                from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

                dispatch_cpu_unquantized_gemm(worker.model_runner.get_model().lm_head, remove_weight=False)
        except Exception as error:
            return {"ok": False, "error": f"{type(error).__name__}: {error}"}
        return {"ok": True}
