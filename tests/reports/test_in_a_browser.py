"""What a browser makes of a page: curves, samples, no complaint, in time."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mlflow.reports import run, study
from grpo_mlflow.reports.texts import plain
from tests.support.pages import Parsed, opened
from tests.support.run_records import evaluation, run_record, study_record, table

SECONDS = 2.0
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>\x00\ud800\u202e"


def _drawn(page: str, folder: Path) -> tuple[Parsed, float]:
    """Return the page as it has become and the seconds that this took; nothing may be complained about."""
    path = folder / "page.html"
    path.write_text(page)
    found, complaints = opened(path)
    assert complaints == []
    return found, int(dict(found.elements[0][1])["data-drawn"] or "") / 1000


def test_the_curves_of_a_run_and_its_samples_are_drawn(tmp_path: Path) -> None:
    texts = {0: table(("p", HOSTILE, "x" * 10**6, False)), 2: table(("p", HOSTILE, HOSTILE, True))}
    found, _ = _drawn(run.page(run_record(name=HOSTILE, tables=texts)), tmp_path)
    drawn = [tag for tag, attributes in found.elements if tag == "canvas"]
    assert len(drawn) == len(found.data["charts"]) == 4
    assert "owned'" in found.said
    assert [tag for tag, _ in found.elements].count("img") == 0
    assert found.said.count(plain(HOSTILE)) >= 4  # title, heading, prompt, completion
    assert "iterationresultrewardtokens" in found.said


def test_a_thousand_trials_open_in_time(tmp_path: Path) -> None:
    page = study.page(study_record(1000))
    assert len(page) < 1_500_000
    for _ in range(3):  # a machine that stands still makes anything slow once
        found, seconds = _drawn(page, tmp_path)
        if seconds < SECONDS:
            break
    else:
        pytest.fail(f"took more than {SECONDS:.0f} s three times")
    assert [tag for tag, _ in found.elements].count("canvas") == len(found.data["charts"]) == 6
    assert [tag for tag, _ in found.elements].count("tr") == 1001


@pytest.mark.parametrize("value", [0.0, 1e-12, 1.0, 1e9, -3.0])
def test_values_that_are_all_equal_are_drawn(value: float, tmp_path: Path) -> None:
    figures = [{"iteration": i, "reward_mean": value, "lr": abs(value), "grad_norm": None} for i in range(2)]
    record = run_record(iterations=figures, evaluations=[evaluation(0, [0.5])], standing=None)
    found, _ = _drawn(run.page(record), tmp_path)
    assert [tag for tag, _ in found.elements].count("canvas") == 3
