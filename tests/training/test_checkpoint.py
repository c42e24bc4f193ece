"""Checkpoints are whole or absent, and the best one outlives the newest."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from grpo_mlflow.errors import UserError
from grpo_mlflow.training import optimizer_files
from grpo_mlflow.training.checkpoint import CheckpointStore, read
from tests.support.signals import at_every_line


def writes(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.txt").write_text(text)
        (folder / "trainer").mkdir()
        (folder / "trainer" / "state.txt").write_text(text * 2)

    return write


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    removed = []
    for iteration, score in [(1, 0.3), (2, 0.9), (3, None), (999, 0.5), (1000, 0.9), (1001, 0.1)]:
        store.save(iteration, score, writes(str(iteration)))
        for name in store.superseded():
            store.remove(name)
            removed.append(name)
    assert [c.iteration for c in store.all()] == [2, 1000, 1001]  # ordered by number, not by name
    assert removed == ["iter_001", "iter_003", "iter_999"]
    best = store.best()
    assert best is not None
    assert (best.iteration, best.score) == (2, 0.9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_002", "iter_1000", "iter_1001"]


def test_what_is_left_of_a_checkpoint_that_was_being_deleted_does_not_pass_for_one(tmp_path: Path) -> None:
    store, moments = CheckpointStore(tmp_path / "own", keep_last=1), 0
    for iteration in (1, 2):
        store.save(iteration, None, writes(str(iteration)))

    def reached() -> None:  # what a process that is killed here leaves
        nonlocal moments
        moments += 1
        if moments % 10 == 0:
            shutil.copytree(store.root, tmp_path / str(moments))

    with at_every_line(reached):
        store.remove("iter_001")
    copies = [path for path in tmp_path.iterdir() if path != store.root]
    assert len(copies) > 5
    for copy in copies:
        for checkpoint in CheckpointStore(copy, keep_last=1).all():
            read(checkpoint.path)  # raises where a file of it is gone


def test_a_crash_while_writing_leaves_the_checkpoints_as_they_were(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    store.save(1, 0.5, writes("one"))

    def crash(folder: Path) -> None:
        (folder / "model.txt").write_text("half")
        raise RuntimeError("the machine went away")

    for iteration in (1, 2):
        with pytest.raises(RuntimeError):
            store.save(iteration, None, crash)
    assert [c.iteration for c in store.all()] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["iter_001"]  # a full disk gets its room back
    assert read(tmp_path / "iter_001").score == 0.5
    assert store.save(2, None, writes("two")).name == "iter_002"
    assert read(tmp_path / "iter_002").iteration == 2


def test_saving_again_replaces(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    store.save(4, None, writes("old"))
    path = store.save(4, 0.7, writes("new"))
    assert (path / "model.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["iter_004"]
    assert read(path).score == 0.7


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: (path / "manifest.json").unlink(), "manifest.json"),
        (lambda path: (path / "manifest.json").write_text('{"files":'), "manifest.json"),
        (lambda path: (path / "trainer" / "state.txt").unlink(), "trainer/state.txt is missing"),
        (lambda path: (path / "model.txt").write_text("anf"), "model.txt differs"),
        (lambda path: (path / "model.txt").write_text("longer text"), "model.txt differs"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], None], named: str) -> None:
    path = CheckpointStore(tmp_path, keep_last=1).save(3, None, writes("and"))
    read(path)
    damage(path)
    with pytest.raises(UserError, match=named):
        read(path)


def test_an_optimizer_goes_on_exactly_as_if_it_had_not_been_saved(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def steps(layer: torch.nn.Linear, optimizer: torch.optim.AdamW, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            layer(torch.full((2, 5), step + 1.0)).square().sum().backward()
            optimizer.step()

    whole, optimizer = make()
    steps(whole, optimizer, 0, 6)
    before, optimizer = make()
    steps(before, optimizer, 0, 3)
    optimizer_files.save(optimizer, tmp_path / "optimizer.safetensors")
    after, optimizer = make()
    after.load_state_dict(before.state_dict())
    optimizer_files.load(optimizer, tmp_path / "optimizer.safetensors")
    steps(after, optimizer, 3, 6)
    assert torch.equal(whole.weight, after.weight)
    assert torch.equal(whole.bias, after.bias)
