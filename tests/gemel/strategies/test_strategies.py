import itertools
import json
import random

import numpy as np
import pytest
from pico import PicoNet, thresholds

from gemel.sharing.groups import affected_tasks, find_groups, from_plain, joined, restrict, saved_bytes, to_plain
from gemel.strategies import STRATEGIES, strategy_class
from gemel.strategies.adaptive import Adaptive
from gemel.strategies.baselines import All, Gemel, Stem, gemel_units
from gemel.strategies.curves import Curve, ExpectedLoss
from gemel.thresholds import THRESHOLDS


def workload(*extras: int, width: int = 8) -> dict:
    return {f"task{i}_x": PicoNet(extra=extra, width=width) for i, extra in enumerate(extras)}


def play(strategy, judge, limit: int = 1000) -> list:
    """Runs a strategy to its end; judge(configuration) -> (kept, met tasks). Returns the proposals."""
    proposals = []
    while (proposal := strategy.propose()) is not None:
        assert len(proposals) < limit, "the search does not end"
        proposals.append(proposal)
        strategy.record(*judge(proposal))
    return proposals


def tasks_in(configuration) -> set:
    return {task for group in configuration for task in group.tasks}


def contains(configuration, other) -> bool:
    """Whether whatever the other ties is tied here as well."""
    return all(any(set(g.occurrences) <= set(h.occurrences) for h in configuration) for g in other)


def always(configuration):
    return True, tasks_in(configuration)


def never(configuration):
    return False, set()


@pytest.mark.parametrize("name", STRATEGIES)
def test_everything_is_kept_when_everything_works(name):
    models = workload(1, 1, 1)
    strategy = strategy_class(name)(models)
    play(strategy, always)
    assert saved_bytes(strategy.kept) == saved_bytes(find_groups(models))


@pytest.mark.parametrize("name", STRATEGIES)
def test_nothing_is_kept_when_nothing_works_and_the_search_ends(name):
    strategy = strategy_class(name)(workload(2, 1, 0, 3))
    assert play(strategy, never)
    assert strategy.kept == () and strategy.propose() is None


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("models", [workload(0), {}, {**workload(0), "other_x": PicoNet(width=3)}])
def test_nothing_to_share_ends_at_once(name, models):
    assert strategy_class(name)(models).propose() is None


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("seed", range(8))
def test_any_outcomes_end_grow_and_never_repeat(name, seed):
    rng = random.Random(seed)

    def judge(configuration):
        met = {task for task in tasks_in(configuration) if rng.random() < 0.6}
        return met == tasks_in(configuration), met

    strategy = strategy_class(name)(workload(3, 1, 2, 0, 2))
    kept_before, seen = (), set()
    while (proposal := strategy.propose()) is not None:
        trial = (proposal, strategy.releases_before_training)  # with fitted weights alone, or with training
        assert trial not in seen and contains(proposal, kept_before)
        seen.add(trial)
        occurrences = [o for group in proposal for o in group.occurrences]
        assert len(set(occurrences)) == len(occurrences), "a layer stands in two groups"
        strategy.record(*judge(proposal))
        kept_before = strategy.kept
        assert len(seen) < 500


@pytest.mark.parametrize("name", STRATEGIES)
def test_state_survives_json(name):
    models = workload(2, 1, 2)
    outcomes = itertools.cycle([(False, {"task0_x", "task2_x"}), (True, {"task0_x", "task1_x", "task2_x"})])
    strategy = strategy_class(name)(models)
    while (proposal := strategy.propose()) is not None:
        other = strategy_class(name)(models)
        other.load_state(json.loads(json.dumps(strategy.state())))
        assert other.propose() == proposal and other.kept == strategy.kept
        strategy.record(*next(outcomes))


def test_gemel_units_are_largest_first_and_gather_equal_signatures():
    units = gemel_units(find_groups(workload(2, 2)))
    assert [len(unit) for unit in units] == [3, 1, 1]  # conv2 and more.0, more.1 are alike
    savings = [saved_bytes(unit) for unit in units]
    assert savings == sorted(savings, reverse=True)


