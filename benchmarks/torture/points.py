"""The points at which runs and studies are killed."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.torture.moments import Region
from grpo_mlflow import runs
from grpo_mlflow.runs import description, models, stored
from grpo_mlflow.search import champion, optimize, recovery
from grpo_mlflow.search.confirm import Confirmation
from grpo_mlflow.search.trials import Search
from grpo_mlflow.tracking import opening
from grpo_mlflow.tracking.operations import Publish, Register
from grpo_mlflow.tracking.outbox import Outbox
from grpo_mlflow.tracking.spool import Spool
from grpo_mlflow.tracking.tracker import MlflowTracker
from grpo_mlflow.training import checkpoint, state
from grpo_mlflow.training.checkpoint import CheckpointStore
from grpo_mlflow.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Point:
    """Where a process is struck.

    Args:
        work: `run`, `remote` (its artifacts go to a server), `spool` (which is away for a while) or `study`.
        region: the part of the program; None: anywhere, after a random time, or a random file for a full disk.
        resumed: whether the process that is struck is the second one, which goes on after a first kill.
        disk: whether the disk is full from there on, instead of a signal; `limited`: files may not grow.
    """

    name: str
    work: str
    region: Region | None = None
    resumed: bool = False
    disk: str = ""


_SAVE = [CheckpointStore.save]
POINTS = (
    Point("checkpoint: write", "run", Region([state.write])),
    Point("checkpoint: rename", "run", Region(_SAVE, [state.write, checkpoint._sha256])),
    Point("checkpoint: prune", "run", Region([Trainer._tidy])),
    Point("run: opening", "run", Region([opening.start])),
    Point("run: config", "run", Region([description.describe])),
    Point("run: metrics", "run", Region([MlflowTracker.flush])),
    Point("run: files", "run", Region([MlflowTracker.text, MlflowTracker.table])),
    Point("run: end", "run", Region([MlflowTracker.finish])),
    Point("run: anywhere", "run"),
    Point("resume: finding", "run", Region([stored.resolve_training]), resumed=True),
    Point("resume: opening", "run", Region([opening.start, description.describe]), resumed=True),
    Point("resume: state", "run", Region([state.restore, CheckpointStore.__init__]), resumed=True),
    Point("resume: anywhere", "run", resumed=True),
    Point("disk: full", "run", disk="full"),
    Point("disk: file size", "run", disk="limited"),
    Point("upload", "remote", Region([Publish.send])),
    Point("upload: anywhere", "remote"),
    Point("spool: append", "spool", Region([Spool.append])),
    Point("spool: replay", "spool", Region([Outbox.replay])),
    Point("spool: drop", "spool", Region([Spool.drop])),
    Point("trial: start", "study", Region([Search._perform], [runs.train])),
    Point("trial: report", "study", Region([Search._report])),
    Point("trial: end", "study", Region([Search._tell])),
    Point("study: confirmation", "study", Region([Confirmation.measure], [models.load_measured])),
    Point("study: leaving", "study", Region([optimize._leave])),
    Point("study: registration", "study", Region([champion.register, Register.send])),
    Point("study: anywhere", "study"),
    Point("study: going on", "study", Region([recovery.revive, recovery.run_of]), resumed=True),
)
