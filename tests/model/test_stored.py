"""Frozen weights in fewer bits, and an output layer in float32: which numbers are computed with, and their bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from grpo_mlflow import runs
from grpo_mlflow.cli import merge
from grpo_mlflow.config import LoraConfig, TinyConfig
from grpo_mlflow.errors import ModelError
from grpo_mlflow.forward.layers import StoredLinear
from grpo_mlflow.generation import LocalGenerator, Sampling
from grpo_mlflow.model import loading, lora, policy, tiny
from grpo_mlflow.model.policy import FLOAT32, Policy, Stored
from grpo_mlflow.runs import self_check
from grpo_mlflow.training.batching import Row, pad
from grpo_mlflow.training.scoring import Scorer
from grpo_mlflow.types import Prompt
from tests.support.adapters import move_adapter
from tests.support.packed_rows import rows
from tests.support.small_runs import curves, resume, small

CPU = torch.device("cpu")
# The sixteen values of NF4: quantiles of a normal distribution, zero among them (Dettmers et al. 2023, appendix E).
NEGATIVE = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
AROUND = [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
POSITIVE = [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
NF4 = torch.tensor([*NEGATIVE, *AROUND, *POSITIVE])


def to_bfloat16(weight: Tensor) -> Tensor:
    return weight.bfloat16().float()


def to_nf4(weight: Tensor) -> Tensor:
    """Blocks of 64 numbers, each the nearest of the sixteen times the largest of its block."""
    blocks = weight.reshape(-1, 64)
    most = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / most)[:, :, None].sub(NF4).abs().argmin(dim=2)
    return (NF4[nearest] * most).reshape(weight.shape)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    made = tiny.build(TinyConfig(hidden_size=64, layers=2, heads=2, seed=3))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in made.model.modules():  # else all are zero, and any way of computing them would do
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                layer.bias.copy_(0.1 * torch.randn(layer.bias.shape, generator=draw))
    made.save(folder)
    return folder


def with_adapter(folder: Path, dtype: str = "float32", stored: Stored = FLOAT32) -> Policy:
    found = policy.load(folder, CPU, dtype, stored=stored)
    lora.add(found.model, LoraConfig(rank=4), 0)
    move_adapter(found)
    return found


def rounded(folder: Path, inside: Callable[[Tensor], Tensor], outside: Callable[[Tensor], Tensor]) -> Policy:
    """A float32 model that has the numbers of one in fewer bits."""
    found = policy.load(folder, CPU)
    embedding = found.model.get_input_embeddings().weight
    embedding.data = outside(embedding.data)
    for layer in found.model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = inside(layer.weight.data)
    lora.add(found.model, LoraConfig(rank=4), 0)
    move_adapter(found)
    return found


STORED = pytest.mark.parametrize(
    ("stored", "inside", "outside"),
    [
        (Stored(torch.bfloat16), to_bfloat16, to_bfloat16),
        (Stored(in_4_bits=True), to_nf4, lambda weight: weight),
        (Stored(torch.bfloat16, in_4_bits=True), to_nf4, to_bfloat16),
    ],
    ids=["bfloat16", "nf4", "nf4 and bfloat16"],
)


def gradients(given: Policy, batch: list[Row]) -> dict[str, Tensor]:
    with torch.no_grad():  # as sampling does before each update
        given.model(input_ids=torch.tensor([[5, 6, 7]]))
    given.model.zero_grad()
    logprobs, _ = Scorer(given, 0.7).score(batch)
    logprobs.square().sum().backward()
    return {name: p.grad for name, p in given.model.named_parameters() if p.grad is not None}


@STORED
def test_an_adapter_learns_from_the_numbers_that_its_base_stands_for(
    base_folder: Path, stored: Stored, inside: Callable[[Tensor], Tensor], outside: Callable[[Tensor], Tensor]
) -> None:
    """On processors with AVX512-BF16 the layers of bitsandbytes would give no gradients here."""
    batch = rows("alike, ragged")
    found = gradients(with_adapter(base_folder, stored=stored), batch)
    expected = gradients(rounded(base_folder, inside, outside), batch)
    assert found.keys() == {name for name in expected if ".lora_" in name}
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-4)


@STORED
def test_a_merged_model_is_float32_and_has_those_numbers(
    base_folder: Path,
    stored: Stored,
    inside: Callable[[Tensor], Tensor],
    outside: Callable[[Tensor], Tensor],
    tmp_path: Path,
) -> None:
    given = with_adapter(base_folder, stored=stored)
    before = {name: (id(p), p.dtype) for name, p in given.model.named_parameters()}
    given.save_plain(tmp_path)
    assert before == {name: (id(p), p.dtype) for name, p in given.model.named_parameters()}
    found = policy.load(tmp_path, CPU)
    assert not hasattr(found.model.config, "quantization_config")
    assert {type(module) for module in found.model.modules()}.isdisjoint({StoredLinear})
    expected = rounded(base_folder, inside, outside).merged()
    for (name, weight), (other, wanted) in zip(
        found.model.named_parameters(), expected.model.named_parameters(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(weight, wanted, atol=1e-6, rtol=1e-5)
    assert len(list(found.model.parameters())) == len(list(expected.model.parameters()))  # still tied


def test_an_adapter_is_saved_and_read_as_on_any_base(base_folder: Path, tmp_path: Path) -> None:
    stored = Stored(torch.bfloat16, in_4_bits=True)
    given = with_adapter(base_folder, stored=stored)
    given.save(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again = policy.load(tmp_path, CPU, stored=stored)
    ids = torch.tensor([[7, 8, 9, 30, 31]])
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, given.model(input_ids=ids).logits)


def test_a_base_in_bfloat16_changes_nothing_where_bfloat16_is_computed_in(base_folder: Path, tmp_path: Path) -> None:
    """Autocast rounds the same matrices; those that are looked up are made such that they need no rounding."""
    plain = policy.load(base_folder, CPU)
    for parameter in plain.model.parameters():
        parameter.data = to_bfloat16(parameter.data)
    plain.save(tmp_path)
    batch, found = rows("ragged"), []
    for dtype in (torch.float32, torch.bfloat16):
        given = with_adapter(tmp_path, "bfloat16", Stored(dtype))
        own = gradients(given, batch)
        with torch.no_grad():
            logprobs, _ = Scorer(given, 0.7).score(batch)
        found.append([logprobs, *(own[name] for name in sorted(own))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_bytes_are_those_of_the_stored_numbers(base_folder: Path) -> None:
    """By hand: of n numbers in a matrix 4n, 2n, or n / 2 and a float32 for each block of 64."""

    def held(stored: Stored = FLOAT32) -> int:
        model = policy.load(base_folder, CPU, stored=stored).model
        states = [state for p in model.parameters() if (state := getattr(p, "quant_state", None)) is not None]
        return sum(int(held.nbytes) for held in (*model.parameters(), *(state.absmax for state in states)))

    model = policy.load(base_folder, CPU).model
    inside = sum(layer.weight.numel() for layer in model.model.layers.modules() if isinstance(layer, nn.Linear))
    embedding = model.get_input_embeddings().weight.numel()
    small = sum(p.numel() for p in model.parameters()) - inside - embedding
    assert held() == 4 * (inside + embedding + small)
    assert held(Stored(torch.bfloat16)) == 2 * (inside + embedding) + 4 * small
    assert held(Stored(in_4_bits=True)) == inside * (1 / 2 + 4 / 64) + 4 * (embedding + small)


@STORED
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_way_proves_itself_on_stored_weights(
    base_folder: Path, stored: Stored, inside: object, outside: object, dtype: str
) -> None:
    scoring, sampler = self_check.find(with_adapter(base_folder, dtype, stored), 64)
    assert (scoring.way, sampler.way) == ("packed", "packed")
    assert scoring.written_out  # in float32; under autocast it serves no model
    assert not sampler.written_out


@pytest.mark.slow
def test_a_resumed_run_on_a_base_in_4_bits_is_the_unbroken_one_and_merges(shared_store: str, tmp_path: Path) -> None:
    own = ("model.lora.rank=4", "model.quantization=nf4", "model.frozen_dtype=bfloat16", "train.lr_schedule=constant")
    whole = runs.train(small(shared_store, *own))
    assert curves(shared_store, whole.run_id)["train/grad_norm"][0][1] > 0
    part = runs.train(small(shared_store, *own, "train.iterations=2"))
    resumed = resume(shared_store, part.run_id, "train.iterations=4")
    assert curves(shared_store, whole.run_id) == curves(shared_store, resumed.run_id)
    checkpoint, again = (run.run_dir / "checkpoints" / "iter_004" for run in (whole, resumed))
    adapter = "adapter_model.safetensors"
    assert (checkpoint / adapter).read_bytes() == (again / adapter).read_bytes()
    words = ["--model", whole.run_id, "--checkpoint", "last", "--output", str(tmp_path / "plain")]
    merge.main([*words, f"tracking.uri={shared_store}"])
    merged = policy.load(tmp_path / "plain", CPU)
    trained = policy.load(checkpoint, CPU, stored=Stored(torch.bfloat16, in_4_bits=True))
    loading.require_equal(trained, merged)
    with pytest.raises(ModelError, match="the merged model differs from its adapter"):
        loading.require_equal(policy.load(checkpoint, CPU), merged)


# The output layer in float32


def sharp(folder: Path, dtype: str, exactly: bool = False) -> Policy:
    """A policy whose logits are large and whose layers add little: what is rounded is the output layer."""
    found = policy.load(folder, CPU, dtype, stored=Stored(float32_head=exactly))
    with torch.no_grad():
        found.model.model.norm.weight.mul_(8.0)
        for layer in found.model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
    return found


def exact_logprobs(given: Policy, batch: list[Row]) -> Tensor:
    """What the policy's own hidden states give in float64: (N,) for all tokens of all completions."""
    hidden: list[Tensor] = []
    head = given.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    found = []
    for row in batch:
        with torch.no_grad(), given.autocast():
            given.model(input_ids=torch.tensor([[*row.prompt_ids, *row.completion_ids]]), use_cache=False)
        states = hidden.pop()[0, len(row.prompt_ids) - 1 : -1].double()
        logprobs = (states @ head.weight.detach().double().T).log_softmax(-1)
        found.append(logprobs.gather(1, torch.tensor(row.completion_ids)[:, None])[:, 0])
    hook.remove()
    return torch.cat(found)


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_an_output_layer_in_float32_is_as_exact_as_its_input(base_folder: Path, packs: bool) -> None:
    batch, errors = rows("ragged"), []
    for exactly in (False, True):
        given = sharp(base_folder, "bfloat16", exactly)
        scorer = Scorer(given, 1.0)
        scorer.shares = packs
        with torch.no_grad():
            logprobs, _ = scorer.score(batch)
        mask = torch.arange(logprobs.shape[1]) < torch.tensor([len(row.completion_ids) for row in batch])[:, None]
        errors.append(float((logprobs[mask] - exact_logprobs(given, batch)).abs().mean()))
    assert errors[1] < errors[0] / 10, errors


