"""A server's proof of its weights, in every number format, and of its log-probabilities."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import Qwen2ForCausalLM

from grpo_mlflow.errors import ServerFailed
from grpo_mlflow.generation import Sampling
from grpo_mlflow.generation.server import canary, pricing
from grpo_mlflow.generation.server.checksums import Comparison, TensorSum, WeightSums, digest
from grpo_mlflow.model import policy as policies
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.serverside.grpo_vllm_worker import checksum
from grpo_mlflow.types import Prompt
from tests.support.fake_server import DIALECTS, SAMPLE, Answer, Dropped, FakeServer, Fault, Quirks
from tests.support.served import served

EACH_DIALECT = pytest.mark.parametrize("dialect", DIALECTS)
HALF = torch.bfloat16


def step(policy: Policy, lr: float, seed: int) -> None:
    """Move every weight by `lr`, up or down, as AdamW's first step does."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(lr * (torch.randint(0, 2, parameter.shape, generator=chance) * 2 - 1))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
class TestChecksum:
    def test_that_of_a_fused_layer_is_the_sum_of_its_parts(self, dtype: torch.dtype) -> None:
        q, k = random(6, 8).to(dtype), random(3, 8, seed=1).to(dtype)
        whole = checksum(torch.cat([q, torch.zeros(5, 8, dtype=dtype), k]))
        assert whole == (checksum(q) + checksum(k)) % 2**64
        assert checksum(torch.cat([q[:, 0], k[:, 0]])) == (checksum(q[:, 0]) + checksum(k[:, 0])) % 2**64

    def test_one_changed_bit_shows(self, dtype: torch.dtype) -> None:
        weight = random(64, 64).to(dtype)
        changed = weight.clone()
        changed[5, 7] = torch.nextafter(changed[5, 7], torch.tensor(9.0, dtype=dtype))
        assert checksum(weight) != checksum(changed)
        assert checksum(weight) != checksum(weight.flip(1))

    def test_columns_keep_their_places(self, dtype: torch.dtype) -> None:
        weight = random(16, 12).to(dtype)
        parts = (checksum(weight[:, first::3], first, 3) for first in range(3))
        assert checksum(weight) == sum(parts) % 2**64

    def test_zero_has_no_sign(self, dtype: torch.dtype) -> None:
        assert checksum(torch.tensor([-0.0], dtype=dtype)) == checksum(torch.tensor([0.0], dtype=dtype)) == 0


def sums_of(folder: Path) -> WeightSums:
    """What a server would say that keeps every tensor under its own name."""
    state = policies.load(folder, torch.device("cpu")).model.state_dict()
    return WeightSums({n: TensorSum(checksum(w), "float32", 0, 1) for n, w in state.items()}, {}, "float32")


