"""What the path through a server costs, on a real vLLM that this starts: throughput, weight sync, overlap.

    make .venv-vllm/.installed
    python -m benchmarks.servers --output benchmarks/results/servers.json          # about five minutes on two cores
    python -m benchmarks.servers --iterations 0 --new-tokens 8 --in-flight 4 8 model.train_id=FOLDER  # another model

Throughput: the same requests (prompts, seeds, concurrency) are sent by a bare load generator, which writes prepared
bytes to open connections and throws the answers away, and through the generator that training uses, which also parses,
checks, decodes and lets the server prove its weights; in turn, several rounds, medians of the ratio of pairs.
Overlap: seconds per iteration of the same training run with generation.async_rollouts 0 and 1.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from grpo_mlflow import runs, seeding, tasks
from grpo_mlflow.config import Config, resolve
from grpo_mlflow.generation import Generators, Sampling
from grpo_mlflow.generation.server.engine import Ask
from grpo_mlflow.generation.server.generator import ServerGenerator
from grpo_mlflow.generation.server.vllm import VLLM
from grpo_mlflow.model import loading, policy
from grpo_mlflow.model.devices import choose_device
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.http.client import Client
from grpo_mlflow.types import Prompt

MANAGED = ("generation.backend=vllm_server", "generation.server.manage=true")


async def bare_load(url: str, bodies: list[bytes], at_once: int) -> None:
    """Send every body once over `at_once` open connections; read the answers and drop them."""
    address, waiting = urlsplit(url), list(reversed(bodies))

    async def work() -> None:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        while waiting:
            body = waiting.pop()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert answer.startswith(b"http/1.1 200"), answer
            await reader.readexactly(int(answer.split(b"content-length:")[1].split(b"\r\n")[0]))
        writer.close()

    await asyncio.gather(*(work() for _ in range(at_once)))


def throughput(
    config: Config, actor: Policy, generators: Generators, lengths: list[int], in_flight: list[int], rounds: int
) -> list[dict[str, Any]]:
    """Return one record per longest completion and concurrency."""
    task, table = tasks.of(config), []
    prompts = [actor.prompt(task.problem("train", seed)) for seed in range(config.data.problems_per_iteration)]
    k = config.data.rollouts_per_problem
    first = generators.training()
    assert isinstance(first, ServerGenerator)
    first.sync(0)
    for length, at_once in itertools.product(lengths, in_flight):
        sampling = Sampling(length)
        if length > 8 and first.server.version == 0:
            _never_end(actor)
            first.sync(1)
        generator = ServerGenerator(first.server, actor, at_once, None)
        bare, ours, tokens = [], [], 0
        for number in range(rounds + 1):
            key = ("bench", number)
            bodies = _bodies(first.server.url, prompts, k, sampling, key, actor)
            seconds: dict[str, float] = {}
            for who in ("bare", "ours") if number % 2 else ("ours", "bare"):  # neither always comes second
                began = time.perf_counter()
                if who == "bare":
                    asyncio.run(bare_load(first.server.url, bodies, at_once))
                else:
                    found = generator.generate(prompts, k, sampling, 0, key)
                seconds[who] = time.perf_counter() - began
            if number:  # the first warms both up
                bare.append(seconds["bare"])
                ours.append(seconds["ours"])
                tokens += sum(len(c.token_ids) for group in found for c in group)
        table.append(
            {
                "model": config.model.train_id,
                "max_new_tokens": length,
                "prompts_in_flight": at_once,
                "rollouts": len(prompts) * k,
                "tokens_per_completion": tokens / (rounds * len(prompts) * k),
                "bare_tokens_per_sec": tokens / sum(bare),
                "ours_tokens_per_sec": tokens / sum(ours),
                "ours_over_bare": statistics.median(b / o for b, o in zip(bare, ours, strict=True)),
            }
        )
        print(json.dumps(table[-1]), flush=True)
    return table


def _never_end(actor: Policy) -> None:
    """Change the embedded model, which ends its answers after four tokens, so that it hardly ever does."""
    with torch.no_grad():
        actor.model.get_input_embeddings().weight[list(actor.eos_ids)] *= -1


def _bodies(
    url: str, prompts: list[Prompt], k: int, sampling: Sampling, key: tuple[str | int, ...], actor: Policy
) -> list[bytes]:
    """Return the very requests that the generator sends."""

    async def engine() -> VLLM:
        found = VLLM(Client(url, 60.0))
        await found.connect()
        await found.client.close()
        return found

    vllm = asyncio.run(engine())
    seeds = [seeding.integer(0, *key, prompt.problem_id) >> 1 for prompt in prompts]
    asks = [
        Ask(prompt.token_ids, k, sampling, seed, actor.eos_ids) for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return [json.dumps(vllm.request(ask)).encode() for ask in asks]


def iterations(folder: Path, iterations_: int, words: list[str]) -> list[dict[str, Any]]:
    """Return seconds per iteration with and without overlap, alternating runs would restart the server: one each."""
    table = []
    for ahead in (0, 1):
        store = f"tracking.uri=sqlite:///{folder}/mlflow.db"
        wanted = [*MANAGED, *words, store, f"generation.async_rollouts={ahead}", f"train.iterations={iterations_}"]
        finished = runs.train(resolve("tiny", [*wanted, "eval.enabled=false", "checkpoint.save_interval=0"]))
        perf = [json.loads(path.read_text()) for path in sorted((finished.run_dir / "metrics").glob("train_*.json"))]
        counted = perf[3:-1]  # the first ones warm up, the last has nothing to sample ahead
        record = {"async_rollouts": ahead, "iterations": len(counted)}
        for name in ("seconds_iteration", "seconds_generate", "seconds_update", "seconds_sync"):
            record[name] = statistics.median(each[name] for each in counted)
        table.append(record)
        print(json.dumps(record), flush=True)
    return table


def keep(found: dict[str, Any], output: Path | None) -> None:
    """Write figures to a file, and leave those there that others have measured."""
    if output is not None:
        known = json.loads(output.read_text()) if output.exists() else {}
        output.write_text(json.dumps(known | found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="pairs per concurrency")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[8, 32], help="longest completions")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[4, 16, 64], help="prompts in flight")
    parser.add_argument("--iterations", type=int, default=20, help="training iterations per run; 0: none")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    parser.add_argument("overrides", nargs="*", help="settings of the preset tiny to change")
    arguments = parser.parse_args()
    config = resolve("tiny", [*MANAGED, *arguments.overrides]).config
    source = loading.model_source(config.model.train_id, config)
    actor = policy.load(source, choose_device(config.model.device), config.model.dtype)
    with tempfile.TemporaryDirectory() as folder:
        with Generators(config, actor, source, source, Path(folder) / "server.log", print) as generators:
            lengths, in_flight = arguments.new_tokens, arguments.in_flight
            table = throughput(config, actor, generators, lengths, in_flight, arguments.rounds)
        found: dict[str, Any] = {"throughput": table}
        if arguments.iterations:
            found["iterations"] = iterations(Path(folder), arguments.iterations, arguments.overrides)
    found["cores"] = os.cpu_count()
    keep(found, arguments.output)


if __name__ == "__main__":
    main()
