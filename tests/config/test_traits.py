"""What settings declare about themselves: every one declares everything, and the commands act on it."""

from __future__ import annotations

import pytest
from pydantic import Field

from grpo_mlflow.config import OF_EVALUATION, TRAITS, Config, flatten, parse_arguments, resuming, summary
from grpo_mlflow.config.fields import Section, Traits, setting
from grpo_mlflow.config.keys import KEYS
from grpo_mlflow.errors import ConfigError

RESUME = (
    *("resume", "train.iterations", "eval.interval", "model.device", "model.ref_device", "checkpoint.", "tracking."),
    *("generation.base_url", "generation.sync_dir", "generation.server.", "eval.base_url"),
    *("generation.timeout", "generation.retry_seconds", "data.reward_timeout"),
    *("train.max_tokens_per_batch", "generation.max_tokens_per_batch", "train.sharding", "train.optimizer_offload"),
)
NOT_COMPARED = (
    *("search.", "tracking.", "checkpoint.", "resume", "model.device", "eval.base_url", "generation.base_url"),
    *("generation.server.", "generation.sync_dir", "generation.timeout", "generation.retry_seconds"),
    *("data.reward_timeout", "train.max_tokens_per_batch", "generation.max_tokens_per_batch", "train.sharding"),
    "train.optimizer_offload",
)
MEASURING = ("search.k", "search.objective", "search.objective_window", "search.cost")
VARIES = ("seed", "model.", "generation.", "train.", "data.")
SAMPLED = ("generation.base_url", "generation.server.", "generation.max_tokens_per_batch")
MEASURED = (
    *("model.chat_template", "data.task", "data.system_prompt", "data.mix", "data.arithmetic.", "data.sat."),
    *("data.gsm8k.", "data.rows.", "data.reasoning_gym", "data.settings", "data.rewards", "data.success"),
)
SECRET = (
    *("generation.base_url", "generation.server.arguments", "eval.base_url", "tracking.uri", "search.storage"),
    *("data.settings", "data.rewards", "data.success"),
)
EVALUATION = (
    *(*MEASURED, "seed", "generation.backend", "generation.max_new_tokens", "generation.temperature"),
    *("generation.top_", "generation.repetition_penalty", "eval.replicates", "eval.num_ids", "eval.id_seed_start"),
    *("eval.ks", "eval.greedy", "eval.temperature", "eval.top_", "eval.backend", "eval.seed", "eval.max_new_tokens"),
    *("eval.repetition_penalty", "eval.base_url", *SAMPLED),
)
RUN_ID = "1" * 32


def test_every_setting_declares_every_trait() -> None:
    assert set(TRAITS) == set(flatten(Config().model_dump()))


@pytest.mark.parametrize(
    ("trait", "expected"),
    [
        ("resume", {key for key in KEYS if key.startswith(RESUME)}),
        ("compared", {key for key in KEYS if key in MEASURING or not key.startswith(NOT_COMPARED)}),
        (
            "varies",
            {
                key
                for key in KEYS
                if key.startswith(VARIES)
                and not key.startswith((*MEASURED, *SAMPLED, "data.reward_timeout", "train.sharding"))
            },
        ),
        ("secret", set(SECRET)),
        ("evaluation", {key for key in KEYS if key.startswith(EVALUATION)}),
    ],
)
def test_the_settings_with_a_trait(trait: str, expected: set[str]) -> None:
    assert {key for key, traits in TRAITS.items() if getattr(traits, trait)} == expected


def test_what_decides_evaluations_varies_only_where_eval_can_hold_it() -> None:
    """Else a study would compare trials that were measured differently."""
    followed = {key for key, traits in TRAITS.items() if traits.evaluation and traits.varies}
    assert followed == set(OF_EVALUATION.values())
    empty = flatten(Config().model_dump())
    assert {empty[own] for own in OF_EVALUATION} == {None}


class Silent(Section):
    bare: int = 1
    field: int = Field(1, description="one")
    nothing: int = setting(1, "one")
    some: int = setting(1, "one", resume=True, varies=False)


class Speaking(Section, resume=False, compared=True, varies=True, secret=False):
    bare: int = 1
    nothing: int = setting(1, "one")
    one: int = setting(1, "one", evaluation=True)
    other: int = setting(1, "one", evaluation=False, compared=False, secret=True)
    inner: Silent = Silent()


@pytest.mark.parametrize(
    ("section", "name", "told"),
    [
        (Silent, "bare", "Silent.bare: declare it as setting"),
        (Silent, "field", "Silent.field: declare it as setting"),
        (Silent, "nothing", "Silent.nothing: neither .* resume, compared, varies, secret, evaluation$"),
        (Silent, "some", "Silent.some: neither .* compared, secret, evaluation$"),
        (Speaking, "bare", "Speaking.bare: declare it as setting"),
        (Speaking, "nothing", "Speaking.nothing: neither it nor its section declares evaluation$"),
    ],
)
def test_a_setting_that_leaves_a_trait_open_is_refused(section: type[Section], name: str, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        section.traits_of(name)


def test_a_setting_wins_over_its_section() -> None:
    said = {"resume": False, "compared": True, "varies": True, "secret": False, "evaluation": True}
    assert Speaking.traits_of("one") == Traits(**said)
    assert Speaking.traits_of("other") == Traits(**said | {"evaluation": False, "compared": False, "secret": True})


def test_a_section_in_another_declares_for_itself() -> None:
    with pytest.raises(TypeError, match=r"Silent\.nothing"):
        type(Speaking().inner).traits_of("nothing")


def test_a_summary_names_whole_sections() -> None:
    assert summary(()) == ()
    assert summary(KEYS)[:4] == ("seed", "resume", "model.", "generation.")
    lora = {key for key in KEYS if key.startswith("model.lora.")}
    assert summary({"train.lr", *lora, "model.dtype"}) == ("model.dtype", "model.lora.", "train.lr")
    assert summary(lora - {"model.lora.rank"}) == ("model.lora.alpha", "model.lora.targets")


@pytest.mark.parametrize(
    ("cap", "words"),
    [
        (3.5, ("train.sampler_correction_cap=3.5", "train.importance_sampling_cap=3.5")),
        (None, ("train.sampler_correction_cap=null", "train.importance_sampling_mode=none")),
    ],
)
def test_a_run_of_an_earlier_version_goes_on_with_the_words_that_began_it(
    cap: float | None, words: tuple[str, ...]
) -> None:
    def changes(word: str) -> tuple[str, ...]:
        given = [f"resume={RUN_ID}", word]
        return resuming.changes(parse_arguments(given, "test", "a test"), {"train": {"sampler_correction_cap": cap}})

    for word in words:
        assert changes(word) == (f"resume={RUN_ID}",)
    with pytest.raises(ConfigError, match=r"train\.importance_sampling_(cap|mode) = .* cannot change on resume"):
        changes("train.sampler_correction_cap=4")


@pytest.mark.parametrize("key", [*KEYS, "tracking.unknown", "train.unknown", "model.device_map", "tracking", "train"])
def test_what_may_be_given_on_resume(key: str) -> None:
    value = RUN_ID if key == "resume" else "another"
    arguments = parse_arguments([f"resume={RUN_ID}", f"{key}={value}"], "test", "a test")
    if key.startswith(RESUME) and key != "model.device_map":
        assert f"{key}={value}" in resuming.changes(arguments, {})
    else:
        with pytest.raises(ConfigError, match=r"cannot change on resume; allowed: resume, .*, tracking\.\*$"):
            resuming.changes(arguments, {})
