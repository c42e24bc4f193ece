"""Every command that README.md and docs/ show works, and every setting that they name exists.

Our own commands are run as they stand as far as their config, and then to their end on a stand-in: the embedded model
hardly warmed up, one iteration of two problems, a server of the tests. A command that cannot be run stands in `NOT_RUN`
with the reason; one that is in neither list fails, so a new kind of command needs a line here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlflow
import pytest

from grpo_mlflow.cli import commands
from grpo_mlflow.config import presets, resolve, yaml12
from grpo_mlflow.config.keys import KEYS, SECTIONS
from grpo_mlflow.search import space_file
from tests.support.docs_commands import (
    PAGES,
    Command,
    commands_of,
    every_command,
    keys_in_code,
    parse,
    through_mlproject,
)
from tests.support.fake_server import FakeServer
from tests.support.paths import ROOT
from tests.support.stores import Stores

# The stand-in: sizes that win over those of a command.
MODEL = {
    **{"model.train_id": "tiny", "model.device": "cpu", "model.dtype": "float32", "model.tiny.hidden_size": 16},
    **{"model.tiny.layers": 1, "model.tiny.heads": 1, "model.tiny.steps": 1, "model.tiny.batch_size": 2},
}
SIZES = {
    **{"train.iterations": 1, "train.batch_size": 4, "train.grad_accum_steps": "auto", "train.lr_warmup_steps": 0},
    **{"data.problems_per_iteration": 2, "data.rollouts_per_problem": 2},
    **{"eval.num_ids": 2, "eval.replicates": 2, "eval.ks": "[1,2]", "eval.interval": 1, "eval.greedy": "false"},
    **{"tracking.samples": 2},
}
STUDY = {
    **{"search.finalists": 0, "search.confirm_num_ids": 2, "search.confirm_replicates": 2},
    **{"search.retrain_seeds": 0, "search.k": 1},
}
OPTIONS = {"n_trials": "1", "n_jobs": "1", "timeout": ""}  # of `optimize`; they win over search.n_trials and so on


@dataclass
class World:
    """A folder with what the docs' commands name: runs, models, files, a server."""

    folder: Path
    server: FakeServer
    run_id: str = ""
    model: str = ""
    adapter: str = ""  # the run id of a model with an adapter
    done: set[str] = field(default_factory=set)

    def named(self, words: Sequence[str]) -> list[str]:
        """Return the words with what the docs leave to the reader filled in."""
        places = {
            "RUN_ID": self.run_id,
            "/path/to/checkpoint": self.model,
            "/path/to/model": self.model,
            "/path/to/mine.jsonl": str(self.folder / "mine.jsonl"),
            "FOLDER": self.model,
            "docs/smollm2.yaml": str(ROOT / "docs" / "smollm2.yaml"),
            "models:/NAME@ALIAS": "models:/grpo@champion",
        }
        pattern = re.compile("|".join(rf"(?<![A-Z_]){re.escape(place)}(?![A-Z_])" for place in places))
        return ["" if word == "..." else pattern.sub(lambda m: places[m[0]], word) for word in words]


def standins(config: dict[str, Any], world: World) -> list[str]:
    """Return the overrides that turn a config into a small one that needs nothing from outside."""
    if config["resume"]:
        return ["train.iterations=2"]
    values = {**MODEL, **SIZES, **STUDY, "model.ref_id": "null", "generation.server.manage": "false"}
    values["generation.server.replicas"] = "1"
    longest = min(4, config["generation"]["max_new_tokens"])
    values |= {"generation.max_new_tokens": longest, "train.epochs": min(2, config["train"]["epochs"])}
    values["data.overlong_buffer"] = min(longest, config["data"]["overlong_buffer"])
    if config["generation"]["sync"] == "lora":
        world.server.restart()  # an adapter goes beside the weights that it started with
        values["model.train_id"] = world.model
    if "judge" in config["data"]["rewards"]:
        values["data.rewards"] = "{exact: 1}"
    for section in ("generation", "eval"):
        if config[section]["backend"] not in (None, "local"):
            values |= {f"{section}.backend": "vllm_server", f"{section}.base_url": world.server.url}
    return [f"{key}={value}" for key, value in values.items()]


def call(name: str, words: Sequence[str]) -> str:
    """Run a command in this process and return what it prints.

    Raises:
        AssertionError: it does not end well.
    """
    printed, code = io.StringIO(), None
    main: Callable[[Sequence[str]], None] = importlib.import_module(f"grpo_mlflow.cli.{name}").main
    try:
        with contextlib.redirect_stdout(printed):
            main(words)
    except SystemExit as end:
        code = end.code
    assert code in (None, 0), printed.getvalue()
    return printed.getvalue()


