"""Servers that were started by somebody else: used as they are where that is right, refused at once where not."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from grpo_mlflow import runs
from grpo_mlflow.config import Config, GenerationConfig, LoraConfig, resolve
from grpo_mlflow.errors import ConfigError, ServerFailed, ServerUnfit
from grpo_mlflow.generation import Generators, Sampling
from grpo_mlflow.generation.server.generator import ServerGenerator
from grpo_mlflow.generation.server.launch import start_command
from grpo_mlflow.generation.server.recompute import behaviour_logprobs
from grpo_mlflow.model import lora
from grpo_mlflow.model import policy as policies
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runs.doctor import Doctor
from tests.support.adapters import move_adapter
from tests.support.conformance import prompts
from tests.support.fake_server import DIALECTS, FakeServer, Quirks
from tests.support.served import served
from tests.support.small_runs import SMALL

PLAIN = Quirks(without_development=True, without_extension=True, raw_logprobs=True)
AS_IT_IS = ("generation.sync=none", "generation.behaviour_logprobs=recompute", "eval.backend=local")


def refusal(policy: Policy, server: FakeServer, **settings: object) -> str:
    """How a training run is refused, at once and in one line."""
    began = time.monotonic()
    with served(policy, server, retry_seconds=60.0, **settings) as generators, pytest.raises(ServerFailed) as caught:
        generators.training().sync(0)
    assert time.monotonic() - began < 30
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def command(server: FakeServer, **settings: object) -> str:
    content = {"backend": "vllm_server", "base_url": server.url, **settings}
    config = Config(generation=GenerationConfig.model_validate(content))
    return start_command(config, "vllm_server", server.url, server.folder)


def measuring(policy: Policy, server: FakeServer, source: Path) -> Generators:
    content = {"backend": "vllm_server", "base_url": server.url, "retry_seconds": 0.0}
    config = Config(generation=GenerationConfig.model_validate(content))
    return Generators(config, policy, source, source, server.folder / "log", print, trains=False)


def test_training_on_a_plain_server_is_refused_before_anything_is_written(policy: Policy, folder: Path) -> None:
    """Though its weights are those of version 0. The line names the alternative, and ends with the right command."""
    with FakeServer("vllm", folder, quirks=PLAIN) as server:
        told = refusal(policy, server, sync_dir=str(folder / "weights"))
        assert "VLLM_SERVER_DEV_MODE=1" in told
        assert told.endswith(f": {command(server)}")
        assert " ".join(AS_IT_IS) in told
        assert not (folder / "weights").exists()
        assert "/pause" not in server.requests


@pytest.mark.parametrize(
    ("quirks", "settings", "found"),
    [
        (Quirks(raw_logprobs=True), {"temperature": 0.7}, "generation.behaviour_logprobs=recompute"),
        (Quirks(without_extension=True, on_cpu=True), {}, "output layer"),
        (Quirks(other_tokenizer=True), {}, "tokenizer"),
    ],
)
def test_what_another_start_mends_is_told_with_its_command(
    policy: Policy, folder: Path, quirks: Quirks, settings: dict[str, object], found: str
) -> None:
    with FakeServer("vllm", folder, quirks=quirks) as server:
        told = refusal(policy, server, **settings)
        assert found in told
        assert told.endswith(f": {command(server, **settings)}")


@pytest.mark.parametrize(
    ("quirks", "words"),
    [
        (PLAIN, ["generation.async_rollouts=1"]),
        (Quirks(without_extension=True, on_cpu=True), ["generation.async_rollouts=1"]),
        (Quirks(raw_logprobs=True), ["generation.async_rollouts=1", "generation.temperature=0.7"]),
        (Quirks(without_logprobs=True), ["generation.async_rollouts=1"]),
        (PLAIN, ["eval.enabled=false"]),
        (Quirks(without_lora=True), ["model.lora.rank=4", "generation.sync=lora", "generation.async_rollouts=1"]),
    ],
)
def test_settings_that_a_refusal_proposes_are_taken_beside_those_of_the_run(
    policy: Policy, folder: Path, quirks: Quirks, words: list[str]
) -> None:
    with FakeServer("vllm", folder, quirks=quirks) as server:
        given = ["generation.backend=vllm_server", f"generation.base_url={server.url}", *words]
        given.append("generation.retry_seconds=0")
        config = resolve("tiny", [f"eval.base_url={server.url}", *given]).config
        if config.model.lora.rank:
            lora.add(policy.model, config.model.lora, 0)
            move_adapter(policy)
        generators = Generators(config, policy, folder, folder, folder / "log", print)
        with generators, pytest.raises(ServerUnfit) as caught:
            generators.training().sync(0)
    proposed = re.search(r"or choose ((?:\S+=\S+ ?)+): ", caught.value.remedy)
    assert proposed, caught.value.remedy
    resolve("tiny", [*given, *proposed[1].split()]).require_trainable()


def test_a_server_that_only_measures_is_done_without(policy: Policy, folder: Path) -> None:
    """How rollouts are drawn is not to change for that."""
    with FakeServer("vllm", folder, quirks=PLAIN) as server:
        words = ["eval.backend=vllm_server", f"eval.base_url={server.url}", "generation.retry_seconds=0"]
        generators = Generators(resolve("tiny", words).config, policy, folder, folder, folder / "log", print)
        with generators, pytest.raises(ServerUnfit, match=r"or choose eval\.backend=local: "):
            generators.evaluation().sync(0)


def test_what_no_setting_does_without_is_not_proposed(policy: Policy, folder: Path, tmp_path: Path) -> None:
    """An adapter that training starts from is never sent to a server that is sent no weights."""
    lora.add(policy.model, LoraConfig(rank=4), 0)
    move_adapter(policy)
    policy.save(tmp_path / "adapter")
    with FakeServer("vllm", folder, quirks=PLAIN) as server:
        words = ["generation.backend=vllm_server", f"generation.base_url={server.url}", "generation.retry_seconds=0"]
        config = resolve("tiny", [*words, "model.lora.rank=4"]).config
        source = tmp_path / "adapter"
        generators = Generators(config, policy, source, source, folder / "log", print)
        with generators, pytest.raises(ServerUnfit) as caught:
            generators.training().sync(0)
    assert "or choose" not in caught.value.remedy
    assert "with this command: " in caught.value.remedy


def test_another_model_or_number_format_is_told_with_the_command(policy: Policy, folder: Path) -> None:
    with FakeServer("vllm", folder, dtype=torch.bfloat16) as server:
        told = refusal(policy, server, sync="none")
        assert "does not serve the policy (model.train_id)" in told
        assert told.endswith(f": {command(server, sync='none')}")
        assert "--dtype float32" in told


@pytest.mark.parametrize("status", [400, 404, 405, 501])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_server_that_does_not_tokenize_is_used_and_a_line_says_so(
    policy: Policy, folder: Path, dialect: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeServer(dialect, folder, quirks=Quirks(refuses={"/tokenize": status})) as server:
        with served(policy, server) as generators:
            generator = generators.training()
            assert isinstance(generator, ServerGenerator)
            assert generator.server.check_tokenizer() == 0
            generator.sync(0)
            generator.sync(1)
        assert len(server.loads) == 2
    (line,) = [record.getMessage() for record in caplog.records if "tokenizer" in record.getMessage()]
    assert line.endswith(f"was not checked: /tokenize answers {status}: Not for you")


@pytest.mark.parametrize(
    ("quirks", "found"),
    [
        (Quirks(lists_no_model=True), "lists no model"),
        (Quirks(text_only=True), "1 completions of a prompt where 2 are asked for|without token ids"),
    ],
)
def test_servers_of_text_are_refused_at_once(policy: Policy, folder: Path, quirks: Quirks, found: str) -> None:
    with FakeServer("vllm", folder, quirks=quirks) as server:
        told = refusal(policy, server)
        assert any(each in told for each in found.split("|"))
        assert sum(server.requests.values()) < 5


def test_a_plain_server_measures_the_model_that_it_was_started_with(policy: Policy, folder: Path) -> None:
    with FakeServer("vllm", folder, quirks=PLAIN) as server, measuring(policy, server, folder) as generators:
        generator = generators.evaluation()
        generator.sync(0)
        found = generator.generate(prompts(policy), 2, Sampling(4, 0.7), 0, ("x",))
        assert [len(row) for row in found] == [2] * len(prompts(policy))
        assert server.loads == []


def test_scores_alone_do_not_make_it_the_model_that_is_measured(policy: Policy, folder: Path, tmp_path: Path) -> None:
    """A checkpoint after a few small steps scores as the base model does, within what number formats explain."""
    policy.save(tmp_path / "checkpoint")
    with FakeServer("vllm", folder, quirks=PLAIN) as server:
        with measuring(policy, server, tmp_path / "checkpoint") as generators, pytest.raises(ServerUnfit) as caught:
            generators.evaluation().sync(0)
        assert f"--model {tmp_path / 'checkpoint'} " in str(caught.value)
        with torch.no_grad():
            server.model.get_input_embeddings().weight.mul_(1.2)
        with measuring(policy, server, folder) as generators, pytest.raises(ServerUnfit):
            generators.evaluation().sync(0)


def test_a_server_that_can_load_is_given_the_weights_to_measure(policy: Policy, folder: Path) -> None:
    with FakeServer("vllm", folder, quirks=Quirks(raw_logprobs=True)) as server:
        with measuring(policy, server, folder) as generators:
            generators.evaluation().sync(0)
        assert len(server.loads) == 1


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_rollouts_of_a_static_server_are_priced_with_the_initial_weights(
    folder: Path, dialect: str, adapter: bool
) -> None:
    initial, trained = (policies.load(folder, torch.device("cpu")) for _ in range(2))
    if adapter:
        lora.add(trained.model, LoraConfig(rank=4), 0)
    sampling = Sampling(8, 0.7, 0.9, 20, 1.1)
    quirks = Quirks(without_development=True, raw_logprobs=True)
    settings = {"sync": "none", "behaviour_logprobs": "recompute", "temperature": 0.7}
    with FakeServer(dialect, folder, quirks=quirks) as server, served(trained, server, **settings) as generators:
        generator = generators.training()
        for version in range(2):
            generator.sync(version)
            prompt = prompts(trained)[0]
            found = generator.generate([prompt], 2, sampling, 0, ("x",))[0]
            expected = behaviour_logprobs(initial, prompt.token_ids, [c.token_ids for c in found], sampling)
            for completion, values in zip(found, expected, strict=True):
                assert completion.policy_version == 0
                assert completion.behaviour_logprobs == pytest.approx(values, abs=1e-5)
            if adapter:
                move_adapter(trained)
            else:
                with torch.no_grad():
                    trained.model.get_input_embeddings().weight.mul_(1.5)
        anew = behaviour_logprobs(trained, prompt.token_ids, [c.token_ids for c in found], sampling)
        assert (
            max(abs(a - b) for row, other in zip(anew, expected, strict=True) for a, b in zip(row, other, strict=True))
            > 1e-3
        )


def test_sampling_ahead_cannot_be_priced_by_the_trainer() -> None:
    words = ["generation.backend=vllm_server", "generation.base_url=http://h:1", *AS_IT_IS]
    assert resolve("tiny", words).config
    with pytest.raises(ConfigError, match=r"async_rollouts = 1 the trainer's weights are not those that sampled"):
        resolve("tiny", [*words, "generation.async_rollouts=1"])


def configured(server: FakeServer, store: str, *words: str) -> list[str]:
    given = ["train.iterations=1", "train.lr_warmup_steps=0", "eval.num_ids=2", "eval.replicates=2", "eval.ks=[1]"]
    given += [f"generation.backend={server.dialect}_server", f"generation.base_url={server.url}"]
    return [*SMALL, f"tracking.uri={store}", "generation.temperature=0.5", *given, *words]


def test_a_plain_server_trains_without_new_weights(small_model: Path, shared_store: str) -> None:
    with FakeServer("vllm", small_model, quirks=PLAIN) as server:
        finished = runs.train(resolve("tiny", configured(server, shared_store, *AS_IT_IS)))
        assert server.loads == []
    assert finished.progress.iteration == 1


def test_a_plain_server_evaluates(small_model: Path, shared_store: str) -> None:
    with FakeServer("vllm", small_model, quirks=PLAIN) as server:
        found = runs.evaluate(resolve("tiny", configured(server, shared_store)), "")
        assert server.loads == []
    assert len(found.outcomes) == 2


@pytest.mark.slow
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("without_extension", [False, True])
@pytest.mark.parametrize("without_development", [False, True])
def test_doctor_and_train_agree(
    small_model: Path, shared_store: str, tmp_path: Path, without_development: bool, without_extension: bool, raw: bool
) -> None:
    quirks = Quirks(
        without_development=without_development, without_extension=without_extension, on_cpu=True, raw_logprobs=raw
    )
    with FakeServer("vllm", small_model, quirks=quirks) as server:
        resolved = resolve("tiny", configured(server, shared_store))
        doctor = Doctor(resolved.config, tmp_path)
        checks = list(doctor.examine())
        server.restart()
        server.loads.clear()
        try:
            runs.train(resolved)
            refused = ""
        except ServerUnfit as unfit:
            refused = unfit.remedy
        assert doctor.healthy == (refused == ""), [str(check) for check in checks]
        assert doctor.healthy == (not (without_development or without_extension or raw))
        if refused:
            first = next(check for check in checks if check.state == "FAILED")
            assert refused in first.remedy
            assert refused.endswith(f": {start_command(resolved.config, 'vllm_server', server.url, small_model)}")
