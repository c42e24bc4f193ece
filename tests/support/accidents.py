"""What may be wrong with the world around a command: how to make it so, and what the one line about it must hold."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

TINY = (
    *("model.tiny.hidden_size=32", "model.tiny.layers=1", "model.tiny.heads=2", "model.tiny.steps=120"),
    *("model.tiny.lr=3e-3", "data.arithmetic.digits=1", "data.problems_per_iteration=2"),
    *("data.rollouts_per_problem=2", "train.iterations=2", "train.batch_size=4", "train.grad_accum_steps=1"),
    *(
        "eval.num_ids=2",
        "eval.replicates=1",
        "eval.ks=[1]",
        "eval.interval=2",
        "search.finalists=0",
        "search.pruner=none",
        "generation.max_new_tokens=8",
    ),
)
STORE = "tracking.uri=sqlite:///mlflow.db"


@dataclass(frozen=True, slots=True)
class Ground:
    """The folder of one accident, and the whole run that others of its kind leave alone."""

    here: Path
    run_id: str
    run_dir: Path
    store: str

    def checkpoint(self, name: str = "iter_002") -> Path:
        """Copy the last checkpoint of the run."""
        path = self.here / name
        shutil.copytree(self.run_dir / "checkpoints" / "iter_002", path)
        return path

    def resealed(self, name: str = "iter_002") -> Path:
        return seal(self.checkpoint(name))


def seal(path: Path) -> Path:
    """Make the manifest of a checkpoint fit what it holds."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in list(manifest["files"]):
        content = (path / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@dataclass(frozen=True, slots=True)
class Accident:
    """`make` gives the words of the command; the line holds `says`, and the exit code is `code`."""

    make: Callable[[Ground], list[str]]
    says: tuple[str, ...] = ()
    code: int = 1
    command: str = "train"
    before: Callable[[], None] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    resumable: bool = False
    log: bool = False


def new(*words: str, tracked: str = STORE) -> list[str]:
    return ["--config", "tiny", *TINY, tracked, *words]


def resume(path: Path, *words: str) -> list[str]:
    return [f"resume={path}", *words]


def changed(name: str, content: bytes, *, sealed: bool = True) -> Callable[[Ground], list[str]]:
    """A resume from a checkpoint with another content of a file."""

    def make(ground: Ground) -> list[str]:
        path = ground.checkpoint()
        (path / name).write_bytes(content)
        if sealed:
            seal(path)
        return resume(path, f"tracking.uri={ground.store}", "train.iterations=3")

    return make


def cut(name: str, *, sealed: bool = True) -> Callable[[Ground], list[str]]:
    """A resume from a checkpoint with the first half of a file."""

    def make(ground: Ground) -> list[str]:
        content = (ground.run_dir / "checkpoints" / "iter_002" / name).read_bytes()
        return changed(name, content[: len(content) // 2], sealed=sealed)(ground)

    return make


def of_another_size(name: str) -> Callable[[Ground], list[str]]:
    """A resume from a checkpoint whose tensors all have one row too few."""

    def make(ground: Ground) -> list[str]:
        from safetensors.torch import load_file, save_file

        path = ground.checkpoint()
        tensors = {
            key: value[:-1].contiguous() if value.ndim else value for key, value in load_file(path / name).items()
        }
        save_file(tensors, path / name, metadata={"format": "pt"})
        seal(path)
        return resume(path, f"tracking.uri={ground.store}", "train.iterations=3")

    return make


def of_other_names(ground: Ground) -> list[str]:
    from safetensors.torch import load_file, save_file

    path = ground.checkpoint()
    name = path / "trainer" / "optimizer.safetensors"
    save_file({f"x{key}": value for key, value in load_file(name).items()}, name)
    seal(path)
    return resume(path, f"tracking.uri={ground.store}", "train.iterations=3")


def placed(name: str, content: bytes | None, *words: str, tracked: str = STORE) -> Callable[[Ground], list[str]]:
    """A new run beside a file (None: a folder) of this name."""

    def make(ground: Ground) -> list[str]:
        path = ground.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)
        return new(*words, tracked=tracked)

    return make


def locked(name: str, *words: str, tracked: str = STORE) -> Callable[[Ground], list[str]]:
    """A new run with a database that another process never lets go."""

    def make(ground: Ground) -> list[str]:
        path = ground.here / name
        if name == "mlflow.db":
            shutil.copyfile(ground.store.removeprefix("sqlite:///"), path)
        HELD.append(sqlite3.connect(path))
        HELD[-1].execute("create table if not exists held (x)")
        HELD[-1].execute("begin exclusive")
        return new(*words, tracked=tracked)

    return make


HELD: list[sqlite3.Connection] = []


def damaged(ground: Ground) -> list[str]:
    """A store with garbage in the middle."""
    path = ground.here / "mlflow.db"
    content = bytearray(Path(ground.store.removeprefix("sqlite:///")).read_bytes())
    content[4096 : len(content) // 2] = os.urandom(len(content) // 2 - 4096)
    path.write_bytes(content)
    return new()


def task(code: str, *words: str) -> Callable[[Ground], list[str]]:
    """A new run of a task of the user's own; `code` stands in its class."""

    def make(ground: Ground) -> list[str]:
        (ground.here / "mine.py").write_text(OWN.replace("    # CODE", code))
        return new("data.task=python:mine:Mine", *words)

    return make


OWN = """
from grpo_mlflow.tasks import Task
from grpo_mlflow.types import Problem, Verdict

class Mine(Task):
    name = "mine"
    text = "1+1"
    answer = "2"
    def problem(self, split, seed):
        return Problem(f"mine/{split}/{seed}", seed, ({"role": "user", "content": f"{self.text}{seed}"},))
    def verify(self, problem, text):
        return Verdict(float(len(text) % 2), {}, text == self.answer, text)
    def reference_answer(self, problem):
        return self.answer
    # CODE
"""


def _failing(number: int, after: int) -> None:
    """Let the file system fail with this error from some file on that is written as a whole."""
    sync, left = os.fsync, after

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    os.fsync = fsync  # type: ignore[assignment]


def quota() -> None:
    _failing(errno.EDQUOT, 2)


def broken_disk() -> None:
    _failing(errno.EIO, 2)


def stale() -> None:
    _failing(errno.ESTALE, 2)


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def mistake() -> None:
    """Let a part of the program fail as if it had a mistake."""
    from grpo_mlflow.training import iteration

    def track(*_: object) -> None:
        raise KeyError("ours")

    iteration.track = track  # type: ignore[assignment]


EMPTY_PROMPT = """
    def problem(self, split, seed):
        return Problem(f"{split}{seed}", seed, (dict(role="user", content=""),))
"""
UNSENT = f"{'x' * 600}"
ACCIDENTS: dict[str, Accident] = {
    # checkpoints
    "model cut off": Accident(cut("model.safetensors", sealed=False), ("model.safetensors", "manifest"), 2),
    "model cut off, manifest fits": Accident(cut("model.safetensors"), ("model.safetensors",), 2),
    "optimizer cut off": Accident(cut("trainer/optimizer.safetensors"), ("optimizer.safetensors",), 2),
    "optimizer of another size": Accident(
        of_another_size("trainer/optimizer.safetensors"), ("optimizer.safetensors",), 2
    ),
    "optimizer of other names": Accident(of_other_names, ("optimizer.safetensors",), 2),
    "optimizer empty": Accident(changed("trainer/optimizer.safetensors", b""), ("optimizer.safetensors",), 2),
    "model of another size": Accident(of_another_size("model.safetensors"), (), 2),
    "state {}": Accident(changed("trainer/state.json", b"{}"), ("state.json",), 2),
    "state [1]": Accident(changed("trainer/state.json", b"[1]"), ("state.json",), 2),
    "state no text": Accident(changed("trainer/state.json", b"\xff\xfe"), ("state.json",), 2),
    "state cut off": Accident(cut("trainer/state.json"), ("state.json",), 2),
    "state without progress": Accident(
        changed("trainer/state.json", b'{"run_id": "", "optimizer_step": 1, "kl_coef": 0.1, "progress": {}}'),
        ("state.json",),
        2,
    ),
    "config [1]": Accident(changed("trainer/config.yaml", b"[1]"), ("config.yaml",), 2),
    "config no text": Accident(changed("trainer/config.yaml", b"\xff\xfe"), ("config.yaml",), 2),
    "config empty": Accident(changed("trainer/config.yaml", b""), ("config.yaml",), 2),
    "config unknown key": Accident(
        changed("trainer/config.yaml", b"{train: {nothing: 1}, generation: {backend: local}}"), ("train.nothing",), 2
    ),
    "ahead no groups": Accident(changed("trainer/ahead.jsonl", b'{"x": 1}\n'), ("ahead.jsonl",), 2),
    "manifest {}": Accident(changed("manifest.json", b"{}", sealed=False), ("manifest.json",), 2),
    "manifest [1]": Accident(changed("manifest.json", b"[1]", sealed=False), ("manifest.json",), 2),
    "manifest no text": Accident(changed("manifest.json", b"\xff", sealed=False), ("manifest.json",), 2),
    "manifest deep": Accident(changed("manifest.json", b"[" * 100_000, sealed=False), ("manifest.json",), 2),
    "manifest leads outside": Accident(
        changed(
            "manifest.json",
            b'{"iteration": 2, "score": null, "files": {"../../x": {"size": 1, "sha256": "a"}}}',
            sealed=False,
        ),
        ("manifest.json",),
        2,
    ),
    "resume a file": Accident(
        lambda g: resume(Path(shutil.copy(g.run_dir / "config/resolved.yaml", g.here / "a.yaml")), STORE),
        ("a.yaml",),
        2,
    ),
    "resume an empty folder": Accident(lambda g: resume(g.here), (), 2),
    "evaluate a name with a surrogate": Accident(
        lambda g: ["--model", g.run_id, "--checkpoint", "iter_\udcff", f"tracking.uri={g.store}"], (), 1, "evaluate"
    ),
    "evaluate iter_foo": Accident(
        lambda g: ["--model", g.run_id, "--checkpoint", "iter_foo", f"tracking.uri={g.store}"],
        ("iter_foo", "allowed: best, last, iter_"),
        1,
        "evaluate",
    ),
    "evaluate a damaged checkpoint": Accident(
        lambda g: ["--model", str(broken_state(g)), f"tracking.uri={g.store}"], ("state.json",), 2, "evaluate"
    ),
    # writing
    "quota": Accident(lambda g: new(), ("Disk quota exceeded",), before=quota, resumable=True),
    "broken disk": Accident(lambda g: new(), ("Input/output error",), before=broken_disk, resumable=True),
    "stale handle": Accident(lambda g: new(), ("Stale file handle",), before=stale, resumable=True),
    "cache under a file": Accident(placed("cache", b""), ("GRPO_MLFLOW_CACHE",), env={"GRPO_MLFLOW_CACHE": "cache"}),
    "cache in /proc": Accident(lambda g: new(), ("GRPO_MLFLOW_CACHE", "/proc/x"), env={"GRPO_MLFLOW_CACHE": "/proc/x"}),
    "cache on a full disk": Accident(
        lambda g: new("model.tiny.seed=9", "model.tiny.steps=1"), ("File too large",), before=small_files
    ),
    "artifacts under a file": Accident(placed("mlruns", b""), ("mlruns",)),
    "artifacts of the experiment under a file": Accident(placed("mlruns/grpo", b""), ("mlruns/grpo",)),
    # stores
    "PostgreSQL away": Accident(
        lambda g: new(tracked="tracking.uri=postgresql+psycopg://me:hidden@127.0.0.1:9/x"), ("127.0.0.1",)
    ),
    "PostgreSQL unknown host": Accident(
        lambda g: new(tracked="tracking.uri=postgresql+psycopg://me:hidden@nowhere.invalid/x"), ("nowhere.invalid",)
    ),
    "MySQL": Accident(lambda g: new(tracked="tracking.uri=mysql://me:hidden@127.0.0.1:9/x"), ()),
    "server away": Accident(lambda g: new(tracked="tracking.uri=http://127.0.0.1:9"), ("127.0.0.1",)),
    "half a bracket": Accident(lambda g: new(tracked="tracking.uri=http://[::1"), ("tracking.uri", "http://[::1"), 2),
    "half a bracket in the environment": Accident(
        lambda g: new(tracked="seed=1"), ("http://[::1",), 2, env={"MLFLOW_TRACKING_URI": "http://[::1"}
    ),
    "no port": Accident(lambda g: new(tracked="tracking.uri=http://127.0.0.1:x"), ("tracking.uri",), 2),
    "port too high": Accident(lambda g: new(tracked="tracking.uri=http://127.0.0.1:99999"), ("tracking.uri",), 2),
    "no scheme": Accident(lambda g: new(tracked="tracking.uri=nothing://x"), ("tracking.uri", "nothing://x"), 2),
    "no address": Accident(lambda g: new(tracked="tracking.uri=sqlite://["), ("sqlite://[",), 1),
    "databricks": Accident(lambda g: new(tracked="tracking.uri=databricks"), ("databricks",), 1),
    "no database": Accident(placed("mlflow.db", b"text" * 4000), ("mlflow.db", "not a database")),
    "a folder as database": Accident(placed("mlflow.db", None), ("mlflow.db",)),
    "database in no folder": Accident(lambda g: new(tracked="tracking.uri=sqlite:////proc/x/mlflow.db"), ("/proc/x",)),
    "locked database": Accident(locked("mlflow.db"), ("mlflow.db", "locked")),
    "damaged database": Accident(damaged, ("mlflow.db",)),
    "database of a later version": Accident(lambda g: later(g), ("mlflow.db",)),
    "foreign tables": Accident(lambda g: foreign(g), ("mlflow.db",)),
    "experiment of Databricks": Accident(lambda g: new("tracking.experiment=/Users/me/x"), (), 0),
    "experiment above": Accident(lambda g: new("tracking.experiment=../up"), (), 0),
    "experiment ..": Accident(lambda g: new("tracking.experiment=.."), (), 0),
    "experiment of 300": Accident(lambda g: new(f"tracking.experiment={'x' * 300}"), (), 0),
    "experiment of 600": Accident(lambda g: new(f"tracking.experiment={UNSENT}"), ("tracking.experiment",), 2),
    "experiment with a surrogate": Accident(lambda g: new("tracking.experiment=a\udcffb"), ("tracking.experiment",), 2),
    "run name with a surrogate": Accident(lambda g: new("tracking.run_name=a\udcffb"), ("tracking.run_name",), 2),
    "answer with a surrogate": Accident(task("    answer = '\\ud800'"), ("reference_answer", "surrogate"), 2),
    "a mistake of the program": Accident(lambda g: new(), ("KeyError: 'ours'", "error.log"), before=mistake, log=True),
    "folder with %20": Accident(placed("a%20b/x", b"", tracked="tracking.uri=sqlite:///a%20b/mlflow.db"), (), 0),
    "experiment with %20": Accident(lambda g: new("tracking.experiment=a%20b"), (), 0),
    "experiment with #": Accident(lambda g: new("tracking.experiment='a#b?c d'"), (), 0),
    "experiment with a slash": Accident(lambda g: new("tracking.experiment=a/b"), (), 0),
    # storages of studies
    "study: PostgreSQL away": Accident(
        lambda g: new("search.storage=postgresql://me:hidden@127.0.0.1:9/x"), ("search.storage",), 1, "optimize"
    ),
    "study: no database": Accident(
        placed("o.db", b"text" * 4000, "search.storage=sqlite:///o.db"),
        ("search.storage", "not a database"),
        1,
        "optimize",
    ),
    "study: a folder": Accident(
        placed("o.db", None, "search.storage=sqlite:///o.db"), ("search.storage",), 1, "optimize"
    ),
    "study: no journal": Accident(
        placed("o.log", b"text\n" * 40, "search.storage=journal:o.log"), ("search.storage",), 1, "optimize"
    ),
    "study: a folder as journal": Accident(
        placed("o.log", None, "search.storage=journal:o.log"), ("search.storage",), 1, "optimize"
    ),
    "study: no folder": Accident(
        lambda g: new("search.storage=sqlite:////proc/x/o.db"), ("search.storage",), 1, "optimize"
    ),
    "study: name with a surrogate": Accident(
        lambda g: new("search.study_name=a\udcff", "search.space=train.lr=[1e-5,1e-4]"),
        ("search.study_name",),
        2,
        "optimize",
    ),
    "study: space is a folder": Accident(placed("space", None, "search.space=space"), ("space",), 2, "optimize"),
    # texts and the user's code
    "surrogates in a prompt": Accident(task("    text = '\\ud800'"), ("python:mine:Mine",), 2),
    "surrogates in an id": Accident(
        task(
            "    def problem(self, split, seed):\n"
            "        return Problem(f'\\ud800{seed}', seed, ({'role': 'user', 'content': '1'},))"
        ),
        (),
        2,
    ),
    "surrogates in parsed": Accident(
        task(
            "    def verify(self, p, t):\n        return Verdict(1.0, {}, t == self.answer, '\\ud800')",
            "eval.enabled=true",
            "eval.num_ids=2",
            "eval.replicates=1",
        ),
        (),
        0,
    ),
    "no messages": Accident(
        task("    def problem(self, split, seed):\n        return Problem(f'{split}{seed}', seed, ())"), (), 2
    ),
    "empty prompt": Accident(
        task(EMPTY_PROMPT),
        (),
        0,
    ),
    "empty prompt without a template": Accident(lambda g: untemplated(g), (), 2),
    "a late problem fails": Accident(
        task(
            "    def problem(self, split, seed):\n"
            "        if seed > 0: raise KeyError('late')\n"
            "        return Problem(f'{split}{seed}', seed, ({'role': 'user', 'content': '1'},))"
        ),
        ("problem(", "late"),
        1,
    ),
    "import exits": Accident(lambda g: written(g, "mine.py", "raise SystemExit(3)"), ("mine",), 2),
    "import is interrupted by MemoryError": Accident(
        lambda g: written(g, "mine.py", "raise MemoryError"), ("mine",), 2
    ),
    "import has bad syntax": Accident(lambda g: written(g, "mine.py", "def"), ("mine",), 2),
    "constructor exits": Accident(task("    def __init__(self): raise SystemExit(3)"), ("Mine",), 2),
    # numbers
    "NaN": Accident(
        lambda g: new("train.lr=1e38", "train.grad_clip=null", "train.iterations=6"), ("not finite", "train.lr"), 1
    ),
}


def broken_state(ground: Ground) -> Path:
    path = ground.checkpoint()
    (path / "trainer" / "state.json").write_text("[1]")
    return seal(path)


def written(ground: Ground, name: str, content: str) -> list[str]:
    (ground.here / name).write_text(content)
    return new("data.task=python:mine:Mine")


def untemplated(ground: Ground) -> list[str]:
    return task(
        EMPTY_PROMPT,
        f"model.train_id={bare(ground)}",
    )(ground)


def bare(ground: Ground) -> Path:
    path = ground.checkpoint("model")
    shutil.rmtree(path / "trainer")
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return path


def later(ground: Ground) -> list[str]:
    path = ground.here / "mlflow.db"
    shutil.copyfile(ground.store.removeprefix("sqlite:///"), path)
    with sqlite3.connect(path) as database:
        database.execute("update alembic_version set version_num = 'fffffffffff'")
    return new()


def foreign(ground: Ground) -> list[str]:
    (ground.here / "mlflow.db").unlink(missing_ok=True)
    with sqlite3.connect(ground.here / "mlflow.db") as database:
        database.execute("create table experiments (x integer)")
    return new()
