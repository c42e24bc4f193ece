"""A model in shards learns like a whole one, and leaves the same files."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from bitsandbytes.functional import dequantize_blockwise
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_mlflow.config import LoraConfig, TrainConfig
from grpo_mlflow.forward import layers, ways
from grpo_mlflow.generation.server import canary
from grpo_mlflow.model import lora, sharding, shards
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.model.recomputing import recompute_activations
from grpo_mlflow.training import optimizer_files
from grpo_mlflow.training.batching import rows_of
from grpo_mlflow.training.learner import Learner, Sizes
from grpo_mlflow.training.scoring import Scorer
from tests.support import ranks, small_models
from tests.support.groups import ALL_TERMS, K, fresh, make_groups

ITERATIONS = 5


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    tied: bool = True
    adapter: bool = False
    way: str = "packed"
    recomputes: bool = False
    dtype: torch.dtype = torch.float32
    stored: torch.dtype = torch.float32
    exact_head: bool = False
    whole_reference: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    exact: int = ITERATIONS  # iterations whose metrics are those of one process up to rounding of float32


EIGHT_BITS = Case(tied=False, settings={"optimizer": "adamw8bit"}, exact=3)  # the first step's moments begin as zeros
CASES = {
    "full, tied, packed": Case(settings=ALL_TERMS),
    "full, untied, packed": Case(tied=False, recomputes=True, settings={"grad_clip": 0.05}),
    "full, untied, padded": Case(tied=False, way="padded", settings={"epochs": 2}),
    "full, tied, packed, cut off": Case(settings={"mask_truncated_completions": True, "aggregation": "dapo"}),
    "full, untied, packed, corrected": Case(
        tied=False,
        settings={"importance_sampling_mode": "sequence_mask", "importance_sampling_floor": 0.01, "ipo_eps": 0.004},
    ),
    "full, tied, alike": Case(way="alike", settings={"optimizer": "sgd", "lr": 1e-2}),
    "adapter, tied, packed": Case(adapter=True, settings=ALL_TERMS),
    "adapter, untied, padded": Case(tied=False, adapter=True, way="padded", recomputes=True),
    "adapter on bfloat16, tied, packed": Case(adapter=True, stored=torch.bfloat16),
    "full, tied, offloaded": Case(settings={**ALL_TERMS, "optimizer_offload": "cpu"}),
    "full, tied, a whole reference": Case(settings=ALL_TERMS, whole_reference=True),
    "full, untied, 8 bits": EIGHT_BITS,
}
LOW = {
    "adapter": Case(adapter=True, dtype=torch.bfloat16, settings=ALL_TERMS),
    "output layer in float32, tied": Case(exact_head=True, dtype=torch.bfloat16, settings=ALL_TERMS),
    "output layer in float32, untied": Case(tied=False, exact_head=True, dtype=torch.bfloat16, way="padded"),
}


def make(case: Case, seed: int = 3) -> Policy:
    made = fresh(seed)
    if not case.tied:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**small_models.SIZES, "vocab_size": made.vocabulary})).eval()
        made = Policy(model, made.tokenizer, made.device, made.dtype, made.eos_ids, made.pad_id)
    if case.stored != torch.float32:
        layers.store(made.model, case.stored)
    if case.exact_head:
        layers.use_float32(made.model)
    if case.adapter:
        lora.add(made.model, LoraConfig(rank=12), 0)
    if case.recomputes:
        recompute_activations(made.model)
    if case.way == "padded":
        made.model.set_attn_implementation("eager")
    if case.way == "alike":
        ways.know(made.model, ways.Scoring("alike", reason="the test says so"))
    else:
        ways.scoring(made.model)
    return replace(made, dtype=case.dtype)


def spread(made: Policy) -> Policy:
    """Leave each process its share of a model, if there are several: those of the others lose their numbers first."""
    if "RANK" in os.environ:
        if dist.get_rank():
            for name, parameter in list(made.model.named_parameters()):
                empty = torch.nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
                shards._set(made.model, name, empty)
            made.model.tie_weights()
        shards.spread(made.model, made.device, made.dtype)
    return made


def updates(case: Case) -> tuple[list[dict[str, float | None]], Policy, Learner]:
    accelerator = Accelerator(cpu=True)
    trained = spread(make(case))
    other = make(case, seed=4)
    reference = trained.base() if case.adapter else other if case.whole_reference else spread(other)
    given = {"batch_size": 3, "grad_accum_steps": "auto", "lr": 1e-3, "kl_coef": 0.0, **case.settings}
    made = Learner(
        trained, reference if given["kl_coef"] else None, accelerator, TrainConfig(**given), Sizes(0.8, 16, 5 * K, 100)
    )
    groups = [make_groups(5, flat=(1,), seed=n) for n in range(ITERATIONS - 1)]
    groups.insert(2, make_groups(5, flat=(0, 1, 2, 3, 4), seed=9))  # a step without a gradient
    return [made.update(each, 0, number) for number, each in enumerate(groups)], trained, made


def _train(path: str) -> None:
    """Save what each case measures, the weights that it leaves, and the numbers that this process held of them."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        metrics, trained, made = updates(case)
        folder = Path(f"{path}-{os.environ.get('WORLD_SIZE', 1)}-{name}")
        untrained = spread(make(case))
        untrained.save(folder / "own")
        untrained.save_plain(folder / "plain")
        held = [getattr(each, "to_local", lambda each=each: each)() for each in trained.model.parameters()]
        states = [
            (each.own if isinstance(each, sharding.Part) else each).nbytes
            for key, each in optimizer_files.states(made.optimizer).items()
            if "qmap" not in key and "step" not in key
        ]
        found[name] = (metrics, sum(each.numel() for each in held), sum(states))
        save_state(made, trained.model, Path(f"{folder}.state"))
    _through(path)
    found["led"] = _led()
    found["interrupted"] = _interrupted()
    found["low"] = {name: [each["grad_norm"] for each in updates(case)[0]] for name, case in LOW.items()}
    found["head"] = {exact: _rounded(Case(exact_head=exact, dtype=torch.bfloat16)) for exact in (False, True)}
    torch.save(found, f"{path}-{os.environ.get('WORLD_SIZE', 1)}-{os.environ.get('RANK', 0)}")


