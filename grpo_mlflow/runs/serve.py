"""An inference server in the foreground, for others to train with, or the command that starts one."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from grpo_mlflow.config import Config
from grpo_mlflow.errors import ServerFailed
from grpo_mlflow.generation.server import replicas
from grpo_mlflow.generation.server.launch import EVERYWHERE, listens_at, start_command
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
    """Start the servers that `generation` describes with `model.train_id`, and keep them until a signal.

    Raises:
        ServerFailed: one does not start, or ends by itself.
        Interrupted: at the end.
    """
    servers = replicas.processes(config, log, lambda text: print(text, flush=True))
    model = _model(config)
    with interrupts.handled(), ThreadPoolExecutor(len(servers)) as pool, ExitStack() as held:
        for server in servers:
            held.callback(server.close)  # before the pool waits for starts, which end with that
        for starting in [pool.submit(server.start, model) for server in servers]:
            starting.result()
        urls = [server.url for server in servers]
        at = urls[0] if len(urls) == 1 else f"[{','.join(urls)}]"
        print(f"train with: generation.backend={config.generation.backend} generation.base_url={at}", flush=True)
        while all(server.alive for server in servers):
            time.sleep(1.0)
        ended = next((found for server in servers if (found := server.ended())), "a server ended")
        raise ServerFailed(ended)


def _model(config: Config) -> str | Path:
    source = loading.model_source(config.model.train_id, config)
    return SYNCS[config.generation.sync].starts_with(source, source)
