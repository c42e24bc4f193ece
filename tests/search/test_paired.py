"""The paired pruner: its bound by hand, its error on equals by simulation, and when it must not prune."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow.search import decay
from grpo_mlflow.search.paired import UNTRAINED, PairedPruner, rates_key

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
    bound = PairedPruner(4, alpha=0.05).upper_bound([0.1, 0.3, 0.2, 0.6, 0.4], [0.6, 0.6, 0.6, 0.8, 1.0], 2)
    assert bound == pytest.approx(-0.4 + 2.7764 * 0.0707107, abs=2e-3)


def test_the_bound_of_a_constant_difference_is_the_difference() -> None:
    bound = PairedPruner(20).upper_bound([0.25, 0.5, 0.75, 0.0], [0.5, 0.75, 1.0, 0.25], 10)
    assert bound == pytest.approx(-0.25)


def test_the_bound_does_not_see_how_hard_the_problems_are() -> None:
    rng = np.random.default_rng(0)
    hardness, luck = rng.uniform(0, 0.5, 64), rng.normal(0, 0.05, 64)
    pruner = PairedPruner(5)
    plain = pruner.upper_bound((0.2 + luck).tolist(), [0.4] * 64, 2)
    assert pruner.upper_bound((0.2 + luck + hardness).tolist(), (0.4 + hardness).tolist(), 2) == pytest.approx(plain)


def test_more_tests_and_less_error_widen_the_bound() -> None:
    bounds = [
        PairedPruner(20, alpha=alpha).upper_bound(POOR, GOOD, tests)
        for tests, alpha in ((1, 0.2), (1, 0.05), (4, 0.05), (20, 0.05), (20, 0.01))
    ]
    assert bounds == sorted(bounds)
    assert len(set(bounds)) == len(bounds)


@pytest.mark.parametrize("tests", [1, 2, 5])
def test_tests_share_the_error_alike(tests: int) -> None:
    shared = PairedPruner(20, alpha=0.2).upper_bound(POOR, GOOD, tests)
    assert shared == pytest.approx(PairedPruner(20, alpha=0.2 / tests).upper_bound(POOR, GOOD, 1))


def keen(looks: int, margin: float = 0.0) -> PairedPruner:
    """A pruner that does not wait for flat trials."""
    return PairedPruner(looks, margin=margin, precedents=0)


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
    assert PairedPruner(3, precedents=0, top=0.05).prune(study_of(first, second, *weak), middling)
    assert keen(3).prune(study_of(first, second, *weak), trial(flat(0.5, 0.5, 0.5), 20))


def test_it_must_be_behind_the_incumbent_at_the_same_step() -> None:
    late = trial(flat(*[0.2] * 6, *[0.9] * 4), 0, TrialState.COMPLETE)
    other = trial(flat(*[0.8] * 10), 1, TrialState.COMPLETE)
    assert not keen(10).prune(study_of(late, other), trial(flat(*[0.2] * 6)))  # so was the incumbent
    assert keen(10).prune(study_of(late, other), trial(flat(*[0.2] * 8)))
    assert keen(10).prune(study_of(other), trial(flat(*[0.2] * 6)))


def test_one_that_has_risen_and_stalled_is_not_waited_for() -> None:
    study = study_of(*(trial(flat(*[0.9] * 10), number, TrialState.COMPLETE) for number in (0, 1)))
    assert PairedPruner(10).prune(study, trial(flat(0.2, 0.4, 0.4, 0.4)))


@pytest.mark.parametrize(("rate", "is_flat"), [(0.3, True), (0.325, False)])
def test_a_rise_within_the_noise_counts_from_a_share_of_the_way_to_the_contender(rate: float, is_flat: bool) -> None:
    study = study_of(finished(flat(*[0.9] * 10)))  # .16 of the way from .2 to .9 is .312
    spread = [rate + 0.3, rate - 0.3] * 4  # standard error .11
    assert PairedPruner(10, precedents=1).prune(study, trial(steps([0.2] * 8, *[spread] * 4))) != is_flat


def stayed(number: int) -> FrozenTrial:
    return trial(flat(*[0.2] * 10), number, TrialState.COMPLETE)


def test_a_flat_trial_needs_four_that_stayed_flat() -> None:
    good, late = trial(flat(*[0.9] * 10), 0, TrialState.COMPLETE), flat(*[0.2] * 8, 0.5, 0.5)
    flat_one, others = trial(flat(*[0.2] * 6), 9), [stayed(number) for number in range(1, 5)]
    assert not PairedPruner(10).prune(study_of(good, *others[:3]), flat_one)
    assert PairedPruner(10).prune(study_of(good, *others), flat_one)
    rose = trial(late, 5, TrialState.COMPLETE)
    assert not PairedPruner(10).prune(study_of(good, *others, rose), flat_one)
    # Of those that rose, none was still flat at the ninth and tenth evaluation.
    assert PairedPruner(10).prune(study_of(good, *others, rose), trial(flat(*[0.2] * 10), 9))


def test_the_start_is_the_untrained_model_and_not_a_trial_that_collapsed() -> None:
    good, collapsed = finished(flat(*[0.9] * 10)), trial(flat(*[0.0] * 10), 1, TrialState.COMPLETE)
    flat_one = trial(flat(*[0.2] * 6))
    assert PairedPruner(10).prune(study_of(good, collapsed), flat_one)  # .2 of .9 would be a rise
    flat_one.user_attrs[UNTRAINED] = [0.2] * 8
    assert not PairedPruner(10).prune(study_of(good, collapsed), flat_one)
    flat_one.user_attrs[UNTRAINED] = [0.2] * 16  # of an earlier version, with problems that repeat
    assert PairedPruner(10).prune(study_of(good, collapsed), flat_one)


def test_one_that_was_pruned_is_no_precedent() -> None:
    good = trial(flat(*[0.9] * 10), 0, TrialState.COMPLETE)
    ended = [trial(flat(*[0.2] * 6), number, TrialState.PRUNED) for number in (1, 2, 3)]
    assert not PairedPruner(10).prune(study_of(good, *ended), trial(flat(*[0.2] * 6), 9))


def test_one_that_stays_within_the_noise_is_flat() -> None:
    study = study_of(*(trial(flat(*[0.9] * 10), number, TrialState.COMPLETE) for number in (0, 1)))
    luck = [0.2, 0.3, 0.1, 0.2, 0.4, 0.2, 0.1, 0.2]  # mean .2125
    noisy = trial(steps([0.2] * 8, luck, luck, luck))
    assert not PairedPruner(10).prune(study, noisy)
    assert PairedPruner(10, precedents=0).prune(study, noisy)


def from_untrained(rates: Rates, untrained: Sequence[float]) -> FrozenTrial:
    """A running trial that keeps what the untrained model had."""
    running = trial(rates)
    running.user_attrs[UNTRAINED] = list(untrained)
    return running


@pytest.mark.parametrize(
    ("means", "latest"),
    [((0.41, 0.14, 0.22, 0.28, 0.28, 0.32, 0.28, 0.38), 5), ((0.45, 0.33, 0.32, 0.18, 0.09, 0.06, 0.02, 0.0), 3)],
)
def test_one_that_collapsed_ends_without_precedents(means: Sequence[float], latest: int) -> None:
    rng = np.random.default_rng(1)
    good, untrained = finished(steps(*[[0.9] * 64] * 8)), (rng.binomial(8, 0.5, 64) / 8).tolist()
    curve = [(rng.binomial(8, mean, 64) / 8).tolist() for mean in means]
    pruner, study = PairedPruner(8), study_of(good)
    pruned = [look for look in range(1, 8) if pruner.prune(study, from_untrained(steps(*curve[:look]), untrained))]
    assert pruned
    assert pruned[0] <= latest


def test_one_that_climbs_out_of_a_dip_goes_on() -> None:
    study = study_of(finished(flat(*[0.75] * 8)))
    dip = flat(0.3, 0.15, 0.25, 0.35)  # from there on as steeply: to a logit of -.52 + 4 * .40, a rate of .75
    assert not PairedPruner(8).prune(study, from_untrained(dip, [0.4] * 8))
    assert PairedPruner(8).prune(study, from_untrained(flat(0.3, 0.15, 0.15, 0.15), [0.4] * 8))


@pytest.mark.parametrize(("spread", "last", "is_flat"), [(0, 0.2, False), (0.2, 0.2, True), (0, 0.4, True)])
def test_it_has_fallen_if_below_the_untrained_model_beyond_the_noise_twice(
    spread: float, last: float, is_flat: bool
) -> None:
    low = [0.2 + spread, 0.2 - spread] * 4  # with a spread of .2, the standard error is .08
    rates = steps([0.4] * 8, low, low, low if last == 0.2 else [last] * 8)
    study = study_of(finished(flat(*[0.9] * 10)))
    assert PairedPruner(10).prune(study, from_untrained(rates, [0.4] * 8)) != is_flat


def test_what_fallen_trials_gained_late_is_credited_to_fallen_ones() -> None:
    contender, fallen = trial(flat(*[0.65] * 10), 0, TrialState.COMPLETE), from_untrained(flat(*[0.2] * 6), [0.4] * 8)
    late = trial(flat(*[0.2] * 6, 0.4, 0.6, 0.9, 0.9), 1, TrialState.COMPLETE)
    pruner = PairedPruner(10, top=1.0)
    assert pruner.prune(study_of(contender), fallen)  # a gain of .08 * .4
    # The other came from -1.19 to 1.78: seven tenths of that are a rate of .709, a gain of .476 + .032.
    assert not pruner.prune(study_of(contender, late), fallen)


def test_a_fallen_trial_is_no_precedent_of_a_flat_one() -> None:
    good, flat_one = trial(flat(*[0.9] * 10), 0, TrialState.COMPLETE), from_untrained(flat(*[0.2] * 6), [0.2] * 8)
    others = [stayed(number) for number in range(1, 4)]
    fallen = trial(flat(*[0.1] * 10), 4, TrialState.COMPLETE)
    assert not PairedPruner(10).prune(study_of(good, *others, fallen), flat_one)
    assert PairedPruner(10).prune(study_of(good, *others, stayed(4)), flat_one)


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
    pruned = [PairedPruner(looks, precedents=0).prune(study, trial(flat(*[0.1] * seen))) for seen in range(1, looks)]
    assert any(pruned) == (looks >= 4)


def test_a_trial_that_may_reach_the_contender_goes_on() -> None:
    study = study_of(finished(flat(*[0.6] * 10)))
    assert not keen(10).prune(study, trial(flat(0.3, 0.35, 0.4)))  # .4 and a gain of .270 (test_forecast.py)
    assert keen(10).prune(study, trial(flat(0.2, 0.22, 0.24)))  # .24 and .092 + .056


def test_what_another_trial_gained_late_is_credited() -> None:
    contender = trial(flat(*[0.44] * 10), 0, TrialState.COMPLETE)
    late = trial(flat(0.2, *[0.3] * 7, 0.5, 0.5), 1, TrialState.COMPLETE)
    stalled = trial(flat(0.2, *[0.3] * 5))
    pruner = PairedPruner(10, top=1.0)
    assert pruner.prune(study_of(contender), stalled)  # a gain of .08 * .4 < .14
    # Both stood at -.7436 and had not risen since the middle. The other came to 0: seven tenths of that are a rate of
    # .444, a gain of .121 + .032.
    assert not pruner.prune(study_of(contender, late), stalled)


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
    study = optuna.create_study(direction="maximize", pruner=PairedPruner(6, precedents=0))
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


@pytest.mark.parametrize("equals", [1, 2])
def test_the_error_of_a_whole_trial_is_what_is_asked_for(equals: int) -> None:
    """The second of two models with the same chances, and luck that stays: the same answers at all three looks.

    Nothing but the test stands between it and its end: at the last look there is nothing to gain. With two equals, the
    better of which is the contender, it has to beat one of them at least; each test has half of the error.
    """
    pruner = PairedPruner(3, alpha=0.2, top=1.0, doubt=0.0, precedents=0)
    rng, studies, pruned = np.random.default_rng(2), 400, 0
    for _ in range(studies):
        answers = rng.binomial(8, rng.beta(1.0, 1.0, 32), (equals + 1, 32)) / 8
        *others, own = (dict.fromkeys((1, 2, 3), rates) for rates in answers)
        ended = [trial(rates, number, TrialState.COMPLETE) for number, rates in enumerate(others)]
        pruned += pruner.prune(study_of(*ended), trial(own))
    noise = 3 * math.sqrt(0.2 * 0.8 / studies)
    assert pruned / studies <= 0.2 + noise
    if equals == 1:  # a single test: its error is used up
        assert pruned / studies >= 0.2 - noise


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
        ("margin", -0.01, "0 or more"),
        ("doubt", math.nan, "0 or more"),
        ("doubt", math.inf, "0 or more"),
        ("precedents", -1, "0 or more"),
        ("share", 1.5, "0 to 1"),
        ("jump", -0.5, "0 to 1"),
    ],
)
def test_an_option_outside_its_range_is_refused(option: str, value: float, allowed: str) -> None:
    build: Callable[..., PairedPruner] = PairedPruner
    with pytest.raises(ValueError, match=rf"^{option} = {value}; allowed: {allowed}$"):
        build(4, **{option: value})


def test_the_order_of_the_problems_changes_nothing() -> None:
    rng = np.random.default_rng(5)
    chances = np.concatenate([np.linspace(0.3, 0.8, 20)[None, :], rng.uniform(0.2, 0.7, (5, 1)) * np.ones(20)])
    rates = rng.binomial(4, chances[:, :, None], (6, 20, 32)) / 4

    def decisions(rates: np.ndarray) -> list[bool]:
        done = [
            trial(dict(enumerate(one.tolist(), 1)), number, TrialState.COMPLETE) for number, one in enumerate(rates[:3])
        ]
        cut = [trial(dict(enumerate(one[:look].tolist(), 1)), 9) for one in rates[3:] for look in range(3, 20)]
        return [keen(20).prune(study_of(*done), one) for one in cut]

    plain = decisions(rates)
    assert any(plain)
    assert not all(plain)
    assert decisions(rates[:, :, rng.permutation(32)]) == plain


def power_law(end: float, exponent: float) -> dict[int, Sequence[float]]:
    """Twenty evaluations of eight problems, whose skill rises from -1.2 to `end` as t^exponent, without noise."""
    t = np.arange(1, 21) / 20
    rates = 1 / (1 + np.exp(-(-1.2 + (end + 1.2) * t**exponent)))
    return {step: [float(rate)] * 8 for step, rate in enumerate(rates, 1)}


@pytest.mark.parametrize("exponent", [0.3, 0.5, 0.8, 1.0])
def test_the_best_of_crossing_curves_is_never_pruned(exponent: float) -> None:
    """Who starts slowly ends higher. The last of the others has the start in sight."""
    others = [
        trial(power_law(end, exponent), number, TrialState.COMPLETE)
        for number, (end, exponent) in enumerate([(0.8, 0.15), (0.3, 0.2), (-0.9, 1.0)])
    ]
    best, poor = power_law(1.0, exponent), power_law(-0.3, 0.2)
    for looks in range(1, 20):
        assert not PairedPruner(20).prune(study_of(*others), trial({step: best[step] for step in range(1, looks + 1)}))
    assert PairedPruner(20).prune(study_of(*others), trial({step: poor[step] for step in range(1, 16)}))


def test_behind_any_of_the_best_is_behind() -> None:
    late = trial(flat(*[0.2] * 6, *[0.9] * 4), 0, TrialState.COMPLETE)
    early = trial(flat(*[0.8] * 10), 1, TrialState.COMPLETE)
    others = [trial(flat(*[0.5] * 10), number, TrialState.PRUNED) for number in range(2, 11)]
    assert keen(10).prune(study_of(late, early, *others), trial(flat(0.2, *[0.4] * 5), 20))
    assert not keen(10).prune(study_of(late, *others), trial(flat(0.2, *[0.4] * 5), 20))


def test_it_waits_for_the_decay_of_the_trial_at_hand() -> None:
    pruner = PairedPruner(10, precedents=0)
    study = study_of(finished(flat(*[0.9] * 10)))
    pruned = {}
    for decays in (False, True):
        cut = [trial(flat(*[0.2] * looks)) for looks in range(1, 10)]
        for one in cut:
            one.user_attrs[decay.KEY] = [1 - look / 10 for look in range(10)] if decays else [1.0] * 10
        pruned[decays] = [pruner.prune(study, one) for one in cut]
    assert pruned == {False: [False] * 2 + [True] * 7, True: [False] * 7 + [True] * 2}


def test_a_trial_has_as_many_looks_as_its_learning_rates() -> None:
    study = study_of(finished(flat(*[0.6] * 100)))
    short, long = trial(flat(0.2, 0.3, 0.4, 0.4)), trial(flat(0.2, 0.3, 0.4, 0.4))
    long.user_attrs[decay.KEY] = [1.0] * 100
    assert keen(5).prune(study, short)
    assert not keen(5).prune(study, long)  # it has the time to come to .6


def test_by_the_best_evaluation_a_past_peak_counts() -> None:
    study = study_of(finished(flat(*[0.6] * 10)))
    fallen = trial(flat(0.2, 0.7, 0.4, 0.4, 0.4, 0.4))
    assert PairedPruner(10).prune(study, fallen)
    assert not PairedPruner(10, objective="best").prune(study, fallen)


def test_by_the_mean_of_the_last_the_contender_is_judged_by_it() -> None:
    done = trial(flat(*[0.6] * 8, 0.1, 0.1), 0, TrialState.COMPLETE)
    done.value = 0.475  # of the last four: .6, .6, .1, .1 is .35
    stalled = trial(flat(0.1, *[0.25] * 6))
    assert not keen(10).prune(study_of(done), stalled)
    assert PairedPruner(10, objective="mean", objective_window=4, precedents=0).prune(study_of(done), stalled)