def test_a_layout_of_its_own_is_left_out_and_said_once(
    policy: Policy, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sums = sums_of(folder)
    turned = {n: TensorSum(s.total + 1, s.dtype, 0, 1) if "o_proj" in n else s for n, s in sums.tensors.items()}
    comparison = Comparison(policy.device)
    assert comparison.wrong(folder, WeightSums(turned, {}, "float32")) == []
    assert comparison.wrong(folder, WeightSums(turned, {}, "float32")) == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "o_proj" in caplog.text
    old = {**turned, "lm_head.weight": TensorSum(1, "float32", 0, 1)}
    assert comparison.wrong(folder, WeightSums(old, {}, "float32")) == ["lm_head.weight"]


def test_names_that_do_not_match_are_not_judged(policy: Policy, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    sums = sums_of(folder)
    comparison = Comparison(policy.device)
    renamed = WeightSums({f"other.{n}": s for n, s in sums.tensors.items()}, {}, "float32")
    fewer = WeightSums(dict(list(sums.tensors.items())[1:5]), {}, "float32")
    assert comparison.wrong(folder, renamed) is comparison.wrong(folder, fewer) is None
    assert len(caplog.records) == 1


def test_weights_that_round_to_the_same_are_the_same(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "one")
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.mul_(1 + 2**-20)
    policy.save(tmp_path / "two")
    assert digest(tmp_path / "one", torch.float32) != digest(tmp_path / "two", torch.float32)
    assert digest(tmp_path / "one", HALF) != 0


@pytest.fixture
def half(folder: Path) -> Policy:
    return policies.load(folder, torch.device("cpu"), "bfloat16")


@EACH_DIALECT
def test_small_steps_in_bfloat16_raise_no_alarm(half: Policy, folder: Path, dialect: str) -> None:
    with FakeServer(dialect, folder, dtype=HALF) as server, served(half, server) as generators:
        generator = generators.training()
        for version in range(51):
            generator.sync(version)
            step(half, (1e-6, 1e-5, 2e-5)[version % 3], version)
        assert len(server.loads) == 51  # none a second time
        assert generator.metrics()["server_canary_error"] > 1e-5  # there is rounding to be mistaken


PLANTED = {
    "all weights old": Quirks(keeps_old_weights=True),
    "output layer old": Quirks(keeps_tensors="lm_head."),
    "one block old": Quirks(keeps_tensors="model.layers.1."),
}


def untied(folder: Path) -> Policy:
    """The model of a folder with an output layer of its own, saved there."""
    found = policies.load(folder, torch.device("cpu"))
    settings = found.model.config.to_dict() | {"tie_word_embeddings": False}
    model = Qwen2ForCausalLM(type(found.model.config)(**settings)).eval()
    model.load_state_dict(found.model.state_dict())
    made = Policy(model, found.tokenizer, found.device, HALF, found.eos_ids, found.pad_id)
    made.save(folder)
    return made


@pytest.mark.parametrize("lr", [1e-6, 2e-5])
@pytest.mark.parametrize("name", PLANTED)
def test_old_weights_are_caught_at_that_load(folder: Path, name: str, lr: float) -> None:
    policy = untied(folder)
    with FakeServer("vllm", folder, dtype=HALF) as server, served(policy, server) as generators:
        generator = generators.training()
        for version in range(2):
            generator.sync(version)
            step(policy, lr, version)
        server.quirks = PLANTED[name]
        with pytest.raises(ServerFailed, match=r"given new weights, but \d+ of its \d+ tensors are not what was sent"):
            generator.sync(2)
        server.quirks = Quirks()
        generator.sync(2)  # and as soon as they are there, it goes on


@pytest.mark.parametrize("lr", [1e-5, 2e-5])
@EACH_DIALECT
def test_a_server_without_sums_that_keeps_all_weights_is_caught_at_that_load(
    half: Policy, folder: Path, dialect: str, lr: float
) -> None:
    plain = FakeServer(dialect, folder, quirks=Quirks(without_extension=True), dtype=HALF)
    with plain as server, served(half, server) as generators:
        generator = generators.training()
        for version in range(2):
            generator.sync(version)
            step(half, lr, version)
        server.quirks.keeps_old_weights = True
        with pytest.raises(ServerFailed, match="stayed where they were with the old weights"):
            generator.sync(2)


@pytest.mark.parametrize("name", ["output layer old", "one block old"])
def test_without_sums_a_part_that_stays_old_is_caught_in_float32(folder: Path, name: str) -> None:
    policy = replace(untied(folder), dtype=torch.float32)
    plain = FakeServer("vllm", folder, quirks=Quirks(without_extension=True))
    with plain as server, served(policy, server) as generators:
        generator = generators.training()
        for version in range(12):
            generator.sync(version)
            step(policy, 1e-5, version)
        server.quirks.keeps_tensors = PLANTED[name].keeps_tensors
        with pytest.raises(ServerFailed, match="a part of the new weights is missing"):
            generator.sync(12)


def test_the_extension_is_asked_for_once(policy: Policy, folder: Path) -> None:
    """A refused call ends the connection, so none is made that is known to be refused, and none follows on it."""
    plain = FakeServer("vllm", folder, quirks=Quirks(without_extension=True))
    with plain as server, served(policy, server) as generators:
        generator = generators.training()
        for version in range(3):
            generator.sync(version)
            step(policy, 1e-3, version)
        assert generator.metrics()["server_retries"] == 0
        assert server.requests["/collective_rpc"] == 4  # three loads, and the first refusal


@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.02])
def test_a_change_that_did_not_arrive_is_told_from_noise(noise: float) -> None:
    chance = np.random.default_rng(0)
    was, change = chance.normal(-3, 1, 159), chance.normal(0, 0.01, 159)

    def expected(scores: NDArray[np.float64]) -> canary.Expected:
        return canary.Expected(tuple(scores + noise * chance.normal(size=159)), torch.zeros(1))

    def reading(scores: NDArray[np.float64]) -> canary.Reading:
        return canary.Reading(tuple(scores + noise * chance.normal(size=159)), 0, None)

    old, new, before = expected(was), expected(was + change), reading(was)
    assert canary.standing(old, old, before, before) == "new"  # nothing was to arrive
    assert canary.standing(old, new, before, before) == "old"  # the very same scores
    assert canary.standing(old, expected(was + 10 * change), before, reading(was)) == "old"
    assert canary.standing(old, expected(was + 10 * change), before, reading(was + 10 * change)) == "new"
    if noise < 0.01:
        assert canary.standing(old, new, before, reading(was)) == "old"
    for _ in range(300):  # noise beyond the step may hide it, but never accuses a server that is right
        assert canary.standing(old, expected(was + change), before, reading(was + change)) != "old"


