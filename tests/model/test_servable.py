"""A model's folder as MLflow loads it: the answers are those of the run, whatever form the question has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd  # type: ignore[import-untyped]
import pytest
import torch
import yaml

from grpo_mlflow.config import Config, LoraConfig, TinyConfig, resolve
from grpo_mlflow.generation import LocalGenerator, Sampling
from grpo_mlflow.model import loading, lora, policy, servable, tiny
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.model.servable import Serving
from grpo_mlflow.tasks import Arithmetic, Sat
from grpo_mlflow.training import serving
from grpo_mlflow.types import Completion, Problem
from tests.support import roomy
from tests.support.adapters import move_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")  # as MLflow says of its own classes
CPU = torch.device("cpu")
NEW = 12
PROBLEMS = [
    *(Arithmetic().problem("train", seed) for seed in range(6)),
    Sat().problem("train", 2),  # much longer: rows are padded
    Arithmetic(terms=4).problem("train", 3),
]
TEXTS = [problem.messages[-1]["content"] for problem in PROBLEMS]
GREEDY = {"temperature": 0.0}


@pytest.fixture(autouse=True)
def _other_modules_stay() -> Iterator[None]:
    """MLflow puts the folder of the loader before all others, and Python keeps the module."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("grpo_pyfunc_loader", None)


def build(seed: int = 3) -> Policy:
    """A model whose likeliest answers are as different as the questions."""
    made = tiny.build(TinyConfig(hidden_size=32, layers=2, heads=2, seed=seed))
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weights in made.model.named_parameters():
            if weights.ndim > 1 and "embed" not in name:
                weights.add_(0.2 * torch.randn(weights.shape, generator=noise))
    return made


def written(given: Policy, folder: Path, **changes: Any) -> Path:
    given.save(folder)
    sampling = {"max_new_tokens": NEW, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}
    servable.write(folder, given, Config().model, Serving(**{"defaults": sampling, **changes}))
    return folder


def completions(given: Policy, problems: list[Problem]) -> list[Completion]:
    """What our own generator finds likeliest."""
    prompts = [given.prompt(problem) for problem in problems]
    found = LocalGenerator(given, 4).generate(prompts, 1, Sampling(NEW, temperature=0.0), 0, ("test",))
    return [row[0] for row in found]


def greedy(given: Policy, problems: list[Problem]) -> list[str]:
    return [completion.text for completion in completions(given, problems)]


def test_every_form_of_a_question_gets_the_answers_of_our_own_generator(tmp_path: Path) -> None:
    own = build()
    expected = greedy(own, PROBLEMS)
    assert len({*expected}) > 3  # else it would say little
    loaded = mlflow.pyfunc.load_model(str(written(own, tmp_path / "m")))
    messages = [[dict(message) for message in problem.messages] for problem in PROBLEMS]
    for data in (
        TEXTS,
        {"prompt": TEXTS},
        [{"messages": each} for each in messages],
        pd.DataFrame({"prompt": TEXTS}),
        pd.DataFrame({"messages": messages}),
        pd.DataFrame([{"prompt": TEXTS[0]}, *({"messages": each} for each in messages[1:])]),  # cells without a value
        pd.Series(TEXTS).to_numpy(),
    ):
        assert loaded.predict(data, params=GREEDY) == expected
    for data in (TEXTS[1], {"prompt": TEXTS[1]}, messages[1], {"messages": messages[1]}):
        assert loaded.predict(data, params=GREEDY) == expected[1:2]


def test_the_pipeline_of_transformers_answers_the_same(tmp_path: Path) -> None:
    own = build()
    pipeline = mlflow.transformers.load_model(str(written(own, tmp_path / "m")))
    found = pipeline([dict(message) for message in PROBLEMS[0].messages], do_sample=False, max_new_tokens=NEW)
    assert found[0]["generated_text"][-1] == {"role": "assistant", "content": greedy(own, PROBLEMS[:1])[0]}


@pytest.mark.filterwarnings("ignore:.*peft.*", "ignore:Already found:UserWarning")
def test_an_adapter_loads_with_its_base(tmp_path: Path) -> None:
    build().save(tmp_path / "base")
    own = policy.load(tmp_path / "base", CPU)
    plain = greedy(own, PROBLEMS)
    lora.add(own.model, LoraConfig(rank=4), 0)
    move_adapter(own)
    expected = greedy(own, PROBLEMS)
    assert expected != plain
    folder = written(own, tmp_path / "m")
    assert not (folder / "model.safetensors").exists()
    assert mlflow.pyfunc.load_model(str(folder)).predict(TEXTS, params=GREEDY) == expected
    pipeline = mlflow.transformers.load_model(str(folder))
    found = pipeline([dict(message) for message in PROBLEMS[0].messages], do_sample=False, max_new_tokens=NEW)
    assert found[0]["generated_text"][-1]["content"] == expected[0]


