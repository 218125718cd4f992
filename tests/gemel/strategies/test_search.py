"""What the adaptive search expects of a trial, what it learns of one, and how it keeps a part of a failed one."""

import itertools
import json
import math
from statistics import NormalDist

import pytest
from pico import PicoNet, thresholds

from gemel.sharing.groups import find_groups, restrict, saved_bytes, verified_part
from gemel.strategies import STRATEGIES, strategy_class
from gemel.strategies.adaptive import RISKS, Adaptive
from gemel.strategies.baselines import Stem
from gemel.strategies.curves import Curve, ExpectedLoss
from gemel.strategies.phases import (
    ABOUT_TO_DO,
    DONE,
    FILL,
    SEARCH,
    SMALLER_ADAPTERS,
    TRAIN,
    TRAIN_WITH_ADAPTERS,
    WITH_ADAPTERS,
    following,
)
from gemel.thresholds import THRESHOLDS

NAMES = ("task0_x", "task1_x", "task2_x")


def models(num_tasks: int = 3, **more) -> dict:
    return {name: PicoNet(**more) for name in NAMES[:num_tasks]}


def again(strategy: Adaptive) -> Adaptive:
    """A strategy that was stored and read."""
    other = Adaptive(models())
    other.load_state(json.loads(json.dumps(strategy.state())))
    return other


def test_risks_are_probabilities_from_near_certainty_down_to_any_chance():
    assert list(RISKS) == sorted(set(RISKS), reverse=True) and 0.9 < RISKS[0] < 1 and RISKS[-1] == 0


def test_without_a_budget_no_trial_has_adapters():
    strategy, trials = Adaptive(models(width=32)), []
    assert strategy.adapted.full == list(strategy.groups)
    while (trial := strategy.propose()) is not None:
        trials.append(trial)
        strategy.record(False, ())
    assert len(trials) > 2 and not [group for trial in trials for group in trial if group.rank]


def test_the_chance_of_a_trial_is_that_of_all_its_tasks_and_is_known_in_the_search_alone(monkeypatch):
    strategy = Adaptive(models())
    monkeypatch.setattr(strategy, "_probabilities", lambda trial: dict(zip(NAMES, (0.9, 0.5, 0.2), strict=True)))
    assert strategy.chance(strategy.groups) == 0, "before anything is predicted"
    strategy.sensitivity.errors = {(0, NAMES[0]): 1.0}
    assert strategy.chance(strategy.groups) == pytest.approx(0.09)
    strategy.phase = WITH_ADAPTERS
    assert strategy.chance(strategy.groups) == Stem(models()).chance(strategy.groups) == 0


@pytest.mark.parametrize("num_kept", [0, 1])
def test_the_expected_saving_is_the_mean_over_who_meets_the_target(num_kept, monkeypatch):
    strategy = Adaptive(models())
    strategy.own = restrict(strategy.groups, NAMES[:2])[:num_kept]
    chances = dict(zip(NAMES, (0.9, 0.5, 0.2), strict=True))
    monkeypatch.setattr(strategy, "_probabilities", lambda trial: chances)
    certain = {o for group in strategy.own for o in group.occurrences}
    expected = 0.0
    for outcome in itertools.product((True, False), repeat=len(NAMES)):
        chance = math.prod(chances[n] if met else 1 - chances[n] for n, met in zip(NAMES, outcome, strict=True))
        met = {name for name, good in zip(NAMES, outcome, strict=True) if good}
        for group in strategy.groups:
            tied = sum(o.task in met or o in certain for o in group.occurrences)
            expected += chance * group.bytes * max(0, tied - 1)
    assert strategy._expected_saving(strategy.groups) == pytest.approx(expected)


