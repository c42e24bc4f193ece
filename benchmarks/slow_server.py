"""What one slow server of four costs: the throughput of all four over that of the three quick ones alone.

    python -m benchmarks.slow_server --output benchmarks/results/servers.json  # about eight minutes

The servers are those of the tests, over real HTTP, with a fixed time for each request beside which computing hardly
counts; the slow one takes a multiple of it. Both sides draw the same batch in turn, and the ratio of each pair counts.
The first batch of each round stands by itself: by then nobody knows which server is slow.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.servers import keep
from grpo_mlflow import tasks
from grpo_mlflow.config import resolve
from grpo_mlflow.generation import Generators, Sampling
from grpo_mlflow.generation.server.generator import ServerGenerator
from grpo_mlflow.model import loading, policy
from grpo_mlflow.model.devices import choose_device
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.types import Prompt
from tests.support.fake_server import SAMPLE, Answer, FakeServer
from tests.support.small_runs import SMALL

QUICK, AT_ONCE, K = 3, 8, 2  # quick servers, prompts in flight at each, completions of a prompt


class Timed(FakeServer):
    """A server that takes at least `seconds` for each request of more than one token, however many there are."""

    seconds = 0.0

    def _answer(self, path: str, body: dict[str, Any]) -> Answer:
        if path == SAMPLE[self.dialect] and body.get("max_tokens", 0) > 1:
            time.sleep(self.seconds)
        return super()._answer(path, body)


@contextmanager
def sampler(times: list[float], folder: Path, actor: Policy, model: str | Path) -> Iterator[ServerGenerator[Any]]:
    """Return what draws from servers that have never drawn a batch, one for each of these times per request."""
    with ExitStack() as held:
        servers = [held.enter_context(Timed("vllm", Path(model))) for _ in times]
        urls = ",".join(server.url for server in servers)
        words = ["generation.backend=vllm_server", f"generation.base_url=[{urls}]", f"generation.batch_size={AT_ONCE}"]
        config = resolve("tiny", [*SMALL, *words]).config
        found = held.enter_context(Generators(config, actor, model, model, folder / "log", print)).training()
        assert isinstance(found, ServerGenerator)
        found.sync(0)
        for server, seconds in zip(servers, times, strict=True):
            server.seconds = seconds
        yield found


def ratios(
    four: ServerGenerator[Any], three: ServerGenerator[Any], prompts: list[Prompt], batches: int, key: int
) -> list[float]:
    """Return for each batch of these prompts the throughput of four servers over that of three."""
    found = []
    for number in range(batches):
        seconds: dict[ServerGenerator[Any], float] = {}
        for who in (four, three) if number % 2 else (three, four):
            began = time.perf_counter()
            who.generate(prompts, K, Sampling(2), 0, ("bench", key, number))
            seconds[who] = time.perf_counter() - began
        found.append(seconds[three] / seconds[four])
    return found


def measure(slower: float, size: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return a record for one slow server and one size of batches, over rounds of new servers."""
    config = resolve("tiny", SMALL).config
    model, task = loading.model_source("tiny", config), tasks.of(config)
    actor = policy.load(model, choose_device("cpu"), "float32")
    prompts = [actor.prompt(task.problem("train", seed)) for seed in range(size)]
    first, later = [], list[float]()
    quick = [arguments.seconds] * QUICK
    for number in range(arguments.rounds):
        with ExitStack() as held:
            four, three = (
                held.enter_context(sampler(times, folder, actor, model))
                for times in ([slower * arguments.seconds, *quick], quick)
            )
            found = ratios(four, three, prompts, 1 + arguments.batches, number)
        first.append(found[0])
        later += found[1:]
    return {
        "times_slower": slower,
        "prompts": size,
        "first_batches": sorted(first),
        "first_median": statistics.median(first),
        "later_batches": len(later),
        "later_median": statistics.median(later),
        "later_mean": statistics.mean(later),
        "later_least": min(later),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="of a quick server for a request")
    parser.add_argument(
        "--slower", type=float, nargs="+", default=[3.0, 10.0], help="how many times the slow one takes"
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[24, 48, 96], help="prompts of a batch")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of new servers")
    parser.add_argument("--batches", type=int, default=5, help="batches of a round after its first one")
    parser.add_argument("--output", type=Path, help="the JSON file that takes the figures")
    arguments = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for slower, size in itertools.product(arguments.slower, arguments.prompts):
            table.append(measure(slower, size, arguments, Path(folder)))
            print(json.dumps(table[-1]), flush=True)
    sizes = {"seconds": arguments.seconds, "quick_servers": QUICK, "prompts_in_flight": AT_ONCE}
    keep({"slow_server": {**sizes, "batches": table}}, arguments.output)


if __name__ == "__main__":
    main()
