"""A mistake on the command line is one line on stderr: the key, the value, what is allowed; and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FILES: dict[str, bytes] = {
    "binary.yaml": b"\x89PNG\r\n\x1a\n\xff\xfe",
    "broken.yaml": b"seed: 1\ntrain: [1\n",
    "twice.yaml": b"base: tiny\ntrain:\n  lr: 1e-4\n  lr: 2e-4\n",
    "list.yaml": b"- seed: 1\n",
    "numbers.yaml": b"{1: 2}\n",
    "key.yaml": b"base: tiny\ntrain: {lrate: 1e-4}\n",
    "type.yaml": b"base: tiny\ntrain: {lr: fast}\n",
    "loop.yaml": b"base: loop.yaml\n",
    "baseless.yaml": b"base: nowhere.yaml\n",
    "basetype.yaml": b"base: [tiny]\n",
    "section.yaml": b"base: tiny\ntrain: 3\n",
    "resume.yaml": b"base: tiny\nresume: abc\n",
    "bare.py": b"class A: pass\n",
    "rows.jsonl": b'{"text": "no question"}\n',
    "code.yaml": b"seed: !!python/object/apply:os.system [true]\n",
}

SERVED = ("generation.backend=vllm_server", "generation.base_url=http://127.0.0.1:9")
SEEDS = "data.train_seed_start=100000 data.num_train_seeds=4096 eval.num_ids=256"
STEPS = "data.problems_per_iteration=64 data.rollouts_per_problem=8 train.batch_size=512 train.iterations=40"
HUGE = "data.num_train_seeds=9999999999 data.problems_per_iteration=9999999999"
# words of the command line, and what the one line must hold
CASES: list[tuple[list[str], list[str]]] = [
    # keys
    (["nothing=1"], ["nothing = 1", "unknown key", "allowed: seed", "train"]),
    (["train.nothing=1"], ["train.nothing = 1", "unknown key", "train.iterations"]),
    (["data.lr=1e-5"], ["data.lr = 1e-05", "train.lr"]),
    (["train.lrr=1"], ["train.lrr = 1", "did you mean train.lr"]),
    (["trian.lr=1e-5"], ["trian.lr = 1e-05", "did you mean train.lr"]),
    (["train.learning_rate=1e-5"], ["train.learning_rate = 1e-05", "train.lr,", "train.lr_schedule"]),
    (["train=1"], ["train = 1", "section", "train.lr"]),
    (["train.lr.x=1"], ["train.lr.x = 1", "unknown key", "train.lr"]),
    (["a\nb=1"], ["'a\\nb=1'", "key=value"]),
    # types
    (["train.iterations=ten"], ["train.iterations = 'ten'", "integer"]),
    (["train.iterations=1.5"], ["train.iterations = 1.5", "integer"]),
    (["train.batch_size=true"], ["train.batch_size = true", "integer"]),
    (["eval.enabled=yes"], ["eval.enabled = 'yes'", "boolean"]),
    (["train.grad_accum_steps=all"], ["train.grad_accum_steps = 'all'", "integer", "'auto'"]),
    (["eval.ks=4"], ["eval.ks = 4", "list"]),
    (["data.sat.difficulty=0.5"], ["data.sat.difficulty = 0.5", "list"]),
    (["data.sat.difficulty=[0.5]"], ["data.sat.difficulty = [0.5]", "[low, high]"]),
    (["model.train_id="], ["model.train_id = null", "string"]),
    (["seed=" + "1" * 5000], ["seed", "not valid YAML"]),
    (["seed=" + "[" * 2000], ["seed", "not valid YAML"]),
    # ranges and choices
    (["--seed", "-1"], ["seed = -1", "greater than or equal to 0"]),
    (["train.lr=.nan"], ["train.lr = nan", "finite"]),
    (["train.lr=.inf"], ["train.lr = inf", "finite"]),
    (["train.lr=1e999"], ["train.lr = inf", "finite"]),
    (["train.lr=0"], ["train.lr = 0", "greater than 0"]),
    (["generation.top_p=1.5"], ["generation.top_p = 1.5", "less than or equal to 1"]),
    (["data.rollouts_per_problem=1"], ["data.rollouts_per_problem = 1", "greater than or equal to 2"]),
    (["data.task=chess"], ["data.task = 'chess'", "'arithmetic' or 'sat'", "python:MODULE:CLASS"]),
    (["data.task=python:mine"], ["data.task = 'python:mine'", "python:MODULE:CLASS"]),
    (["data.task=python:nowhere:A"], ["data.task = 'python:nowhere:A'", "nowhere cannot be imported"]),
    (["train.optimizer=adam"], ["train.optimizer = 'adam'", "'adamw' or 'sgd'"]),
    (
        ["train.optimizer=sgd", "train.optimizer_options={betas: [0.9, 0.99]}"],
        ["train.optimizer_options = {'betas': [0.9, 0.99]}: betas: sgd has no such option; allowed: momentum"],
    ),
    (
        ["train.optimizer_options={eps: 0}"],
        ["train.optimizer_options = {'eps': 0}: eps: input should be greater than 0"],
    ),
    (["train.loss=ppo"], ["train.loss = 'ppo'", "'grpo' or python:MODULE:FUNCTION"]),
    (["train.loss=python:nowhere:f"], ["train.loss = 'python:nowhere:f'", "nowhere cannot be imported"]),
    (["train.loss=python:bare:A"], ["train.loss = 'python:bare:A'", "bare has no function A"]),
    (["train.loss_options={x: 1}"], ["train.loss_options = {'x': 1}", "grpo has no option x; allowed: none"]),
    (["data.task=python:bare:A"], ["data.task = 'python:bare:A'", "A lacks name", "verify"]),
    (["data.task=python:bare:B", "data.settings={x: 1}"], ["data.task = 'python:bare:B'", "has no class B"]),
    (["data.settings=3"], ["data.settings = 3", "dictionary"]),
    (["data.settings.x=3"], ["data.settings.x = 3", "data.settings='{NAME: VALUE}'"]),
    (["train.lr_warmup_steps=80"], ["train.lr_warmup_steps = 80", "80 optimizer steps", "allowed: 0 to 79"]),
    (
        ["model.train_id=a/b", "generation.backend=vllm_server"],
        ["generation.base_url = null", "generation.backend = 'vllm_server'", "allowed: http://HOST:PORT"],
    ),
    (["data.task=mix"], ["data.mix = {}", "allowed: data.mix='{arithmetic: 0.7, sat: 0.3}'"]),
    (["data.task=mix", "data.mix={chess: 1}"], ["data.mix = {'chess': 1.0}", "'chess' is no task", "'gsm8k'"]),
    (["data.task=mix", "data.mix={mix: 1}"], ["'mix' is no task"]),
    (["data.task=mix", "data.mix={sat: 0}"], ["data.mix = {'sat': 0}", "greater than 0"]),
    (["data.task=gsm8k", "data.gsm8k.path=nowhere"], ["data.gsm8k.path = 'nowhere'", "no such folder or file"]),
    (
        ["data.task=gsm8k", "data.gsm8k.path=empty"],
        ["data.gsm8k.path = 'empty'", "holds no rows", ".parquet or .jsonl"],
    ),
    (["data.task=gsm8k", "data.gsm8k.path=rows.jsonl"], ["rows.jsonl: row 1 is not of GSM8K", "`question`"]),
    (["data.task=rows"], ["data.rows.path = null", "a file, a folder or a hub id"]),
    (["data.task=rows", "data.rows.path=nowhere"], ["data.rows.path = 'nowhere'", "no such folder or file"]),
    (["data.task=rows", "data.rows.path=rows.jsonl"], ["rows.jsonl: row 1: there is no column 'prompt'", "text"]),
    (["data.overlong_buffer=9"], ["data.overlong_buffer = 9", "max_new_tokens = 8", "allowed: 0 to 8"]),
    (["data.task=reasoning_gym/nothing"], ["data.task = 'reasoning_gym/nothing'", "reasoning_gym", "allowed: "]),
    (["generation.backend=tgi"], ["generation.backend = 'tgi'", "'local'", "'vllm_server'"]),
    (["model.device=gpu"], ["model.device = 'gpu'", "auto, cpu, cuda or cuda:N"]),
    # settings that contradict each other
    (
        ["--overrides", SEEDS, "eval.id_seed_start=104095"],
        ["eval.id_seed_start = 104095", "overlap", "104096 or more", "99744 or less"],
    ),
    (
        ["eval.ks=[1,16]", "eval.replicates=8"],
        ["eval.ks = [1, 16]", "pass@16", "eval.replicates = 8", "allowed: k from 1 to 8"],
    ),
    (["eval.ks=[1,1]"], ["eval.ks = [1, 1]", "twice", "allowed: each k once"]),
    (["data.sat.difficulty=[0.7,0.3]"], ["data.sat.difficulty = [0.7, 0.3]", "exceeds", "allowed: [low, high]"]),
    (
        ["data.num_train_seeds=8", "data.problems_per_iteration=64"],
        ["data.problems_per_iteration = 64", "data.num_train_seeds = 8", "allowed: 1 to 8"],
    ),
    (
        ["--overrides", STEPS, "train.batch_size=7", "train.grad_accum_steps=1"],
        ["train.batch_size = 7", "512", "128, 256, 512", "auto"],
    ),
    (
        ["--overrides", f"{STEPS} {HUGE} train.grad_accum_steps=3 eval.enabled=false"],
        ["train.batch_size = 512", "train.grad_accum_steps = 3", "auto"],
    ),
    (
        ["--overrides", STEPS, "train.lr_warmup_steps=40"],
        ["train.lr_warmup_steps = 40", "40 optimizer steps", "allowed: 0 to 39"],
    ),
    (
        ["train.kl_target=0.1", "train.kl_coef=0"],
        ["train.kl_target = 0.1", "train.kl_coef = 0", "allowed: kl_coef > 0"],
    ),
    (
        ["model.tiny.heads=5", "model.tiny.hidden_size=128"],
        ["model.tiny.heads = 5", "hidden_size = 128", "allowed: [1, 2, 4"],
    ),
    (["model.tiny.hidden_size=7"], ["model.tiny.hidden_size", "7", "even"]),
    (["generation.backend=vllm_server"], ["generation.base_url = null", "allowed: http://HOST:PORT"]),
    (["generation.base_url=localhost:80"], ["generation.base_url = 'localhost:80'", "allowed: http://HOST:PORT"]),
    (["generation.base_url=http://gpu-box:99999"], ["'http://gpu-box:99999': not an address", "http://HOST:PORT"]),
    (["generation.base_url=http://"], ["'http://': not an address", "allowed: http://HOST:PORT"]),
    (["eval.base_url=http://[::1"], ["'http://[::1': not an address", "allowed: http://HOST:PORT"]),
    (["eval.base_url=ftp://x"], ["eval.base_url = 'ftp://x'", "allowed: http://HOST:PORT"]),
    (["eval.backend=sglang_server"], ["eval.backend = 'sglang_server'", "allowed: "]),
    (["generation.server.manage=true"], ["generation.server.manage = true", "'local' has no server to start"]),
    ([*SERVED, "generation.sync=restart"], ["generation.sync = 'restart'", "allowed: reload", "manage=true"]),
    ([*SERVED, "generation.sync=none"], ["generation.sync = 'none'", "allowed: reload", "eval.backend=local"]),
    (["generation.async_rollouts=1"], ["generation.async_rollouts = 1", "allowed: 0, or a server backend"]),
    (
        [*SERVED, "generation.async_rollouts=1", "generation.behaviour_logprobs=recompute"],
        ["generation.behaviour_logprobs = 'recompute'", "generation.async_rollouts", "allowed: server"],
    ),
    (
        [
            *("generation.backend=sglang_server", "generation.base_url=http://h:1", "generation.top_k=50"),
            "generation.behaviour_logprobs=server",
        ],
        ["generation.top_k = 50", "SGLang", "allowed: -1, or generation.behaviour_logprobs=recompute"],
    ),
    (
        [
            *("generation.backend=sglang_server", "generation.base_url=http://h:1"),
            "generation.repetition_penalty=1.1",
        ],
        ["generation.repetition_penalty = 1.1", "SGLang", "allowed: 1"],
    ),
    # from Hydra
    (
        ["--config", "tiny", "train.lr=[5e-6,1e-5]", "seed=1"],
        ["optimize --config tiny --sampler grid --space 'train.lr=[5e-6,1e-5]' seed=1"],
    ),
    (["--train.lr", "[5e-6,1e-5]"], ["train.lr=[5e-6,1e-5]: one run takes one value", "optimize"]),
    (
        ["-m", "train.lr=5e-6,1e-5", "train.batch_size=[4,8]"],
        ["optimize --sampler grid --space 'train.lr=[5e-6,1e-5] train.batch_size=[4,8]'"],
    ),
    (["--multirun", "train.method=grpo,dapo"], ["optimize --sampler grid --space 'train.method=[grpo,dapo]'"]),
    (["-m", "seed=1"], ["-m: no setting has several values", "leave -m out"]),
    (["hydra.run.dir=x"], ["hydra.run.dir = 'x'", "no Hydra", "outputs/RUN_ID"]),
    (["--config-name", "offline_grpo"], ["--config-name", "--config NAME"]),
    (["--cfg=job"], ["--cfg", "--print-config"]),
    (["generation.server.port=99999"], ["generation.server.port = 99999", "65535"]),
    (["generation.server.arguments=--enforce-eager"], ["generation.server.arguments", "list"]),
    # models
    (["model.train_id=./nowhere"], ["model.train_id = './nowhere'", "no such folder", "allowed: tiny, a hub id"]),
    (["model.train_id=empty"], ["model.train_id = 'empty'", "config.json", "save_pretrained"]),
    (["model.train_id=" + "a" * 10_000], ["model.train_id = 'aaaa", "no such folder", "allowed: tiny, a hub id"]),
    (["--config", "a" * 10_000], ["config = 'aaaa", "no such file or preset"]),
    (["data.task=gsm8k", "data.gsm8k.path=" + "a" * 10_000], ["data.gsm8k.path = 'aaaa", "no such folder or file"]),
    (["model.ref_id=/no/where", "train.kl_coef=0.1"], ["model.ref_id = '/no/where'", "no such folder", "allowed: "]),
    (["model.train_id=~nobody_here/model"], ["model.train_id = '~nobody_here/model'", "no such folder", "allowed: "]),
    # files
    (["--config", "missing.yaml"], ["config = 'missing.yaml'", "no such file", "tiny"]),
    (["--config", "~nobody_here/a.yaml"], ["config = '~nobody_here/a.yaml'", "no such file", "tiny"]),
    (["--config", "empty"], ["config = 'empty'", "no such file", "tiny"]),
    (["--config", "binary.yaml"], ["binary.yaml", "cannot be read as text"]),
    (["--config", "broken.yaml"], ["broken.yaml, line 3", "not valid YAML", "expected"]),
    (["--config", "twice.yaml"], ["twice.yaml, line 4", "'lr' is given twice"]),
    (["--config", "list.yaml"], ["list.yaml", "mapping of sections", "list"]),
    (["--config", "numbers.yaml"], ["numbers.yaml", "key 1", "mapping of sections"]),
    (["--config", "key.yaml"], ["train.lrate = 0.0001 (file key.yaml)", "train.lr"]),
    (["--config", "type.yaml"], ["train.lr = 'fast' (file type.yaml)", "number"]),
    (["--config", "loop.yaml"], ["base = 'loop.yaml'", "back to itself"]),
    (["--config", "baseless.yaml"], ["baseless.yaml", "base = 'nowhere.yaml'", "no such file", "tiny"]),
    (["--config", "basetype.yaml"], ["base = ['tiny']", "name of a preset or a file"]),
    (["--config", "section.yaml"], ["train = 3 (file section.yaml)", "section", "train.lr"]),
    (["--config", "code.yaml"], ["code.yaml, line 1", "not valid YAML", "python/object"]),
    # words
    (["train.lr=[1"], ["train.lr=[1", "not valid YAML", "']'"]),
    (["train.lr=@x"], ["train.lr=@x", "not valid YAML"]),
    (["train={lr: 1e-4, lr: 2e-4}"], ["train={lr: 1e-4, lr: 2e-4}", "'lr' is given twice"]),
    (["--overrides", "train.lr='1e-5"], ["train.lr='1e-5", "no closing quotation"]),
    (
        ["--overrides", "data.settings={x: '1'} seed=1"],
        ["data.settings", "needs quotes of its own, such as data.mix='"],
    ),
    (["train.lr"], ["'train.lr'", "key=value"]),
    (["=3"], ["'=3'", "key=value"]),
    (["--overrides", "train.lr"], ["'train.lr'", "key=value"]),
    (["--train.lr"], ["--train.lr", "allowed: --train.lr VALUE"]),
    (["--seed", "--train.lr", "1e-5"], ["--seed", "allowed: --seed VALUE"]),
    (["-x"], ["-x", "--help"]),
    (["--config"], ["--config", "expected one argument"]),
    (["resume=nothing"], ["resume = 'nothing'", "run id", "checkpoint folder"]),
    (["--config", "resume.yaml"], ["resume = 'abc' (file resume.yaml)", "allowed on the command line only"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("commands")
    (path / "empty").mkdir()
    for name, content in FILES.items():
        (path / name).write_bytes(content)
    return path


def _train(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the real command; a line that is wrongly accepted starts a training, which the time limit ends."""
    return subprocess.run(
        [sys.executable, "-m", "grpo_mlflow", "train", *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"},
        timeout=20,
        check=False,
    )


@pytest.mark.parametrize(("words", "fragments"), CASES, ids=[" ".join(words)[-60:] for words, _ in CASES])
def test_a_mistake_is_one_line(words: list[str], fragments: list[str], folder: Path) -> None:
    done = _train(words, folder)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 2
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert [fragment for fragment in fragments if fragment not in lines[0]] == []


def test_every_mistake_has_its_line(folder: Path) -> None:
    done = _train(["train.lr=fast", "data.task=chess", "seed=-1"], folder)
    assert done.returncode == 2
    starts = [line.split(" = ")[0] for line in done.stderr.splitlines()]
    assert sorted(starts) == ["error: data.task", "error: seed", "error: train.lr"]


def test_a_right_line_is_accepted(folder: Path) -> None:
    done = _train(["--overrides", SEEDS, "eval.id_seed_start=104096", "train.lr=1e-4", "--print-config"], folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "lr: 0.0001" in done.stdout
    assert not (folder / "mlflow.db").exists()
