"""Adapters: what is trained, what the reference is, what merging and saving keep, what the fast paths must not see."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_mlflow import runs
from grpo_mlflow.cli import merge
from grpo_mlflow.config import Config, LoraConfig, TinyConfig, parse_arguments, resolve
from grpo_mlflow.errors import ConfigError, UserError
from grpo_mlflow.forward import llama_pass
from grpo_mlflow.generation import LocalGenerator, Sampling
from grpo_mlflow.model import loading, lora, policy, tiny
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.model.recomputing import recompute_activations
from grpo_mlflow.runs import stored
from grpo_mlflow.tasks import Arithmetic
from grpo_mlflow.training.scoring import Scorer
from tests.support.adapters import move_adapter
from tests.support.conformance import ShapedConformance, prompts
from tests.support.packed_rows import build, rows, scorer
from tests.support.small_runs import SMALL, curves, resume

CPU = torch.device("cpu")


def logits(given: Policy) -> Tensor:
    ids = torch.randint(5, 200, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), given.weights():
        found: Tensor = given.model(input_ids=ids).logits
    return found


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.build(TinyConfig(hidden_size=32, layers=2, heads=2, seed=3)).save(folder)
    return folder


@pytest.fixture
def adapted(base_folder: Path) -> Policy:
    """A model with an adapter that changes much."""
    found = policy.load(base_folder, CPU)
    lora.add(found.model, LoraConfig(rank=4), 0)
    move_adapter(found)
    return found


def test_an_untrained_adapter_changes_nothing_and_is_the_only_thing_trained(base_folder: Path) -> None:
    plain, found = policy.load(base_folder, CPU), policy.load(base_folder, CPU)
    lora.add(found.model, LoraConfig(rank=4), 0)
    assert torch.equal(logits(found), logits(plain))
    trained = {name for name, parameter in found.model.named_parameters() if parameter.requires_grad}
    assert {name.rsplit(".", 3)[-3] for name in trained} == {"lora_A", "lora_B"}
    layers = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for name in trained}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    again = policy.load(base_folder, CPU)
    lora.add(again.model, LoraConfig(rank=4), 0)
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), again.model.parameters(), strict=True))


def test_the_reference_is_the_base_model_and_leaves_the_adapter_as_it_was(adapted: Policy, base_folder: Path) -> None:
    plain, given = policy.load(base_folder, CPU), rows("ragged")
    before = logits(adapted)
    trained = [name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        found, _ = Scorer(adapted.base(), 0.7).score(given)
        expected, _ = Scorer(plain, 0.7).score(given)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert torch.equal(logits(adapted), before)
    assert not torch.allclose(before, logits(plain), atol=0.1)
    assert [name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad] == trained


def test_a_saved_adapter_comes_back_the_same_and_names_its_base(
    adapted: Policy, base_folder: Path, tmp_path: Path
) -> None:
    adapted.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
    assert not names & {"model.safetensors", "config.json"}
    assert lora.base_of(tmp_path) == str(base_folder)
    found = policy.load(tmp_path, CPU)
    assert torch.equal(logits(found), logits(adapted))
    problem = Arithmetic().problem("train", 5)
    assert found.prompt(problem) == adapted.prompt(problem)
    assert (found.eos_ids, found.pad_id) == (adapted.eos_ids, adapted.pad_id)
    pairs = zip(found.model.named_parameters(), adapted.model.named_parameters(), strict=True)
    assert all((n, p.requires_grad) == (m, q.requires_grad) for (n, p), (m, q) in pairs)


def test_peft_reads_a_saved_adapter(adapted: Policy, base_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(policy.load(base_folder, CPU).model, str(tmp_path)).eval()
    ids = torch.tensor([[7, 8, 9, 30, 31]])
    torch.testing.assert_close(theirs(input_ids=ids).logits, adapted.model(input_ids=ids).logits)


def test_merged_weights_equal_the_adapter(adapted: Policy, tmp_path: Path) -> None:
    before = logits(adapted)
    adapted.save_plain(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    found = policy.load(tmp_path, CPU)
    assert not found.has_adapter
    torch.testing.assert_close(logits(found), before, atol=1e-4, rtol=0)
    merged = adapted.merged()
    torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=0)
    assert {name for name, _ in merged.model.named_parameters()} == {n for n, _ in found.model.named_parameters()}
    assert torch.equal(logits(adapted), before)
    assert adapted.has_adapter


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_shared_prompts_equal_padded_rows_with_an_adapter(name: str) -> None:
    """Log-probabilities, entropy and the gradient of the adapter."""
    made = scorer(build(name))
    lora.add(made._policy.model, LoraConfig(rank=4), 0)
    move_adapter(made._policy)
    assert made.shares
    found = [_results(made, shares) for shares in (True, False)]
    for one, other in zip(*found, strict=True):
        # each of both ways is 1e-5 to 2e-5 of the largest gradient off float64
        torch.testing.assert_close(one, other, atol=2e-5 * max(1.0, float(other.abs().max())), rtol=0)


def test_in_low_precision_the_adapter_and_its_gradient_stay_float32() -> None:
    made = scorer(build("llama"), 1.0, torch.bfloat16)
    # With a larger alpha the adapter amplifies rounding: both ways are a fifth of the gradient off float64, and as far
    # from each other as the processor has it.
    lora.add(made._policy.model, LoraConfig(rank=4, alpha=4), 0)
    move_adapter(made._policy)
    found, expected = (_results(made, shares) for shares in (True, False))
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert (found[0] - expected[0]).abs().mean() < 0.1
    one, other = (torch.cat([gradient.flatten() for gradient in results[2:]]) for results in (found, expected))
    assert (one - other).norm() < 0.05 * other.norm()


class Casts(TorchDispatchMode):
    """Counts casts of matrices to bfloat16."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._weights = {parameter.data_ptr() for parameter in model.parameters() if parameter.ndim == 2}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self._weights:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_sampling_casts_each_weight_once_though_it_is_frozen(adapted: Policy) -> None:
    low = replace(adapted, dtype=torch.bfloat16)
    trained = [parameter.requires_grad for parameter in low.model.parameters()]
    counts = []
    for tokens in (2, 12):
        with Casts(low.model) as casts:
            LocalGenerator(low, 2).generate(prompts(low)[:2], 4, Sampling(tokens), 0, ("x",))
        counts.append(casts.count)
    assert counts[0] == counts[1] > 0
    assert [parameter.requires_grad for parameter in low.model.parameters()] == trained