def printed_config(name: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the config of a command as it stands."""
    config: dict[str, Any] = yaml12.load(call(name, [*words, "--print-config"]), shlex.join([name, *words]))
    return config


def run_ours(words: Sequence[str], world: World) -> None:
    """Run the command `words`: its config as written, then the whole on the stand-in, once."""
    command, given = words[0], world.named(words[1:])
    assert command in commands.COMMANDS, f"there is no {command}"
    if "--help" in given or command == "completion":
        assert call(command, given[: given.index(">")] if ">" in given else given)
        return
    if command == "smoke":  # it has no --print-config
        call(command, [*given, *(f"{key}={value}" for key, value in (MODEL | SIZES).items())])
        return
    if command == "merge":  # nor this one; the output must be new
        given[given.index("--model") + 1] = world.adapter
        given[given.index("--output") + 1] = str(world.folder / f"merged-{len(list(world.folder.glob('merged-*')))}")
        call(command, given)
        return
    if "--print-command" in given:
        assert "-m vllm." in call(command, given)
        return
    if command == "upload":
        (world.folder / "outputs").mkdir(exist_ok=True)
    config = printed_config(command, given)
    if command == "server" or "--print-config" in given:
        return  # the one stays until it is stopped, the other has done all that it does
    small = standins(config, world)
    if command == "optimize":
        for name in (*OPTIONS, "study_name", "storage"):
            while (option := f"--{name}") in given:
                place = given.index(option)
                del given[place : place + 2]
        given += [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
        as_written = resolve(base=config, origin="the docs")
        space = space_file.load(config["search"]["space"], as_written)
        if config["search"]["sampler"] == "grid":
            space.require_grid(as_written)
            given += ["--sampler", "random"]  # a grid runs all its combinations, whatever n_trials says
    if command == "evaluate" and "--model" in given:
        place = given.index("--model") + 1
        if given[place] and not given[place].startswith(("models:", world.run_id)):
            given[place] = world.model  # a hub id
            small = [word for word in small if not word.startswith("model.t")]
    words = [*given, *small]
    same = f"{command} {given if command == 'evaluate' else ''} {printed_config(command, words)}"
    if same not in world.done:
        world.done.add(same)
        study_name = f"docs-{len(world.done)}"
        study = [f"search.study_name={study_name}", f"search.storage=sqlite:///{study_name}.db"]
        call(command, [*words, *(study if command == "optimize" else ())])


def run_grpo(command: Command, world: World) -> None:
    run_ours(command.words[1:], world)


def run_mlflow(command: Command, world: World) -> None:
    module, *words = through_mlproject(command.words)[2:]
    assert importlib.util.find_spec(module), f"there is no {module}"
    run_ours([module.removeprefix("entrypoints."), *words], world)


def run_make(command: Command, world: World) -> None:
    """Ask make what it would do, and run what of it is ours."""
    done = subprocess.run(
        ["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        inner = parse(re.sub(r'^PATH="[^"]*" ', "", line), str(command))
        if inner.words[:2] == ("mlflow", "run"):
            run_mlflow(inner, world)
        elif inner.words[0] == "grpo":
            run_grpo(inner, world)


def check_ours_inside(command: Command, world: World) -> None:
    """Check the config of the command of ours that a launcher would start, and that the files it names exist."""
    words = list(command.words)
    for place in range(len(words)):
        if words[place : place + 2] == ["-m", "grpo_mlflow"]:
            assert printed_config(words[place + 2], world.named(words[place + 3 :]))
            words = words[:place]
            break
    for word in words:
        if word.endswith((".yaml", ".yml", ".sbatch", ".sh")) and "=" not in word:
            assert (ROOT / word).is_file(), f"{command}: there is no {word}"


def check_benchmark(command: Command, world: World) -> None:
    """Check that the benchmark is there and takes the options."""
    found = importlib.util.find_spec(command.words[2])
    assert found, f"{command}: there is no {command.words[2]}"
    source = Path(str(found.origin)).read_text()
    for word in command.words[3:]:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in source, f"{command}: {word} is unknown to it"


def check_code(command: Command, world: World) -> None:
    compile(command.words[command.words.index("-c") + 1] if "-c" in command.words else "", str(command), "exec")


def no_check(command: Command, world: World) -> None: ...


RUN: dict[str, Callable[[Command, World], None]] = {
    r"(\S+/)?grpo \w+": run_grpo,
    r"mlflow run \.": run_mlflow,
    r"make [a-z0-9./-]+": run_make,
}
# What is not run: why, and what is looked at instead.
NOT_RUN: dict[str, tuple[str, Callable[[Command, World], None]]] = {
    r"(\S+/)?(python3? -m )?pip3? install .*": ("installs packages", no_check),
    r"uv (sync|pip|venv).*": ("installs packages", no_check),
    r"python3? -m venv .*": ("installs packages", no_check),
    r"git clone .*": ("needs the network", no_check),
    r"mlflow (ui|server) .*": ("stays until it is stopped", no_check),
    r"mlflow models serve.*": ("stays until it is stopped: tests/runs/test_published.py starts one", no_check),
    r"mlflow artifacts download .*": ("MLflow's own", no_check),
    r"(vllm serve|hf \w+)( .*)?": ("a program that need not be here", no_check),
    r"python3? \S*convert_hf_to_gguf.py .*": ("a program of llama.cpp", no_check),
    r"(\S+/)?python3? -m (vllm|sglang)\..*": ("a real server: `make test-server` starts one", no_check),
    r"(\S+/)?python3? -m benchmarks\..*": ("takes minutes or hours", check_benchmark),
    r"python3? -m grpo_mlflow\.config\.document.*": ("tests/config/test_describe.py runs it", no_check),
    r"python3? -m pytest.*": ("these tests themselves", no_check),
    r"python3? (-X importtime )?-c .*": ("says something about the machine", check_code),
    r"(curl|nvidia-smi) .*": ("asks a server or device that is not here", no_check),
    r"(torchrun|accelerate launch|srun) .*": (
        "several processes: tests/runtime/test_processes.py starts two",
        check_ours_inside,
    ),
    r"(sbatch|kubectl|docker|ray job submit) .*": ("needs a cluster", check_ours_inside),
}
NO_SETTINGS = {
    "train.log10_lr",  # a parameter that runs log beside their settings
    "train.reward_weights.brief",  # an entry of a mapping
}
COMMANDS = every_command()
SERVER = re.compile(r"(\S+/)?python3? -m (vllm|sglang)\.")


def rule_of(command: Command) -> Callable[[Command, World], None]:
    """Return what to do with a command.

    Raises:
        LookupError: it is of no kind that is known.
    """
    text = shlex.join(command.words)
    for pattern, run in RUN.items():
        if re.match(rf"{pattern}(\s|$)", text):
            return run
    for pattern, (_, check) in NOT_RUN.items():
        if re.fullmatch(pattern, text, re.DOTALL):
            return check
    raise LookupError(
        f"{command}\nis a command of no known kind: add it to RUN in tests/test_docs.py (it is run on the stand-in) "
        "or to NOT_RUN with the reason why it is not and what is checked instead"
    )


@pytest.fixture(scope="module")
def world(empty_stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """What the commands need, made by our own commands: a run, a study with a champion, files."""
    folder = tmp_path_factory.mktemp("docs")
    store = empty_stores.new(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", store)
        example = next(text for text in (ROOT / "docs/optimize.md").read_text().split("\n\n") if "{low:" in text)
        (folder / "my_space.yaml").write_text("\n".join(line[4:] for line in example.splitlines()))
        (folder / "my.yaml").write_text("base: tiny\ntrain: {lr: 3.0e-4}\n")
        (folder / "best_config.yaml").write_text("base: tiny\n")
        (folder / "gsm8k").mkdir()
        row = '{"question": "What is %d + 1?", "answer": "#### %d"}\n'
        for split in ("train", "test"):
            rows = (row % (n + (split == "test") * 100, n + 1 + (split == "test") * 100) for n in range(64))
            (folder / f"gsm8k/{split}.jsonl").write_text("".join(rows))
        rows = (f'{{"question": "What is {n} + 7?", "answer": "{n + 7}"}}\n' for n in range(50))
        (folder / "mine.jsonl").write_text("".join(rows))
        function = next(t for t in (ROOT / "docs/own_data.md").read_text().split("\n\n") if "def accuracy" in t)
        (folder / "my_rewards.py").write_text("".join(f"{line[4:]}\n" for line in function.splitlines()))
        small = [f"{key}={value}" for key, value in (MODEL | SIZES | STUDY).items()]
        call("train", small)
        call("optimize", [*small, "search.finalists=1", "--n_trials", "1"])
        client = mlflow.MlflowClient(store)
        experiment = client.get_experiment_by_name("grpo").experiment_id
        call("train", [*small, "model.lora.rank=1"])
        run, *_, adapted = client.search_runs([experiment], "tags.`grpo.kind` = 'train'", order_by=["start_time"])
        model = Path(run.info.artifact_uri.removeprefix("file://")) / "checkpoints/iter_001"
        plain = shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns("trainer"))
        with FakeServer("vllm", plain) as server:
            yield World(folder, server, run.info.run_id, str(plain), adapted.info.run_id)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_works(command: Command, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = rule_of(command)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{world.folder}/mlflow.db")  # MLflow sets it to the last used
    for name, value in command.variables.items():
        if name == "PYTHONPATH":
            monkeypatch.syspath_prepend(ROOT / value)
            assert (ROOT / value).is_dir(), f"{command}: there is no folder {value}"
    rule(command, world)


# What each command of the offline trainer's guide sets, without its shell words.
B15, B7, B05 = ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-0.5B")
SERVED_RUN = {"model.train_id": B15, "model.ref_id": B15, "model.device": "cuda:2", "train.iterations": "10"}
GUIDE_RUNS: list[dict[str, str]] = [
    *(
        SERVED_RUN
        | {f"{section}.backend": kind for section in ("generation", "eval")}
        | {f"{section}.base_url": f"http://127.0.0.1:{port}" for section in ("generation", "eval")}
        for kind, port in (("vllm_server", 30000), ("sglang_server", 30001))
    ),
    {"model.train_id": B7, "model.ref_id": B7, "model.device": "cuda:2"},
    {"model.train_id": "/path/to/checkpoint", "model.ref_id": B15},
    {"generation.temperature": "0.5", "generation.top_p": "0.9", "generation.max_new_tokens": "512"},
    {"generation.batch_size": "16", "eval.batch_size": "16"},
    {"train.iterations": "50", "train.lr": "5e-5", "train.batch_size": "16", "data.problems_per_iteration": "8"},
    {"train.lr": "5e-6", "train.kl_coef": "0.02", "train.batch_size": "4"},
    {"model.train_id": B05, "model.ref_id": B05, "train.iterations": "3", "data.problems_per_iteration": "2"},
    {
        **{"model.train_id": B7, "model.ref_id": B7, "train.iterations": "100", "train.lr": "1e-5"},
        **{"data.problems_per_iteration": "8", "eval.interval": "5"},
    },
]
LR_KL = {"train.lr": "[5e-6,1e-5,2e-5]", "train.kl_coef": "[0.02,0.05,0.1]"}
GUIDE_SWEEPS: list[tuple[dict[str, str], dict[str, str]]] = [
    (LR_KL | {"train.batch_size": "[4,8]"}, {}),
    (LR_KL, {"model.train_id": B15, "train.iterations": "20"}),
]


def from_the_guide() -> list[tuple[str, dict[str, str]]]:
    """Return the entry point and the parameters of each `mlflow run` for readers of the guide that has some."""
    section = (ROOT / "docs/recipes.md").read_text().partition("## From the guide")[2]
    words = [command.words for command in commands_of(section, "docs/recipes.md")]
    runs = [each for each in words if each[:2] == ("mlflow", "run") and "-P" in each]
    return [(run[run.index("-e") + 1], dict(b.split("=", 1) for a, b in pairwise(run) if a == "-P")) for run in runs]


def test_every_command_of_the_guide_has_its_counterpart() -> None:
    found = from_the_guide()
    assert [given for entry, given in found if entry == "train"] == GUIDE_RUNS
    studies = [given for entry, given in found if entry == "optimize"]
    for study, (varied, fixed) in zip(studies, GUIDE_SWEEPS, strict=True):
        assert dict(item.split("=") for item in study["space"].split()) == varied
        assert study["sampler"] == "grid"
        assert {key: value for key, value in study.items() if "." in key} == fixed


def test_no_command_needs_conda() -> None:
    managed = [each for each in COMMANDS if each.words[:2] == ("mlflow", "run")]
    assert [str(each) for each in managed if not any(word.startswith("--env-manager=") for word in each.words)] == []


@pytest.mark.parametrize("command", [each for each in COMMANDS if SERVER.match(shlex.join(each.words))], ids=str)
def test_a_server_computes_as_the_presets_for_its_model_do(command: Command) -> None:
    given = dict(pairwise(command.words))
    model = given.get("--model") or given["--model-path"]
    configs = [config for name in presets() if (config := resolve(name).config).model.train_id == model]
    assert {config.model.dtype for config in configs} == {given.get("--dtype")}
    ranks = [config.model.lora.rank or 0 for config in configs if config.generation.sync == "lora"]
    assert all("--enable-lora" in command.words and int(given["--max-lora-rank"]) >= rank for rank in ranks)


@pytest.mark.parametrize("command", [each for each in COMMANDS if SERVER.match(shlex.join(each.words))], ids=str)
def test_a_server_is_started_by_the_command_that_is_printed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict(pairwise(command.words))
    model, backend = given.get("--model"), "vllm_server"
    if model is None:
        model, backend = given["--model-path"], "sglang_server"
    preset = next(name for name in presets() if resolve(name).config.model.train_id == model)
    words = [f"generation.backend={backend}", f"generation.base_url=http://127.0.0.1:{given['--port']}"]
    if "--gpu-memory-utilization" in given:
        words.append(f"generation.server.memory={given['--gpu-memory-utilization']}")
    if "--enable-lora" in command.words:
        words += [f"model.lora.rank={given['--max-lora-rank']}", "generation.sync=lora"]
    monkeypatch.chdir(ROOT)
    printed = parse(call("server", ["--print-command", "--config", preset, *words]), "printed")
    assert (printed.variables, printed.words) == (command.variables, command.words)


@pytest.mark.slow
def test_the_first_command_of_the_readme_through_mlflow(tmp_path: Path) -> None:
    """`mlflow run` itself, in a process of its own: what the other tests put together in its place."""
    command = next(each for each in COMMANDS if each.words[:2] == ("mlflow", "run"))
    small = " ".join(f"{key}={value}" for key, value in {**MODEL, **SIZES}.items())
    words = [sys.executable, "-m", "mlflow", "run", str(ROOT), *command.words[3:], "-P", f"overrides={small}"]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }
    done = subprocess.run(
        words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "held-out pass@1" in done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_is_named_exists(page: Path) -> None:
    sections = sorted({key.split(".")[0] for key in KEYS if "." in key})
    files = (".py", ".md", ".json", ".jsonl", ".yaml", ".log", ".safetensors")
    named = {name for name in keys_in_code(page.read_text(), sections) if not name.endswith(files)}
    assert sorted(named - KEYS.keys() - set(SECTIONS) - NO_SETTINGS) == []


def test_what_is_read_out_of_a_page() -> None:
    page = """# A page

    grpo train train.lr=1e-4 \\
        eval.ks='[1,2]'   # why
    make smoke

Then `mlflow run . -e doctor
-P config=qwen`, but not `mlflow run` alone, nor this:

    x = 3
    python = x

| `make ui` | or `reward` |

```bash
# a comment
NAME=1 frobnicate --all
```

```python
make = 1
```
"""
    found = commands_of(page, "p.md")
    assert [command.words for command in found] == [
        ("grpo", "train", "train.lr=1e-4", "eval.ks=[1,2]"),
        ("make", "smoke"),
        ("frobnicate", "--all"),
        ("mlflow", "run", ".", "-e", "doctor", "-P", "config=qwen"),
        ("make", "ui"),
    ]
    assert [command.where for command in found] == ["p.md:3", "p.md:5", "p.md:17", "p.md", "p.md"]
    assert found[2].variables == {"NAME": "1"}
    with pytest.raises(LookupError, match=r"p\.md:17.*\n.*RUN in tests/test_docs\.py"):
        rule_of(found[2])
    assert keys_in_code("`train.lr=1` `generation.base_url` `train.py` data.x `data.mix.y`", ["train", "data"]) == [
        "train.lr",
        "train.py",
        "data.mix.y",
    ]


def test_a_command_is_put_together_as_mlflow_does() -> None:
    words = ["mlflow", "run", ".", "-e", "train", "--env-manager=local", "-P", "config=qwen", "-P", "train.lr=1e-4"]
    expected = ["python", "-m", "entrypoints.train", "--config", "qwen", "--overrides", "", "--train.lr", "1e-4"]
    assert through_mlproject(words) == expected
    for wrong in (["-e", "nothing"], ["--frobnicate"], ["-P", "train.lr"]):
        with pytest.raises(ValueError, match="mlflow run"):
            through_mlproject(["mlflow", "run", ".", *wrong])


def test_the_stand_in_is_a_config() -> None:
    assert resolve("tiny", [f"{key}={value}" for key, value in (MODEL | SIZES | STUDY).items()]).warnings == ()