def test_gemel_tries_the_last_group_too():
    """Published fault: the list of the largest groups loses its last one."""
    models = workload(0, 0)
    proposals = play(Gemel(models), always)
    assert len(proposals) == len(gemel_units(find_groups(models))) == 3
    assert set(proposals[-1]) == set(find_groups(models))


def test_gemel_tries_one_unit_at_a_time_and_keeps_what_worked():
    models = workload(0, 0)
    units = gemel_units(find_groups(models))
    proposals = play(Gemel(models), lambda c: (units[1][0] not in c, set()))
    assert [set(p) for p in proposals] == [set(units[0]), {*units[0], *units[1]}, {*units[0], *units[2]}]


def test_gemel_keeps_the_tasks_that_met_and_halves_the_rest():
    strategy = Gemel(workload(*[0] * 8, width=32))  # conv2 between two tasks is worth more than conv1 among eight
    met, trials = {"task6_x", "task7_x"}, []
    while (group := strategy.propose()[0]).occurrences[0].layer == "conv2":
        trials.append("".join(sorted(task[4] for task in group.tasks)))
        strategy.record(False, met)
    assert trials == ["01234567", "01267", "067", "67"]


def test_gemel_moves_on_when_the_next_unit_is_worth_more():
    strategy = Gemel(workload(*[0] * 4))  # saved by conv2: 2336 bytes per task but one, by conv1 3 x 896
    trials = []
    for _ in range(3):
        (group,) = strategy.propose()
        trials.append((group.occurrences[0].layer, len(group.tasks)))
        strategy.record(False, {"task0_x", "task1_x"})
    assert trials == [("conv2", 4), ("conv2", 3), ("conv1", 4)]


def test_gemel_halves_all_when_a_task_outside_the_unit_fails():
    strategy = Gemel(workload(*[0] * 4, width=32))
    strategy.record(False, set(strategy.propose()[0].tasks))  # everybody in the unit met the target
    assert strategy.propose()[0].tasks == ("task0_x", "task1_x")


def test_all_tries_once_more_among_the_tasks_that_met():
    models = workload(0, 0, 0)
    strategy = All(models)
    proposals = play(strategy, lambda c: ("task1_x" not in tasks_in(c), tasks_in(c) - {"task1_x"}))
    assert [tasks_in(p) for p in proposals] == [set(models), {"task0_x", "task2_x"}]
    assert tasks_in(strategy.kept) == {"task0_x", "task2_x"}


@pytest.mark.parametrize("longest", range(6))
def test_stem_finds_the_longest_prefix_that_works(longest):
    strategy = Stem(workload(3, 3))
    stems = strategy.stems
    works = stems[: longest + 1]
    proposals = play(strategy, lambda c: (c in works, set()))
    assert strategy.kept == stems[min(longest, len(stems) - 1)]
    assert len(proposals) <= 4
    assert proposals[0] == stems[-1]


def hurt_by(*layers):
    """A judge: the tasks of groups with these layers miss their targets."""

    def judge(configuration):
        bad = {o for group in configuration for o in group.occurrences if o.layer in layers}
        met = tasks_in(configuration) - {o.task for o in bad}
        return met == tasks_in(configuration), met

    return judge


def sensitivities(groups, value: float = 0.01, **others: float) -> dict:
    """(group, task) -> value; for groups with a layer of that name another one."""
    return {(g, task): others.get(g.occurrences[0].layer, value) for g in groups for task in g.tasks}


def test_the_search_ties_everything_first_and_releases_what_hurts_most_for_the_task_that_fails():
    strategy = Adaptive(workload(1, 1, 1))
    groups = find_groups(workload(1, 1, 1))
    harm = sensitivities(groups)
    worst = next(group for group in groups if group.occurrences[0].layer == "conv2")
    harm[worst, "task1_x"] = 0.05
    strategy.set_sensitivity(harm, reached=dict.fromkeys(tasks_in(groups), 1.25))
    everything = strategy.propose()
    assert everything == groups and not strategy.needs_sensitivity
    strategy.record(False, {"task0_x", "task2_x"}, {"task0_x": 1.02, "task1_x": 0.97, "task2_x": 1.03})
    assert not strategy.continues_failed_trial, "fits begin anew"
    strategy.keep_part(restrict(groups, ["task0_x", "task2_x"]))
    second = strategy.propose()
    assert all({"task0_x", "task2_x"} <= set(group.tasks) for group in second) and len(second) == len(groups), (
        "the others go on sharing"
    )
    shared = {occurrence for group in second for occurrence in group.occurrences}
    released = {group for group in groups if not set(group.occurrences) <= shared}
    assert released and "task1_x" in tasks_in(second), "the task that failed shares less"
    density = {group: harm[group, "task1_x"] / group.bytes for group in groups}
    assert max(density[g] for g in groups if g not in released) <= min(density[g] for g in released)
    strategy.record(True, tasks_in(second), dict.fromkeys(tasks_in(second), 1.0))
    assert strategy.kept == second and not strategy.continues_failed_trial


