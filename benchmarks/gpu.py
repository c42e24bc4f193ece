"""Is this package right on a CUDA device, how fast is it, how much memory does it take? Needs no network there.

    python -m benchmarks.gpu                    # at most 8 minutes; writes benchmarks/results/gpu.json
    python -m benchmarks.gpu --tiny             # every part on the CPU, in seconds
    python -m benchmarks.gpu --parts update     # only the parts whose names begin so

Models of the shapes of Qwen3-0.6B and 1.7B get random weights. Parts: the device's own rate; loading; log-probs and an
update against the CPU; sampling K copies of a prompt, sampled log-probs against recomputed ones; full and LoRA updates.
Each part runs in a process of its own with a limit of time: one that fails or hangs is recorded with what it has
measured, and the next begins. Exit code 1 if any failed.

It needs torch, transformers, peft (which brings accelerate, psutil and PyYAML), safetensors, numpy and pydantic, but
neither mlflow nor optuna nor openai. If pydantic is missing, take it along as wheels, 3 MB. With a network, for
Python 3.12:

    python -m pip download --only-binary=:all: --python-version 3.12 --platform manylinux_2_17_x86_64 \
        --dest build/wheels "pydantic>=2.8,<3"

and on the CUDA machine, from the sources' folder:

    python -m pip install --no-index --find-links build/wheels pydantic
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_parts
from benchmarks.gpu_parts import Figures
from benchmarks.gpu_shapes import FORMULA, QWEN3, TINY

_LIMIT = 470.0  # seconds of all parts together
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "pydantic")
_COLUMNS = ("tokens_per_s", "peak_gib", "mfu", "max_difference", "mean_difference")
_PUBLISHED = [  # prime-rl, benchmarks/results/BENCHMARKS.md: activations recomputed, one sequence in a micro-batch
    {"case": "Qwen3-0.6B full, 16384 tokens", "tokens_per_s": 11900.0, "peak_gib": 12.5, "mfu": 0.11},
    {"case": "Qwen3-0.6B LoRA 16, 16384 tokens", "tokens_per_s": 13300.0, "peak_gib": 5.1, "mfu": 0.11},
    {"case": "Qwen3-4B LoRA 16, 16384 tokens", "tokens_per_s": 6200.0, "peak_gib": 23.3, "mfu": 0.22},
]


@dataclass(frozen=True)
class Part:
    """Something to measure, within `limit` seconds."""

    name: str
    limit: float
    measure: Callable[[], Iterable[Figures]]


def parts(root: Path, peak: float | None) -> list[Part]:
    """Return the parts for a GPU; models are kept in `root`, `peak` is the device's operations per second if given."""
    agreement = partial(gpu_parts.agreement, k=4, prompt=32, completion=64)
    sampling = partial(gpu_parts.sampling, dtypes=("bfloat16", "float32"), k=64, prompts=(32, 512), new=128)
    update = partial(gpu_parts.update, lengths=(1024, 4096, 16384), peak=peak)
    found = [Part("device", 30, partial(gpu_parts.device_rates, "cuda"))]
    for shape in QWEN3:
        name, given = shape.name, (shape, root, "cuda")
        found += [
            Part(f"loading {name}", 50, partial(gpu_parts.loading, *given)),
            # cut to two layers: the CPU's side takes seconds
            Part(f"agreement {name}", 75, partial(agreement, replace(shape, layers=2), root, "cuda")),
            Part(f"sampling {name}", 75, partial(sampling, *given)),
            Part(f"update {name} full", 75, partial(update, *given, rank=None)),
            Part(f"update {name} LoRA 16", 75, partial(update, *given, rank=16)),
        ]
    return found


def tiny_parts(root: Path, peak: float | None) -> list[Part]:
    """Return the same parts with sizes for a CPU."""
    given, limit = (TINY, root, "cpu"), 120.0
    sampling = partial(gpu_parts.sampling, dtypes=("bfloat16", "float32"), k=4, prompts=(8, 16), new=8)
    update = partial(gpu_parts.update, lengths=(16, 48), peak=peak)
    return [
        Part("device", limit, partial(gpu_parts.device_rates, "cpu")),
        Part("loading", limit, partial(gpu_parts.loading, *given)),
        Part("agreement", limit, partial(gpu_parts.agreement, *given, k=2, prompt=8, completion=32)),
        Part("sampling", limit, partial(sampling, *given)),
        Part("update full", limit, partial(update, *given, rank=None)),
        Part("update LoRA", limit, partial(update, *given, rank=16)),
    ]


