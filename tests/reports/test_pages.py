"""A page loads nothing, says nothing but what it was given, and its texts are texts."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_mlflow import redaction
from grpo_mlflow.algorithm.statistics import Estimate, paired_difference
from grpo_mlflow.reports import run, samples, study
from grpo_mlflow.reports.charts import fits_log, thinned
from grpo_mlflow.reports.records import Confirmed, Setting, Standing, TrialRecord
from grpo_mlflow.reports.texts import MOST, embedded, escaped, plain
from tests.support.pages import Parsed
from tests.support.run_records import evaluation, run_record, study_record, table

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "--><!--<script>",
    "\"' onload='x' &lt;b&gt;",
    "a\x00b\x07\x1b[31m\x7f\x85",
    "half \ud800 of a pair \udfff",
    "turned \u202e around \u2066",
    "line\u2028separators\u2029",
    "é漢字🙂",
    "$& `${x}` \\u003c \\",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_a_text_wherever_it_stands(text: str) -> None:
    record = run_record(
        name=text,
        tables={0: table((text, text, text, False)), 2: table((text, text, text, True))},
        remarks=[text],
        facts={text: text},
        settings=[(text, text, text)],
        commands={text: text},
    )
    clean = Parsed(run.page(run_record(tables={0: table(("", "", "", False)), 2: table(("", "", "", True))})))
    page = run.page(record)
    page.encode()
    found = Parsed(page)
    assert [tag for tag, _ in found.elements if tag in ("script", "style", "img")] == ["style", *["script"] * 3]
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert found.data["samples"][0]["prompt"] == found.data["samples"][0]["answers"][0]["completion"] == plain(text)
    assert found.data["charts"] == clean.data["charts"]
    assert found.said.count(plain(text)) >= 9
    of_study = study.page(study_record(name=text, cautions=text, lines=[(text, text), ("verdict", text)]))
    assert [tag for tag, _ in Parsed(of_study).elements if tag == "script"] == ["script"] * 3


@pytest.mark.parametrize("page", [run.page(run_record()), study.page(study_record())])
def test_a_page_loads_nothing(page: str) -> None:
    elements = Parsed(page).elements
    assert not [
        name for _, attributes in elements for name in attributes if name in ("src", "href", "srcset", "action")
    ]
    assert "url(" not in page
    assert "@import" not in page
    (policy,) = [a["content"] for tag, a in elements if tag == "meta" and "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none';")


def test_what_is_shown_of_a_text() -> None:
    assert plain("a\x00b\tc\nd\ud800\u202e") == "a\\x00b\tc\nd\\ud800\\u202e"
    long = plain("x" * MOST + "y" * MOST)
    assert long.startswith("xxx")
    assert long.endswith("yyy")
    assert f"{MOST} characters left out" in long
    assert escaped('<b a="1">') == "&lt;b a=&quot;1&quot;&gt;"
    assert embedded({"a": ["</script>", 1.5, None]}) == '{"a":["\\u003c/script\\u003e",1.5,null]}'


def test_a_page_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_shown", {})
    monkeypatch.setattr(redaction, "_pattern", None)
    redaction.learn("p<\"w&'1x9")
    secret = "p<\"w&'1x9"
    page = run.page(run_record(tables={0: table((secret, secret, secret, True))}, commands={secret: secret}))
    assert "w&amp;" not in page
    assert "w\\u0026" not in page
    assert "***" in page


def test_the_numbers_of_a_page_are_those_of_the_figures() -> None:
    evaluations = [evaluation(0, [0.1, 0.2], greedy_accuracy=1 / 3), evaluation(5, [0.3, 0.7], greedy_accuracy=2 / 3)]
    found = Parsed(run.page(run_record(evaluations=evaluations, standing=None)))
    mark = found.mark("share solved", "pass@1")
    names = {"y": "pass@1", "low": "pass@1_low", "high": "pass@1_high"}
    assert {name: mark[name] for name in names} == {n: [each[key] for each in evaluations] for n, key in names.items()}
    assert mark["x"] == [0, 5]
    assert found.mark("share solved", "greedy")["y"] == [1 / 3, 2 / 3]
    assert found.mark("reward", "correct")["y"] == [0.4, 0.4]
    assert found.mark("nats per token", "entropy")["y"] == [0.6, None]
    labels = {mark["label"] for chart in found.data["charts"] for mark in chart["marks"]}
    assert "std" not in labels  # a spread is no part of the reward


def test_the_verdict_of_a_run_by_hand() -> None:
    """Of 8 problems 7 rise from 0 to 1, one stays: +7/8, and 7 of 7 that moved have gained."""
    first, last = [0.0] * 8, [1.0] * 7 + [0.0]
    evaluations = [evaluation(0, first), evaluation(4, [1.0] * 8), evaluation(6, last)]
    record = run_record(evaluations=evaluations, standing=Standing(first, last, 4, 4, 1.0))
    said = Parsed(run.page(record)).said
    change = paired_difference(last, first)
    assert change.value == 7 / 8
    assert f"Change +0.875 [{change.low:+.3f}, {change.high:+.3f}]: better, beyond the noise of problems." in said
    assert "Held-out pass@1 0.000 [" in said
    assert "1.000iteration 4 (picked on these problems" in said
    assert "8 problems" in said


def test_a_run_without_rates_says_that_its_interval_is_not_known() -> None:
    said = Parsed(run.page(run_record(standing=None))).said
    assert "Change +0.250. The run has kept no pass@1 of each problem" in said
    assert "better" not in said


def test_a_run_that_has_nothing_yet_has_a_page() -> None:
    found = Parsed(run.page(run_record(evaluations=[], iterations=[], standing=None, iteration=0)))
    assert found.data["charts"] == []
    assert "Nothing was evaluated yet" in found.said


def test_the_same_problems_stand_beside_each_other_and_changed_ones_first() -> None:
    first = table(("a", "A?", "no", False), ("b", "B?", "no", False), ("c", "C?", "yes", True), ("gone", "?", "", True))
    last = table(("a", "A?", "no", False), ("b", "B?", "yes", True), ("c", "C?", "no", False), ("new", "?", "", True))
    found = samples.compared({0: first, 10: last})
    assert [(each["id"], each["turn"]) for each in found] == [
        ("b", "wrong, then right"),
        ("c", "right, then wrong"),
        ("a", "wrong first and last"),
    ]
    assert [(a["iteration"], a["completion"]) for a in found[0]["answers"]] == [(0, "no"), (10, "yes")]


def test_many_evaluations_and_problems_are_thinned_evenly() -> None:
    rows = [(str(i), "?", "", i % 2 == 0) for i in range(100)]
    found = samples.compared({step: table(*rows) for step in range(0, 1000, 10)})
    assert len(found) == 24
    assert {each["turn"] for each in found} == {"right first and last", "wrong first and last"}
    steps = [answer["iteration"] for answer in found[0]["answers"]]
    assert (steps[0], steps[-1], len(steps)) == (0, 990, 8)
    assert thinned(1000)[-1] == 999
    assert len(set(thinned(1000))) == 600


@pytest.mark.parametrize(
    ("values", "log"),
    [([1e-5, 1e-3], True), ([0.5, 0.9], False), ([0.0, 1.0], False), ([-1.0, 100.0], False), ([None, None], False)],
)
def test_a_log_axis_is_for_values_that_are_far_apart(values: list[float | None], log: bool) -> None:
    assert fits_log(values) is log


def test_points_of_a_study_stand_where_their_trials_are() -> None:
    """A value that only a pruned trial has gets its own place on the axis of words."""

    def trial(number: int, value: Any, score: float, pruned: bool = False) -> TrialRecord:
        return TrialRecord(number, pruned, score, {"train.aggregation": value, "train.lr": 10.0**-number})

    trials = [trial(0, None, 0.1), trial(2, "dapo", 0.3), trial(3, "grpo", 0.2, pruned=True), trial(4, "dapo", 0.2)]
    confirmed = [Confirmed(2, Estimate(0.28, 0.2, 0.35), "fresh problems")]
    found = Parsed(study.page(study_record(trials=trials, confirmed=confirmed, winner=2))).data
    in_order, words, lr = found["charts"][:3]
    marks = {mark["label"]: mark for mark in in_order["marks"]}
    assert (in_order["x"]["whole"], marks["finished"]["x"], marks["finished"]["y"]) == (
        True,
        [0, 2, 4],
        [0.1, 0.3, 0.2],
    )
    assert (marks["pruned"]["x"], marks["pruned"]["y"]) == ([3], [0.2])
    assert (marks["best so far"]["x"], marks["best so far"]["y"]) == ([0, 2, 4], [0.1, 0.3, 0.3])
    again = marks["on fresh problems"]
    assert [again[name] for name in ("x", "y", "low", "high")] == [[2], [0.28], [0.2], [0.35]]
    assert words["x"]["categories"] == ["None", "dapo", "grpo"]
    assert [(m["x"], m["y"]) for m in words["marks"]] == [([0, 1, 1], [0.1, 0.3, 0.2]), ([2], [0.2])]
    assert (lr["x"]["log"], lr["marks"][0]["x"]) == (True, [1.0, 0.01, 0.0001])
    assert [found["names"][i].split("\n")[0] for i in lr["marks"][1]["of"]] == ["trial 3, pruned"]


def test_choices_that_are_numbers_stand_in_their_order() -> None:
    values = [0.001, 0.0001, None, 0.01, 0.0001]
    trials = [TrialRecord(i, False, 0.5, {"train.lr": value}) for i, value in enumerate(values)]
    found = Parsed(study.page(study_record(trials=trials, settings=[Setting("train.lr", "words")]))).data
    chart = found["charts"][1]
    assert chart["x"]["categories"] == ["0.0001", "0.001", "0.01", "None"]
    assert chart["marks"][0]["x"] == [1, 0, 3, 2, 0]


def test_what_nothing_cheaper_beats() -> None:
    costs = {10.0: 0.2, 20.0: 0.1, 30.0: 0.5, 40.0: 0.4}
    trials = [TrialRecord(i, False, score, {}, tokens=cost) for i, (cost, score) in enumerate(costs.items())]
    found = Parsed(study.page(study_record(trials=trials, settings=[])))
    (front,) = [mark for mark in found.data["charts"][1]["marks"] if mark["kind"] == "steps"]
    assert (front["x"], front["y"]) == ([10, 30], [0.2, 0.5])
