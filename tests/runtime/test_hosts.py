"""Several machines: what works on one also works where only a network is shared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from grpo_mlflow.search import study as studies
from grpo_mlflow.search.storage import open_storage
from tests.support import postgres
from tests.support.hosts import Host, hosts
from tests.support.mlflow_server import Server
from tests.support.study_commands import Commands, closed_storages, require_whole

pytestmark = pytest.mark.slow
TRIALS = 4
WORDS = (
    *("search.sampler=grid", "train.iterations=20"),
    "search.space=train.lr=[" + ",".join(f"{number}e-4" for number in range(1, TRIALS + 1)) + "]",
)


@pytest.fixture
def machines() -> Iterator[list[Host]]:
    """Three machines, the test on the last."""
    with hosts(3) as found, found[-1].entered(), closed_storages():
        yield found


def test_a_study_over_postgresql_has_workers_on_two_machines(machines: list[Host], tmp_path: Path) -> None:
    *workers, third = machines
    tracking = Server(tmp_path, third.address)
    tracking.start()
    commands = [Commands(tmp_path / host.name, tracking.uri) for host in workers]
    try:
        with postgres.server(third.address) as server:
            address = server.database()
            for own, host in zip(commands, workers, strict=True):
                (tmp_path / host.name).mkdir()
                own.start([*WORDS, f"search.storage={address}"], on=host.words)
            outputs = [own.end(0) for own in commands]
            study = optuna.load_study(study_name="grpo", storage=open_storage(address))
            require_whole(tracking.uri, study, TRIALS)
            owners = {trial.user_attrs[studies.OWNER]["pid"] for trial in studies.final_trials(study)}
    finally:
        for own in commands:
            own.stop()
        tracking.stop()
    assert sorted("joining study" in output for output in outputs) == [False, True]
    assert len(owners) == 2