def run(part: Part, limit: float, method: str = "fork") -> dict[str, Any]:
    """Measure the part in a process of its own, for `limit` seconds at most; return its record.

    An error after which CUDA fails every later call in a process thus ends with the part.
    """
    record: dict[str, Any] = {"seconds": 0.0, "limit": limit, "rows": [], "modules": [], "error": None}
    if limit <= 0:
        return {**record, "error": "not begun: the time of all parts together is spent"}
    context: Any = multiprocessing.get_context(method)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(part, send))
    began = time.perf_counter()
    process.start()
    send.close()  # so that the end of the process is the end of the pipe
    while True:
        if not receive.poll(max(0.0, began + limit - time.perf_counter())):
            record["error"] = f"not done after {limit:g} s"
            process.kill()
            break
        try:
            kind, value = receive.recv()
        except (EOFError, OSError):  # the latter if the process was killed while it sent something
            break
        if kind == "rows":
            record["rows"].append(value)
        else:
            record[kind] = value
    process.join()
    record["seconds"] = time.perf_counter() - began
    if process.exitcode and record["error"] is None:
        record["error"] = f"its process ended with exit code {process.exitcode}"
    return record


def _work(part: Part, send: Connection) -> None:
    try:
        for row in part.measure():
            odd = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
            if odd:
                raise ArithmeticError(f"{row['case']}: {odd[0]} is {row[odd[0]]}")
            send.send(("rows", row))
    except Exception as error:  # whatever goes wrong in a part: the others have still to run
        send.send(("error", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"))
    send.send(("modules", sorted({name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names)))


def run_all(chosen: Sequence[Part], limit: float = _LIMIT) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the parts one after the other, `limit` seconds in all; yield the name and record of each as it ends."""
    method = _method()
    ends = time.perf_counter() + limit
    for part in chosen:
        record = run(part, min(part.limit, round(ends - time.perf_counter(), 1)), method)
        error = f", FAILED: {record['error']}" if record["error"] else ""
        print(f"{part.name}: {record['seconds']:.1f} s{error}", flush=True)
        yield part.name, record


def _method() -> str:
    """Return how parts start: "fork" saves their imports, but fails if an import here has already called CUDA."""
    (row,) = run(Part("fork", 30, _forked), 30)["rows"]
    return "spawn" if row["too_late"] else "fork"


def _forked() -> Iterable[Figures]:
    yield {"case": "fork", "too_late": torch.cuda._is_in_bad_fork()}


def table(records: dict[str, dict[str, Any]]) -> str:
    """Return all rows, what went wrong, and the published figures as one table."""
    lines = [f"{'':60}{'tokens/s':>10}{'peak GiB':>10}{'MFU':>7}{'max diff':>10}{'mean diff':>10}"]
    for name, record in records.items():
        lines += [_line(name, row) for row in record["rows"]]
        if record["error"]:
            lines.append(f"{name}: FAILED: {record['error']}")
    lines += [_line("prime-rl, 1xH100", row) for row in _PUBLISHED]
    return "\n".join(lines)


def _line(name: str, row: Figures) -> str:
    formats = {"tokens_per_s": (10, ".0f"), "peak_gib": (10, ".2f"), "mfu": (7, ".1%")}
    cells = ""
    for key in _COLUMNS:
        width, form = formats.get(key, (10, ".1e"))
        cells += f"{row[key]:>{width}{form}}" if key in row else " " * width
    others = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k not in _COLUMNS]
    return f"{name + ': ' + row['case']:60}{cells}  {', '.join(others[1:])}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU: does every part work?")
    parser.add_argument("--parts", nargs="+", default=[""], metavar="NAME", help="only parts whose names begin so")
    parser.add_argument("--peak-tflops", type=float, help="the device's bfloat16 rate; known of H100, H200 and A100")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    arguments = parser.parse_args()
    peak = arguments.peak_tflops * 1e12 if arguments.peak_tflops else None
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        every = (tiny_parts if arguments.tiny else parts)(Path(folder), peak)
        chosen = [part for part in every if part.name.startswith(tuple(arguments.parts))]
        if not chosen:
            parser.error(f"--parts: no such part; allowed: the beginnings of {', '.join(p.name for p in every)}")
        records: dict[str, dict[str, Any]] = {}
        for name, record in run_all(chosen):
            records[name] = record
            _write(records, arguments.output)  # each time: what is measured stays if the machine goes away
    print(table(records))
    print(FORMULA)
    sys.exit(any(record["error"] for record in records.values()))


def _write(records: dict[str, dict[str, Any]], output: Path) -> None:
    imported = {name for record in records.values() for name in record["modules"] if not name.startswith("_")}
    found = {
        "versions": {name: _version(name) for name in _PACKAGES},
        "imported": sorted(imported),
        "formula": FORMULA,
        "parts": {
            name: {key: value for key, value in record.items() if key != "modules"} for name, record in records.items()
        },
        "published": _PUBLISHED,
    }
    output.write_text(json.dumps(found, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
