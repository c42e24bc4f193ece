"""What a command starts from when it names no config, what gives way to it, and what may be repeated on resume."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from grpo_mlflow.config import Config, Resolved, dump, flatten, parse_arguments, render, resolve, resuming
from grpo_mlflow.errors import ConfigError

ADDRESS = "http://127.0.0.1:30000"
GUIDE = (
    "model.train_id=Qwen/Qwen2.5-1.5B model.ref_id=Qwen/Qwen2.5-1.5B model.device=cuda:2 "
    f"generation.backend=ENGINE generation.base_url={ADDRESS} eval.backend=ENGINE eval.base_url={ADDRESS} "
    "train.iterations=10"
)
RUN_ID = "1" * 32


def _flat(config: Config) -> dict[str, Any]:
    return flatten(config.model_dump(mode="json"))


def _changed(resolved: Resolved) -> dict[str, Any]:
    """Return what differs from the schema's defaults, which are the guide's."""
    defaults = _flat(Config())
    return {key: value for key, value in _flat(resolved.config).items() if value != defaults[key]}


def _folder(path: Path, trained: str | None = None) -> str:
    path.mkdir()
    (path / "config.json").write_text("{}")
    if trained:
        (path / "trainer").mkdir()
        (path / "trainer" / "config.yaml").write_text(f"model: {{train_id: {trained}}}\n")
    return str(path)


def test_the_guides_quick_start_gets_the_guides_defaults() -> None:
    resolved = resolve("", GUIDE.replace("ENGINE", "vllm_server").split())
    assert _changed(resolved) == {
        **{"model.ref_id": "Qwen/Qwen2.5-1.5B", "model.device": "cuda:2"},
        **{"generation.base_url": ADDRESS, "eval.backend": "vllm_server", "eval.base_url": ADDRESS},
    }
    assert (resolved.config.train.lr, resolved.config.generation.max_new_tokens) == (1e-5, 256)
    assert resolved.warnings == ()


def test_the_guides_quick_start_on_sglang_recomputes_the_log_probs() -> None:
    resolved = resolve("", GUIDE.replace("ENGINE", "sglang_server").split())
    assert resolved.config.generation.behaviour_logprobs == "recompute"
    assert resolved.config.generation.repetition_penalty == 1
    penalty, logprobs = resolved.warnings
    assert penalty.startswith("generation.repetition_penalty = 1.0, not 1.1 (default): SGLang")
    assert logprobs.startswith("generation.behaviour_logprobs = 'recompute', not 'server' (default): SGLang")


def test_a_model_without_a_server_samples_in_this_process(tmp_path: Path) -> None:
    model = _folder(tmp_path / "model")
    resolved = resolve("", [f"model.train_id={model}", "data.task=python:sums:Sums"])
    assert _changed(resolved) == {
        **{"model.train_id": model, "data.task": "python:sums:Sums"},
        "generation.backend": "local",
    }
    assert resolved.origins["generation.backend"] == "no server named"


@pytest.mark.parametrize("word", [f"generation.base_url={ADDRESS}", "generation.server.manage=true"])
def test_a_model_with_a_server_samples_on_it(word: str) -> None:
    resolved = resolve("", ["model.train_id=a/b", word])
    assert resolved.config.generation.backend == "vllm_server"
    assert resolved.origins["generation.backend"] == "default"


def test_a_backend_that_was_chosen_without_an_address_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"generation\.base_url = null.*allowed: http://HOST:PORT"):
        resolve("", ["model.train_id=a/b", "generation.backend=vllm_server"])


def test_a_descendant_of_the_embedded_model_starts_from_its_preset(tmp_path: Path) -> None:
    first = _folder(tmp_path / "iter_001", trained="tiny")
    second = _folder(tmp_path / "iter_002", trained=first)
    made = _folder(tmp_path / "made")
    (tmp_path / "made" / "recipe.json").write_text("[]")
    other = _folder(tmp_path / "iter_003", trained="a/b")
    loop = _folder(tmp_path / "iter_004", trained=str(tmp_path / "iter_004"))
    for model in ("tiny", first, second, made):
        assert resolve("", [f"model.train_id={model}"]).origins["train.lr"] == "preset tiny"
    for model in (other, loop):
        assert resolve("", [f"model.train_id={model}"]).origins["train.lr"] == "default"


def test_a_named_config_holds_whatever_the_model_is() -> None:
    assert resolve("tiny", ["model.train_id=a/b"]).config.train.lr == 4e-4


@pytest.mark.parametrize(
    ("config", "line", "key", "value", "old"),
    [
        ("tiny", "train.iterations=5", "train.lr_warmup_steps", 0, "10 (preset tiny)"),
        ("tiny", "train.iterations=10", "train.lr_warmup_steps", 1, "10 (preset tiny)"),
        ("tiny", "eval.replicates=2", "eval.ks", [1], "[1, 4] (preset tiny)"),
        ("tiny", "eval.ks=[1,16]", "eval.replicates", 16, "8 (preset tiny)"),
        ("tiny", "search.k=16", "eval.replicates", 16, "8 (preset tiny)"),
        ("tiny", "data.num_train_seeds=10", "data.problems_per_iteration", 10, "64 (preset tiny)"),
        ("qwen", "data.problems_per_iteration=128", "data.num_train_seeds", 128, "64 (default)"),
        ("qwen", "data.problems_per_iteration=3", "train.batch_size", 6, "8 (default)"),
        # 7 x 2: batches of 7; 11 x 2: batches of 2 would be many steps of little, so one step of all
        ("qwen", "data={problems_per_iteration: 7, rollouts_per_problem: 2}", "train.batch_size", 7, "8 (default)"),
        (
            "qwen",
            "data={problems_per_iteration: 11, rollouts_per_problem: 2}",
            *("train.grad_accum_steps", "auto", "1 (default)"),
        ),
        ("qwen", "train.batch_size=12", "train.grad_accum_steps", "auto", "1 (default)"),
        ("qwen", "train.grad_accum_steps=4", "train.batch_size", 4, "8 (default)"),
        ("tiny", "train.kl_target=0.1", "train.kl_coef", 0.05, "0.0 (preset tiny)"),
        ("tiny", "data.train_seed_start=4000", "eval.id_seed_start", 8096, "5000 (preset tiny)"),
        ("tiny", "eval.id_seed_start=100000", "data.train_seed_start", 100256, "100000 (preset tiny)"),
        ("tiny", "data.train_seed_start=49000", "search.confirm_seed_start", 53096, "50000 (default)"),
        ("tiny", "model.tiny.hidden_size=36", "model.tiny.heads", 3, "4 (default)"),
        ("tiny", "model.tiny.heads=3", "model.tiny.hidden_size", 132, "128 (default)"),
        ("tiny", "search.sampler=nsga2", "search.pruner", "none", "'paired' (default)"),
    ],
)
def test_what_nobody_chose_gives_way(config: str, line: str, key: str, value: Any, old: str) -> None:
    resolved = resolve(config, [line])
    assert _flat(resolved.config)[key] == value
    assert resolved.warnings[0].startswith(f"{key} = {value!r}, not {old}: ")
    assert len(resolved.warnings) == 1
    assert f"# adapted from {old}\n" in render(resolved)
    given = flatten(_flat(resolve(config).config))
    others = {name for name, held in _flat(resolved.config).items() if held != given[name]} - {key}
    assert all(resolved.origins[name] == "override" for name in others)


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("train.iterations=5 train.lr_warmup_steps=10", r"train\.lr_warmup_steps = 10"),
        ("eval.replicates=2 eval.ks=[1,4]", r"eval\.ks = \[1, 4\]"),
        ("data.num_train_seeds=10 data.problems_per_iteration=64", r"data\.problems_per_iteration = 64"),
        ("train.kl_target=0.1 train.method=dr_grpo", r"train\.kl_target = 0\.1"),
        ("train.grad_accum_steps=1 train.batch_size=12", r"train\.batch_size = 12"),
    ],
)
def test_what_was_chosen_is_refused(line: str, refused: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=refused):
        resolve("tiny", line.split())
    path = tmp_path / "own.yaml"
    path.write_text("base: tiny\n" + "".join(f"{word.replace('=', ': ')}\n" for word in line.split()))
    with pytest.raises(ConfigError, match=refused):  # a file of one's own is a choice, too
        resolve(str(path))


def test_a_study_by_a_large_k_measures_often_enough() -> None:
    resolved = resolve("tiny", ["search.k=64"])
    assert [line.split(" = ")[0] for line in resolved.warnings] == ["eval.replicates", "search.confirm_replicates"]
    assert (resolved.config.eval.replicates, resolved.config.search.confirm_replicates) == (64, 64)
    resolved.require_searchable()


def _resumed(line: str, run: Resolved) -> Config:
    arguments = parse_arguments([*shlex.split(line), f"resume={RUN_ID}"], "test", "a test")
    stored = run.config.model_dump(mode="json")
    return resolve("", resuming.changes(arguments, stored), base=stored, origin="resume").config


@pytest.mark.parametrize(
    "line",
    [
        "train.iterations=5 train.lr_warmup_steps=0",
        "train.iterations=5 train.lr=1e-3 eval.ks='[1,4]' train.optimizer_options='{betas: [0.9, 0.99]}'",
        "--config tiny train.iterations=5",
        "--config smoke data.rollouts_per_problem=4 tracking.run_name=again",
        "train.method=dapo train.kl_coef=0.01",
        "--config qwen model.dtype=float32 train.lr=5e-6",
    ],
)
def test_the_command_of_a_run_may_be_repeated(line: str) -> None:
    arguments = parse_arguments(shlex.split(line), "test", "a test")
    run = resolve(arguments.config, arguments.overrides)
    assert _resumed(line, run) == run.config.model_copy(update={"resume": RUN_ID})


def test_a_method_that_is_repeated_alone_lays_nothing_anew() -> None:
    run = resolve("tiny", ["train.method=dapo", "train.kl_coef=0.01"])
    assert _resumed("train.method=dapo", run).train.kl_coef == 0.01


def test_what_differs_from_the_run_is_refused() -> None:
    run = resolve("tiny", ["train.iterations=5"])
    with pytest.raises(ConfigError, match=r"train\.lr_warmup_steps = 1 .*the run has 0, which cannot change on resume"):
        _resumed("train.lr_warmup_steps=1", run)
    with pytest.raises(
        ConfigError, match=r"config = 'qwen': .* comes from the run, which has model\.train_id = 'tiny'"
    ):
        _resumed("--config qwen", run)
    assert _resumed("--config tiny train.iterations=9", run).train.iterations == 9


def test_a_dump_resolves_to_itself_after_something_gave_way(tmp_path: Path) -> None:
    first = resolve("tiny", ["train.iterations=5", "eval.replicates=2"])
    (tmp_path / "dumped.yaml").write_text(dump(first.config))
    again = resolve(str(tmp_path / "dumped.yaml"))
    assert (again.config, again.warnings) == (first.config, ())
