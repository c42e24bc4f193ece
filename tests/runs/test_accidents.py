"""What goes wrong around a command is one line with the right exit code, and no work is lost by it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.accidents import ACCIDENTS, HELD, Ground, new
from tests.support.commands import command
from tests.support.small_runs import newest
from tests.support.stores import Stores


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"GRPO_MLFLOW_CACHE": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, empty_stores: Stores, cache: dict[str, str]
) -> tuple[str, Path, str]:
    """The id, the folder and the store of a whole run."""
    folder = tmp_path_factory.mktemp("whole")
    store = empty_stores.new(folder)
    ended = command("train", new(), folder, cache)
    assert (ended.code, ended.errors) == (0, [])
    found = re.search(r"run +([0-9a-f]{32})", ended.out)
    assert found is not None
    return found[1], folder / "mlruns" / "grpo" / found[1] / "artifacts", store


@pytest.mark.parametrize("name", ACCIDENTS)
def test_an_accident_is_one_line(
    name: str, whole: tuple[str, Path, str], empty_stores: Stores, cache: dict[str, str], tmp_path: Path
) -> None:
    accident, store = ACCIDENTS[name], empty_stores.new(tmp_path)
    words = accident.make(Ground(tmp_path, *whole))
    try:
        ended = command(accident.command, words, tmp_path, {**cache, **accident.env}, accident.before)
    finally:
        while HELD:
            HELD.pop().close()
    assert "Traceback" not in ended.out + ended.err
    assert ended.code == accident.code, ended.err
    assert len(ended.errors) == (1 if accident.code else 0)
    assert [word for word in accident.says if word not in ended.errors[0]] == []
    assert not (tmp_path.parent / "up").exists()
    if accident.log:
        path = Path(ended.errors[0].rpartition(" is in ")[2])
        assert path.parent.name == "artifacts"
        assert "KeyError" in path.read_text()
    if accident.resumable:
        again = command("train", [f"resume={newest(store)}", f"tracking.uri={store}"], tmp_path, cache)
        assert (again.code, again.errors) == (0, [])