def test_a_trial_that_is_expected_to_fail_is_not_made_first():
    """Before anything is measured, the loss that is expected of a task decides how much it ties."""
    groups = find_groups(workload(1, 1, 1))
    shares = []
    for loss in (0.0, 2.0, 100.0):
        strategy = Adaptive(workload(1, 1, 1))
        tasks = tasks_in(groups)
        losses = dict.fromkeys(tasks, ExpectedLoss(loss))
        strategy.set_sensitivity(sensitivities(groups), reached=dict.fromkeys(tasks, 1.05), losses=losses)
        proposal = strategy.propose()
        shares.append(saved_bytes(proposal) if strategy.phase == "search" else 0)
    assert shares[0] == saved_bytes(groups) > shares[1] > shares[2]


def test_the_search_ties_more_once_all_targets_are_met():
    groups = find_groups(workload(20, 20))
    strategy = Adaptive(workload(20, 20))
    tasks = tasks_in(groups)
    strategy.set_sensitivity(sensitivities(groups, 0.001), reached=dict.fromkeys(tasks, 1.05))
    limit, kept, trials = 0.6 * saved_bytes(groups), 0, 0
    while strategy.propose() is not None and strategy.phase == "search":
        saving = saved_bytes(strategy.propose())
        good = saving <= limit
        ratios = dict.fromkeys(tasks, 1.05 - 0.05 * saving / limit)  # what it measures is what it expects
        strategy.record(good, tasks if good else set(), ratios)
        kept, trials = max(kept, saving if good else 0), trials + 1
    assert 0.5 * saved_bytes(groups) <= kept == saved_bytes(strategy.kept) <= limit and trials <= 8


def test_curves_expect_the_more_of_a_share_the_nearer_it_is_to_one_that_worked():
    curve = Curve(unshared=1.05)
    assert curve.met == (0.0, 1.05) and curve.failed is None
    curve.add(0.8, 0.8)
    chances = [curve.probability(share) for share in (0.0, 0.1, 0.2, 0.4, 0.8)]
    assert chances == sorted(chances, reverse=True) and chances[0] == 1.0 and chances[-1] < 1e-6
    assert chances[1] > 0.5 > chances[3], "the line comes down to the target at a share of .16"
    curve.add(0.3, 1.01)
    assert curve.probability(0.3) == 1.0 and curve.probability(0.1) == 1.0
    assert curve.met == (0.3, 1.01) and curve.failed == (0.8, 0.8)
    again = Curve.of(json.loads(json.dumps(curve.state())))
    assert again == curve


def test_a_stem_that_no_fit_can_serve_is_given_the_weights_of_the_task_at_most_risk():
    models = workload(9, 9, 9)
    strategy = Adaptive(models)
    stem, *others = sorted(find_groups(models), key=lambda group: group.occurrences[0].layer != "conv1")
    misfit = {(group, task): 0.2 if task == "task1_x" else 0.1 for group in others for task in group.tasks}
    unfit = misfit | {(stem, task): 0.9 if task == "task0_x" else 0.2 for task in stem.tasks}
    strategy.set_sensitivity(sensitivities(find_groups(models), 0.01), unfit)
    again = Adaptive(models)
    again.load_state(json.loads(json.dumps(strategy.state())))
    for each in (strategy, again):
        assert each.donor_of(stem) == "task1_x", "of all layers together"
        assert each.donor_of(stem.restricted_to({"task0_x", "task1_x"})) == "task1_x"
        assert each.donor_of(stem.restricted_to({"task0_x", "task2_x"})) is None
        assert [each.donor_of(group) for group in others] == [None] * len(others)
    fit = Adaptive(models)
    fit.set_sensitivity({}, misfit | {(stem, task): 0.2 for task in stem.tasks})
    assert fit.donor_of(stem) is None, "this one can be fitted"
    deep = Adaptive(models)
    deep.set_sensitivity({}, {key: 0.9 if key[0] == others[0] else 0.1 for key in unfit})
    assert deep.donor_of(others[0]) is None, "what is before it would not be fitted to it"


