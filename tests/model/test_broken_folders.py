"""A model folder that cannot be used is one line with exit code 2, before a run is opened; and what only looks odd is
used."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AddedToken, AutoTokenizer

from grpo_mlflow.cli import doctor, evaluate, merge, optimize, train
from grpo_mlflow.config import LoraConfig, TinyConfig, resolve
from grpo_mlflow.errors import ConfigError, ModelError, UserError
from grpo_mlflow.model import loading, lora, merging, policy, tiny
from tests.support import broken
from tests.support.adapters import move_adapter
from tests.support.paths import ROOT

CPU = torch.device("cpu")
ALL = {
    **{name: ("model", *case) for name, case in broken.MODELS.items()},
    **{name: ("adapter", *case) for name, case in broken.ADAPTERS.items()},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and an adapter of it, by these names."""
    folder = tmp_path_factory.mktemp("sound")
    tiny.build(TinyConfig(hidden_size=32, layers=2, heads=2, seed=3)).save(folder / "model")
    found = policy.load(folder / "model", CPU)
    lora.add(found.model, LoraConfig(rank=4), 0)
    move_adapter(found)
    found.save(folder / "adapter")
    return folder


def broken_copy(sound: Path, name: str, to: Path) -> Path:
    kind, apply, _ = ALL[name]
    shutil.copytree(sound / kind, to / "given")
    apply(to / "given")
    return to / "given"


def words(folder: Path, store: Path) -> list[str]:
    return ["--config", "tiny", f"model.train_id={folder}", "model.device=cpu", f"tracking.uri=sqlite:///{store}"]


