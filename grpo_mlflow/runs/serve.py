"""An inference server in the foreground, for others to train with."""

from __future__ import annotations

import time
from pathlib import Path

from grpo_mlflow.config import Config
from grpo_mlflow.errors import ServerFailed
from grpo_mlflow.generation.server.launch import Launch, launch
from grpo_mlflow.generation.server.process import ServerProcess
from grpo_mlflow.generation.server.sync import SYNCS
from grpo_mlflow.model import loading, lora
from grpo_mlflow.runtime import interrupts


def serve(config: Config, log: Path) -> None:
    """Start the server that `generation` describes with `model.train_id`, and keep it until a signal.

    Raises:
        ServerFailed: it does not start, or ends by itself.
        Interrupted: at the end.
    """
    settings, backend = config.generation.server, config.generation.backend

    def start(model: str | Path, port: int) -> Launch:
        rank = SYNCS[config.generation.sync].lora_rank(config.model.lora)
        return launch(backend, settings, model, port, config.model.dtype, rank)

    server = ServerProcess(start, settings, log, lambda text: print(text, flush=True))
    with interrupts.handled():
        try:
            source = loading.model_source(config.model.train_id, config)
            server.start(lora.base_of(source) or source)  # a run that trains an adapter sends it itself
            print(f"train with: generation.backend={backend} generation.base_url={server.url}", flush=True)
            while server.alive:
                time.sleep(1.0)
            raise ServerFailed(f"the server ended; the end of {log}:\n{server.tail()}")
        finally:
            server.close()
