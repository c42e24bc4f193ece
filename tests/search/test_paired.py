"""The paired pruner: its bound by hand, when it must not prune, and that two equal settings seldom part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow.search.paired import PairedPruner, rates_key

GOOD = [0.75, 0.5, 1.0, 0.75, 1.0, 0.5, 0.75, 1.0]
POOR = [0.25, 0.0, 0.25, 0.25, 0.5, 0.0, 0.0, 0.5]
Rates = Mapping[int, Sequence[float]]


def trial(rates: Rates, number: int = 9, state: TrialState = TrialState.RUNNING) -> FrozenTrial:
    """A trial with the given success rates at each step; its score is the last mean."""
    means = {step: float(np.mean(values)) for step, values in rates.items()}
    ended = state.is_finished()
    return FrozenTrial(
        number=number,
        trial_id=number,
        state=state,
        value=means[max(means)] if state == TrialState.COMPLETE else None,
        datetime_start=datetime.now(),
        datetime_complete=datetime.now() if ended else None,
        params={},
        distributions={},
        user_attrs={rates_key(step): list(values) for step, values in rates.items()},
        system_attrs={},
        intermediate_values=means,
    )


def study_of(*trials: FrozenTrial) -> optuna.Study:
    study = optuna.create_study(direction="maximize")
    for one in trials:
        study.add_trial(one)
    return study


def finished(rates: Rates) -> FrozenTrial:
    return trial(rates, 0, TrialState.COMPLETE)


def steps(*values: Sequence[float]) -> dict[int, Sequence[float]]:
    """Rates at the steps 10, 20, ..."""
    return {10 * place: rates for place, rates in enumerate(values, 1)}


def test_the_bound_by_hand() -> None:
    # d = -.5, -.3, -.4, -.2, -.6: mean -.4; squared deviations .01, .01, 0, .04, .04 add up to .1, so sd = sqrt(.1 / 4)
    # and the standard error is sqrt(.025 / 5) = .070711; Student's t has its 97.5% point for 4 degrees at 2.7764.
    # Of 4 looks, 2 are even; they share the error of 5%.
    bound = PairedPruner(looks=4, alpha=0.05).upper_bound([0.1, 0.3, 0.2, 0.6, 0.4], [0.6, 0.6, 0.6, 0.8, 1.0])
    assert bound == pytest.approx(-0.4 + 2.7764 * 0.0707107, abs=2e-3)


def test_the_bound_of_a_constant_difference_is_the_difference() -> None:
    bound = PairedPruner(looks=20).upper_bound([0.25, 0.5, 0.75, 0.0], [0.5, 0.75, 1.0, 0.25])
    assert bound == pytest.approx(-0.25)


def test_the_bound_does_not_see_how_hard_the_problems_are() -> None:
    rng = np.random.default_rng(0)
    hardness, luck = rng.uniform(0, 0.5, 64), rng.normal(0, 0.05, 64)
    pruner = PairedPruner(looks=5)
    plain = pruner.upper_bound((0.2 + luck).tolist(), [0.4] * 64)
    assert pruner.upper_bound((0.2 + luck + hardness).tolist(), (0.4 + hardness).tolist()) == pytest.approx(plain)


def test_more_looks_and_less_error_widen_the_bound() -> None:
    bounds = [
        PairedPruner(looks, alpha=alpha).upper_bound(POOR, GOOD)
        for looks, alpha in ((1, 0.2), (1, 0.05), (4, 0.05), (20, 0.05), (20, 0.01))
    ]
    assert bounds == sorted(bounds)
    assert len(set(bounds)) == len(bounds)


@pytest.mark.parametrize(("looks", "even"), [(2, 1), (3, 1), (5, 2), (10, 5)])
def test_the_error_is_shared_by_every_other_look(looks: int, even: int) -> None:
    shared = PairedPruner(looks, alpha=0.2).upper_bound(POOR, GOOD)
    assert shared == pytest.approx(PairedPruner(looks=1, alpha=0.2 / even).upper_bound(POOR, GOOD))


def keen(looks: int, margin: float = 0.0) -> PairedPruner:
    """A pruner that does not wait for slow starters."""
    return PairedPruner(looks, margin=margin, patience=0.0)


def test_a_clearly_worse_trial_is_pruned_from_its_third_evaluation() -> None:
    study = study_of(finished(steps(GOOD, GOOD, GOOD)))
    assert not keen(3).prune(study, trial(steps(POOR)))
    assert not keen(3).prune(study, trial(steps(POOR, POOR)))
    assert keen(3).prune(study, trial(steps(POOR, POOR, POOR)))
    assert keen(3).prune(study, trial(steps(GOOD, POOR, POOR)))


def flat(*rates: float) -> dict[int, Sequence[float]]:
    """The same rate of eight problems at each step."""
    return steps(*([rate] * 8 for rate in rates))


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED])
def test_it_must_miss_the_last_of_the_best_tenth(state: TrialState) -> None:
    first, second = (trial(flat(*[rate] * 3), number, TrialState.COMPLETE) for number, rate in ((0, 0.9), (1, 0.6)))
    weak = [trial(flat(0.1, 0.1, 0.1), number, state) for number in range(2, 10)]
    middling = trial(flat(0.6, 0.6, 0.6), 20)
    assert keen(3).prune(study_of(first, second, *weak[:-1]), middling)  # the tenth trial: the best one counts
    assert not keen(3).prune(study_of(first, second, *weak), middling)  # the eleventh: the best two
    assert PairedPruner(3, patience=0.0, top=0.05).prune(study_of(first, second, *weak), middling)
    assert keen(3).prune(study_of(first, second, *weak), trial(flat(0.5, 0.5, 0.5), 20))


def test_it_must_be_behind_the_incumbent_at_the_same_step() -> None:
    late = trial(flat(*[0.2] * 6, *[0.9] * 4), 0, TrialState.COMPLETE)
    other = trial(flat(*[0.8] * 10), 1, TrialState.COMPLETE)
    assert not keen(10).prune(study_of(late, other), trial(flat(*[0.2] * 6)))  # so was the incumbent
    assert keen(10).prune(study_of(late, other), trial(flat(*[0.2] * 8)))
    assert keen(10).prune(study_of(other), trial(flat(*[0.2] * 6)))


def test_a_flat_trial_is_given_until_its_patience_is_over() -> None:
    study = study_of(*(trial(flat(*[0.9] * 10), number, TrialState.COMPLETE) for number in (0, 1)))
    pruner = PairedPruner(10, patience=0.4)
    pruned = [pruner.prune(study, trial(flat(*[0.2] * looks))) for looks in range(1, 10)]
    assert pruned == [False] * 4 + [True] * 5


@pytest.mark.parametrize("moved", [(0.2, 0.4, 0.4, 0.4), (0.4, 0.2, 0.2, 0.2)])
def test_one_that_has_risen_and_stalled_or_has_fallen_is_not_waited_for(moved: tuple[float, ...]) -> None:
    study = study_of(*(trial(flat(*[0.9] * 10), number, TrialState.COMPLETE) for number in (0, 1)))
    assert PairedPruner(10, patience=0.4).prune(study, trial(flat(*moved)))


def test_a_rise_within_the_noise_is_none() -> None:
    study = study_of(*(trial(flat(*[0.9] * 10), number, TrialState.COMPLETE) for number in (0, 1)))
    luck = [0.2, 0.3, 0.1, 0.2, 0.4, 0.2, 0.1, 0.2]  # mean .2125
    noisy = trial(steps([0.2] * 8, luck, luck, luck))
    assert not PairedPruner(10, patience=0.4).prune(study, noisy)
    assert PairedPruner(10, patience=0.0).prune(study, noisy)


def test_a_slow_starter_overtakes() -> None:
    rng = np.random.default_rng(3)
    rivals = [
        trial(dict(enumerate(rng.binomial(8, 0.6, (20, 64)) / 8, 1)), number, TrialState.COMPLETE) for number in (0, 1)
    ]
    study = study_of(*rivals)
    chances = 0.2 + 0.6 / (1 + np.exp(-(np.arange(1, 21) - 8) / 1.6))
    rates = [(rng.binomial(8, chance, 64) / 8).tolist() for chance in chances]
    for looks in range(1, 20):
        assert not PairedPruner(20).prune(study, trial(dict(enumerate(rates[:looks], 1))))


@pytest.mark.parametrize("looks", [1, 2, 3, 4, 10])
def test_few_looks(looks: int) -> None:
    study = study_of(*(trial(flat(*[0.9] * looks), number, TrialState.COMPLETE) for number in (0, 1)))
    pruned = [PairedPruner(looks).prune(study, trial(flat(*[0.1] * seen))) for seen in range(1, looks)]
    assert any(pruned) == (looks >= 4)


def test_a_trial_that_rises_fast_enough_goes_on() -> None:
    study = study_of(finished(flat(*[0.9] * 10)))
    # Logits of .3, .35, .4: -.847, -.619, -.405. Slope .2136, .2209 on the mean: it lasts 2 * 3 * .967 = 5.80 of the 7
    # evaluations left. 1.5 * .2136 * 5.80 = 1.859 up from -.405 is a rate of .811; credit .411 + .17 * .7 = .530 > .5.
    assert not keen(10).prune(study, trial(flat(0.3, 0.35, 0.4)))
    # .2, .22, .24: slope .1130, lasts 5.80, .984 up from -1.153 is .458; .218 + .119 does not make up for .66.
    assert keen(10).prune(study, trial(flat(0.2, 0.22, 0.24)))


def test_a_rise_that_flattens_out_is_not_taken_to_go_on() -> None:
    study = study_of(finished(flat(*[0.9] * 10)))
    # The slope of .35 to .4 again, but 1.743 on the mean from .02: it lasts 6 * .1225 = .735, and the credit is .177.
    assert keen(10).prune(study, trial(flat(0.02, 0.35, 0.4)))


def test_a_fall_goes_on_in_part() -> None:
    study = study_of(finished(flat(*[0.9] * 9, 0.5)))
    falling = trial(flat(0.6, 0.55, 0.5))  # slope of the logit -.2007: a quarter of it, 7 times, is a rate of .413
    assert PairedPruner(10, patience=0.0, reserve=0.0).prune(study, falling)
    assert not PairedPruner(10, patience=0.0, reserve=0.0, fall=0.0).prune(study, falling)
    assert PairedPruner(10, patience=0.0, reserve=0.12).prune(study, falling)  # 0.7 of it is .084
    assert not PairedPruner(10, patience=0.0, reserve=0.13).prune(study, falling)


@pytest.mark.parametrize("rates", [[0.0] * 8, [1.0] * 8])
def test_rates_at_the_ends_have_no_slope(rates: list[float]) -> None:
    study = study_of(finished(flat(*[1.0] * 10)))
    assert keen(10).prune(study, trial(steps(*[rates] * 4))) == (rates[0] == 0)


@pytest.mark.parametrize("rates", [(POOR, GOOD), (GOOD, POOR), (POOR, POOR, GOOD), (POOR, GOOD, POOR)])
def test_one_fine_evaluation_of_the_last_two_spares_it(rates: tuple[Sequence[float], ...]) -> None:
    study = study_of(finished(steps(GOOD, GOOD, GOOD)))
    assert not keen(3).prune(study, trial(steps(*rates)))


def test_nothing_is_pruned_before_a_trial_has_finished() -> None:
    assert not keen(3).prune(study_of(), trial(steps(POOR, POOR, POOR)))


@pytest.mark.parametrize("state", [TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING])
def test_only_a_finished_trial_is_an_incumbent(state: TrialState) -> None:
    ended = trial(steps(GOOD, GOOD, GOOD), 0, state)
    assert not keen(3).prune(study_of(ended), trial(steps(POOR, POOR, POOR)))


@pytest.mark.parametrize("rates", [GOOD, POOR, [0.0] * 8, [1.0] * 8])
def test_the_equal_of_the_incumbent_goes_on(rates: list[float]) -> None:
    study = study_of(finished(steps(rates, rates, rates)))
    assert not keen(3).prune(study, trial(steps(rates, rates, rates)))


def test_a_better_trial_goes_on() -> None:
    study = study_of(finished(steps(POOR, POOR, POOR)))
    assert not keen(3).prune(study, trial(steps(GOOD, GOOD, GOOD)))


def test_worse_by_less_than_the_margin_goes_on() -> None:
    worse = [rate - 0.05 for rate in GOOD]
    study = study_of(finished(steps(GOOD, GOOD, GOOD)))
    assert not keen(3, margin=0.06).prune(study, trial(steps(worse, worse, worse)))
    assert keen(3, margin=0.04).prune(study, trial(steps(worse, worse, worse)))


def test_the_rival_is_the_best_finished_trial() -> None:
    weak = trial(steps(POOR, POOR, POOR), 0, TrialState.COMPLETE)
    strong = trial(steps(GOOD, GOOD, GOOD), 1, TrialState.COMPLETE)
    middling = trial(steps([0.5] * 8, [0.5] * 8, [0.5] * 8))
    assert not keen(3).prune(study_of(weak), middling)
    assert keen(3).prune(study_of(weak, strong), middling)
    assert keen(3).prune(study_of(strong, weak), middling)


def test_a_finished_trial_without_these_steps_is_no_incumbent() -> None:
    bare = trial(steps(GOOD, GOOD, GOOD), 1, TrialState.COMPLETE)
    bare.user_attrs = {}
    other = finished({5: GOOD, 15: GOOD, 25: GOOD})
    assert not keen(3).prune(study_of(bare, other), trial(steps(POOR, POOR, POOR)))


def test_rates_that_are_missing_are_passed_over() -> None:
    bare, full = (trial(steps(GOOD, GOOD, GOOD), number, TrialState.COMPLETE) for number in (0, 1))
    del bare.user_attrs[rates_key(20)], full.user_attrs[rates_key(10)]
    poor = trial(steps(POOR, POOR, POOR))
    assert keen(3).prune(study_of(bare, full), poor)  # `full` has what is asked of it
    assert not keen(3).prune(study_of(bare), poor)
    del poor.user_attrs[rates_key(20)]
    assert not keen(3).prune(study_of(bare, full), poor)  # two evaluations are left


def test_only_trials_over_the_same_problems_are_compared() -> None:
    """An earlier version counted problems that repeat, so its trials have more rates."""
    behind, twice = steps(POOR, POOR, POOR), finished(steps(*[[*GOOD, *GOOD]] * 4))
    assert not keen(4).prune(study_of(twice), trial(behind))
    assert keen(4).prune(study_of(twice, finished(steps(GOOD, GOOD, GOOD, GOOD))), trial(behind))
    assert not keen(4).prune(study_of(finished(steps(*[GOOD] * 4))), trial(steps(POOR, [*POOR, *POOR], POOR)))


def test_the_trial_is_compared_at_the_same_steps() -> None:
    late = finished(steps(POOR, POOR, POOR, GOOD, GOOD))
    assert not keen(5).prune(study_of(late), trial(steps(POOR, POOR, POOR)))
    assert keen(5).prune(study_of(late), trial(steps(POOR, POOR, POOR, POOR, POOR)))


def test_a_whole_study() -> None:
    study = optuna.create_study(direction="maximize", pruner=PairedPruner(looks=6))
    ended: dict[float, int] = {}
    for chance in (0.7, 0.75, 0.2, 0.9, 0.3):
        study.enqueue_trial({"chance": chance})

    def objective(trial: optuna.Trial) -> float:
        chance = trial.suggest_float("chance", 0, 1)
        rng = np.random.default_rng([7, trial.number])
        for step in range(1, 7):
            rates = rng.binomial(8, chance, 64) / 8
            trial.set_user_attr(rates_key(step), rates.tolist())
            trial.report(float(rates.mean()), step)
            ended[chance] = step
            if trial.should_prune():
                raise optuna.TrialPruned
        return float(rates.mean())

    study.optimize(objective, n_trials=5)
    states = [one.state for one in study.trials]
    complete, pruned = TrialState.COMPLETE, TrialState.PRUNED
    assert states == [complete, complete, pruned, complete, pruned]
    assert ended == {0.7: 6, 0.75: 6, 0.2: 3, 0.9: 6, 0.3: 3}
    assert study.trials[0].distributions == {"chance": FloatDistribution(0, 1)}


def test_of_two_equal_settings_one_is_seldom_pruned() -> None:
    """Without a margin, which only helps; 20 looks at 64 problems x 8 replicates, independent draws."""
    looks, problems, replicates, studies = 20, 64, 8, 400
    pruner, rng, pruned = keen(looks), np.random.default_rng(1), 0
    for _ in range(studies):
        chances = rng.beta(1.0, 1.0, problems)
        first, second = rng.binomial(replicates, chances, (2, looks, problems)) / replicates
        study = study_of(finished(dict(enumerate(first))))
        pruned += any(
            pruner.prune(study, trial({step: second[step] for step in range(look + 1)})) for look in range(2, looks)
        )
    assert pruned / studies <= 0.05


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("alpha", 0.0, "above 0 and below 1"),
        ("alpha", 1.0, "above 0 and below 1"),
        ("top", 1.5, "0 to 1"),
        ("patience", -0.1, "0 to 1"),
        ("margin", -0.01, "0 or more"),
        ("doubt", math.nan, "0 or more"),
        ("gain", math.inf, "0 or more"),
        ("reserve", 2.0, "0 to 1"),
    ],
)
def test_an_option_outside_its_range_is_refused(option: str, value: float, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option} = {value}; allowed: {allowed}$"):
        PairedPruner(4, **{option: value})