@pytest.mark.parametrize(
    "quick, num_kept, gain, phase",
    [
        (NAMES[:2], 1, 0.02, WITH_ADAPTERS),
        (NAMES[:2], 1, 0.5, SEARCH),
        (NAMES[:2], 0, 0.02, SEARCH),
        (NAMES[:1], 1, 0.02, SEARCH),
    ],
)
def test_where_the_next_trial_promises_little_adapters_come_first(quick, num_kept, gain, phase, monkeypatch):
    """For tasks that learn quickly in what they hold alone."""
    strategy = Adaptive(models(width=32), adapter_budget=0.125)
    strategy.learn_quickly = quick
    strategy.own = strategy.groups[-1:] if num_kept else ()
    expected = saved_bytes(strategy.own) + gain * saved_bytes(strategy.groups)
    monkeypatch.setattr(Adaptive, "_expected_saving", lambda self, trial: expected)
    trial = strategy.propose()
    assert strategy.phase == phase and strategy.trains_alone_at_length == (phase == WITH_ADAPTERS)
    assert any(group.rank for group in trial) == (phase == WITH_ADAPTERS)
    if phase == WITH_ADAPTERS:
        resumed = Adaptive(models(width=32), adapter_budget=0.125)
        resumed.learn_quickly = quick
        resumed.load_state(json.loads(json.dumps(strategy.state())))
        assert resumed.propose() == trial
        resumed.record(False, (), dict.fromkeys(NAMES, 0.1))
        assert resumed.propose() != trial and resumed.phase == SEARCH, (
            "it goes on, and comes to adapters once more last"
        )
        strategy.record(True, NAMES)
        strategy.propose()
        assert strategy.phase not in (SEARCH, WITH_ADAPTERS), "all is tied"


@pytest.mark.parametrize("least, phase", [(0.015, SMALLER_ADAPTERS), (0.9, TRAIN)])
def test_what_is_kept_with_adapters_is_tried_with_smaller_ones_where_that_saves_enough(least, phase, monkeypatch):
    monkeypatch.setattr("gemel.strategies.adaptive.THRESHOLDS", thresholds(worth_smaller_adapters=least))
    strategy = Adaptive(models(width=32), adapter_budget=0.25)
    strategy.own, strategy.phase = tuple(strategy.adapted.full), WITH_ADAPTERS
    larger = {group.occurrences: group.rank for group in strategy.kept if group.rank}
    trial = strategy.propose()
    assert strategy.phase == phase and larger
    if phase == SMALLER_ADAPTERS:
        ranks = {group.occurrences: group.rank for group in trial}
        assert all(0 < ranks[key] < rank for key, rank in larger.items())
        assert saved_bytes(trial) > saved_bytes(strategy.kept) and strategy.trains_alone_at_length
        strategy.record(True, NAMES)
        assert strategy.kept == trial


@pytest.mark.parametrize("last_is_kept", [True, False])
def test_adapters_become_ever_smaller_until_that_fails_or_saves_little(last_is_kept):
    strategy = Adaptive(models(width=64), adapter_budget=0.25)
    strategy.own, strategy.phase = tuple(strategy.adapted.full), WITH_ADAPTERS
    saved, sizes = saved_bytes(strategy.kept), []
    trial = strategy.propose()
    while strategy.phase == SMALLER_ADAPTERS:
        least = THRESHOLDS.fill.worth_smaller_adapters * saved_bytes(strategy.groups)
        assert saved_bytes(trial) - saved >= least
        sizes.append(sum(group.adapter_bytes for group in trial))
        resumed = Adaptive(models(width=64), adapter_budget=0.25)
        resumed.load_state(json.loads(json.dumps(strategy.state())))
        assert resumed.propose() == trial, "the same size after resuming"
        if len(sizes) == 2 and not last_is_kept:
            strategy.record(False, (), dict.fromkeys(NAMES, 0.1))
            assert strategy.phase in (TRAIN_WITH_ADAPTERS, TRAIN) and saved_bytes(strategy.kept) == saved
            return
        strategy.record(True, NAMES)
        saved = saved_bytes(trial)
        assert strategy.kept == trial
        trial = strategy.propose()
    assert last_is_kept and len(sizes) > 2 and sizes == sorted(sizes, reverse=True)