@pytest.mark.filterwarnings("ignore:.*peft.*", "ignore:Already found:UserWarning")
def test_a_merged_adapter_needs_no_base(tmp_path: Path) -> None:
    build().save(tmp_path / "base")
    own = policy.load(tmp_path / "base", CPU)
    lora.add(own.model, LoraConfig(rank=4), 0)
    move_adapter(own)
    expected = greedy(own, PROBLEMS)
    config = resolve("tiny", [f"generation.max_new_tokens={NEW}"]).config
    folder = loading.merge(written(own, tmp_path / "m"), tmp_path / "merged", config.model, asked=serving.of(config))
    shutil.rmtree(tmp_path / "base")
    assert mlflow.pyfunc.load_model(str(folder)).predict(TEXTS, params=GREEDY) == expected
    assert "peft" not in (folder / "requirements.txt").read_text()


def test_a_prompt_is_that_of_the_run(tmp_path: Path) -> None:
    """Its system prompt before a plain text, its arguments of the template, its texts alone without one."""
    own = build()
    system = {"role": "system", "content": "Be brief. " * 3}
    asked = [Problem(p.id, p.seed, (system, *p.messages), p.payload) for p in PROBLEMS]
    loaded = mlflow.pyfunc.load_model(str(written(own, tmp_path / "m", system_prompt=system["content"])))
    expected = greedy(own, asked)
    assert loaded.predict(TEXTS, params=GREEDY) == expected
    assert expected != greedy(own, PROBLEMS)
    given = [{"role": "user", "content": TEXTS[0]}]
    assert loaded.predict(given, params=GREEDY) == greedy(own, PROBLEMS[:1])  # messages are taken as given
    own.tokenizer.chat_template = None
    loaded = mlflow.pyfunc.load_model(str(written(own, tmp_path / "plain", system_prompt=system["content"])))
    assert loaded.predict(TEXTS, params=GREEDY) == greedy(own, asked)


def test_no_token_is_sampled_that_the_run_could_not_sample(tmp_path: Path) -> None:
    own = roomy.load(tmp_path / "source", 1)
    with torch.no_grad():  # the likeliest are those that stand for no token
        own.model.get_input_embeddings().weight[roomy.KNOWN :] = own.model.get_input_embeddings().weight[5:13] * 50
    expected = greedy(own, PROBLEMS)
    assert mlflow.pyfunc.load_model(str(written(own, tmp_path / "m"))).predict(TEXTS, params=GREEDY) == expected


def test_each_end_token_of_the_run_ends_an_answer(tmp_path: Path) -> None:
    own = build()
    ids = list(completions(own, PROBLEMS[:1])[0].token_ids)
    short = Policy(own.model, own.tokenizer, CPU, torch.float32, (own.eos_ids[0], ids[3]), own.pad_id)
    loaded = mlflow.pyfunc.load_model(str(written(short, tmp_path / "m")))
    assert loaded.predict(TEXTS[0], params=GREEDY) == [own.decode([ids[: ids.index(ids[3])]])[0]]


def test_sampling_is_that_of_the_run_unless_a_request_says_otherwise(tmp_path: Path) -> None:
    own = build()
    config = resolve("tiny", ["generation.max_new_tokens=3", "eval.temperature=0.5", "generation.top_k=7"]).config
    own.save(tmp_path / "m")
    servable.write(tmp_path / "m", own, config.model, serving.of(config))
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "m"))
    params = {param.name: param.default for param in loaded.metadata.signature.params.params}
    assert params == {
        **{"max_new_tokens": 3, "temperature": 0.5, "top_p": config.generation.top_p, "top_k": 7},
        **{"repetition_penalty": config.generation.repetition_penalty, "seed": None},
    }
    many = [TEXTS[1]] * 40
    long = completions(own, PROBLEMS[1:2])[0]
    assert loaded.predict(TEXTS[1], {"temperature": 0}) == own.decode([long.token_ids[:3]])
    assert loaded.predict(TEXTS[1], {"temperature": 0, "max_new_tokens": 5}) == own.decode([long.token_ids[:5]])
    assert len({*loaded.predict(many)}) > 5
    assert len({*loaded.predict(many, {"temperature": 0})}) == 1
    assert len({*loaded.predict(many, {"top_k": 1})}) == 1


