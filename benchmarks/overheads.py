"""What a default run spends beside its iterations: starting, resuming, tracking; and how cost grows with the work.

    python -m benchmarks.overheads --output benchmarks/results/overheads.json --model build/bench-models/tiny

Processor seconds, which other processes disturb less than wall time; wall time from a command to its first iteration.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WARM_UP = 2  # iterations that are not counted
_ROOT = Path(__file__).resolve().parent.parent
_IMPORTS = "from grpo_mlflow.cli.command import importing\nwith importing(): import grpo_mlflow.runs"
_CONFIG = "from grpo_mlflow.config import resolve; resolve('tiny', ['train.lr=1e-4']).config"


def startup() -> dict[str, float]:
    """Return processor seconds of: reading the settings; importing what a run needs."""
    found = {}
    for name, code in {"config": _CONFIG, "imports": _IMPORTS}.items():
        command = [sys.executable, "-c", f"import time\n{code}\nprint(time.process_time())"]
        environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
        runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(3)]
        found[name] = min(float(run.stdout.split()[-1]) for run in runs)
    return found


def tracking(folder: Path, iterations: int) -> dict[str, float]:
    """Return processor seconds per iteration of the default run: the iteration, and of or beside it, wherever they are
    spent, those for the files of an iteration and those for MLflow."""
    from grpo_mlflow.cli.command import importing

    with importing():
        from grpo_mlflow import runs
        from grpo_mlflow.training import rollout_files
    from grpo_mlflow.config import resolve
    from grpo_mlflow.tracking.sender import Sender
    from grpo_mlflow.tracking.tracker import MlflowTracker
    from grpo_mlflow.training.trainer import Trainer

    clock: dict[str, list[float]] = {"iterate": [], "files": [], "mlflow": []}

    def time_calls(owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def timed(*arguments: Any) -> Any:
            began = time.thread_time()
            result = inner(*arguments)
            if len(clock["iterate"]) >= _WARM_UP or name == "iterate":
                clock[name].append(time.thread_time() - began)
            return result

        setattr(owner, method, timed)

    time_calls(Trainer, "iterate", "iterate")
    time_calls(rollout_files, "write", "files")
    time_calls(MlflowTracker, "text", "files")
    time_calls(Sender, "send", "mlflow")
    store = f"tracking.uri=sqlite:///{folder}/mlflow.db"
    os.chdir(folder)
    runs.train(resolve("tiny", [store, f"train.iterations={iterations}", "eval.enabled=false"]))
    del clock["iterate"][:_WARM_UP]
    return {name: sum(seconds) / (iterations - _WARM_UP) for name, seconds in clock.items()}


def first_iteration(folder: Path) -> dict[str, float]:
    """Return seconds from the command to the end of the first iteration, in which held-out problems are evaluated
    first: of the cached default as the first run of a store, as a further run, and as one that resumes."""
    folder.mkdir()
    store = f"tracking.uri=sqlite:///{folder}/mlflow.db"

    def begin(*words: str) -> tuple[float, str]:
        command = [sys.executable, "-u", "-m", "grpo_mlflow", "train", store, *words]
        began, reached, run = time.perf_counter(), 0.0, ""
        with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("iter ") and not reached:
                    reached = time.perf_counter() - began
                if line.startswith("run "):
                    run = line.split()[1]
        if process.returncode:
            raise SystemExit(f"{command} ended with {process.returncode}")
        return reached, run

    new, run = begin("train.iterations=12")
    further, _ = begin("train.iterations=12")
    resumed, _ = begin("train.iterations=14", f"resume={run}")
    return {"new": new, "further": further, "resumed": resumed}


def _iteration(folder: str) -> Callable[..., float]:
    """Return what measures processor seconds of an iteration of `prompts` of `length` tokens with `k` completions."""
    from dataclasses import replace

    import torch
    from accelerate import Accelerator

    from grpo_mlflow.config import TrainConfig
    from grpo_mlflow.generation import LocalGenerator, Sampling
    from grpo_mlflow.model import policy
    from grpo_mlflow.runtime import allocator
    from grpo_mlflow.training import rollouts
    from grpo_mlflow.training.learner import Learner, Sizes
    from grpo_mlflow.types import Completion, Problem, Prompt, Rollout, Verdict

    allocator.keep_freed()
    actor = policy.load(folder, torch.device("cpu"))
    sampler = replace(actor, eos_ids=())

    def seconds(prompts: int, k: int, length: int, tokens: int = 16) -> float:
        config = TrainConfig(batch_size=64, kl_coef=0.0, lr=1e-6, grad_accum_steps="auto")
        learner = Learner(actor, None, Accelerator(cpu=True), config, Sizes(1.0, tokens, prompts * k, 10))
        asked = [Prompt(f"p{i}", (), tuple(4 + (i + 7 * j) % 60 for j in range(length))) for i in range(prompts)]
        spent = []
        for turn in range(4):
            began = time.process_time()
            found: list[list[Completion]] = []
            for start in range(0, prompts, 16):
                found += LocalGenerator(sampler, 16).generate(
                    asked[start : start + 16], k, Sampling(tokens), 0, (turn,)
                )
            judged = [
                [Rollout(prompt, c, Verdict(float(j % 2), {}, False, None)) for j, c in enumerate(row)]
                for prompt, row in zip(asked, found, strict=True)
            ]
            problems = [Problem(prompt.problem_id, i, ()) for i, prompt in enumerate(asked)]
            learner.update(rollouts.form_groups(problems, judged, "group"), 0, turn)
            spent.append(time.process_time() - began)
        return min(spent[1:])

    seconds(4, 8, 16)
    return seconds


def scaling(folder: str) -> dict[str, list[dict[str, float]]]:
    """Return processor seconds of an iteration by rollouts, prompt length and K, on a model of a million weights."""
    seconds = _iteration(folder)
    return {
        "rollouts": [{"rollouts": 64 * n, "seconds": seconds(8 * n, 8, 32)} for n in (1, 2, 4, 8, 16)],
        "prompt_length": [{"tokens": n, "seconds": seconds(8, 8, n)} for n in (32, 64, 128, 256, 512)],
        "k": [{"k": n, "seconds": seconds(64 // n, n, 128)} for n in (2, 4, 8, 16, 32)],
    }


def model_sizes(like: str, folder: Path) -> list[dict[str, float]]:
    """Return processor seconds of an iteration by the number of weights: the model `like`, made wider."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    found = []
    for width in (64, 128, 256, 512, 1024):
        config = AutoConfig.from_pretrained(like)
        config.hidden_size, config.intermediate_size = width, 4 * width
        model = AutoModelForCausalLM.from_config(config)
        wide = str(folder / f"wide{width}")
        model.save_pretrained(wide)
        AutoTokenizer.from_pretrained(like).save_pretrained(wide)
        found.append({"parameters": model.num_parameters(), "seconds": _iteration(wide)(8, 8, 32)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--model", type=Path, required=True, help="the model `tiny` of benchmarks.models")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    output = arguments.output.absolute() if arguments.output else None
    model = str(arguments.model.absolute())
    started = startup()
    with tempfile.TemporaryDirectory() as folder:
        tracked = tracking(Path(folder), arguments.iterations)
        os.chdir(_ROOT)
        first = first_iteration(Path(folder) / "new")
        sizes = model_sizes(model, Path(folder))
    result = {"startup": started, "first_iteration": first, "tracking": tracked, **scaling(model), "model_size": sizes}
    result["tracking_share"] = (tracked["files"] + tracked["mlflow"]) / tracked["iterate"]
    text = json.dumps(result, indent=1)
    print(text)
    if output:
        output.write_text(text + "\n")


if __name__ == "__main__":
    main()