def test_adapters_become_smaller_still_where_only_some_of_them_could():
    strategy = Adaptive(models(width=64), adapter_budget=0.25)
    strategy.own, strategy.phase = tuple(strategy.adapted.full), WITH_ADAPTERS
    everything, before = strategy.propose(), strategy.adapted.ranks
    strategy.record(False, NAMES, dict.fromkeys(NAMES, 0.9))  # none of them alone
    half = strategy.propose()
    assert strategy.phase == SMALLER_ADAPTERS and saved_bytes(half) < saved_bytes(everything)
    strategy.record(True, NAMES)
    while strategy.adapted.ranks == before and (trial := strategy.propose()) is not None:
        if strategy.adapted.ranks == before:
            strategy.record(False, (), dict.fromkeys(NAMES, 0.9))
    assert strategy.phase == SMALLER_ADAPTERS and saved_bytes(strategy.kept) == saved_bytes(half)
    assert all(now[1] < then[1] for now, then in zip(strategy.adapted.ranks, before, strict=True) if then[1] > 1)
    assert saved_bytes(trial) > saved_bytes(half)


def test_every_phase_follows_once_in_either_order():
    for adapters_first, second in ((False, FILL), (True, WITH_ADAPTERS)):
        order = [SEARCH]
        while order[-1] != DONE:
            order.append(following(order[-1], adapters_first))
        assert sorted(order) == sorted(ABOUT_TO_DO) and order[1] == second and order[-2] == TRAIN


def test_what_a_trial_teaches_of_each_task():
    strategy = Adaptive(models())
    met, ratios = {"task0_x"}, {"task0_x": 0.98, "task1_x": 1.02}
    assert strategy.propose() == strategy.groups
    strategy.record(False, met, ratios)
    points = {name: curve.points for name, curve in strategy.curves.items()}
    (share, ratio), (_, below) = points["task0_x"][0], points["task1_x"][0]
    assert share == 1.0 and ratio == 1.0, "it was at its target, whatever a part of val said"
    assert 1 - 1e-5 < below < 1, "it was not"
    assert points["task2_x"] == [], "nothing was measured"


@pytest.mark.parametrize("kept, ratio", [(True, 1.0), (False, 0.9)])
def test_a_trial_without_ratios_is_taken_to_be_at_the_targets_or_below_them(kept, ratio):
    strategy = Adaptive(models())
    strategy.record(kept, NAMES if kept else ())
    assert {tuple(curve.points) for curve in strategy.curves.values()} == {((1.0, ratio),)}


def test_a_trained_trial_teaches_nothing_of_fits():
    strategy = Adaptive(models())
    strategy._begin_filling("fill in with training")
    strategy.record(False, ())
    assert not any(curve.points for curve in strategy.curves.values())


def failed_with_a_part(strategy: Adaptive) -> tuple:
    """Records that the next trial failed but for the first two tasks, which keep what they share in it."""
    trial = strategy.propose()
    part = verified_part(strategy.kept, trial, NAMES[:2])
    strategy.record(False, NAMES[:2], {NAMES[2]: 0.95})
    strategy.keep_part(part)
    return part


def test_the_search_keeps_a_part_but_does_not_build_on_it():
    strategy = Adaptive(models())
    part = failed_with_a_part(strategy)
    for each in (strategy, again(strategy)):
        assert each.kept == part == restrict(each.groups, NAMES[:2]) and each.base == () and each.phase == "search"
        assert each.state() == strategy.state()
    whole = strategy.propose()
    assert saved_bytes(whole) > saved_bytes(part)
    strategy.record(True, NAMES)
    assert strategy.kept == whole and strategy.part == (), "of more saving"


def test_what_follows_the_search_builds_on_a_part():
    strategy = Adaptive(models())
    strategy.adopt(restrict(strategy.groups, NAMES[1:])[:1])
    part = failed_with_a_part(strategy)
    assert saved_bytes(part) > saved_bytes(strategy.adopted)
    strategy._begin_filling("fill in")
    assert strategy.own == strategy.base == strategy.kept == part
    assert strategy.part == strategy.adopted == (), "the part may have split what was adopted"


