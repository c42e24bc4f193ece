"""The report that a run leaves: its numbers are the run's, a resumed run has the same, and it can be written again."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import mlflow
import pytest

from grpo_mlflow import runs, tracking
from grpo_mlflow.cli import report as command
from grpo_mlflow.errors import Pruned, UserError
from grpo_mlflow.runs import rewriting
from grpo_mlflow.runs.reporter import Reporter
from grpo_mlflow.tracking import NullTracker
from grpo_mlflow.training.progress import Progress
from grpo_mlflow.training.trainer import Trainer
from tests.support.artifacts import Memory, serving
from tests.support.pages import Parsed
from tests.support.small_runs import curves, newest, resume, small


def _page(finished: runs.Finished) -> Parsed:
    return Parsed((finished.run_dir / "report.html").read_text())


def _train_until(store: str, iteration: int) -> None:
    """Train up to an iteration that breaks, without a checkpoint of the one before it."""

    class Breaks(Trainer):
        def iterate(self, version: int) -> None:
            if version == iteration:
                raise SystemExit("as asked")
            super().iterate(version)

        def _keep(self) -> None:
            """Save nothing, as a process that is killed."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("grpo_mlflow.runs.train"), "Trainer", Breaks)
        runs.train(small(store, "checkpoint.save_interval=2"))


def test_the_numbers_of_the_report_are_the_metrics_of_the_run(store: str) -> None:
    finished = runs.train(small(store))
    known, page = curves(store, finished.run_id), _page(finished)
    shown = {
        ("share solved", "pass@1"): "eval/pass_at_1",
        ("share solved", "pass@4"): "eval/pass_at_4",
        ("share solved", "greedy"): "eval/greedy_accuracy",
        ("reward", "total"): "train/reward_mean",
        ("reward", "correct"): "train/reward_correct",
        ("nats per token", "entropy"): "train/entropy_mean",
        ("tokens", "mean"): "train/completion_length_mean",
        ("share", "training"): "train/truncated_frac",
        ("share", "evaluation"): "eval/truncated_frac",
        ("norm", "norm before clipping"): "train/grad_norm",
        ("learning rate", "learning rate"): "train/lr",
    }
    for (axis, label), key in shown.items():
        mark = page.mark(axis, label)
        points = [(x, y) for x, y in zip(mark["x"], mark["y"], strict=True) if y is not None]
        assert points == known[key], key
    band = page.mark("share solved", "pass@1")
    assert [(0, band["low"][0]), (4, band["high"][-1])] == [
        known["eval/pass_at_1_low"][0],
        known["eval/pass_at_1_high"][-1],
    ]
    assert finished.run_id in page.said
    assert "finished, 4 of 4 iterations" in page.said
    assert f"grpo train resume={finished.run_id} tracking.uri={store} train.iterations=8" in page.said


