import itertools
import json
import random

import pytest
from pico import PicoNet

from sharing.groups import find_groups, saved_bytes
from sharing.strategies import STRATEGIES, All, Gemel, Stem, gemel_units


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


def always(configuration):
    return True, tasks_in(configuration)


def never(configuration):
    return False, set()


@pytest.mark.parametrize("name", STRATEGIES)
def test_everything_is_kept_when_everything_works(name):
    models = workload(1, 1, 1)
    strategy = STRATEGIES[name](models)
    play(strategy, always)
    assert saved_bytes(strategy.kept) == saved_bytes(find_groups(models))


@pytest.mark.parametrize("name", STRATEGIES)
def test_nothing_is_kept_when_nothing_works_and_the_search_ends(name):
    strategy = STRATEGIES[name](workload(2, 1, 0, 3))
    assert play(strategy, never)
    assert strategy.kept == () and strategy.propose() is None


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("models", [workload(0), {}, {**workload(0), "other_x": PicoNet(width=3)}])
def test_nothing_to_share_ends_at_once(name, models):
    assert STRATEGIES[name](models).propose() is None


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("seed", range(8))
def test_any_outcomes_end_grow_and_never_repeat(name, seed):
    rng = random.Random(seed)

    def judge(configuration):
        met = {task for task in tasks_in(configuration) if rng.random() < 0.6}
        return met == tasks_in(configuration), met

    strategy = STRATEGIES[name](workload(3, 1, 2, 0, 2))
    kept_before, seen = (), set()
    while (proposal := strategy.propose()) is not None:
        assert proposal not in seen and set(kept_before) <= set(proposal)
        seen.add(proposal)
        occurrences = [o for group in proposal for o in group.occurrences]
        assert len(set(occurrences)) == len(occurrences), "a layer stands in two groups"
        strategy.record(*judge(proposal))
        kept_before = strategy.kept
        assert len(seen) < 500


@pytest.mark.parametrize("name", STRATEGIES)
def test_state_survives_json(name):
    models = workload(2, 1, 2)
    outcomes = itertools.cycle([(False, {"task0_x", "task2_x"}), (True, {"task0_x", "task1_x", "task2_x"})])
    strategy = STRATEGIES[name](models)
    while (proposal := strategy.propose()) is not None:
        other = STRATEGIES[name](models)
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