def test_a_part_that_saves_less_than_what_is_kept_is_forgotten():
    strategy = Adaptive(models())
    strategy.own = strategy.groups
    strategy.keep_part(restrict(strategy.groups, NAMES[:2]))
    assert strategy.kept == strategy.groups
    strategy._begin_filling("fill in")
    assert strategy.own == strategy.kept == strategy.groups and strategy.part == ()


@pytest.mark.parametrize(
    "phase, trains",
    [
        ("search", False),
        ("fill in", False),
        ("fill in with adapters", False),
        ("fill in with adapters and training", True),
        ("fill in with training", True),
    ],
)
def test_training_belongs_to_the_last_phases(phase, trains):
    """Before, a trial releases layers instead, and tasks at their targets keep a part of one that failed."""
    strategy = Adaptive(models(), adapter_budget=0.5)
    strategy.phase = phase
    assert strategy.releases_before_training == strategy.keeps_verified_part == (not trains)
    assert not strategy.continues_failed_trial, "none has failed"
    strategy.working = strategy.groups
    assert strategy.continues_failed_trial == trains


def test_sensitivity_that_is_known_is_looked_up_and_otherwise_in_proportion_to_bytes():
    strategy = Adaptive(models())
    assert strategy.needs_sensitivity and strategy.predicted_sensitivity() == {}
    first, second = strategy.groups[:2]
    bytes_of = [strategy.sensitivity.of(i, "task0_x") / group.bytes for i, group in enumerate(strategy.groups)]
    assert bytes_of == pytest.approx([1 / saved_bytes(strategy.groups)] * len(bytes_of))
    known = {(first, "task0_x"): 0.7, (second, "task1_x"): 0.5}
    strategy.set_sensitivity(known, losses={"task0_x": ExpectedLoss(2.0)}, reached={"task0_x": 1.1})
    assert strategy.predicted_sensitivity() == {first.occurrences[0]: 0.7, second.occurrences[1]: 0.5}
    assert not strategy.needs_sensitivity
    curve, other = strategy.curves["task0_x"], strategy.curves["task1_x"]
    assert (curve.unshared, curve.slope) == (1.1, 1.4) and (other.unshared, other.slope) == (1.0, 0.0)


def test_a_task_that_nothing_is_predicted_to_hurt_is_judged_as_if_all_were_tied():
    strategy = Adaptive(models())
    zero = {(group, task): 0.0 for group in strategy.groups for task in group.tasks}
    strategy.set_sensitivity(zero, reached=dict.fromkeys(NAMES, 1.05))
    curve = strategy.curves["task0_x"]
    assert curve.probability(2.0) < curve.probability(1.0) < 1
    assert strategy._released("task0_x", curve.probability(1.0)) == []


def test_the_share_that_is_tied_leaves_out_layers_with_adapters():
    strategy = Adaptive(models(width=32), adapter_budget=0.5)
    assert all(group.rank for group in strategy.adapted.full[:2])
    whole = strategy.sensitivity.tied_share(strategy.groups, "task0_x")
    without = strategy.sensitivity.tied_share((strategy.adapted.full[0], *strategy.groups[1:]), "task0_x")
    assert whole == pytest.approx(1.0)
    own = [group for group in find_groups(models(width=32)) if "task0_x" in group.tasks]
    assert without == pytest.approx(1 - own[0].bytes / sum(group.bytes for group in own))


def test_a_cautious_trial_that_works_is_followed_by_what_is_expected_to_save_most():
    """However little it saves: the least sensitive half is for what comes after a failure."""
    strategy = Adaptive(models(width=32, extra=2))
    errors = {(group, task): 0.01 for group in strategy.groups for task in group.tasks}
    strategy.set_sensitivity(errors, reached=dict.fromkeys(NAMES, 1.05))
    strategy.own = strategy.groups[-1:]
    strategy.tried = {"a cautious trial"}
    assert saved_bytes(strategy.kept) < 0.5 * saved_bytes(strategy.groups)
    assert strategy._small_step() is None and strategy.propose() == strategy._most_promising()
    strategy.curves[NAMES[0]].add(1.0, 0.9)
    assert strategy.propose() == strategy._small_step() is not None