@pytest.mark.parametrize("factor, trained", [(0.9, True), (1.1, False)])
def test_what_is_missing_by_a_hair_is_not_trained(factor, trained, monkeypatch):
    groups = find_groups(workload(3, 3))
    smallest = min(groups, key=lambda group: group.saved_bytes)
    limit = factor * smallest.saved_bytes / saved_bytes(groups)
    monkeypatch.setattr("gemel.strategies.adaptive.THRESHOLDS", thresholds(worth_training=limit, worth_a_trial=1.0))
    strategy = filling(workload(3, 3), tuple(group for group in groups if group != smallest))
    assert (strategy.propose() is not None and not strategy.releases_before_training) == trained


def filling(models, kept) -> Adaptive:
    """A strategy whose search has ended with this, and that fills in what is missing."""
    strategy = Adaptive(models)
    strategy.own = kept
    strategy._begin_filling("fill in")
    return strategy


@pytest.mark.parametrize("ratio, halved", [(0.79, False), (0.81, True)])
def test_a_part_that_is_far_from_its_targets_is_not_halved_without_training(ratio, halved):
    everything = find_groups(workload(3, 3))
    strategy = filling(workload(3, 3), everything[: len(everything) // 2])
    strategy.curves = {task: Curve(unshared=2.0) for task in strategy.curves}  # so that halves are expected to work
    assert strategy.phase == "fill in" and strategy.propose() == everything
    strategy.record(False, set(), {task: ratio for task in tasks_in(everything)})
    assert (strategy.phase == "fill in") == halved
    assert strategy.releases_before_training == halved and (strategy.propose() == everything) != halved


def test_a_part_that_one_of_two_tasks_refuses_is_halved_by_its_groups():
    """To leave that task out would leave the other with nobody to share with."""
    everything = find_groups(workload(1, 1))
    strategy = filling(workload(1, 1), everything[:1])
    strategy.record(False, {"task0_x"}, {"task0_x": 1.0, "task1_x": 0.95})
    assert strategy.phase == "fill in"
    assert contains(everything, strategy.propose()) and strategy.kept != strategy.propose() != everything


def test_parts_smaller_than_a_share_of_what_was_missing_are_not_halved_without_training():
    everything = find_groups(workload(20, 20))
    strategy = filling(workload(20, 20), everything[1:3])
    missing, gains = saved_bytes(everything) - saved_bytes(strategy.kept), []
    while strategy.phase == "fill in":
        gains.append(saved_bytes(strategy.propose()) - saved_bytes(strategy.kept))
        strategy.record(False, set(), {task: 0.99 for task in tasks_in(everything)})
    assert gains[0] == missing and len(gains) < len(everything) - 2, "not every layer on its own"
    for gain, after in zip(gains, gains[1:], strict=False):
        assert gain >= missing / 4 or after != gain - after


def test_training_goes_on_from_a_small_part_that_was_fitted(monkeypatch):
    monkeypatch.setattr("gemel.strategies.adaptive.THRESHOLDS", thresholds(worth_a_fit=0.5))
    everything = find_groups(workload(1, 1))
    strategy = filling(workload(1, 1), tuple(g for g in everything if g.occurrences[0].layer != "conv1"))
    assert (
        strategy.propose() == everything and strategy.releases_before_training and not strategy.continues_failed_trial
    )
    strategy.record(False, set())
    assert (
        strategy.continues_failed_trial and strategy.propose() == everything and not strategy.releases_before_training
    )
    again = Adaptive(workload(1, 1))
    again.load_state(strategy.state())
    assert again.continues_failed_trial and again.propose() == everything
    strategy.record(False, set())
    assert not strategy.continues_failed_trial


def test_a_failed_trial_is_continued_only_if_it_comes_next():
    """Not one that was trained before, in another part: what is stored of it would stay."""
    continued = []
    for seed in range(40):
        rng, strategy = random.Random(seed), Adaptive(workload(3, 1, 2, width=24), adapter_budget=0.3)
        while (proposal := strategy.propose()) is not None:
            met = {task for task in sorted(tasks_in(proposal)) if rng.random() < 0.6}
            strategy.record(met == tasks_in(proposal), met)
            if strategy.continues_failed_trial:
                continued.append(strategy.propose() == proposal)
    assert continued and all(continued)


def test_the_search_releases_more_each_time_until_a_task_shares_nothing():
    strategy = Adaptive(workload(3, 3, 3))
    shares = []
    while (proposal := strategy.propose()) is not None and strategy.phase == "search":
        shares.append(sum(group.bytes for group in proposal if "task0_x" in group.tasks))
        strategy.record("task0_x" not in tasks_in(proposal), tasks_in(proposal) - {"task0_x"})
    assert len(shares) > 1 and shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("bad", [("conv2",), ("fc",), ("conv1", "more.0")])
def test_adaptive_finds_all_but_what_hurts(bad):
    models = workload(2, 2, 2)
    strategy = Adaptive(models)
    play(strategy, hurt_by(*bad))
    good = [group for group in find_groups(models) if group.occurrences[0].layer not in bad]
    assert saved_bytes(strategy.kept) == saved_bytes(good)


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_an_earlier_run_has_kept_is_part_of_every_proposal(name):
    before = restrict(find_groups(workload(2, 2, 2)), ("task0_x", "task1_x"))
    strategy = strategy_class(name)(workload(2, 2, 2))
    strategy.adopt(before)
    assert strategy.kept == before
    proposals = play(strategy, never)
    assert proposals and all(contains(proposal, before) for proposal in proposals) and strategy.kept == before
    again = strategy_class(name)(workload(2, 2, 2))
    again.adopt(before)
    play(again, always)
    assert saved_bytes(again.kept) == saved_bytes(find_groups(workload(2, 2, 2)))


def test_joined_configurations_tie_what_any_of_them_ties():
    groups = find_groups(workload(1, 1, 1))
    first, second = restrict(groups, ("task0_x", "task1_x")), restrict(groups, ("task1_x", "task2_x"))
    assert saved_bytes(joined(first, second)) == saved_bytes(groups)
    assert joined(groups, first) == groups == joined(first, groups)
    assert from_plain(json.loads(json.dumps(to_plain(groups)))) == groups
    assert affected_tasks(first, groups) == ["task0_x", "task1_x", "task2_x"]


def test_a_part_of_what_is_missing_is_fitted_behind_what_is_kept():
    """And a trial of all that is missing is fitted as a whole, as those of the search are."""
    everything = find_groups(workload(1, 1))
    assert Adaptive(workload(1, 1)).refits_all_changes
    strategy = filling(workload(1, 1), everything[:1])
    assert strategy.propose() == everything and strategy.refits_all_changes
    strategy.record(False, {"task0_x"}, {"task0_x": 1.0, "task1_x": 0.95})
    assert strategy.phase == "fill in" and strategy.propose() != everything and not strategy.refits_all_changes


def test_the_expected_loss_is_that_of_a_line_with_a_prior():
    """Ridge regression: the prior is one more observation of the slope."""
    curve, search = Curve(unshared=1.02, slope=0.3, points=[(0.5, 0.9), (0.8, 0.7)]), THRESHOLDS.search
    prior = max(search.uncertainty * curve.slope, search.noise)
    rows = [1 / prior, *(share / search.noise for share, _ in curve.points)]
    values = [curve.slope / prior, *((curve.unshared - ratio) / search.noise for _, ratio in curve.points)]
    solved = np.linalg.lstsq(np.array(rows)[:, None], np.array(values))[0][0]
    slope, deviation = curve._expected_slope()
    assert slope == pytest.approx(solved) and deviation == pytest.approx(sum(row**2 for row in rows) ** -0.5)
