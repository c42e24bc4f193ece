"""What a kill may leave of a file that is read back: nothing, an empty file, or the first half of one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
import torch

from grpo_mlflow import runs, tracking
from grpo_mlflow.config import parse_arguments, resolve
from grpo_mlflow.errors import UserError
from grpo_mlflow.runs import stored
from grpo_mlflow.runtime.files import replacing, write_whole
from grpo_mlflow.training import evaluation
from grpo_mlflow.types import Completion, Prompt, Rollout, Verdict
from tests.support.small_runs import curves, newest, resume, small, weights

CONSTANT = ("train.lr_schedule=constant", "seed=1234")


def first_lines(path: Path) -> bytes:
    lines = path.read_bytes().splitlines(keepends=True)
    return b"".join(lines[: len(lines) // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a byte less": lambda path: path.write_bytes(path.read_bytes()[:-1]),
}
CUT: dict[str, Callable[[Path], object]] = {
    **DAMAGES,
    "half of the lines": lambda path: path.write_bytes(first_lines(path)),  # which is a config by its looks
    "no text": lambda path: path.write_bytes(b"\xff\xfe"),
    "another text": lambda path: path.write_text("[1]\n"),
}


@pytest.fixture(scope="module")
def short(shared_store: str) -> runs.Finished:
    """A run of two iterations."""
    return runs.train(small(shared_store, *CONSTANT, "train.iterations=2"))


@pytest.fixture(scope="module")
def undisturbed(shared_store: str) -> runs.Finished:
    """A run of four."""
    return runs.train(small(shared_store, *CONSTANT))


@pytest.fixture
def damaged(short: runs.Finished, tmp_path: Path) -> Iterator[Path]:
    """The folder of the run, whose files are put back after the test."""
    shutil.copytree(short.run_dir, tmp_path / "sound")
    yield short.run_dir
    shutil.rmtree(short.run_dir)
    shutil.copytree(tmp_path / "sound", short.run_dir)


def found(store: str, name: str) -> tuple[dict[str, object], int | None]:
    """The settings that a resume of a run has, and the iteration that it goes on from."""
    words = [f"resume={name}", f"tracking.uri={store}"]
    resolved, run = stored.resolve_training(parse_arguments(words, "train", ""), name)
    assert run.run_id == name
    settings = resolved.config.model_dump() | {"resume": None}
    return settings, run.checkpoint.iteration if run.checkpoint else None


@pytest.mark.parametrize("damage", CUT)
def test_a_run_whose_config_is_not_whole_has_that_of_its_newest_checkpoint(
    damage: str, damaged: Path, short: runs.Finished, shared_store: str, caplog: pytest.LogCaptureFixture
) -> None:
    sound = found(shared_store, short.run_id)
    assert sound[1] == 2
    CUT[damage](damaged / "config" / "resolved.yaml")
    assert found(shared_store, short.run_id) == sound
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith(f"run {short.run_id}: ")
    assert line.endswith("; taking that of iter_002")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", "config.json", "model.safetensors", "trainer/state.json"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(
    damage: str, name: str, damaged: Path, short: runs.Finished, shared_store: str
) -> None:
    settings = found(shared_store, short.run_id)[0]
    DAMAGES[damage](damaged / "checkpoints" / "iter_002" / name)
    DAMAGES[damage](damaged / "config" / "resolved.yaml")
    assert found(shared_store, short.run_id) == (settings, 1)


@pytest.mark.parametrize("text", ["{}", "[1]", "null", '{"iteration": 2, "score": null, "files": {"a": 1}}'])
def test_a_manifest_of_another_shape_is_none(text: str, damaged: Path, short: runs.Finished, shared_store: str) -> None:
    (damaged / "checkpoints" / "iter_002" / "manifest.json").write_text(text)
    (damaged / "checkpoints" / "iter_002").with_name("iter_foo").mkdir()
    assert found(shared_store, short.run_id)[1] == 1


def test_a_run_without_a_whole_checkpoint_does_not_begin_again_in_silence(
    damaged: Path, short: runs.Finished, shared_store: str
) -> None:
    for path in damaged.glob("checkpoints/iter_*/manifest.json"):
        path.write_text("{}")
    with pytest.raises(
        UserError, match=r"none of its checkpoints is whole \(iter_001, iter_002\).*; allowed: "
    ) as caught:
        found(shared_store, short.run_id)
    assert "\n" not in str(caught.value)


def test_a_run_that_was_killed_before_its_config_was_written_can_be_ended(
    shared_store: str,
) -> None:
    client = mlflow.MlflowClient(shared_store)
    tracker = tracking.start(resolve("tiny", [f"tracking.uri={shared_store}"]).config.tracking, "train")
    with pytest.raises(UserError, match=f"run {tracker.run_id}: has no artifact config/resolved.yaml"):
        found(shared_store, tracker.run_id)
    assert client.get_run(tracker.run_id).info.status == "FAILED"


def test_a_run_whose_folder_cannot_be_made_is_failed_not_running(store: str) -> None:
    tracking.start(resolve("tiny", [f"tracking.uri={store}"]).config.tracking, "train").finish("FINISHED")
    client = mlflow.MlflowClient(store)
    folder = Path(client.get_run(newest(store)).info.artifact_uri).parent.parent
    shutil.rmtree(folder)
    folder.write_text("a file where the runs of the experiment should be")
    with pytest.raises(UserError, match="Not a directory"):
        runs.train(small(store))
    assert client.get_run(newest(store)).info.status == "FAILED"
    assert len(client.search_runs(["1"])) == 2


@pytest.mark.parametrize("damage", ["empty", "half"])
def test_a_resume_with_a_config_that_is_not_whole_ends_like_an_undisturbed_run(
    damage: str, store: str, undisturbed: runs.Finished, shared_store: str
) -> None:
    short = runs.train(small(store, *CONSTANT, "train.iterations=2"))
    DAMAGES[damage](short.run_dir / "config" / "resolved.yaml")
    extended = resume(store, short.run_id, "train.iterations=4")
    assert extended.run_id == short.run_id
    one, two = weights(undisturbed, 4), weights(extended, 4)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert curves(store, extended.run_id) == curves(shared_store, undisturbed.run_id)
    again = resolve(str(short.run_dir / "config" / "resolved.yaml")).config
    assert again.train.iterations == 4


def test_a_recording_that_is_not_whole_is_one_line(damaged: Path, short: runs.Finished, shared_store: str) -> None:
    for damage in ("empty", "half", "half of the lines"):
        sound = (damaged / "rollouts" / "iter_001.jsonl").read_bytes()
        CUT[damage](damaged / "rollouts" / "iter_001.jsonl")
        words = [*CONSTANT, "train.iterations=2", f"data.source=runs:/{short.run_id}"]
        with pytest.raises(UserError, match=r"^data\.source = .*: iteration 1 (is no whole recording|holds \d+ )"):
            runs.train(small(shared_store, *words))
        (damaged / "rollouts" / "iter_001.jsonl").write_bytes(sound)


@pytest.mark.parametrize("synced", [True, False])
def test_a_write_that_fails_leaves_what_was_there(synced: bool, tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_whole(path, "first", synced=synced)

    def write() -> None:
        with replacing(path, synced=synced) as stream:
            stream.write(b"sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "first"
    write_whole(path, "second \N{SNOWMAN}", synced=synced)
    assert path.read_text(encoding="utf-8") == "second \N{SNOWMAN}"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("damage", sorted(CUT.keys() - {"missing", "a byte less"}))  # a line's end is no loss
def test_an_evaluation_that_is_not_whole_is_one_line(damage: str, tmp_path: Path) -> None:
    prompt, verdict = Prompt("p", ({"role": "user", "content": "1"},), (1,)), Verdict(1.0, {}, True, "1")
    rollouts = (Rollout(prompt, Completion((7,), "1", (-1.0,), "stop", 0), verdict),) * 2
    whole = evaluation.Evaluation((evaluation.Outcome("p", rollouts, None, 0.0),) * 3, (1,))
    path = tmp_path / "evaluation.jsonl"
    evaluation.write(path, whole)
    assert evaluation.read(path) == whole
    CUT[damage](path)
    with pytest.raises(UserError, match="is no whole evaluation: ") as caught:
        evaluation.read(path)
    assert "\n" not in str(caught.value)