def test_losses_that_grow_more_slowly_than_sensitivity_are_on_a_line_over_its_power():
    """The loss of a share is what the factor and the exponent say, as long as nothing was measured."""
    noise, uncertainty = THRESHOLDS.search.noise, THRESHOLDS.search.uncertainty
    curve = Curve(unshared=1.1)
    curve.expect(ExpectedLoss(0.2, 0.5), 0.25)
    assert curve.slope == pytest.approx(0.1), "of everything"
    for share in (0.01, 0.16, 1.0):
        loss = 0.2 * (0.25 * share) ** 0.5
        expected = NormalDist(1.1 - loss, math.hypot(noise, loss * max(uncertainty, noise / 0.1)))
        assert curve.probability(share) == pytest.approx(1 - expected.cdf(1.0)), share
    curve.add(0.16, 1.06)
    curve.add(0.64, 0.98)
    line = (0.16**0.5, 0.64**0.5)
    slope = 0.08 / (line[1] - line[0])
    for share, distance in ((0.25, 0.1), (0.49, 0.1), (1.0, 0.2)):
        spread = math.hypot(noise, uncertainty * slope * distance)
        expected = NormalDist(1.06 - slope * (share**0.5 - line[0]), spread)
        assert curve.probability(share) == pytest.approx(1 - expected.cdf(1.0)), share


def test_everything_is_tried_first_where_what_would_be_left_is_not_worth_a_trial_of_its_own():
    """Which of two trials is made depends on what one more of them counts, and on how likely everything works."""
    strategy = Adaptive(models(width=32))
    small = min(strategy.groups, key=lambda group: group.bytes)
    rest = tuple(group for group in strategy.groups if group != small)
    errors = {(group, task): 1.0 if group == small else 0.01 for group in strategy.groups for task in group.tasks}
    one_more = THRESHOLDS.search.one_more_trial * saved_bytes(strategy.groups)
    chances = []
    for unshared, loss in itertools.product((1.05, 1.01), (0.0, 0.005, 0.01, 0.02)):
        losses = dict.fromkeys(NAMES, ExpectedLoss(loss))
        strategy.set_sensitivity(errors, reached=dict.fromkeys(NAMES, unshared), losses=losses)
        chances.append(math.prod(strategy._probabilities(strategy.groups).values()))
        gain = strategy._expected_saving(rest) - strategy._expected_saving(strategy.groups)
        is_first = gain < chances[-1] * one_more
        assert (strategy._worth(strategy.groups) > strategy._worth(rest)) == is_first, (unshared, loss)
        if unshared == 1.05:  # else something in between is worth more
            assert strategy.propose() == (strategy.groups if is_first else rest), loss
    assert max(chances) > 0.8 and min(chances) < 0.2


# ---- filling in -------------------------------------------------------------------------------------------


def filling(phase: str, kept=(), num_extra: int = 0) -> Adaptive:
    """A strategy that fills in what is missing besides what is kept, and expects it to work."""
    strategy = Adaptive(models(extra=num_extra))
    strategy.curves = {name: Curve(unshared=2.0) for name in NAMES}
    strategy.own = kept
    strategy._begin_filling(phase)
    return strategy


def test_a_part_joins_the_tasks_that_share_a_group_already_and_no_others():
    strategy = filling("fill in with training")
    strategy.own = restrict(strategy.groups, NAMES[:1] + NAMES[2:])[:1]
    (index,) = (i for i, group in enumerate(strategy.groups) if set(strategy.own[0].occurrences) < {*group.occurrences})
    assert strategy._filled({index: NAMES[1:2]}) == strategy.groups[index : index + 1]
    strategy.own = ()
    assert strategy._filled({index: NAMES[1:]}) == restrict(strategy.groups[index : index + 1], NAMES[1:])
    assert strategy._filled({index: NAMES[:1]}) == (), "one task alone shares nothing"


