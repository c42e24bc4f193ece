"""An inference server in the foreground, for others to train with, or the command that starts one."""

from __future__ import annotations

import time
from pathlib import Path

from grpo_mlflow.config import Config
from grpo_mlflow.errors import ServerFailed
from grpo_mlflow.generation.server.launch import EVERYWHERE, Launch, launch_as, listens_at, start_command
from grpo_mlflow.generation.server.process import ServerProcess
from grpo_mlflow.generation.server.sync import SYNCS
from grpo_mlflow.model import loading
from grpo_mlflow.runtime import interrupts


def command(config: Config, url: str | None) -> tuple[str, str]:
    """Return the shell command that starts the server that `generation` describes with `model.train_id`.

    Args:
        url: the address that it is to have; None: this machine's.

    Returns:
        The command, and a line on who can reach that server; empty: this machine alone.
    """
    text, remark = start_command(config, config.generation.backend, url, _model(config)), ""
    if url is not None and listens_at(url) in EVERYWHERE.values():
        remark = (
            f"as generation.base_url names another machine, the server listens at all addresses of its own (--host "
            f"{listens_at(url)}): let nobody but the trainer reach it there, since whoever can may load weights into it"
        )
    return text, remark


def serve(config: Config, log: Path) -> None:
    """Start the server that `generation` describes with `model.train_id`, and keep it until a signal.

    Raises:
        ServerFailed: it does not start, or ends by itself.
        Interrupted: at the end.
    """
    settings, backend = config.generation.server, config.generation.backend

    def start(model: str | Path, port: int) -> Launch:
        return launch_as(config, backend, model, port)

    server = ServerProcess(start, settings, log, lambda text: print(text, flush=True))
    with interrupts.handled():
        try:
            server.start(_model(config))
            print(f"train with: generation.backend={backend} generation.base_url={server.url}", flush=True)
            while server.alive:
                time.sleep(1.0)
            raise ServerFailed(server.ended() or "the server ended")
        finally:
            server.close()


def _model(config: Config) -> str | Path:
    source = loading.model_source(config.model.train_id, config)
    return SYNCS[config.generation.sync].starts_with(source, source)