def _results(made: Scorer, shares: bool) -> list[Tensor]:
    model, made.shares = made._policy.model, shares
    logprobs, entropy = made.score(rows("ragged"), entropy_gradient=True)
    coefficients = torch.randn(2, *logprobs.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    ((logprobs * coefficients[0]).sum() + (entropy * coefficients[1]).sum()).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) == sum(parameter.requires_grad for parameter in model.parameters())
    return [logprobs.detach(), entropy.detach(), *(gradient.clone() for gradient in gradients)]


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("shares", [True, False])
def test_recomputed_activations_give_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, adapter: bool, shares: bool
) -> None:
    monkeypatch.setattr(llama_pass, "serves", lambda _: False)  # as it does once they are recomputed
    made = scorer(build("llama"))
    if adapter:
        lora.add(made._policy.model, LoraConfig(rank=4), 0)
        move_adapter(made._policy)
    expected, layer, calls = _results(made, shares), made._policy.model.model.layers[0], []
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    recompute_activations(made._policy.model)
    for one, other in zip(_results(made, shares), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert len(calls) == 2  # forward, and again in the backward pass
    assert not any(module.training for module in made._policy.model.modules())


class TestLocal(ShapedConformance):
    """In-process sampling from a model with an adapter."""

    @pytest.fixture
    def policy(self, adapted: Policy) -> Policy:
        return adapted

    @pytest.fixture
    def generator(self, policy: Policy) -> LocalGenerator:
        return LocalGenerator(policy, batch_size=2)


# Whole runs

ADAPTED = (*SMALL, "model.lora.rank=4", "train.lr=1e-2")


def adapter_config(overrides: Sequence[str], *more: str) -> Config:
    return resolve("tiny", [*overrides, *more]).config


def test_two_and_resume_and_two_equal_four(shared_store: str, tmp_path: Path) -> None:
    """Bit for bit; the base stays as it was, the adapter moves, and no second model is loaded for the reference."""
    # with this seed each iteration has a group with a signal
    words = (*ADAPTED, f"tracking.uri={shared_store}", "train.lr_schedule=constant", "seed=4")
    whole = runs.train(resolve("tiny", words))
    short = runs.train(resolve("tiny", [*words, "train.iterations=2"]))
    continued = resume(shared_store, short.run_id, "train.iterations=4")
    last = [finished.run_dir / "checkpoints" / "iter_004" for finished in (whole, continued)]
    for name in ("adapter_model.safetensors", "trainer/optimizer.safetensors"):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
    assert curves(shared_store, whole.run_id) == curves(shared_store, continued.run_id)
    assert not list(whole.run_dir.rglob("model.safetensors"))
    base, trained = lora.base_of(last[0]), policy.load(last[0], CPU)
    assert base is not None
    assert torch.equal(logits(trained.base()), logits(policy.load(base, CPU)))
    assert not torch.allclose(logits(trained), logits(trained.base()), atol=1e-3)
    assert dict(curves(shared_store, whole.run_id)["train/kl_divergence"])[3] > 0

    # the checkpoint as a model: measured, trained on as an adapter, trained on as a whole
    arguments = parse_arguments([f"tracking.uri={shared_store}"], "evaluate", "")
    measured = runs.evaluate(*stored.resolve_evaluation(arguments, str(last[0]), "best"))
    assert measured.success_rates() == list(whole.progress.last_rates)
    onward = ("train.iterations=1", "train.lr_warmup_steps=0", "train.kl_coef=0.02", f"model.train_id={last[0]}")
    as_adapter = runs.train(resolve("tiny", [*words, *onward]))
    assert as_adapter.progress.first_rates == whole.progress.last_rates
    as_whole = runs.train(resolve("tiny", [*words, *onward, "model.lora.rank=0"]))
    assert (as_whole.run_dir / "checkpoints" / "iter_001" / "model.safetensors").exists()
    assert as_whole.progress.first_rates == whole.progress.last_rates


def test_the_reference_of_an_adapter_that_goes_on_is_what_it_went_on_from(adapted: Policy, tmp_path: Path) -> None:
    adapted.save(tmp_path)
    words = [*ADAPTED, f"model.train_id={tmp_path}"]
    config = resolve("tiny", words).config
    actor = loading.trained(config, tmp_path, CPU)
    reference = loading.reference(config, actor, lambda: tmp_path)
    assert reference is not None
    move_adapter(actor, 5)
    assert torch.equal(logits(reference), logits(adapted))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.lora.rank=-1", "model.lora.rank = -1"),
        ("model.lora.alpha=0", "model.lora.alpha = 0"),
        ("model.lora.targets=[]", "model.lora.targets = []"),
        ("model.lora.targets=some-linear", "model.lora.targets = 'some-linear'"),
        ("model.ref_id=Qwen/Qwen2.5-0.5B", "model.ref_id = 'Qwen/Qwen2.5-0.5B': with model.lora.rank = 4"),
        ("model.ref_device=cpu", "model.ref_device = 'cpu': with model.lora.rank = 4"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("tiny", [*ADAPTED, override])
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_an_adapter_without_rank_has_nothing_to_sync() -> None:
    with pytest.raises(ConfigError, match=r"generation\.sync = 'lora': the model has no adapter"):
        resolve("tiny", ["generation.sync=lora"])
    assert resolve("tiny", ["model.lora.rank=null"]).config == resolve("tiny").config


@pytest.mark.parametrize("target", ["query", "lm_head", "embed_tokens", "layers"])
def test_targets_that_are_no_layers_are_named(base_folder: Path, target: str) -> None:
    model = policy.load(base_folder, CPU).model
    with pytest.raises(UserError, match=f"'{target}' is no linear layer inside the model; allowed: .*q_proj") as caught:
        lora.add(model, LoraConfig(rank=2, targets=("q_proj", target)), 0)
    assert "\n" not in str(caught.value)


def test_only_the_named_layers_get_an_adapter(base_folder: Path) -> None:
    model = policy.load(base_folder, CPU).model
    lora.add(model, LoraConfig(rank=2, targets=("q_proj", "v_proj")), 0)
    trained = {n.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}


def test_an_adapter_of_another_rank_is_refused(adapted: Policy, tmp_path: Path) -> None:
    adapted.save(tmp_path)
    config = adapter_config(ADAPTED, f"model.train_id={tmp_path}", "model.lora.rank=8")
    with pytest.raises(UserError, match=r"model\.lora\.rank = 8: the adapter to go on with has 4; allowed: 4"):
        loading.trained(config, tmp_path, CPU)


def test_without_peft_both_ways_to_an_adapter_say_what_to_install(
    adapted: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted.save(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    install = r"pip install -e '\.\[lora\]'"
    with pytest.raises(ConfigError, match=rf"model\.lora\.rank = 4: the package peft is not installed.*{install}"):
        resolve("tiny", ADAPTED)
    with pytest.raises(UserError, match=install):
        policy.load(tmp_path, CPU)


def test_an_adapter_is_merged_by_a_command(adapted: Policy, base_folder: Path, tmp_path: Path) -> None:
    adapted.save(tmp_path / "adapter")
    merge.main(["--model", str(tmp_path / "adapter"), "--output", str(tmp_path / "plain")])
    torch.testing.assert_close(logits(policy.load(tmp_path / "plain", CPU)), logits(adapted), atol=1e-4, rtol=0)
    for model, output, line in (
        (tmp_path / "adapter", tmp_path / "plain", "exists already"),
        (base_folder, tmp_path / "other", "is no LoRA adapter"),
        ("", tmp_path / "other", "expected --model"),
    ):
        with pytest.raises(UserError, match=line):
            merge.main(["--model", str(model), "--output", str(output)])


def test_plain_prompts_from_a_tokenizer_with_a_chat_template(base_folder: Path, tmp_path: Path) -> None:
    problem = Arithmetic().problem("train", 5)
    settings = resolve("tiny", ["model.chat_template=none"]).config.model
    found = policy.load_as(settings, base_folder, CPU)
    plain = "\n\n".join(message["content"] for message in problem.messages)
    assert found.decode([found.prompt(problem).token_ids]) == [plain]
    assert policy.load(base_folder, CPU).prompt(problem) != found.prompt(problem)
    found.save(tmp_path)  # a checkpoint goes on as it was trained
    assert policy.load(tmp_path, CPU).prompt(problem) == found.prompt(problem)


def test_another_attention_gives_the_same_and_shares_no_prompts(base_folder: Path) -> None:
    settings = resolve("tiny", ["model.attn_implementation=eager"]).config.model
    found, plain, given = policy.load_as(settings, base_folder, CPU), policy.load(base_folder, CPU), rows("ragged")
    eager = Scorer(found, 0.7)
    assert eager.reason == "its attention is eager"
    with torch.no_grad():
        torch.testing.assert_close(eager.score(given)[0], Scorer(plain, 0.7).score(given)[0], atol=1e-5, rtol=0)


def test_a_reference_on_a_device_that_is_not_there_is_refused(base_folder: Path) -> None:
    config = adapter_config(SMALL, "model.ref_device=cuda:97")
    with pytest.raises(UserError, match=r"model\.ref_device = 'cuda:97': this machine has \d+ CUDA devices; allowed:"):
        loading.reference(config, policy.load(base_folder, CPU), lambda: base_folder)
    elsewhere = adapter_config(SMALL, "model.ref_device=cpu")
    found = loading.reference(elsewhere, policy.load(base_folder, CPU), lambda: base_folder)
    assert found is not None
    assert found.device == CPU
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"base_model_name_or_path": "/nowhere/base"}, "adapter of '/nowhere/base', which is not there"),
        ({"base_model_name_or_path": None}, "adapter_config.json cannot be read: base_model_name_or_path = null"),
        ({"r": 8}, "its LoRA adapter cannot be loaded"),
        ({"target_modules": ["q_proj"]}, "are no part of a plain LoRA adapter"),
        ({"target_modules": ["nothing"]}, "its LoRA adapter cannot be loaded"),
    ],
)
def test_a_damaged_adapter_is_refused_in_one_line(
    adapted: Policy, tmp_path: Path, change: dict[str, object], line: str
) -> None:
    adapted.save(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=line) as caught:
        policy.load(tmp_path, CPU)
    assert "\n" not in str(caught.value)
