"""Presets, files and overrides become one checked config that can be written down and read back."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from grpo_mlflow.config import Config, Resolved, dump, flatten, parse_arguments, presets, render, resolve, yaml12
from grpo_mlflow.errors import ConfigError

GUIDE = """
model: {train_id: Qwen/Qwen2.5-1.5B, ref_id: Qwen/Qwen2.5-1.5B, device: "cuda:2"}
generation: {backend: vllm_server, base_url: "http://127.0.0.1:30000", batch_size: 4, max_new_tokens: 256,
             temperature: 0.7, top_p: 0.95, top_k: 50, repetition_penalty: 1.1}
train: {iterations: 10, batch_size: 8, lr: 1.0e-5, grad_clip: 1.0, kl_coef: 0.05, entropy_coef: 0.0,
        grad_accum_steps: 1}
data: {problems_per_iteration: 4, rollouts_per_problem: 4, train_seed_start: 1000, num_train_seeds: 64}
eval: {enabled: true, interval: 1, backend: vllm_server, base_url: "http://127.0.0.1:30000", batch_size: 8,
       replicates: 4, num_ids: 16, id_seed_start: 5000}
checkpoint: {save_interval: 1}
"""
EVERY_PRESET = pytest.mark.parametrize("preset", presets())


def _flat(resolved: Resolved) -> dict[str, Any]:
    return flatten(resolved.config.model_dump(mode="json"))


def _from_line(line: str) -> Resolved:
    arguments = parse_arguments(shlex.split(line), "test", "a test")
    return resolve(arguments.config, arguments.overrides)


def _file(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@EVERY_PRESET
def test_every_preset_resolves_and_survives_dump_and_load(preset: str, tmp_path: Path) -> None:
    first = resolve(preset)
    again = resolve(_file(tmp_path, "dumped.yaml", dump(first.config)))
    assert first.warnings == again.warnings == ()
    assert again.config == first.config
    assert resolve(base=yaml12.load(dump(first.config), "dump"), origin="run").config == first.config


@EVERY_PRESET
def test_render_is_yaml_of_the_config_with_origins(preset: str) -> None:
    resolved = resolve(preset, ["train.lr=3e-6", "eval.ks=[1,2]"])
    text = render(resolved)
    assert yaml12.load(text, "render") == resolved.config.model_dump(mode="json")
    assert yaml.safe_load(text) == resolved.config.model_dump(mode="json")
    origins = [line.rsplit("#", 1)[1].strip() for line in text.splitlines() if "#" in line]
    assert origins == list(resolved.origins.values())
    assert origins.count("override") == 2


TEXTS = (
    "5e-6|1E5|.5e3|010|0x10|1:30|no|null|~|2024-01-01|a: b # c| a |é|a\nb|[1]|{a: 1}|!x|&x|*x|'|\"|%|@x|-|=|<<|...|---"
)


@pytest.mark.parametrize("name", [*TEXTS.split("|"), "word " * 40 + "end", "x" * 300])
def test_any_text_survives_dump_and_render(name: str, tmp_path: Path) -> None:
    first = resolve(base={**resolve("tiny").config.model_dump(), "tracking": {"run_name": name}}, origin="test")
    for write in (dump(first.config), render(first)):
        assert resolve(_file(tmp_path, "again.yaml", write)).config == first.config


def test_a_setting_that_is_a_mapping_is_one_value(tmp_path: Path) -> None:
    mix = {"python:a.b:C": 2.0, "reasoning_gym/gcd": 1.0}
    first = resolve("tiny", [f"data.mix={mix}", "data.settings={a.b: [1, {c: null}]}"])
    assert _flat(first)["data.mix"] == first.config.data.mix == mix
    assert first.config.data.settings == {"a.b": [1, {"c": None}]}
    for text in (dump(first.config), render(first)):
        assert resolve(_file(tmp_path, "again.yaml", text)).config == first.config
    assert resolve(_file(tmp_path, "again.yaml", dump(first.config)), ["data.mix={sat: 1}"]).config.data.mix == {
        "sat": 1
    }


def test_qwen_holds_the_guides_settings() -> None:
    found, guide = _flat(resolve("qwen")), flatten(yaml.safe_load(GUIDE))
    for key in ("backend", "base_url"):
        found[f"eval.{key}"] = found[f"eval.{key}"] or found[f"generation.{key}"]  # null: as generation
    assert len(guide) == 31
    assert {key: found[key] for key in guide} == guide


@pytest.mark.parametrize(
    ("preset", "different"),
    [
        (
            "quick",
            {
                "model.train_id": "Qwen/Qwen2.5-0.5B",
                "model.ref_id": "Qwen/Qwen2.5-0.5B",
                "train.iterations": 3,
                "data.problems_per_iteration": 2,
            },
        ),
        (
            "overnight",
            {
                "model.train_id": "Qwen/Qwen2.5-7B",
                "model.ref_id": "Qwen/Qwen2.5-7B",
                "model.lora.rank": 16,  # the guide trains all weights, which fit no single GPU
                "generation.sync": "lora",
                "train.iterations": 100,
                "train.lr": 5e-5,
                "data.problems_per_iteration": 8,
                "eval.interval": 5,
            },
        ),
    ],
)
def test_the_guides_workflows_change_only_what_they_say(preset: str, different: dict[str, Any]) -> None:
    assert _flat(resolve(preset)) == {**_flat(resolve("qwen")), **different}


@pytest.mark.parametrize(
    "line",
    [
        "model.train_id=Qwen/Qwen2.5-7B model.ref_id=Qwen/Qwen2.5-7B model.device=cuda:2",
        "generation.temperature=0.5 generation.top_p=0.9 generation.max_new_tokens=512",
        "generation.batch_size=16 eval.batch_size=16",
        "train.iterations=50 train.lr=5e-5 train.batch_size=16 data.problems_per_iteration=8",
        "train.lr=5e-6 train.kl_coef=0.02 train.batch_size=4",
        "checkpoint.save_interval=1 eval.replicates=5 eval.ks='[1,5]'",
    ],
)
def test_the_guides_overrides_are_accepted(line: str) -> None:
    words = dict(word.split("=") for word in shlex.split(line))
    found = _flat(resolve("qwen", shlex.split(line)))
    assert {key: found[key] for key in words} == {key: yaml12.load(value, key) for key, value in words.items()}


def test_the_default_preset_runs_without_server_or_download() -> None:
    config = resolve().config
    assert (config.model.train_id, config.generation.backend, config.eval.backend) == ("tiny", "local", None)


def test_three_ways_to_override_give_the_same_config() -> None:
    plain = _from_line("train.lr=5e-6 eval.ks='[1,2]' train.grad_clip=null seed=7")
    grouped = _from_line("""--overrides "train.lr=5e-6 eval.ks='[1,2]' train.grad_clip=null seed=7" """)
    options = _from_line("--train.lr 5e-6 --eval.ks '[1,2]' --train.grad_clip=null --seed 7")
    assert plain == grouped == options
    config = plain.config
    assert (config.train.lr, config.eval.ks, config.train.grad_clip, config.seed) == (5e-6, (1, 2), None, 7)


def test_several_overrides_are_not_split_inside_brackets() -> None:
    mapping = "{arithmetic: 0.7,  sat: 0.3}"
    quoted = _from_line(f"data.task=mix data.mix='{mapping}' eval.ks='[1, 2]' seed=7")
    assert _from_line(f'--overrides "data.task=mix data.mix={mapping} eval.ks=[1, 2] seed=7"') == quoted
    text = _from_line("""--overrides "data.system_prompt='say [' seed=7" """).config
    assert (text.data.system_prompt, text.seed) == ("say [", 7)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train.lr=1e-3 train.lr=2e-3", 2e-3),
        ('train.lr=2e-3 --overrides "train.lr=1e-3"', 2e-3),
        ("--train.lr 1e-3 train.lr=2e-3", 2e-3),
        ("train.lr=2e-3 --config qwen", 2e-3),
        ("train='{lr: 2e-3}'", 2e-3),
        ("--config qwen", 1e-5),
        ("--config=tiny --config=qwen", 1e-5),
    ],
)
def test_the_last_word_wins(line: str, expected: float) -> None:
    assert _from_line(line).config.train.lr == expected


def test_no_word_at_all_means_the_default_preset() -> None:
    assert _from_line("") == _from_line("--overrides=") == _from_line("--config tiny") == resolve()


def test_own_options_are_not_overrides() -> None:
    options = {"model": ("", "what to measure"), "checkpoint": ("best", "which")}
    arguments = parse_arguments(["--model", "here", "seed=3", "--print-config"], "test", "a test", options)
    assert arguments.options == {"model": "here", "checkpoint": "best"}
    assert (arguments.overrides, arguments.print_config, arguments.resumes()) == (("seed=3",), True, None)
    assert parse_arguments(["resume=" + "1" * 32], "test", "a test").resumes() == "1" * 32


def test_options_may_stand_between_overrides() -> None:
    words = ["seed=1", "--model", "here", "seed=2", "--overrides", "seed=0", "--print-config", "seed=3"]
    arguments = parse_arguments(words, "test", "a test", {"model": ("", "what to measure")})
    assert arguments.overrides == ("seed=0", "seed=1", "seed=2", "seed=3")
    assert (arguments.options, arguments.print_config) == ({"model": "here"}, True)


def test_files_stand_on_their_base_and_overrides_on_both(tmp_path: Path) -> None:
    _file(tmp_path, "parent.yaml", "base: quick\nseed: 1\ntrain:\n  lr: 2e-5\n  kl_coef: 0.1\n")
    child = _file(tmp_path, "child.yaml", f"base: {tmp_path}/parent.yaml\ntrain:\n  lr: 3e-5\n  iterations: 4\n")
    resolved = resolve(child, ["train.iterations=5"])
    train, origins = resolved.config.train, resolved.origins
    assert (train.iterations, train.lr, train.kl_coef, resolved.config.seed) == (5, 3e-5, 0.1, 1)
    assert resolved.config.model.train_id == "Qwen/Qwen2.5-0.5B"
    assert resolved.config.generation.top_k == 50
    expected = {
        "train.iterations": "override",
        "train.lr": "file child.yaml",
        "train.kl_coef": "file parent.yaml",
        "data.problems_per_iteration": "preset quick",
        "generation.backend": "preset qwen",
        "train.epochs": "default",
    }
    assert {key: origins[key] for key in expected} == expected
    assert set(origins) == set(_flat(resolved))


def test_a_base_is_found_beside_its_file(tmp_path: Path) -> None:
    _file(tmp_path, "parent.yaml", "base: tiny\nseed: 11\n")
    assert resolve(_file(tmp_path, "child.yaml", "base: parent.yaml\n")).config.seed == 11


def test_a_base_that_leads_back_is_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(f"base: {second}\n")
    second.write_text(f"base: {first}\n")
    with pytest.raises(ConfigError, match="back to itself"):
        resolve(str(first))


def test_a_file_without_base_starts_from_the_guides_defaults(tmp_path: Path) -> None:
    text = "generation: {backend: local}\ntrain:\n  lr: 1e-4\n"
    config = resolve(_file(tmp_path, "own.yaml", text)).config
    assert config == Config.model_validate({"generation": {"backend": "local"}, "train": {"lr": 1e-4}})
    assert config.model.train_id == "Qwen/Qwen2.5-1.5B"


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        resolve().config.train.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        resolve().config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["train.clip_low=0.1"], "train.clip_low"),
        (["train.clip_high=0.3"], "train.clip_high"),
        (["train.ratio_level=sequence"], "train.ratio_level"),
        (["model.ref_id=tiny"], "model.ref_id"),
        (["train.kl_estimator=k1"], "train.kl_estimator"),
        (["model.train_id=a/b", "model.tiny.steps=10"], "model.tiny.steps"),
        (["data.sat.difficulty=[0.1,0.2]"], "data.sat.difficulty"),
        (["data.task=sat", "data.arithmetic.digits=3"], "data.arithmetic.digits"),
        (["data.gsm8k.path=rows"], "data.gsm8k.path"),
        (["data.rows.prompt=question"], "data.rows.prompt"),
        (["data.reasoning_gym={max_terms: 3}"], "data.reasoning_gym"),
        (["data.settings={length: 3}"], "data.settings"),
        (["data.mix={sat: 1}"], "data.mix"),
        (["data.task=mix", "data.mix={sat: 1}", "data.arithmetic.digits=3"], "data.arithmetic.digits"),
        (["eval.enabled=false", "eval.interval=7"], "eval.interval"),
        (["generation.base_url=http://127.0.0.1:1"], "generation.base_url"),
        (["eval.base_url=http://127.0.0.1:1"], "eval.base_url"),
        (["train.kl_coef=0.1", "train.kl_horizon=5"], "train.kl_horizon"),
        (["train.iterations=1", "train.lr_warmup_steps=0", "train.lr_schedule=cosine"], "train.lr_schedule"),
        (["train.importance_sampling_mode=none", "generation.top_p=0.9"], "train.importance_sampling_mode"),
        (["train.importance_sampling_mode=none", "train.importance_sampling_cap=3"], "train.importance_sampling_cap"),
        (
            ["train.importance_sampling_mode=none", "train.importance_sampling_floor=.5"],
            "train.importance_sampling_floor",
        ),
    ],
)
def test_a_chosen_setting_that_cannot_act_is_named(overrides: list[str], key: str, tmp_path: Path) -> None:
    by_override = resolve("tiny", overrides).warnings
    assert len(by_override) == 1
    assert by_override[0].startswith(f"{key} ")
    text = "base: tiny\n" + "".join(f"{item.replace('=', ': ', 1)}\n" for item in overrides)
    assert resolve(_file(tmp_path, "own.yaml", text)).warnings == by_override


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("cap=null", "train.importance_sampling_mode = 'token_truncate': .* are null; allowed: one of them a number"),
        ("floor=2", "train.importance_sampling_floor = 2.0: not below train.importance_sampling_cap = 2.0; allowed"),
        (
            "mode=token_mask cap=.9",
            "train.importance_sampling_cap = 0.9: masks the weight 1, .*; allowed: 1 or more, or null",
        ),
        (
            "mode=sequence_mask floor=1.1",
            "train.importance_sampling_floor = 1.1: masks the weight 1, .*; allowed: up to 1",
        ),
        ("mode=truncate", "train.importance_sampling_mode = 'truncate' .*: input should be 'none', 'token_truncate'"),
    ],
)
def test_bounds_that_leave_no_correction_are_refused(words: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        resolve("tiny", [f"train.importance_sampling_{word}" for word in words.split()])
    resolve("tiny", ["train.importance_sampling_mode=none", "train.importance_sampling_cap=null"])


@pytest.mark.parametrize(("cap", "expected"), [("3.5", ("token_truncate", 3.5)), ("null", ("none", 2.0))])
def test_the_cap_of_earlier_versions_is_understood(cap: str, expected: tuple[str, float], tmp_path: Path) -> None:
    file = _file(tmp_path, "own.yaml", f"base: tiny\ntrain: {{sampler_correction_cap: {cap}}}\n")
    stored = {"generation": {"backend": "local"}, "train": {"sampler_correction_cap": yaml12.load(cap, "")}}
    for found in (
        resolve(file),
        resolve("", base=stored, origin="run"),
        resolve("tiny", [f"train.sampler_correction_cap={cap}"]),
    ):
        train = found.config.train
        assert (train.importance_sampling_mode, train.importance_sampling_cap) == expected
        assert "sampler_correction_cap" not in dump(found.config)


@pytest.mark.parametrize("word", ["arguments=[--max-num-seqs, '4']", "python=mine", "memory=0.3", "device=cpu"])
def test_what_shapes_the_command_that_starts_a_server_by_hand_has_an_effect(word: str) -> None:
    server = ["generation.backend=vllm_server", "generation.base_url=http://127.0.0.1:30000"]
    assert resolve("tiny", [*server, f"generation.server.{word}"]).warnings == ()
    evaluated = ["eval.backend=vllm_server", "eval.base_url=http://127.0.0.1:30000"]
    assert resolve("tiny", [*evaluated, f"generation.server.{word}"]).warnings == ()
    (line,) = resolve("tiny", [f"generation.server.{word}"]).warnings
    assert line == f"generation.server.{word.partition('=')[0]} has no effect: generation.server.manage is false"


def test_the_port_of_a_server_has_an_effect_where_the_address_names_none() -> None:
    words = ["generation.backend=vllm_server", "generation.server.port=7000"]
    assert resolve("tiny", [*words, "generation.base_url=http://gpu-box"]).warnings == ()
    (line,) = resolve("tiny", [*words, "generation.base_url=http://gpu-box:7000"]).warnings
    assert line == "generation.server.port has no effect: generation.server.manage is false"


def test_a_default_counts_as_chosen_on_the_command_line_only(tmp_path: Path) -> None:
    assert resolve("tiny", ["train.clip_high=0.2"]).warnings[0].startswith("train.clip_high ")
    assert resolve(_file(tmp_path, "own.yaml", "base: tiny\ntrain: {clip_high: 0.2}\n")).warnings == ()


def test_settings_that_act_are_not_warned_about() -> None:
    assert resolve("tiny", ["train.epochs=2", "train.clip_low=0.1", "train.ratio_level=sequence"]).warnings == ()
    assert resolve("tiny", ["train.kl_coef=0.1", "train.kl_estimator=k2", "model.ref_id=tiny"]).warnings == ()
    assert resolve("tiny", ["data.arithmetic.digits=3", "model.tiny.steps=10", "eval.interval=7"]).warnings == ()


@pytest.mark.parametrize(
    ("line", "steps"),
    [
        ("", 1),
        ("train.epochs=3", 3),
        ("train.grad_accum_steps=1 train.batch_size=64", 8),
        ("train.grad_accum_steps=4 train.batch_size=64 train.epochs=2", 4),
        ("--config qwen", 2),  # 4 problems x 4 rollouts in batches of 8
    ],
)
def test_optimizer_steps_per_iteration(line: str, steps: int) -> None:
    sizes = "" if "qwen" in line else "data.problems_per_iteration=64 data.rollouts_per_problem=8 train.batch_size=512 "
    assert _from_line(sizes + line).config.steps_per_iteration == steps


def test_a_horizon_that_turns_the_kl_coefficient_negative_is_refused() -> None:
    # the coefficient may fall by 0.2 / horizon of itself: at 0.1 it would become -1 times itself
    with pytest.raises(ConfigError, match=r"train\.kl_horizon = 0\.1"):
        resolve("tiny", ["train.kl_coef=0.1", "train.kl_target=1.0", "train.kl_horizon=0.1"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-6", 5e-6),
        *(("1.", 1.0), ("-.5", -0.5)),
        ("010", 10),
        ("true", True),
        *((text, None) for text in ("null", "~", "")),
        ("[1, a, null]", [1, "a", None]),
        (".inf", float("inf")),
        *((text, text) for text in ("no", "on", "1:30", "1_000", "2024-01-01", "0x10", "\u0661", "1\u0661")),
    ],
)
def test_scalars_are_read_as_people_write_them(text: str, value: object) -> None:
    read = yaml12.load(text, "here")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "module", ["grpo_mlflow.config", "grpo_mlflow.cli.commands", "entrypoints.train", "entrypoints.evaluate"]
)
def test_reading_settings_imports_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    loaded = set(done.stdout.split())
    assert module in loaded
    assert not loaded & {"torch", "mlflow", "transformers", "accelerate", "optuna", "openai", "numpy"}


def test_a_study_is_not_resumed_but_begun_again() -> None:
    with pytest.raises(ConfigError, match=r"resume = '1{32}': a study goes on with its own command; allowed: null"):
        resolve("tiny", ["resume=" + "1" * 32]).require_searchable()