def test_steps_below_the_rounding_are_said_once(half: Policy, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with FakeServer("sglang", folder, dtype=HALF) as server, served(half, server) as generators:
        for version in range(12):
            generators.training().sync(version)
            step(half, 1e-6, version)
    assert sum("not distinguishable" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("size", [0.0, 0.02])
def test_log_probabilities_that_are_not_those_drawn_from_are_told(size: float) -> None:
    processed = -3 * random(64).abs()
    raw, noise = processed * 0.7 - 0.2, size * random(64, seed=2)
    allowed = canary.TOLERANCE[HALF if size else torch.float32]
    assert pricing.trouble(processed + noise, processed, raw, allowed) is None
    assert pricing.trouble(processed + noise, processed, processed, allowed) is None  # nothing is processed
    assert "leave out" in str(pricing.trouble(raw + noise, processed, raw, allowed))
    assert "differ" in str(pricing.trouble(torch.zeros(64), processed, processed, allowed))
    assert "differ" in str(pricing.trouble(processed.roll(1) + noise, processed, processed, allowed))


class Peaked:
    """A model that nearly always goes on in the same way, its tail cut off, and a server's rounding of it.

    The rounding is the same for the same token after the same tokens, however often it is drawn.
    """

    def __init__(self, chance: np.random.Generator) -> None:
        self._chance = chance
        self._known: dict[tuple[int, ...], NDArray[np.float64]] = {}
        self._rounding: dict[tuple[int, ...], float] = {}

    def draw(self) -> tuple[list[list[int]], torch.Tensor]:
        """Return 8 completions of 8 tokens, and for each token (3, 64) the log-probabilities given, right and raw."""
        completions, values = [], []
        for _ in range(8):
            ids: tuple[int, ...] = ()
            for _ in range(8):
                if ids not in self._known:
                    weights = np.arange(1.0, 201.0) ** -self._chance.uniform(3.5, 6.5)
                    self._known[ids] = weights / weights.sum()
                p, kept = self._known[ids], self._known[ids][:5].sum()
                token = int(self._chance.choice(5, p=p[:5] / kept))
                ids = (*ids, token)
                right, raw = np.log(p[token] / kept), np.log(p[token])
                values.append((right + self._rounding.setdefault(ids, 0.028 * self._chance.normal()), right, raw))
            completions.append(list(ids))
        return completions, torch.tensor(values, dtype=torch.float64).T


def test_what_repeats_is_no_evidence_twice_against_a_server_that_prices_right() -> None:
    """At temperature 1 with top-k, right and raw log-probabilities are closer than bfloat16's rounding."""
    chance, trials, allowed = np.random.default_rng(0), 400, canary.TOLERANCE[HALF]
    accused = {"all": 0, "once": 0}
    for _ in range(trials):
        completions, values = Peaked(chance).draw()
        for name, (given, right, raw) in (("all", values), ("once", values[:, pricing.first_of_each(completions)])):
            accused[name] += pricing.trouble(given, right, raw, allowed) is not None
    assert accused["all"] / trials > 0.02
    assert accused["once"] / trials < 0.0025


def test_the_first_of_each_beginning_counts() -> None:
    found = pricing.first_of_each([[1, 2, 3], [1, 2, 4, 3], [1, 2, 3], [2, 2]])
    assert found.tolist() == [True, True, True, False, False, True, True, False, False, False, True, True]


def test_unprocessed_log_probabilities_are_refused_before_the_first_batch(folder: Path) -> None:
    policy = policies.load(folder, torch.device("cpu"))
    with FakeServer("vllm", folder, quirks=Quirks(raw_logprobs=True)) as server:
        with served(policy, server, temperature=0.7) as generators, pytest.raises(ServerFailed) as caught:
            generators.training().sync(0)
        assert len(str(caught.value).splitlines()) == 1
        assert "--logprobs-mode processed_logprobs" in str(caught.value)
        assert "generation.behaviour_logprobs=recompute" in str(caught.value)
        with served(policy, server, temperature=0.7, behaviour_logprobs="recompute") as generators:
            generators.training().sync(0)
        with served(policy, server, temperature=1.0) as generators:
            generators.training().sync(0)  # at temperature 1 both are the same
        server.quirks = Quirks()
        with served(policy, server, temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.1) as generators:
            generators.training().sync(0)


def test_a_server_started_again_is_asked_again_how_it_prices(policy: Policy, folder: Path) -> None:
    with FakeServer("vllm", folder) as server, served(policy, server, temperature=0.7) as generators:
        generators.training().sync(0)
        server.restart()
        server.quirks.raw_logprobs = True
        prompt = Prompt("a", (), tuple(policy.tokenizer("12 + 34", add_special_tokens=False).input_ids))
        generators.training().generate([prompt], 1, Sampling(4), 0, ())  # meets it, and gives it its weights
        step(policy, 1e-3, 0)
        with pytest.raises(ServerFailed, match="--logprobs-mode processed_logprobs"):
            generators.training().sync(1)


def test_weights_that_a_repair_loads_in_mid_batch_are_proven(folder: Path) -> None:
    def restart(server: FakeServer, _: Answer) -> Answer:
        server.restart()
        server.quirks = PLANTED["output layer old"]
        raise Dropped

    policy = untied(folder)
    fault = Fault(SAMPLE["vllm"], restart, loads=2, nth=0)
    with FakeServer("vllm", folder, faults=[fault], dtype=HALF) as server, served(policy, server) as generators:
        generator = generators.training()
        generator.sync(0)
        step(policy, 2e-5, 0)
        generator.sync(1)
        prompt = Prompt("a", (), tuple(policy.tokenizer("12 + 34", add_special_tokens=False).input_ids))
        with pytest.raises(ServerFailed, match="tensors are not what was sent"):
            generator.generate([prompt], 2, Sampling(4), 0, ())