@pytest.mark.parametrize("name", ALL)
def test_a_broken_folder_is_one_line_before_a_run_is_opened(
    sound: Path,
    name: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # as where the variable CI is set
    given = broken_copy(sound, name, tmp_path)
    capfd.readouterr()
    caplog.clear()
    with pytest.raises(UserError) as caught:
        train.main(words(given, tmp_path / "mlflow.db"))
    line = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in line
    assert [fragment for fragment in (*ALL[name][2], "allowed: ") if fragment not in line] == []
    assert "max_new_tokens" in line or str(given) in line
    assert (capfd.readouterr(), caplog.messages) == (("", ""), [])  # no other line says anything
    assert not (tmp_path / "mlflow.db").exists()


COMMANDS = {
    "evaluate": lambda folder, store: evaluate.main([*words(folder, store)]),
    "evaluate --model": lambda folder, store: evaluate.main(["--model", str(folder), *words(folder, store)[-2:]]),
    "optimize": lambda folder, store: optimize.main([*words(folder, store), f"search.storage=sqlite:///{store}.study"]),
    "merge": lambda folder, store: merge.main(["--model", str(folder), "--output", str(folder.parent / "merged")]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["a tensor of an adapter is missing", "DoRA", "a base that is gone"])
def test_all_commands_refuse_alike(sound: Path, name: str, command: str, tmp_path: Path) -> None:
    given = broken_copy(sound, name, tmp_path)
    with pytest.raises(ModelError) as caught:
        COMMANDS[command](given, tmp_path / "mlflow.db")
    assert [fragment for fragment in ALL[name][2] if fragment not in str(caught.value)] == []
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "merged").exists()


def with_token(folder: Path, *, special: bool) -> None:
    """Give the tokenizer a token that the model has no embedding for."""
    found = AutoTokenizer.from_pretrained(folder)
    found.add_tokens([AddedToken("<image>", special=special)], special_tokens=special)
    found.save_pretrained(folder)


# What makes the tokenizer of an adapter unfit, and what the line must hold
UNFIT: dict[str, tuple[broken.Break, list[str]]] = {
    **{name: broken.MODELS[name] for name in broken.MODELS if name.startswith("a template that ")},
    "a token without an embedding": (
        lambda folder: with_token(folder, special=False),
        ["1 tokens of its tokenizer lie outside the 317 rows", "'<image>' = 317"],
    ),
    "a template with a token without an embedding": (
        broken.both(
            lambda folder: with_token(folder, special=True),
            broken.written("chat_template.jinja", b"<image>{{ messages[0].content }}"),
        ),
        ["a prompt has token 317", "below 317"],
    ),
    "no end-of-sequence token": (
        broken.edited("tokenizer_config.json", eos_token=None),
        ["names no end-of-sequence token", "eos_token"],
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_adapter_that_could_not_be_asked_is_not_merged(sound: Path, name: str, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "given")
    base, adapter = tmp_path / "given" / "model", tmp_path / "given" / "adapter"
    broken.edited("adapter_config.json", base_model_name_or_path=str(base))(adapter)
    broken.without("generation_config.json")(base)  # so that only the tokenizer names an end
    broken.edited("config.json", eos_token_id=None)(base)
    merge.main(["--model", str(adapter), "--output", str(tmp_path / "fits")])
    apply, fragments = UNFIT[name]
    apply(adapter)
    with pytest.raises(ModelError) as caught:
        merge.main(["--model", str(adapter), "--output", str(tmp_path / "merged")])
    line = str(caught.value)
    assert [fragment for fragment in (*fragments, str(adapter), "allowed: ") if fragment not in line] == []
    assert "\n" not in line
    assert not (tmp_path / "merged").exists()


def test_a_broken_reference_is_refused_as_early(sound: Path, tmp_path: Path) -> None:
    given = broken_copy(sound, "NaN", tmp_path)
    asked = [*words(sound / "model", tmp_path / "mlflow.db"), f"model.ref_id={given}", "train.kl_coef=0.1"]
    with pytest.raises(ModelError, match="not finite"):
        train.main(asked)
    assert not (tmp_path / "mlflow.db").exists()


def test_the_doctor_names_it_and_opens_no_run(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = broken_copy(sound, "the tokenizer is lost", tmp_path)
    with pytest.raises(SystemExit) as ended:
        doctor.main(words(given, tmp_path / "mlflow.db"))
    assert ended.value.code == 2
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1
    assert "tokenizer knows no text" in failed[0]
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("name", ["a template that refuses", "another shape", "an adapter of another rank"])
def test_the_doctor_says_what_train_says(
    sound: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = broken_copy(sound, name, tmp_path / ("long" * 40))
    with pytest.raises(UserError) as caught:
        train.main(words(given, tmp_path / "mlflow.db"))
    with pytest.raises(SystemExit):
        doctor.main(words(given, tmp_path / "mlflow.db"))
    line = str(caught.value)
    found, remedy = capsys.readouterr().out.partition("FAILED  model")[2].splitlines()[:2]
    assert found.strip() == line
    assert remedy.strip() == f"remedy: {line.partition('; allowed: ')[2]}"


def test_the_doctor_looks_at_the_reference_too(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = broken_copy(sound, "NaN", tmp_path)
    asked = [*words(sound / "model", tmp_path / "mlflow.db"), f"model.ref_id={given}", "train.kl_coef=0.1"]
    with pytest.raises(SystemExit):
        doctor.main(asked)
    assert f"model '{given}': 1 tensor" in capsys.readouterr().out.partition("FAILED  model")[2]


def test_the_command_prints_the_line_alone(sound: Path, tmp_path: Path) -> None:
    given = broken_copy(sound, "a layer is missing", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "grpo_mlflow", "train", *words(given, tmp_path / "mlflow.db")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"error: model '{given}': 12 tensors (model.layers.2.input_layernorm.weight, ")
    assert not (tmp_path / "mlflow.db").exists()


# What looks odd and is right


def logits(given: policy.Policy) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = given.model(input_ids=torch.tensor([[7, 8, 9, 30, 31, 200]])).logits
    return found


def _old_buffers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["model.embeddings.position_ids"] = torch.arange(8)


@pytest.mark.parametrize("apply", [broken.sharded, broken.changed(_old_buffers)])
def test_shards_and_buffers_of_earlier_versions_are_read(sound: Path, apply: broken.Break, tmp_path: Path) -> None:
    shutil.copytree(sound / "model", tmp_path / "given")
    apply(tmp_path / "given")
    assert torch.equal(logits(policy.load(tmp_path / "given", CPU)), logits(policy.load(sound / "model", CPU)))


def test_a_special_token_may_lie_outside_the_embeddings(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound / "model", tmp_path / "given")
    found = policy.load(tmp_path / "given", CPU)
    found.tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    found.tokenizer.save_pretrained(tmp_path / "given")
    assert policy.load(tmp_path / "given", CPU).tokenizer.convert_tokens_to_ids("<image>") == 317


@pytest.mark.parametrize(
    "change",
    [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 64}}, {"lora_dropout": 0.5}, {"init_lora_weights": "gaussian"}],
)
def test_carried_settings_are_merged_as_peft_computes_them(
    sound: Path, change: dict[str, object], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    shutil.copytree(sound / "adapter", tmp_path / "given")
    broken.edited("adapter_config.json", **change)(tmp_path / "given")
    base = policy.load(sound / "model", CPU)
    theirs = peft.PeftModel.from_pretrained(base.model, str(tmp_path / "given")).eval()
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([[7, 8, 9, 30, 31, 200]])).logits
    loading.merge(tmp_path / "given", tmp_path / "merged", resolve("tiny").config.model)
    torch.testing.assert_close(logits(policy.load(tmp_path / "merged", CPU)), expected, atol=1e-4, rtol=0)


# Merging


def test_a_merge_that_is_not_the_adapter_is_refused(sound: Path) -> None:
    """DoRA scales whole columns, which adding to the weights leaves out."""
    peft = pytest.importorskip("peft")
    found = policy.load(sound / "model", CPU)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True), found.model)
    with torch.no_grad():
        for name, parameter in found.model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1.01)
    with pytest.raises(ModelError, match=r"the adapter of 'model\.layers\.0\.self_attn\.q_proj' cannot be merged"):
        merging.merged(found.model)


def test_models_that_score_differently_are_told_apart(sound: Path) -> None:
    adapted, plain = policy.load(sound / "adapter", CPU), policy.load(sound / "model", CPU)
    loading.require_equal(adapted, adapted.merged())
    with pytest.raises(ModelError, match="the merged model differs from its adapter"):
        loading.require_equal(adapted, plain)


# An adapter that goes on


@pytest.mark.parametrize(("targets", "is_right"), [("all-linear", True), ("[q_proj,v_proj]", False)])
def test_targets_of_an_adapter_that_goes_on_must_be_its_own(sound: Path, targets: str, is_right: bool) -> None:
    folder = sound / "adapter"
    asked = ["model.lora.rank=4", f"model.lora.targets={targets}", f"model.train_id={folder}"]
    config = resolve("tiny", asked).config
    if is_right:
        assert loading.trained(config, folder, CPU).has_adapter
        return
    with pytest.raises(ConfigError) as caught:
        loading.trained(config, folder, CPU)
    assert str(caught.value) == (
        "model.lora.targets = [q_proj,v_proj]: the adapter to go on with has other layers; allowed: all-linear"
    )


def test_an_adapter_of_some_layers_says_which_to_ask_for(sound: Path, tmp_path: Path) -> None:
    found = policy.load(sound / "model", CPU)
    lora.add(found.model, LoraConfig(rank=4, targets=("q_proj", "v_proj")), 0)
    found.save(tmp_path)
    words = ["model.lora.rank=4", f"model.train_id={tmp_path}"]
    with pytest.raises(ConfigError, match=r"targets = all-linear: .*; allowed: \[q_proj,v_proj\]$"):
        loading.trained(resolve("tiny", words).config, tmp_path, CPU)
    asked = [*words, "model.lora.targets=[v_proj,q_proj]"]
    assert loading.trained(resolve("tiny", asked).config, tmp_path, CPU).has_adapter


# The cache of the embedded model

QUICK = ["model.tiny.hidden_size=16", "model.tiny.layers=1", "model.tiny.heads=1", "model.tiny.steps=2"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRPO_MLFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made() -> Path:
    return Path(loading.model_source("tiny", resolve("tiny", QUICK).config))


def flip(file: Path) -> bytes:
    """Flip one bit in the middle of a file, and return what it was."""
    before = file.read_bytes()
    middle = len(before) // 2
    file.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
    return before


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_cache_is_made_again_and_one_line_says_so(
    cache: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made()
    before = flip(folder / name)
    caplog.clear()
    assert made() == folder
    assert (folder / name).read_bytes() == before
    assert [record.getMessage() for record in caplog.records] == [
        f"cached model {folder}: {name} is damaged; it is made again"
    ]
    caplog.clear()
    made()
    assert caplog.messages == []
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]  # nothing is left over


def test_a_cache_of_an_earlier_version_gets_checksums_unless_it_is_unsound(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made()
    (folder / "checksums.json").unlink()
    assert made() == folder
    assert "model.safetensors" in json.loads((folder / "checksums.json").read_text())
    assert caplog.messages == []
    (folder / "checksums.json").unlink()
    broken.cut("model.safetensors", 999)(folder)
    with caplog.at_level(logging.WARNING):
        made()
    assert len(caplog.messages) == 1
    assert policy.load(folder, CPU).model.config.hidden_size == 16


def test_two_processes_at_once_make_one_sound_model_of_a_damaged_one(cache: Path) -> None:
    before = flip(made() / "model.safetensors")
    code = f"""
from grpo_mlflow.config import resolve
from grpo_mlflow.model import loading
for _ in range(3):
    print(loading.model_source("tiny", resolve("tiny", {QUICK}).config))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    ended = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert {line for out, _ in ended for line in out.decode().splitlines()} == {str(made())}
    assert (made() / "model.safetensors").read_bytes() == before