def test_the_report_says_of_a_run_what_its_end_says(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    finished = runs.train(small(store))
    said = capsys.readouterr().out.splitlines()
    page = _page(finished).said
    (change,) = [line for line in said if line.startswith("change ")]
    (held,) = [line for line in said if line.startswith("held-out")]
    (best,) = [line for line in said if line.startswith("best ")]
    first, last = (text.split(" [")[0].split()[-1] for text in held.split("  ->  "))
    assert f"Change {change.removeprefix('change').strip()}." in page
    assert f"before training{first}" in page
    assert f"last, iteration 4{last}" in page
    assert f"best{best.removeprefix('best').strip().replace(' at ', '')}" in page


def test_a_resumed_run_has_the_report_of_an_undisturbed_one(store: str) -> None:
    whole = runs.train(small(store, "checkpoint.save_interval=2"))
    with pytest.raises(SystemExit):
        _train_until(store, 3)
    stopped = newest(store)
    folder = Path(mlflow.MlflowClient(store).get_run(stopped).info.artifact_uri)
    ended = Parsed((folder / "report.html").read_text())
    assert "ended early, 3 of 4 iterations" in ended.said
    assert ended.mark("reward", "total")["x"] == [0, 1, 2]
    continued = resume(store, stopped)
    one, other = ((each.run_dir / "report.html").read_text() for each in (whole, continued))
    assert one.replace(whole.run_id, stopped) == other


def test_a_run_that_goes_back_shows_nothing_of_the_branch_that_it_gave_up(store: str) -> None:
    finished = runs.train(small(store))
    again = resume(store, str(finished.run_dir / "checkpoints" / "iter_002"), "train.iterations=3")
    assert _page(again).mark("reward", "total")["x"] == [0, 1, 2]
    assert _page(again).mark("share solved", "pass@1")["x"] == [0, 2, 3]


def test_a_pruned_trial_has_the_evaluation_that_it_was_pruned_at(store: str) -> None:
    def prune(progress: Progress, _: object) -> None:
        if progress.iteration == 2:
            raise Pruned("as asked")

    parent = mlflow.MlflowClient(store).create_run("0").info.run_id
    started: list[str] = []
    with pytest.raises(Pruned):
        runs.train(small(store), trial=runs.Trial(runs.Nested(parent, "trial-0"), started.append, prune))
    folder = Path(mlflow.MlflowClient(store).get_run(started[0]).info.artifact_uri)
    page = Parsed((folder / "report.html").read_text())
    assert page.mark("share solved", "pass@1")["x"] == [0, 2]
    assert "cannot be said" not in page.said


def test_a_run_without_evaluations_has_a_report(store: str) -> None:
    page = _page(runs.train(small(store, "eval.enabled=false")))
    assert "Nothing was evaluated yet" in page.said
    assert page.mark("reward", "total")["x"] == [0, 1, 2, 3]


def test_the_report_can_be_written_again(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished = runs.train(small(store))
    path = finished.run_dir / "report.html"
    before = path.read_text()
    path.unlink()
    capsys.readouterr()
    command.main(["--run", finished.run_id, f"tracking.uri={store}"])
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_text() == before
    command.main(["--run", str(finished.run_dir), "--output", str(tmp_path / "new" / "page.html")])
    assert Parsed((tmp_path / "new" / "page.html").read_text()).data == Parsed(before).data


def test_an_old_run_that_lacks_most_has_a_page_with_what_is_there(store: str, tmp_path: Path) -> None:
    finished = runs.train(small(store))
    old = tmp_path / finished.run_id
    shutil.copytree(finished.run_dir / "metrics", old / "metrics")
    page = Parsed(rewriting.write(rewriting.in_folder(old), "").read_text())
    assert page.mark("share solved", "pass@1") == _page(finished).mark("share solved", "pass@1")
    assert "cannot be said" in page.said
    assert page.data["samples"] == []
    (old / "config").mkdir()
    (old / "config" / "resolved.yaml").write_text("train: [no mapping]\n")
    (old / "metrics" / "eval_iter_002.json").write_text('{"cut off')
    (old / "checkpoints" / "iter_002" / "trainer").mkdir(parents=True)
    (old / "checkpoints" / "iter_002" / "trainer" / "state.json").write_text(json.dumps({"progress": {"new": 1}}))
    page = Parsed(rewriting.write(rewriting.in_folder(old), "").read_text())
    assert page.mark("share solved", "pass@1")["x"] == [0, 4]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], r"report: expected --run RUN_ID \(or a folder\) or --study_name NAME, one of them"),
        (["--run", "x", "--study_name", "y"], r"report: expected --run RUN_ID"),
        (["--run", "nothing"], r"run = 'nothing': neither a run id \(32 hex digits\) nor a folder"),
        (["--run", "{folder}"], r"run = .*: no folder of a run's files; allowed: one with metrics/, or a run id"),
        (["--run", "{folder}", "--output", "{folder}"], r"output = .*: is a folder; allowed: the file to write"),
        (["--run", "0" * 32], r"run 0{32}: is not in the MLflow store"),
        (
            ["--study_name", "x", "--storage", "sqlite:///{folder}/no.db"],
            r"search\.storage = .*: there is no such file",
        ),
    ],
)
def test_what_cannot_be_reported_is_one_line(words: list[str], line: str, store: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line) as caught:
        command.main([*(word.format(folder=tmp_path) for word in words), f"tracking.uri={store}"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "no.db").exists()


def test_a_run_that_trains_nothing_has_no_report(store: str) -> None:
    runs.evaluate(small(store), "")
    with pytest.raises(UserError, match=r"is a run of evaluate; allowed: one of train or optimize"):
        command.main(["--run", newest(store), f"tracking.uri={store}"])


def test_a_run_that_goes_on_elsewhere_has_its_whole_report(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train.iterations=2", "train.lr_schedule=constant", "tracking.experiment=remote")
    here, there = tmp_path / "here", tmp_path / "there"
    Memory.files = {}
    with serving(Memory) as address:
        tracking.connect(store).create_experiment("remote", address)
        for folder in (here, there):
            folder.mkdir()
        monkeypatch.chdir(here)
        finished = runs.train(small(store, *words))
        monkeypatch.chdir(there)
        again = resume(store, finished.run_id, "train.iterations=3")
        assert again.run_dir != finished.run_dir
        (name,) = [name for name in Memory.files if name.endswith("report.html")]
        sent = Memory.files[name].decode()
        assert sent == (again.run_dir / "report.html").read_text()
        page = Parsed(sent)
        assert page.mark("reward", "total")["x"] == [0, 1, 2]
        assert page.mark("share solved", "pass@1")["x"] == [0, 2, 3]
        assert [answer["iteration"] for answer in page.data["samples"][0]["answers"]] == [0, 2, 3]
        del Memory.files[name]
        monkeypatch.chdir(here)
        capsys.readouterr()
        command.main(["--run", finished.run_id, f"tracking.uri={store}"])
        assert capsys.readouterr().out == f"{finished.run_dir / 'report.html'}\n"
        assert Parsed(Memory.files[name].decode()).data == page.data


class Aside(NullTracker):
    """Notes what is published, and how."""

    def __init__(self, folder: Path) -> None:
        super().__init__("0" * 32, folder)
        self.published: list[tuple[str, str]] = []

    def publish(self, name: str) -> None:
        self.published.append(("at the end", name))

    def publish_aside(self, name: str) -> None:
        self.published.append(("aside", name))


def test_a_page_is_written_in_a_thread_and_the_last_one_at_the_end(tmp_path: Path, store: str) -> None:
    tracker = Aside(tmp_path)
    reporter = Reporter(small(store).config, tracker)
    reporter.note(Progress(iteration=0))
    thread = reporter._thread
    assert thread is not None
    assert thread.daemon
    reporter.end(Progress(iteration=4))
    assert not thread.is_alive()
    assert tracker.published[-1] == ("at the end", "report.html")
    assert set(tracker.published[:-1]) <= {("aside", "report.html")}
    assert "finished, 4 of 4 iterations" in (tmp_path / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_told_once_and_ends_nothing(
    tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(import_module("grpo_mlflow.runs.reporter"), "write_whole", full)
    tracker = Aside(tmp_path)
    for _ in range(2):
        reporter = Reporter(small(store).config, tracker)
        reporter.note(Progress(iteration=1))
        reporter.end(Progress(iteration=1))
        reporter.end(Progress(iteration=1))
    assert tracker.published == []
    assert [record.getMessage() for record in caplog.records] == [
        "report.html could not be written: [Errno 28] No space left on device"
    ] * 2
    assert not (tmp_path / "report.html").exists()
