"""The benchmark of weights in fewer bits: what it reads off runs, and how it compares them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import fewer_bits
from grpo_mlflow.config import resolve


def test_outcomes_are_paired_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewer_bits, "RESULTS", tmp_path / "results.json")
    for seed, plain, other in ((1, 0.8, 0.9), (2, 0.6, 0.6), (3, 0.7, 0.9)):
        for name, after in (("adapter", plain), ("adapter-base_in_4_bits", other)):
            line = f"held-out pass@1   0.100 [0.000, 0.522]  ->  {after:.3f} [0.000, 0.578]   (95% intervals)"
            (tmp_path / f"{name}-{seed}.log").write_text(f"begun\n{line}\n")
    (tmp_path / "all_weights-1.log").write_text("begun, and killed")
    fewer_bits.report(tmp_path, [1, 2, 3])
    found = json.loads((tmp_path / "results.json").read_text())["outcomes"]
    assert found["all weights"]["pass@1"] == {}
    assert found["adapter, base in 4 bits"]["pass@1"] == {"1": 0.9, "2": 0.6, "3": 0.9}
    # differences .1, 0, .2: mean .1, standard deviation .1, and t with 2 degrees of freedom is 4.303
    assert found["adapter, base in 4 bits"]["difference"] == pytest.approx([0.1, -0.1484, 0.3484], abs=1e-4)


def test_the_variants_are_configs() -> None:
    for words in {**fewer_bits.VARIANTS, **fewer_bits.WITH_REFERENCE}.values():
        resolve("tiny", [*words])


def test_the_table_of_the_docs_is_that_of_the_results() -> None:
    found = json.loads(fewer_bits.RESULTS.read_text())["bytes"]
    text = (fewer_bits.ROOT / "docs/models.md").read_text()
    assert all(line in text for line in fewer_bits.bytes_table(found).splitlines())
    errors = [abs(measured / planned - 1) for own in found.values() for measured, planned in own.values() if planned]
    assert max(errors) <= 0.1