def test_what_is_sampled_is_scored_alike(base_folder: Path) -> None:
    exact, low = (sharp(base_folder, "bfloat16", exactly) for exactly in (True, False))
    prompts = [Prompt(f"p{i}", (), (5, 6 + i, 9)) for i in range(4)]
    drawn = LocalGenerator(exact, 4).generate(prompts, 4, Sampling(12, temperature=3.0), 0, ("train", 0))
    batch = [
        Row(prompt.token_ids, each.token_ids, each.behaviour_logprobs, 0.0, False)
        for prompt, group in zip(prompts, drawn, strict=True)
        for each in group
    ]
    with torch.no_grad():
        found, rounded_once = (Scorer(each, 3.0).score(batch)[0] for each in (exact, low))
    sampled = pad([row.behaviour_logprobs for row in batch], found.shape[1])
    torch.testing.assert_close(found, sampled, atol=1e-3, rtol=0)
    assert (rounded_once - sampled).abs().max() > 1e-2  # what would be seen if one of the two took no part in it


def test_an_output_layer_in_float32_trains_tied_weights(base_folder: Path) -> None:
    given = sharp(base_folder, "bfloat16", exactly=True)
    assert given.model.get_output_embeddings().weight is given.model.get_input_embeddings().weight
    batch = rows("ragged")
    grads = []
    for each in (given, sharp(base_folder, "float32")):
        logprobs, _ = Scorer(each, 1.0).score(batch)
        logprobs.sum().backward()
        grads.append(each.model.get_input_embeddings().weight.grad)
    assert grads[0].dtype == torch.float32
    assert (grads[0] - grads[1]).norm() < 0.05 * grads[1].norm()
