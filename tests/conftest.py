"""Shared parts: a cache of their own, a model of 30 thousand parameters, a run that takes a second."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_mlflow import tasks
from grpo_mlflow.config import TinyConfig, resolve
from grpo_mlflow.model import tiny
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.tasks.settings import task_settings
from tests.support.small_runs import SMALL
from tests.support.stores import Stores

_VARIABLES = tuple(
    f"MLFLOW_{name}" for name in ("RUN_ID", "TRACKING_URI", "EXPERIMENT_ID", "EXPERIMENT_NAME", "RUN_NAME")
)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of this test run, for what is made once."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "once"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True, scope="session")
def _own_cache(session_folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRPO_MLFLOW_CACHE", str(session_folder / "cache"))
        for name in (*_VARIABLES, "COLUMNS"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def _terminal() -> Iterator[None]:
    """SIGHUP as at a terminal, though the tests may run under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def small_model(_own_cache: None) -> Path:
    """The embedded model of SMALL, as the folder that a server starts with."""
    config = resolve("tiny", SMALL).config
    return tiny.ensure(config.model.tiny, tasks.of(config), task_settings(config))


@pytest.fixture(scope="session")
def empty_stores(session_folder: Path) -> Stores:
    """Makes empty MLflow stores."""
    return Stores(session_folder)


@pytest.fixture(scope="module")
def shared_store(empty_stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for all tests of a file."""
    return empty_stores.new(tmp_path_factory.mktemp("store"))


@pytest.fixture
def folder(policy: Policy, tmp_path: Path) -> Path:
    """The weights of `policy` as a model folder."""
    policy.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def store(empty_stores: Stores, tmp_path: Path) -> str:
    """The address of an MLflow store of the test's own."""
    return empty_stores.new(tmp_path)


@pytest.fixture
def policy() -> Policy:
    """A small model with random weights, fresh for each test."""
    return tiny.build(TinyConfig(hidden_size=32, layers=2, heads=2, seed=3))