def save_state(made: Learner, model: Any, path: Path) -> None:
    made.offer()
    if not sharding.is_first(model):
        return sharding.take_part(model)
    with sharding.leading(model):
        made.save(path)
    return None


def _through(path: str) -> None:
    """Read the states that one process has saved, and save them again."""
    for name, case in CASES.items():
        trained = spread(make(case))
        settings = TrainConfig(**{"batch_size": 3, "grad_accum_steps": "auto", "kl_coef": 0.0, **case.settings})
        made = Learner(trained, None, Accelerator(cpu=True), settings, Sizes(0.8, 16, 5 * K, 100))
        made.restore(Path(f"{path}-1-{name}.state"), 0, 0.0)
        save_state(made, trained.model, Path(f"{path}-{os.environ.get('WORLD_SIZE', 1)}-{name}.through"))


def _rounded(case: Case) -> float:
    """Return how far log-probabilities are from those that the hidden states give in float64."""
    made, row = spread(make(case)), rows_of(make_groups(1))[0]
    hidden: list[Tensor] = []
    hook = made.model.get_output_embeddings().register_forward_pre_hook(lambda _, given: hidden.append(given[0][0]))
    with torch.no_grad():
        found = Scorer(made, 1.0).score([row])[0][0]
    hook.remove()
    weight = make(case).model.get_output_embeddings().weight.detach()
    exact = (hidden[0].double() @ weight.double().T).log_softmax(-1)
    return float((found - exact.gather(1, torch.tensor(row.completion_ids)[:, None])[:, 0]).abs().max())


def _led() -> list[float]:
    """Let the first process score a text alone, and fail alone; return the scores, of which the others have none."""
    made = spread(make(CASES["full, tied, packed"]))
    scores: list[float] = []
    if not sharding.is_first(made.model):
        sharding.take_part(made.model)
        sharding.take_part(made.model)  # returns when the first has failed
        return []
    with sharding.leading(made.model):
        scores += canary.expected(made, canary.tokens(made)).scores
    with pytest.raises(ValueError, match="of its own"), sharding.leading(made.model):
        raise ValueError("of its own")
    return scores


