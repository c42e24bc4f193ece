"""The laws of every loss, those of the table and the example of docs/methods.md; and what is refused of one's own."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from grpo_mlflow import runs
from grpo_mlflow.algorithm.correction import SUMS, Measures
from grpo_mlflow.algorithm.losses import LossInputs, LossParts
from grpo_mlflow.algorithm.names import LOSSES
from grpo_mlflow.config import TrainConfig, resolve
from grpo_mlflow.errors import ConfigError, UserError
from grpo_mlflow.training.loss import Loss, load
from grpo_mlflow.training.totals import Totals
from tests.support.groups import ALL_TERMS, fresh, make_groups
from tests.support.paths import ROOT
from tests.support.small_runs import SMALL
from tests.support.updates import gradient, learner, measured

EXAMPLE = "python:sapo:sapo"
EVERY_LOSS = pytest.mark.parametrize("name", [*LOSSES, EXAMPLE])
KL = 0.3


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "docs"))


def made(name: str) -> Loss:
    return load(TrainConfig(loss=name, kl_coef=KL, entropy_coef=0.05))


def inputs() -> LossInputs:
    """Two rollouts of three and two tokens, some of them outside the clipping bounds."""

    def tensor(rows: list[Any]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    policy = tensor([[-1.0, -0.5, -2.0], [-0.1, -1.5, -0.7]])
    old = policy - tensor([[0.5, 1.0, 1.6], [0.5, 1.1, 1.6]]).log()
    return LossInputs(
        policy=policy.requires_grad_(),
        old=old,
        behaviour=old - tensor([[0.0, 0.3, 2.0], [-0.4, 0.1, 0.2]]),
        correction=tensor([[1.0, 1.3, 2.0], [0.7, 0.0, 1.2]]),
        reference=policy.detach() - tensor([[0.2, -0.5, 1.0], [0.0, 0.7, 0.1]]),
        entropy=tensor([[1.0, 0.4, 1.2], [0.3, 2.0, 0.9]]).requires_grad_(),
        mask=tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]),
        advantages=tensor([2.0, -1.0]),
        weights=tensor([1 / 6, 1 / 4]),
    )


def changed(given: LossInputs, change: Callable[[str, Tensor], Tensor]) -> LossInputs:
    """Return the inputs with `change(name, tensor)` for each, the gradients cut."""
    found = {field.name: change(field.name, getattr(given, field.name).detach()) for field in fields(given)}
    found |= {name: found[name].requires_grad_() for name in ("policy", "entropy")}
    return LossInputs(**found)


def total(parts: LossParts) -> Tensor:
    return torch.stack(list(parts.terms.values())).sum()


def slopes(loss: Loss, given: LossInputs) -> list[Tensor]:
    found = torch.autograd.grad(total(loss(given, KL)), [given.policy, given.entropy], allow_unused=True)
    return [torch.zeros_like(given.policy) if each is None else each for each in found]


def values(parts: LossParts) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in {**parts.terms, **parts.sums}.items()}


@EVERY_LOSS
def test_a_loss_is_the_sum_over_its_rollouts(name: str) -> None:
    loss, whole = made(name), inputs()
    alone = [changed(whole, lambda _, value, i=i: value[i : i + 1]) for i in range(2)]  # type: ignore[misc]
    parts = [values(loss(each, KL)) for each in alone]
    assert {key: parts[0][key] + parts[1][key] for key in parts[0]} == pytest.approx(values(loss(whole, KL)))
    for place, expected in enumerate(slopes(loss, whole)):
        torch.testing.assert_close(torch.cat([slopes(loss, each)[place] for each in alone]), expected)
        assert place == 1 or expected.norm() > 0.1


@EVERY_LOSS
@pytest.mark.parametrize("junk", [-3.0, 7.0])
def test_a_loss_ignores_what_stands_in_the_padding(name: str, junk: float) -> None:
    loss, given = made(name), inputs()

    def padded(field: str, value: Tensor) -> Tensor:
        if value.ndim == 1:
            return value
        filled = value if field == "mask" else value.masked_fill(given.mask == 0, junk)
        return torch.nn.functional.pad(filled, (0, 2), value=0.0 if field == "mask" else junk)

    wide = changed(given, padded)
    assert values(loss(wide, KL)) == pytest.approx(values(loss(given, KL)))
    for found, expected in zip(slopes(loss, wide), slopes(loss, given), strict=True):
        torch.testing.assert_close(found[:, :3], expected)
        assert not found[wide.mask == 0].any()


@EVERY_LOSS
def test_without_weights_a_loss_is_exactly_zero(name: str) -> None:
    loss, given = made(name), replace(inputs(), weights=torch.zeros(2, dtype=torch.float64))
    assert {float(term.detach()) for term in loss(given, KL).terms.values()} == {0.0}
    assert not any(each.any() for each in slopes(loss, given))


@EVERY_LOSS
def test_the_gradient_of_a_loss_is_that_of_finite_differences(name: str) -> None:
    loss, given = made(name), inputs()

    def at(policy: Tensor, entropy: Tensor) -> Tensor:
        return total(loss(replace(given, policy=policy, entropy=entropy), KL)) + 0.0 * entropy.sum()

    assert torch.autograd.gradcheck(at, (given.policy, given.entropy), eps=1e-6, atol=1e-7)


@EVERY_LOSS
def test_the_gradient_of_a_step_ignores_micro_batches_padding_and_order(name: str) -> None:
    groups = make_groups(6, flat=(1, 4))
    expected = gradient(groups, batch_size=100, loss=name, **ALL_TERMS)
    assert expected.norm() > 0.01
    shuffled = random.Random(5).sample(groups, len(groups))
    for size in (1, 5):
        torch.testing.assert_close(
            gradient(shuffled, batch_size=size, loss=name, **ALL_TERMS), expected, atol=1e-6, rtol=0
        )


@EVERY_LOSS
def test_flat_groups_have_no_gradient_and_count_in_the_denominator(name: str) -> None:
    groups = make_groups(3, flat=(0,))
    assert not gradient(make_groups(3, flat=(0, 1, 2)), loss=name, **ALL_TERMS).any()
    without, found = (gradient(some, loss=name, **ALL_TERMS) for some in (groups[1:], groups))
    torch.testing.assert_close(found * 3 / 2, without, atol=1e-6, rtol=0)


def test_the_gradient_of_the_example_at_ratio_1_is_that_of_grpo() -> None:
    groups = make_groups(4)
    torch.testing.assert_close(gradient(groups, loss=EXAMPLE), gradient(groups), atol=1e-6, rtol=0)


def test_an_own_loss_gets_the_settings_that_it_names_and_the_kl_coefficient_as_it_moves(tmp_path: Path) -> None:
    (tmp_path / "seen.py").write_text(
        "from grpo_mlflow.algorithm.losses import LossParts, kl_terms\n"
        "SEEN = []\n"
        "def loss(inputs, clip_low, *, kl_coef, factor: float = 1.0):\n"
        "    SEEN.append((clip_low, round(kl_coef, 6), factor))\n"
        "    kl = kl_terms(inputs.policy, inputs.reference, 'k3')\n"
        "    terms = {'loss_kl': kl_coef * inputs.weighted_sum(kl)}\n"
        "    return LossParts(terms, {'kl_divergence': inputs.token_sum(kl)})\n"
    )
    settings = {"loss": "python:seen:loss", "loss_options": {"factor": 3}, "clip_low": 0.1, "kl_coef": 0.1}
    own = learner(fresh(), 16, fresh(seed=9), kl_target=1e-4, kl_horizon=1.0, **settings)
    import seen  # type: ignore[import-not-found]

    seen.SEEN.clear()
    flat = own.update(make_groups(4, flat=(0, 1, 2, 3)), 0, 0)  # a step without signal has a reference, too
    assert (flat["loss_kl"], flat["kl_divergence"]) == (0, None)
    metrics = measured(own, make_groups(4), iteration=1)
    assert metrics["kl_divergence"] > 0
    assert metrics["loss_total"] == metrics["loss_kl"] == pytest.approx(0.1 * metrics["kl_divergence"], rel=0.5)
    own.update(make_groups(4), 0, 2)
    assert sorted(set(seen.SEEN)) == [(0.1, 0.1, 3), (0.1, 0.12, 3)]
    assert not metrics.keys() & {"loss_pg", "ratio_mean"}


def test_the_example_trains(store: str) -> None:
    words = [*SMALL, f"tracking.uri={store}", f"train.loss={EXAMPLE}", "train.loss_options={tau_negative: 2.0}"]
    finished = runs.train(resolve("tiny", [*words, "train.iterations=2", "train.kl_coef=0", "train.kl_target=null"]))
    metrics = mlflow.MlflowClient(store).get_run(finished.run_id).data.metrics
    assert metrics["train/loss_total"] == metrics["train/loss_pg"]
    assert metrics["train/ratio_mean"] == pytest.approx(1.0, abs=0.2)
    assert metrics["train/gate_slope"] == pytest.approx(1.0, abs=0.1)  # 4 s (1 - s), near the ratio 1
    assert not metrics.keys() & {"train/loss_kl", "train/entropy_mean", "train/clip_low_frac"}
    assert math.isfinite(metrics["train/grad_norm"])


def test_the_page_shows_the_file() -> None:
    lines = [f"    {line}".rstrip() for line in (ROOT / "docs/sapo.py").read_text().splitlines()]
    assert "\n".join(lines) in (ROOT / "docs/methods.md").read_text()


def test_names_that_change_under_way_are_refused() -> None:
    totals, one, mask = Totals(torch.device("cpu")), torch.ones(()), torch.ones(1, 1)
    totals.add(LossParts({"loss_a": one}, {"b": one}), mask, None)
    with pytest.raises(UserError, match=r"sums are \['c'\] after \['b'\]"):
        totals.add(LossParts({"loss_a": one}, {"c": one}), mask, None)


def test_the_metrics_are_means_and_what_the_summary_makes_of_them() -> None:
    accelerator = Accelerator(cpu=True)
    totals, two, mask = Totals(accelerator.device), torch.tensor(2.0), torch.ones(1, 4)
    for largest in (3.0, None, 2.0):
        parts = LossParts({"loss_a": two}, {"b": two}, lambda means: {"root": means["b"] ** 0.5})
        logs = None if largest is None else torch.tensor([largest, -largest])
        totals.add(parts, mask, None if logs is None else Measures(torch.ones(len(SUMS)), logs))
    metrics = totals.means(accelerator, steps=2)
    assert (metrics["loss_a"], metrics["loss_total"], metrics["tokens_trained"]) == (2.0, 2.0, 8.0)
    assert metrics["root"] == 0.5**0.5
    assert metrics["sampler_kl"] == 2 / 8
    assert (metrics["sampler_ratio_max"], metrics["sampler_ratio_min"]) == (math.exp(3.0), math.exp(2.0))
    assert "b" not in metrics


HEAD = "import torch\nfrom grpo_mlflow.algorithm.losses import LossParts\n"
PG = "inputs.weighted_sum(-inputs.policy * inputs.advantages[:, None])"


def returning(text: str) -> str:
    return f"{HEAD}def f(inputs):\n    return {text}\n"


@pytest.mark.parametrize(
    ("source", "options", "fragments"),
    [
        ("1 / 0", {}, ["train.loss = 'python:mine:f': mine cannot be imported: ZeroDivisionError"]),
        ("def f(:", {}, ["mine cannot be imported", "SyntaxError"]),
        ("g = 1", {}, ["mine has no function f; allowed: the name of a function in it"]),
        ("class f: pass", {}, ["mine has no function f"]),
        ("def f(): pass", {}, ["takes other arguments; allowed: a function of (inputs, *, option=default, ...)"]),
        ("def f(*, inputs): pass", {}, ["takes other arguments"]),
        ("def f(inputs, *others): pass", {}, ["takes other arguments"]),
        ("def f(inputs, **others): pass", {}, ["takes other arguments"]),
        ("def f(inputs): pass", {"tau": 1}, ["train.loss_options = {'tau': 1}", "no option tau; allowed: none"]),
        ("def f(inputs, b=1, *, a=1): pass", {"tau": 1}, ["no option tau; allowed: b, a"]),
        (
            "def f(inputs, *, tau): pass",
            {},
            ["train.loss_options = {}: python:mine:f needs tau; allowed: '{tau: VALUE}'"],
        ),
        ("def f(inputs, *, tau: float = 1.0): pass", {"tau": "x"}, ["tau: input should be a valid number"]),
        ("def f(inputs, *, sampler_correction_cap=2): pass", {}, ["no setting any more", "inputs.correction"]),
        ("def f(inputs, *, lr): pass", {"lr": 1}, ["lr is a setting of its own; allowed: train.lr"]),
        ("import torch\ndef f(inputs, *, t: torch.Tensor = 0): pass", {"t": 1}, ["t: of type", "cannot have"]),
        ("def f(inputs): raise KeyError('lost')", {}, ["fails on an example: KeyError: 'lost'"]),
        ("def f(inputs): return inputs.policy.sum()", {}, ["returns Tensor; allowed: LossParts"]),
        (returning("LossParts({}, {})"), {}, ["its terms are []; allowed: one or more, named loss_..."]),
        (returning(f"LossParts({{'pg': {PG}}}, {{}})"), {}, ["its terms are ['pg']"]),
        (returning("LossParts({'loss_pg': inputs.policy}, {})"), {}, ["loss_pg is a tensor of shape (2, 3)"]),
        (returning(f"LossParts({{'loss_pg': {PG}}}, {{'a': 1.0}})"), {}, ["a is float; allowed: a scalar tensor"]),
        (returning(f"LossParts({{'loss_pg': {PG} / 0}}, {{}})"), {}, ["loss_pg is", "inf", "allowed: finite numbers"]),
        (returning(f"LossParts({{'loss_pg': {PG}.detach()}}, {{}})"), {}, ["no term has a gradient"]),
        (returning("LossParts({'loss_pg': inputs.policy.mean()}, {})"), {}, ["is not 0 where all weights are 0"]),
        (
            returning(f"LossParts({{'loss_pg': {PG}}}, {{}}, lambda means: {{'a': means['b']}})"),
            {},
            ["its summary fails where each mean is 0.5: KeyError: 'b'"],
        ),
        (
            returning(f"LossParts({{'loss_pg': {PG}}}, {{'b': inputs.mask.sum()}}, lambda m: {{'a': int(m['b'])}})"),
            {},
            ["its summary fails where each mean is nan: ValueError"],
        ),
        (
            returning(f"LossParts({{'loss_pg': {PG}}}, {{}}, lambda means: 1.0)"),
            {},
            ["its summary returns 1.0; allowed: a dict of names to numbers"],
        ),
    ],
)
def test_what_is_refused_is_one_line(
    source: str, options: dict[str, Any], fragments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig(loss="python:mine:f", loss_options=options))
    assert "\n" not in str(caught.value)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []


def test_an_unknown_loss_is_refused_by_the_schema() -> None:
    allowed = " or ".join([*map(repr, LOSSES), "python:MODULE:FUNCTION"])
    with pytest.raises(ConfigError, match=rf"train\.loss = 'ppo' .*: input should be {allowed}"):
        resolve("tiny", ["train.loss=ppo"])
    with pytest.raises(ConfigError, match=r"clip_low is a setting of its own; allowed: train\.clip_low"):
        load(TrainConfig(loss_options={"clip_low": 0.1}))
