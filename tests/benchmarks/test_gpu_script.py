"""`benchmarks.gpu` on the CPU with tiny sizes: what a CUDA machine without MLflow, Optuna and openai is given."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_parts
from benchmarks.gpu import Part
from benchmarks.gpu_shapes import QWEN3, TINY, operations
from tests.support.paths import ROOT

ABSENT = ("mlflow", "optuna", "openai")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Return what a tiny run printed and wrote; whoever imports a package that is absent there fails."""
    folder = tmp_path_factory.mktemp("gpu")
    for name in ABSENT:
        (folder / f"{name}.py").write_text("raise ImportError('not on that machine')\n")
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--peak-tflops", "0.1"]
    done = subprocess.run(
        [*command, "--output", str(folder / "gpu.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "gpu.json").read_text())


def test_every_part_measures_finite_numbers(finished: tuple[str, dict[str, Any]]) -> None:
    _, written = finished
    parts = written["parts"]
    assert list(parts) == ["device", "loading", "agreement", "sampling", "update full", "update LoRA"]
    for name, record in parts.items():
        assert record["error"] is None
        assert record["rows"], name
        assert all(math.isfinite(v) for row in record["rows"] for v in row.values() if isinstance(v, int | float))
        assert all(row.get("path", "packed") == "packed" for row in record["rows"])  # ours, not the padded one
    assert all(row["mfu"] > 0 for name in ("update full", "update LoRA") for row in parts[name]["rows"])


def test_the_same_device_agrees_with_itself(finished: tuple[str, dict[str, Any]]) -> None:
    rows = {row["case"]: row for row in finished[1]["parts"]["agreement"]["rows"]}
    assert rows["cpu float32, log-probs, packed rows"]["max_difference"] == 0
    assert rows["cpu float32, change of weights / lr"]["max_difference"] == 0
    assert 0 < rows["cpu float32, log-probs, padded rows"]["max_difference"] < 1e-5
    assert 1e-5 < rows["cpu bfloat16, log-probs, packed rows"]["max_difference"] < 1e-2


def test_log_probs_that_differ_too_much_fail_the_part_after_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_parts, "_ALLOWED", {"float32": -1.0, "bfloat16": 1.0})  # any difference is too much
    shape = replace(TINY, vocabulary=512)
    rows = []
    with pytest.raises(ArithmeticError, match=r"^cpu float32: log-probs differ by \S+; allowed: -1$"):
        for row in gpu_parts.agreement(shape, tmp_path, "cpu", k=2, prompt=8, completion=6):
            rows.append(row["case"])
    assert rows[-1] == "cpu bfloat16, change of weights / lr"


def test_sampled_log_probs_are_those_computed_again(finished: tuple[str, dict[str, Any]]) -> None:
    for row in finished[1]["parts"]["sampling"]["rows"]:
        assert row["max_difference"] < (1e-5 if row["case"].startswith("float32") else 1e-2)


def test_a_table_shows_all_rows(finished: tuple[str, dict[str, Any]]) -> None:
    printed, written = finished
    for name, record in written["parts"].items():
        assert all(f"{name}: {row['case']}" in printed for row in record["rows"])
    assert "prime-rl, 1xH100: Qwen3-0.6B full, 16384 tokens" in printed


def test_what_is_absent_there_is_not_imported(finished: tuple[str, dict[str, Any]]) -> None:
    imported = finished[1]["imported"]
    assert {"torch", "transformers", "peft", "grpo_mlflow"} <= set(imported)
    assert not set(ABSENT) & set(imported)


def measure(*values: float, then: str = "") -> Iterator[dict[str, Any]]:
    for value in values:
        yield {"case": "a number", "value": value}
    if then == "fail":
        raise RuntimeError("out of memory")
    if then == "die":
        os._exit(9)
    if then == "hang":
        time.sleep(60)


def test_a_part_that_fails_keeps_its_rows_and_the_others_run() -> None:
    found = dict(
        gpu.run_all(
            [
                Part("fails", 30, partial(measure, 1.0, then="fail")),
                Part("dies", 30, partial(measure, 2.0, then="die")),
                Part("hangs", 2.0, partial(measure, 3.0, then="hang")),
                Part("overflows", 30, partial(measure, math.inf, 4.0)),
                Part("works", 30, partial(measure, 5.0)),
            ]
        )
    )
    assert {name: record["error"] for name, record in found.items()} == {
        "fails": "RuntimeError: out of memory",
        "dies": "its process ended with exit code 9",
        "hangs": "not done after 2 s",
        "overflows": "ArithmeticError: a number: value is inf",
        "works": None,
    }
    values = [[row["value"] for row in record["rows"]] for record in found.values()]
    assert values == [[1.0], [2.0], [3.0], [], [5.0]]
    assert "fails: FAILED: RuntimeError: out of memory" in gpu.table(found)


def test_a_failed_part_is_written_and_ends_with_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [Part("fails", 30, partial(measure, then="fail")), Part("works", 30, partial(measure, 1.0))]
    monkeypatch.setattr(gpu, "tiny_parts", lambda root, peak: named)
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--output", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [part["error"] for part in parts.values()] == ["RuntimeError: out of memory", None]
    assert "works: a number" in capsys.readouterr().out


def test_parts_end_when_the_time_of_all_is_spent() -> None:
    found = dict(gpu.run_all([Part("long", 30, partial(measure, then="hang")), Part("next", 30, measure)], limit=0.5))
    assert found["long"]["error"].startswith("not done after 0.")
    assert found["next"]["error"] == "not begun: the time of all parts together is spent"


def test_operations_of_an_update_by_hand() -> None:
    """Qwen3-0.6B at 16384 tokens, as published: 11.9k tokens/s are 11% of an H100's 989 TFLOP/s."""
    weights, shape = 596_049_920, QWEN3[0]
    attention = 6 * 28 * 2048 * 16384**2
    assert operations(shape, weights, 0, 16384) == 6 * weights * 16384 + attention
    assert operations(shape, 0, weights, 16384) == 4 * weights * 16384 + attention
    assert operations(shape, weights, 0, 16384) / 16384 * 11_900 / 989e12 == pytest.approx(0.11, abs=0.005)
