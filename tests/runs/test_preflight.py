"""Model, tokenizer, chat template and task meet before a run is opened: a misfit is one line with exit code 2, and what
only looks odd is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_mlflow import runs, tasks
from grpo_mlflow.cli import evaluate, optimize, train
from grpo_mlflow.config import Resolved, TinyConfig, resolve
from grpo_mlflow.errors import ConfigError, ModelError, PromptTooLong, UserError
from grpo_mlflow.generation import Sampling
from grpo_mlflow.generation.local.generator import LocalGenerator
from grpo_mlflow.model import policy, tiny
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runs import preflight
from grpo_mlflow.runs.doctor import Doctor
from grpo_mlflow.training import rollouts
from grpo_mlflow.types import Problem
from tests.support import broken
from tests.support.posing import Repeated

CPU = torch.device("cpu")
FEW = ("data.num_train_seeds=16", "data.problems_per_iteration=4", "eval.num_ids=8", "eval.replicates=2")
MESSAGES = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
OPENED = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
THINKING = "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that fits every task."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    tiny.build(TinyConfig(hidden_size=16, layers=1, heads=2, seed=3)).save(folder)
    return folder


@pytest.fixture
def fitting(sound: Path) -> Policy:
    return policy.load(sound, CPU)


def template(text: str) -> broken.Break:
    return broken.written("chat_template.jinja", text.encode())


def templates(**named: str) -> broken.Break:
    """The chat templates of a tokenizer that has several."""

    def apply(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        listed = [{"name": name, "template": text} for name, text in named.items()]
        broken.edited("tokenizer_config.json", chat_template=listed)(folder)

    return apply


def ending(folder: Path) -> None:
    """Let the tokenizer end every text, as with add_eos_token=true."""
    name, index = "<|end|>", 1
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": name, "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [index], "tokens": [name]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    broken.edited("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")(folder)
    broken.edited("config.json", model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=True)(folder)
    broken.changed(lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(16)}))(folder)


def with_image(folder: Path, **named: str) -> None:
    """Give the tokenizer a special token that the model has no embedding for."""
    found = policy.load(folder, CPU).tokenizer
    found.add_special_tokens({"extra_special_tokens": [*found.all_special_tokens[2:], "<image>"]})
    for key, value in named.items():
        setattr(found, key, value)
    found.save_pretrained(folder)


def positions(count: int) -> broken.Break:
    return broken.edited("config.json", max_position_embeddings=count)


# What does not fit: what makes it so, the settings, and what the line must hold
MISFITS: dict[str, tuple[broken.Break, list[str], list[str]]] = {
    "a template without a system role": (
        template(NO_SYSTEM + MESSAGES + OPENED),
        ["data.system_prompt=Add."],
        ["prompt of arithmetic/eval/", "System role not supported", "data.system_prompt"],
    ),
    "a template that leaves the system out": (
        template("<|user|>{{ messages[-1].content }}<|end|>" + OPENED),
        ["data.system_prompt=Add."],
        ["prompt of arithmetic/eval/", "role system", "renders every message"],
    ),
    "a template that leaves the problem out": (
        template("<|user|>Hello<|end|>" + OPENED),
        [],
        ["prompt of arithmetic/eval/", "role user", "renders every message"],
    ),
    "several templates and no default": (
        templates(rag=MESSAGES, tool_use=MESSAGES),
        [],
        ["(rag, tool_use)", "model.chat_template_kwargs='{chat_template: NAME}'"],
    ),
    "a template that opens no answer": (
        template(MESSAGES),
        [],
        ["prompt of arithmetic/eval/", "ends with the end-of-sequence token 1", "generation prompt"],
    ),
    "a tokenizer that ends each text": (
        ending,
        ["model.chat_template=none"],
        ["prompt of arithmetic/eval/", "ends with the end-of-sequence token 1", "add_eos_token=false"],
    ),
    "a prompt with a token that has no embedding": (
        broken.both(with_image, template("<image>" + MESSAGES + OPENED)),
        [],
        ["prompt of arithmetic/eval/", "has token 317", "below 317"],
    ),
    "a context that is short for training": (
        positions(20),
        ["generation.max_new_tokens=16", "eval.max_new_tokens=2"],
        ["generation.max_new_tokens = 16: the prompt of arithmetic/train/", "20 positions", " or less"],
    ),
    "a context that is short for evaluation": (
        positions(20),
        ["generation.max_new_tokens=2", "eval.max_new_tokens=16"],
        ["eval.max_new_tokens = 16: the prompt of arithmetic/eval/", "20 positions", " or less"],
    ),
    "a context that no prompt fits into": (
        positions(6),
        ["generation.max_new_tokens=2"],
        ["max_new_tokens = 2: the prompt of arithmetic/eval/", "6 positions", "allowed: a model with more"],
    ),
}


def given(sound: Path, apply: Callable[[Path], object], to: Path) -> Path:
    shutil.copytree(sound, to / "given")
    apply(to / "given")
    return to / "given"


def settings(folder: Path, *words: str) -> Resolved:
    return resolve("tiny", [f"model.train_id={folder}", "model.device=cpu", *FEW, *words])


def require(found: Policy, task: tasks.Task | None = None, *words: str) -> int:
    config = settings(Path("given"), *words).config
    return preflight.require(config, task or tasks.of(config), found)


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_is_one_line_before_a_run_is_opened(sound: Path, name: str, tmp_path: Path) -> None:
    apply, words, fragments = MISFITS[name]
    folder, store = given(sound, apply, tmp_path), tmp_path / "mlflow.db"
    resolved = settings(folder, *words, f"tracking.uri=sqlite:///{store}")
    with pytest.raises(UserError) as caught:
        runs.train(resolved)
    line = str(caught.value)
    assert "\n" not in line
    assert caught.value.exit_code == 2
    assert [fragment for fragment in (*fragments, "allowed: ") if fragment not in line] == []
    assert str(folder) in line or "max_new_tokens" in line
    assert not store.exists()


@pytest.mark.parametrize("command", [train, evaluate, optimize])
def test_every_command_refuses_a_misfit(sound: Path, command: object, tmp_path: Path) -> None:
    folder, store = given(sound, template(MESSAGES), tmp_path), tmp_path / "mlflow.db"
    words = ["--config", "tiny", f"model.train_id={folder}", "model.device=cpu", f"tracking.uri=sqlite:///{store}"]
    with pytest.raises(ModelError, match="ends with the end-of-sequence token 1"):
        command.main([*words, *FEW])  # type: ignore[attr-defined]
    assert not store.exists()


def test_the_doctor_refuses_a_misfit(sound: Path, tmp_path: Path) -> None:
    doctor = Doctor(settings(given(sound, template(MESSAGES), tmp_path)).config, tmp_path)
    (check,) = (check for check in doctor.examine() if check.state == "FAILED")
    assert "ends with the end-of-sequence token 1" in check.found
    assert doctor.exit_code == 2


# What fits


def test_the_longest_row_is_returned(fitting: Policy) -> None:
    config = settings(Path("given"), "generation.max_new_tokens=5", "eval.max_new_tokens=9").config
    task = tasks.of(config)
    asked = [fitting.prompt(task.problem("eval", config.eval.id_seed_start + i)) for i in range(config.eval.num_ids)]
    assert preflight.require(config, task, fitting) == max(len(prompt.token_ids) for prompt in asked) + 9


def test_a_row_may_fill_the_context(sound: Path, tmp_path: Path, fitting: Policy) -> None:
    most = require(fitting)
    assert require(policy.load(given(sound, positions(most), tmp_path), CPU)) == most
    with pytest.raises(ConfigError, match=f"{most - 1} positions"):
        positions(most - 1)(tmp_path / "given")
        require(policy.load(tmp_path / "given", CPU))


def test_the_default_of_several_templates_is_used(sound: Path, tmp_path: Path, fitting: Policy) -> None:
    several = templates(default=MESSAGES + OPENED, tool_use="tools" + MESSAGES + OPENED)
    found = policy.load(given(sound, several, tmp_path), CPU)
    problem = Repeated().problem("train", 3)
    assert found.prompt(problem) == fitting.prompt(problem)
    assert require(found) == require(fitting)


def test_a_template_can_be_chosen_by_its_name(sound: Path, tmp_path: Path, fitting: Policy) -> None:
    folder = given(sound, templates(rag="rag", tool_use=MESSAGES + OPENED), tmp_path)
    config = settings(folder, "model.chat_template_kwargs={chat_template: tool_use}").config
    found = policy.load_as(config.model, folder, CPU)
    assert found.prompt(Repeated().problem("train", 3)) == fitting.prompt(Repeated().problem("train", 3))


def test_a_generation_prompt_may_be_an_end_token_too(fitting: Policy) -> None:
    """Phi-3 lists <|assistant|> among its end-of-sequence tokens."""
    opens = fitting.tokenizer.convert_tokens_to_ids("<|assistant|>")
    found = replace(fitting, eos_ids=(*fitting.eos_ids, opens))
    assert found.prompt(Repeated().problem("train", 3)).token_ids[-1] in found.eos_ids
    assert require(found) == require(fitting)


@pytest.mark.parametrize(
    "apply",
    [
        lambda folder: with_image(folder, pad_token="<image>"),
        broken.edited("config.json", pad_token_id=999),
        broken.edited("config.json", pad_token_id=-1),
        broken.edited("generation_config.json", eos_token_id=[1, 999]),
    ],
    ids=["padding of the tokenizer", "padding of the model", "no padding", "an end"],
)
def test_padding_and_further_ends_may_lie_outside_the_embeddings(
    sound: Path, tmp_path: Path, apply: broken.Break, fitting: Policy
) -> None:
    found = replace(policy.load(given(sound, apply, tmp_path), CPU), written_out=False)
    assert found.eos_ids == (1,)
    assert 0 <= found.pad_id < 317
    require(found)
    problems = [Repeated(long=[1], times=3).problem("train", seed) for seed in range(2)]  # ragged: one is padded
    drawn = [sampled(each, problems) for each in (found, replace(fitting, written_out=False))]
    assert drawn[0] == drawn[1]


def sampled(found: Policy, problems: Iterable[Problem]) -> list[list[tuple[int, ...]]]:
    prompts = [found.prompt(problem) for problem in problems]
    groups = LocalGenerator(found, 2).generate(prompts, 2, Sampling(4), 0, ("key",))
    return [[completion.token_ids for completion in group] for group in groups]


# Tokenizers and answers


def words_only(fitting: Policy, *words: str, clean: bool = False, drops: str = "") -> Policy:
    """The model with a tokenizer of whole words, which drops the characters `drops` and joins words with blanks."""
    known = ["<unk>", "<end>", *words, *(str(digit) for digit in range(10)), *"Question:yesno"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(known))}, "<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(letter, "") for letter in drops])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", clean_up_tokenization_spaces=clean
    )
    return replace(fitting, tokenizer=made)


def test_a_tokenizer_that_cannot_write_the_answers_is_refused(fitting: Policy) -> None:
    found = words_only(fitting, "Question", ":", "no")
    assert require(found, Repeated("no")) > 0
    with pytest.raises(
        ModelError, match=r"the answer 'yes' to repeated/eval/\d+ becomes '' in its tokens, .*allowed: a"
    ):
        require(found, Repeated("yes"))


def test_a_tokenizer_that_tells_no_problems_apart_is_refused(fitting: Policy) -> None:
    with pytest.raises(ModelError, match=r"prompt of repeated/eval/\d+ has the same tokens as that of repeated/eval/"):
        require(words_only(fitting, "Question", ":", "yes", drops="1234"), Repeated("yes"))


def test_blanks_that_the_tokenizer_cleans_up_count_as_the_judge_is_given_them(fitting: Policy) -> None:
    words = ("Question", ":", "no", ".")
    assert require(words_only(fitting, *words, clean=True), Repeated("no.")) > 0
    assert require(words_only(fitting, *words), Repeated("no .")) > 0
    with pytest.raises(ModelError, match=r"'no\.' .* becomes 'no \.'"):
        require(words_only(fitting, *words), Repeated("no."))
    with pytest.raises(ModelError, match=r"'no \.' .* becomes 'no\.' .*allowed: clean_up_tokenization_spaces=false"):
        require(words_only(fitting, *words, clean=True), Repeated("no ."))


def test_tags_that_are_special_tokens_are_refused(fitting: Policy) -> None:
    """The judge is given the text without them: the answer succeeds, and never earns the reward for its form."""
    words = ("data.task=sat",)
    require(fitting, None, *words)
    fitting.tokenizer.add_special_tokens({"extra_special_tokens": ["<SOLUTION>", "</SOLUTION>"]})
    fitting.model.resize_token_embeddings(len(fitting.tokenizer), mean_resizing=False)
    with pytest.raises(ModelError, match=r"becomes '[01 ]+' in its tokens.*allowed: a tokenizer that has no special"):
        require(fitting, None, *words)


def test_an_answer_with_a_token_that_has_no_embedding_is_refused(fitting: Policy) -> None:
    fitting.tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    with pytest.raises(
        ModelError, match=r"the answer '<image>' to repeated/eval/\d+ has token 317; allowed: below 317"
    ):
        require(fitting, Repeated("<image>"))


def test_a_task_without_answers_of_its_own_is_not_asked_for_them(fitting: Policy) -> None:
    assert require(words_only(fitting, "Question", ":"), Repeated(None)) > 0


# Arguments of the template


def thinking(sound: Path, to: Path, *words: str) -> tuple[Policy, Resolved]:
    folder = given(sound, template(MESSAGES + OPENED + THINKING), to)
    resolved = settings(folder, *words)
    return policy.load_as(resolved.config.model, folder, CPU), resolved


def test_the_template_gets_its_arguments(sound: Path, tmp_path: Path) -> None:
    problem = Repeated().problem("train", 3)
    plain, _ = thinking(sound, tmp_path / "a")
    found, resolved = thinking(sound, tmp_path / "b", "model.chat_template_kwargs={enable_thinking: false}")
    assert list(found.prompt(problem).token_ids) == [
        *plain.prompt(problem).token_ids,
        *found.tokenizer("no").input_ids,
    ]
    assert preflight.idle_arguments(resolved.config, Repeated(), found) is None


@pytest.mark.parametrize("word", ["enable_thinkin: false", "enable_thinking: true"])
def test_an_argument_that_changes_nothing_is_told(
    sound: Path, tmp_path: Path, word: str, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, resolved = thinking(sound, tmp_path, f"model.chat_template_kwargs={{{word}}}")
    line = preflight.idle_arguments(resolved.config, Repeated(), found)
    assert line is not None
    assert line.startswith(f"model.chat_template_kwargs: {word.partition(':')[0]} changes nothing in a prompt")
    few = ["train.iterations=1", "eval.enabled=false", "generation.max_new_tokens=2", f"tracking.uri={store}"]
    runs.train(settings(tmp_path / "given", *few, f"model.chat_template_kwargs={{{word}}}"))
    assert capsys.readouterr().out.count(line) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["model.chat_template_kwargs=3"],
            "model.chat_template_kwargs = 3 (override): input should be a valid dictionary",
        ),
        (
            ["model.chat_template_kwargs=[enable_thinking]"],
            "model.chat_template_kwargs = ['enable_thinking'] (override): input should be a valid dictionary",
        ),
        (
            ["model.chat_template_kwargs={tokenize: false}"],
            "model.chat_template_kwargs = {'tokenize': False}: tokenize is ",
        ),
        (["model.chat_template_kwargs={messages: []}"], "model.chat_template_kwargs = {'messages': []}: messages is "),
    ],
)
def test_arguments_that_are_none_are_refused(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("tiny", words)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_arguments_without_a_template_are_told() -> None:
    words = ["model.chat_template=none", "model.chat_template_kwargs={enable_thinking: false}"]
    assert [line for line in resolve("tiny", words).warnings if "model.chat_template is none" in line]


# Problems that are met later


class Never:
    """A generator that must not be asked."""

    def generate(self, *_: object) -> list[list[object]]:
        raise AssertionError("asked")


def test_nothing_is_sampled_after_a_prompt_that_is_too_long(fitting: Policy) -> None:
    task = Repeated(long=[1], times=400)
    problems = [task.problem("train", seed) for seed in range(2)]
    with pytest.raises(PromptTooLong, match=r"max_new_tokens = 8: the prompt of repeated/train/1 has \d+ tokens"):
        rollouts.collect(task, fitting, Never(), problems, k=2, sampling=Sampling(8), seed=0, key=())  # type: ignore[arg-type]


def test_the_longest_of_the_later_prompts_count(fitting: Policy) -> None:
    late = rollouts.seeds_of_iteration(0, 80, 8, 9, seed=0)[3]
    words = ["seed=0", "data.train_seed_start=0", "data.num_train_seeds=80", "data.problems_per_iteration=8"]
    words += ["eval.enabled=false", "train.iterations=10", "generation.max_new_tokens=2"]
    task = Repeated(long=[late], times=20)
    assert require(fitting, task, *words) == len(fitting.prompt(task.problem("train", late)).token_ids) + 2


def test_a_resumed_run_meets_what_comes_next_first(fitting: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_LOOKED", 0.0)
    late = rollouts.seeds_of_iteration(0, 80, 8, 9, seed=0)[3]
    words = ["data.train_seed_start=0", "data.num_train_seeds=80", "data.problems_per_iteration=8", "seed=0"]
    config = settings(Path("given"), "eval.enabled=false", "train.iterations=10", *words).config
    task = Repeated(long=[late], times=20)
    begins, resumes = (preflight.require(config, task, fitting, begun) for begun in (0, 9))
    assert resumes > begins + 20


def test_a_long_prompt_that_is_met_late_leaves_a_checkpoint(
    sound: Path, tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "_LOOKED", 0.0)  # as where problems take long to make
    late = rollouts.seeds_of_iteration(0, 80, 8, 9, seed=0)[3]  # after the 64 that are met before the run
    words = ["data.task=python:tests.support.posing:Repeated", f"data.settings={{long: [{late}]}}", "seed=0"]
    words += ["data.train_seed_start=0", "data.num_train_seeds=80", "data.problems_per_iteration=8"]
    words += ["data.rollouts_per_problem=2", "train.iterations=10", "eval.enabled=false", "checkpoint.save_interval=50"]
    words += [f"tracking.uri={store}", "generation.max_new_tokens=2", "train.batch_size=16", "train.grad_accum_steps=1"]
    with pytest.raises(PromptTooLong, match=f"the prompt of repeated/train/{late} has"):
        runs.train(resolve("tiny", [f"model.train_id={sound}", "model.device=cpu", *words]))
    assert "iter_009 is whole" in capsys.readouterr().out  # what it says to do is tried in test_going_around.py
    (weights,) = tmp_path.glob("**/iter_009/model.safetensors")
    assert load_file(weights)