def test_the_tasks_that_missed_their_targets_are_tried_among_themselves():
    """When the one that met it shares nothing without them."""
    groups = find_groups(models())
    strategy = filling("fill in with training", groups[1:])
    assert strategy.propose() == groups
    strategy.record(False, NAMES[:1])
    assert set(strategy.propose()) == {*groups[1:], *restrict(groups[:1], NAMES[1:])}


def test_a_part_that_fails_for_all_is_halved_the_largest_savings_first():
    strategy = filling("fill in with training", num_extra=4)
    groups = strategy.groups
    assert len(groups) == 7 and strategy.propose() == groups
    strategy.record(False, ())
    assert strategy.propose() == groups[:4]
    strategy.record(False, ())
    assert strategy.propose() == groups[:2]
    strategy.record(True, NAMES)
    assert set(strategy.propose()) == {*groups[:2], *groups[4:]}, "the smaller half of a half comes last"


@pytest.mark.parametrize("least, halved", [(0.9, True), (1.1, False)])
@pytest.mark.parametrize("limit", ["worth_a_fit", "smallest_part"])
def test_a_part_that_would_save_little_is_not_halved_without_training(limit, least, halved, monkeypatch):
    others = {"worth_a_fit": 0.0, "smallest_part": 0.0, limit: least}
    monkeypatch.setattr("gemel.strategies.adaptive.THRESHOLDS", thresholds(**others))
    strategy = filling("fill in")
    assert strategy.propose() == strategy.groups, "all of the possible saving, and all that was missing at first"
    strategy.record(False, (), dict.fromkeys(NAMES, 0.99))
    assert (strategy.phase == "fill in") == halved


# ---- the other strategies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_was_adopted_survives_json(name):
    strategy, other = strategy_class(name)(models()), strategy_class(name)(models())
    strategy.adopt(restrict(find_groups(models()), NAMES[:2]))
    other.load_state(json.loads(json.dumps(strategy.state())))
    assert other.adopted == strategy.adopted and other.kept == strategy.kept != ()
    assert other.propose() == strategy.propose()


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "adaptive"])
def test_a_strategy_that_keeps_whole_trials_refuses_a_part(name):
    strategy = strategy_class(name)(models())
    assert not strategy.keeps_verified_part
    with pytest.raises(NotImplementedError, match=type(strategy).__name__):
        strategy.keep_part(())


def test_a_stem_that_is_tied_already_is_not_tried():
    strategy = Stem(models())
    strategy.adopt(strategy.stems[-1])
    assert strategy.propose() is None and strategy.kept == strategy.stems[-1]


# ---- curves -----------------------------------------------------------------------------------------------


def test_the_probability_is_that_of_a_normal_loss_beyond_what_worked():
    """Deviations grow with the distance from what worked, and between two trials from the nearer one."""
    noise, uncertainty = THRESHOLDS.search.noise, THRESHOLDS.search.uncertainty
    curve = Curve(unshared=1.1, slope=0.2, points=[(0.4, 1.03)])
    slope, deviation = curve._expected_slope()
    expected = NormalDist(1.03 - 0.3 * slope, math.hypot(noise, 0.3 * deviation))
    assert curve.probability(0.7) == pytest.approx(1 - expected.cdf(1.0))
    curve.add(0.9, 0.98)
    slope = 0.05 / 0.5
    for share, distance in ((0.5, 0.1), (0.8, 0.1), (0.65, 0.25), (1.0, 0.1)):
        spread = math.hypot(noise, uncertainty * slope * distance)
        expected = NormalDist(1.03 - slope * (share - 0.4), spread)
        assert curve.probability(share) == pytest.approx(1 - expected.cdf(1.0)), share
    assert curve.probability(0.4) == 1.0