def test_a_seed_repeats_an_answer_and_leaves_the_draws_of_others_alone(tmp_path: Path) -> None:
    loaded = mlflow.pyfunc.load_model(str(written(build(), tmp_path / "m")))
    one, again, other = (loaded.predict(TEXTS, {"seed": seed}) for seed in (1, 1, 2))
    assert one == again != other
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loaded.predict(TEXTS, {"seed": 1})
    assert torch.equal(torch.rand(3), expected)


def test_frequencies_are_those_of_the_softmax_at_the_temperature(tmp_path: Path) -> None:
    own = build()
    loaded = mlflow.pyfunc.load_model(str(written(own, tmp_path / "m")))
    answers = loaded.predict([TEXTS[0]] * 2000, {"max_new_tokens": 1, "temperature": 0.6, "seed": 0})
    ids = torch.tensor([own.prompt(PROBLEMS[0]).token_ids])
    with torch.no_grad():
        probabilities = (own.model(input_ids=ids).logits[0, -1] / 0.6).softmax(-1)
    chances = defaultdict[str, float](float)  # of texts: many tokens are no whole character
    for token, text in enumerate(own.decode([[token] for token in range(len(probabilities))])):
        chances[text] += float(probabilities[token])
    for text, chance in sorted(chances.items(), key=lambda item: -item[1])[:3]:
        assert abs(answers.count(text) / 2000 - chance) < 4 * (chance * (1 - chance) / 2000) ** 0.5


@pytest.mark.parametrize("data", [5, {"x": 1}, [{"question": "1+1", "other": 2}], [3.5], [["a", "b"]]])
def test_another_form_is_refused_in_one_line_that_says_what_is_allowed(data: Any, tmp_path: Path) -> None:
    loaded = mlflow.pyfunc.load_model(str(written(build(), tmp_path / "m")))
    with pytest.raises(ValueError, match=r"allowed: a text, a list of texts, chat messages, or rows") as refused:
        loaded.predict(data)
    assert "\n" not in str(refused.value)


def test_a_prompt_without_room_for_an_answer_is_refused(tmp_path: Path) -> None:
    loaded = mlflow.pyfunc.load_model(str(written(build(), tmp_path / "m")))
    with pytest.raises(ValueError, match="1024 positions: no room to answer"):
        loaded.predict("x" * 1100)
    assert loaded.predict([]) == []


def test_two_models_of_one_process_keep_their_own_settings(tmp_path: Path) -> None:
    first, second = build(1), build(2)
    folders = [written(each, tmp_path / str(place)) for place, each in enumerate([first, second])]
    loaded = [mlflow.pyfunc.load_model(str(folder)) for folder in folders]
    assert [each.predict(TEXTS, params=GREEDY) for each in loaded] == [
        greedy(first, PROBLEMS),
        greedy(second, PROBLEMS),
    ]


def test_the_weights_are_stored_once_and_nothing_is_pickled(tmp_path: Path) -> None:
    folder = written(build(), tmp_path / "m")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path.name for path in files if path.suffix in (".safetensors", ".bin", ".pkl", ".pt")] == [
        "model.safetensors"
    ]
    tokenizers = [path for path in files if path.name == "tokenizer.json"]
    assert len(tokenizers) == 2
    assert len({path.stat().st_ino for path in tokenizers}) == 1
    added = sum(path.stat().st_size for path in files if path.parent == folder / "code" or path.name == "MLmodel")
    assert added < 16_000


def test_the_loader_needs_torch_and_transformers_only(tmp_path: Path) -> None:
    folder = written(build(), tmp_path / "m")
    settings = yaml.safe_load((folder / "MLmodel").read_text())["flavors"]["python_function"]["config"]
    script = (
        "import builtins, json, sys\n"
        "real = builtins.__import__\n"
        "def only(name, *rest, **more):\n"
        "    assert name.partition('.')[0] not in ('grpo_mlflow', 'mlflow', 'optuna'), name\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = only\n"
        "import grpo_pyfunc_loader\n"
        f"model = grpo_pyfunc_loader._load_pyfunc({str(folder)!r}, json.loads({json.dumps(settings)!r}))\n"
        f"print(json.dumps(model.predict({TEXTS[:2]!r}, {{'temperature': 0, 'max_new_tokens': {NEW}}})))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder / "code")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == greedy(build(), PROBLEMS[:2])


def test_a_server_of_another_user_can_read_the_weights(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = written(build(), tmp_path / "m")
    finally:
        os.umask(before)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