def _interrupted() -> int:
    """Return how many tensors are whole after a signal has ended a pass in the middle."""
    made = spread(make(CASES["full, tied, packed"]))

    def stop(*_: object) -> None:
        raise InterruptedError

    hook = made.model.model.layers[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError), sharding.whole(made.model):
        made.model(input_ids=torch.tensor([[1, 2, 3]]))
    hook.remove()
    return sum(not sharding.is_shard(each) for each in made.model.parameters())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    _train(str(folder / "x"))
    started = [ranks.start(_train, (str(folder / "x"),), folder / str(count), count) for count in (2, 3)]
    for each in started:
        assert set(each.end(240)) == {0}, each.everything()
    return folder


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [2, 3])
def test_a_model_in_shards_learns_like_a_whole_one(trained: Path, name: str, count: int) -> None:
    whole, weights, states = torch.load(trained / "x-1-0")[name]
    for rank in range(count):
        metrics, held, of_states = torch.load(trained / f"x-{count}-{rank}")[name]
        assert metrics[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-5)
        for one, other in zip(whole[: CASES[name].exact], metrics, strict=False):
            measured = {key: value for key, value in one.items() if value is not None}
            assert {key: value for key, value in other.items() if value is not None} == pytest.approx(
                measured, rel=1e-4, abs=1e-6
            )
        assert held == pytest.approx(weights / count, rel=0.05)
        assert of_states == pytest.approx(states / count, rel=0.05)


@pytest.mark.parametrize("name", CASES)
def test_a_model_in_shards_is_written_as_a_whole_one(trained: Path, name: str) -> None:
    whole = trained / f"x-1-{name}"
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    for count in (2, 3):
        other = trained / f"x-{count}-{name}"
        assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
        for file in files:
            if file.name == "adapter_config.json":  # it names the working directory, and sets in any order
                continue
            assert (other / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("count", [2, 3])
def test_shards_whose_state_is_on_the_host_learn_like_others(trained: Path, count: int) -> None:
    for rank in range(count):
        found = torch.load(trained / f"x-{count}-{rank}")
        assert found["full, tied, offloaded"] == found["full, tied, packed"]


def test_other_blocks_of_8_bits_change_less_than_the_8_bits(trained: Path) -> None:
    """Shares that are no multiples of 256 numbers round moments with other scales, as `adamw8bit` rounds `adamw`'s."""
    last = torch.load(trained / "x-1-0")["full, untied, 8 bits"][0][-1]
    float32 = updates(replace(EIGHT_BITS, settings={}))[0][-1]
    for count in (2, 3):
        found = torch.load(trained / f"x-{count}-0")["full, untied, 8 bits"][0][-1]
        for key in ("grad_norm", "loss_total", "sampler_ratio_mean"):
            assert 2 * abs(found[key] - last[key]) < abs(float32[key] - last[key])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [2, 3])
def test_a_state_that_went_through_shards_is_the_same(trained: Path, name: str, count: int) -> None:
    """One in 8 bits up to rounding, where shares begin inside of a block: two roundings of 1% each."""
    before = load_file(trained / f"x-1-{name}.state")
    after = load_file(trained / f"x-{count}-{name}.through")
    assert before.keys() == after.keys()
    strange = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.partition(".")[2] for key in strange} <= {"state1", "state2", "absmax1", "absmax2"}
    for key in strange:
        assert before[key].shape == after[key].shape
        index, kind = key.partition(".")[0], key[-1]
        one, other = (
            dequantize_blockwise(
                found[f"{index}.state{kind}"],
                absmax=found[f"{index}.absmax{kind}"],
                code=found[f"{index}.qmap{kind}"],
                blocksize=256,
            ).reshape(-1)
            for found in (before, after)
        )
        assert before[f"{index}.state{kind}"].shape[0] % count  # shares of all others are whole blocks
        assert (one - other).norm() <= 0.02 * one.norm()


def test_shards_in_bfloat16_learn_much_the_same(trained: Path) -> None:
    """Their first pass is that of the reference, with the adapter off: what is trained must be known by then."""
    for name, whole in torch.load(trained / "x-1-0")["low"].items():
        for count in (2, 3):
            found = torch.load(trained / f"x-{count}-0")["low"][name]
            assert found == pytest.approx(whole, rel=0.1, abs=1e-6), name


def test_an_output_layer_in_float32_has_weights_that_are_not_rounded(trained: Path) -> None:
    for count in (1, 2, 3):
        rounded, exact = torch.load(trained / f"x-{count}-0")["head"].values()
        assert exact < 1e-5
        assert rounded > 100 * exact


def test_a_pass_that_ends_in_the_middle_leaves_shards(trained: Path) -> None:
    """Else a process that a signal stopped while it sampled would have no shard to give to the checkpoint."""
    for count in (2, 3):
        assert torch.load(trained / f"x-{count}-0")["interrupted"] == 0


def test_the_first_process_computes_and_fails_alone(trained: Path) -> None:
    whole = torch.load(trained / "x-1-0")["led"]
    for count in (2, 3):
        assert torch.load(trained / f"x-{count}-0")["led"] == pytest.approx(whole, rel=1e-5)
        assert torch.load(trained / f"x-{count}-1")["led"] == []
