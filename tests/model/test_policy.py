"""Log-probabilities of completions: what padding, order and logits that are never computed must not change."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from grpo_mlflow.errors import UserError
from grpo_mlflow.forward.padded import completion_logprobs
from grpo_mlflow.model import devices
from grpo_mlflow.model import policy as policies
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.tasks import Arithmetic
from grpo_mlflow.types import Problem


def rows(policy: Policy) -> tuple[list[list[int]], list[int]]:
    """Rows of ids and the lengths of their prompts."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(3, 5), (9, 2), (1, 7)]
    ids = [torch.randint(5, 200, (p + c,), generator=generator).tolist() for p, c in lengths]
    return ids, [p for p, _ in lengths]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_logprobs_and_entropy_equal_a_plain_forward(policy: Policy, temperature: float) -> None:
    ids, starts = rows(policy)
    width = max(map(len, ids)) + 3
    padded = torch.tensor([row + [policy.pad_id] * (width - len(row)) for row in ids])
    found, entropies = completion_logprobs(policy.model, padded, torch.tensor(starts), 7, temperature)
    for i, (row, start) in enumerate(zip(ids, starts, strict=True)):
        logits = policy.model(input_ids=torch.tensor([row])).logits[0] / temperature
        reference = torch.distributions.Categorical(logits=logits)
        for place in range(start, len(row)):
            distribution = torch.distributions.Categorical(logits=logits[place - 1])
            expected = distribution.log_prob(torch.tensor(row[place]))
            assert found[i, place - start].item() == pytest.approx(expected.item(), abs=1e-5)
            assert entropies[i, place - start].item() == pytest.approx(reference.entropy()[place - 1].item(), abs=1e-5)


def test_a_saved_model_comes_back_the_same(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    loaded = policies.load(tmp_path, torch.device("cpu"))
    problem = Arithmetic().problem("train", 5)
    assert loaded.prompt(problem) == policy.prompt(problem)
    assert (loaded.eos_ids, loaded.pad_id) == (policy.eos_ids, policy.pad_id)
    for (name, one), (_, two) in zip(policy.model.named_parameters(), loaded.model.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_any_text_survives_the_tokenizer(policy: Policy) -> None:
    for text in ("12+34=46", "héllo ∑ 日本 \t\n x12 <SOLUTION>0 1</SOLUTION>", "NOT x1 OR x2"):
        assert policy.decode([policy.tokenizer(text).input_ids]) == [text]


def test_a_tokenizer_without_template_gets_the_plain_text(policy: Policy) -> None:
    policy.tokenizer.chat_template = None
    problem = Problem("p", 0, ({"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}))
    assert policy.decode([policy.prompt(problem).token_ids]) == ["Add.\n\n1+1="]


@pytest.mark.parametrize("files", [{}, {"config.json": "{"}, {"config.json": '{"model_type": "qwen2"}'}])
def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        policies.load(tmp_path, torch.device("cpu"))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_id_without_its_organisation_is_asked_about_and_the_hubs_log_told_once() -> None:
    code = """
        import logging, torch
        from grpo_mlflow.model.policy import load
        logging.basicConfig()
        for name in ("Qwen2.5", "Qwen/Qwen2.5"):
            try:
                load(name, torch.device("cpu"))
            except Exception as error:
                print(error)
        logging.getLogger("huggingface_hub").warning("a line of the hub's")
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, check=True
    )
    short, full = done.stdout.splitlines()
    assert short.startswith("model 'Qwen2.5' cannot be loaded (is its hub id ORG/NAME?): ")
    assert full.startswith("model 'Qwen/Qwen2.5' cannot be loaded: ")
    assert done.stderr.count("a line of the hub's") == 1


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="cuda:97"):
        devices.choose_device("cuda:97")
