"""Tasks that share nothing with others are searched by themselves."""

import json
import random

import pytest
from pico import PicoNet

from gemel.sharing.groups import affected_tasks, find_groups, restrict, saved_bytes
from gemel.strategies.adaptive import Adaptive
from gemel.strategies.base import FirstStep, Strategy
from gemel.strategies.components import Components, components_of
from gemel.strategies.curves import ExpectedLoss
from gemel.strategies.phases import ABOUT_TO_DO


def workload(*widths: int) -> dict:
    """Tasks of equal width share all their layers, others none."""
    return {f"task{i}_x": PicoNet(extra=1, width=width) for i, width in enumerate(widths)}


def searched_apart(models) -> Components:
    return Components(models, find_groups(models), lambda own, groups: Adaptive(own, groups))


def tasks_of(configuration) -> set:
    return {task for group in configuration for task in group.tasks}


def test_tasks_are_connected_directly_and_through_others():
    models = {**workload(8, 8, 12, 12, 10), "through_x": PicoNet(width=8)}
    found = components_of(find_groups(models))
    assert found == [["task2_x", "task3_x"], ["task0_x", "task1_x", "through_x"]]


def judged(rng, changed):
    met = {task for task in changed if rng.random() < 0.5}
    return met == set(changed), met


@pytest.mark.parametrize("seed", range(6))
def test_a_trial_changes_one_component_and_each_ends_as_it_would_alone(seed):
    """The same outcomes by component, whatever happens to the others in between."""
    models = workload(8, 8, 8, 12, 12, 12)
    strategy, ends, lasts = searched_apart(models), [], [random.Random(seed), random.Random(seed + 100)]
    proposals = [[], []]
    while (proposal := strategy.propose()) is not None:
        changed = affected_tasks(strategy.kept, proposal)
        number = next(i for i, tasks in enumerate(strategy.tasks) if set(changed) <= set(tasks))
        proposals[number].append(restrict(proposal, strategy.tasks[number]))
        strategy.record(*judged(lasts[number], changed))
        assert sum(map(len, proposals)) < 500
    for number, tasks in enumerate(strategy.tasks):
        alone = {name: models[name] for name in tasks}
        search, rng, seen = Adaptive(alone), random.Random(seed + 100 * number), []
        while (proposal := search.propose()) is not None:
            seen.append(proposal)
            search.record(*judged(rng, affected_tasks(search.kept, proposal)))
        assert proposals[number] == seen
        ends.append(search.kept)
    assert sorted(strategy.kept, key=str) == sorted((g for kept in ends for g in kept), key=str)


def test_fits_come_before_training_and_a_failed_trial_is_continued_at_once():
    strategy, efforts = searched_apart(workload(8, 8, 12, 12)), []
    while (proposal := strategy.propose()) is not None:
        continued, turn = strategy.continues_failed_trial, strategy.turn
        efforts.append((continued, strategy.effort, turn))
        strategy.record(False, set(), dict.fromkeys(affected_tasks(strategy.kept, proposal), 0.97))
    free = [effort for continued, effort, _ in efforts if not continued]
    assert free == sorted(free) and len(set(free)) > 1
    for before, after in zip(efforts, efforts[1:], strict=False):
        assert not after[0] or after[2] == before[2]


def test_state_survives_json():
    models = workload(8, 8, 12, 12)
    rng, strategy = random.Random(0), searched_apart(models)
    while (proposal := strategy.propose()) is not None:
        other = searched_apart(models)
        other.load_state(json.loads(json.dumps(strategy.state())))
        assert other.propose() == proposal and other.kept == strategy.kept
        assert (other.effort, other.continues_failed_trial) == (strategy.effort, strategy.continues_failed_trial)
        strategy.record(*judged(rng, affected_tasks(strategy.kept, proposal)))


def test_predictions_reach_the_searches_that_they_are_for():
    models = workload(8, 8, 12, 12)
    groups, strategy = find_groups(models), searched_apart(models)
    assert strategy.needs_sensitivity
    errors = {(group, o.task): 0.01 for group in groups for o in group.occurrences}
    strategy.set_sensitivity(errors, errors, dict.fromkeys(models, 1.0), dict.fromkeys(models, ExpectedLoss(0.3)))
    assert not strategy.needs_sensitivity
    assert set(strategy.predicted_sensitivity()) == {o for group in groups for o in group.occurrences}


def test_what_was_kept_may_connect_tasks_that_no_group_connects():
    models = workload(8, 8, 8, 8)
    everything = find_groups(models)
    first, second = ({"task0_x", "task1_x"}, {"task2_x", "task3_x"})
    groups = (*restrict(everything[:2], first), *restrict(everything[:2], second))
    strategy = Components(models, groups, lambda own, shared: Adaptive(own, shared))
    assert len(strategy.parts) == 2
    strategy.adopt(everything[2:])
    assert len(strategy.parts) == 1 and strategy.kept == everything[2:]
    assert saved_bytes(strategy.propose()) > saved_bytes(strategy.kept)


def test_every_search_makes_a_small_step_before_one_prediction_for_all():
    models = workload(8, 8, 12, 12)
    groups, strategy = find_groups(models), searched_apart(models)
    strategy.begin_with(lambda own: FirstStep(0.5, 0.6, trials_take_long="task0_x" in tasks_of(own)))
    assert not strategy.needs_sensitivity and strategy.chance(groups) == 0.6
    assert [part.trials_take_long for part in strategy.parts].count(True) == 1, "each by its own groups"
    first = strategy.propose()
    strategy.record(True, tasks_of(first))
    assert strategy.needs_sensitivity, "the next proposals depend on it"
    errors = {(group, o.task): 0.01 for group in groups for o in group.occurrences}
    strategy.set_sensitivity(errors, errors, dict.fromkeys(models, 1.0))
    assert set(strategy.predicted_sensitivity()) == {o for group in groups for o in group.occurrences}
    assert not strategy.needs_sensitivity


def test_where_one_search_waits_for_the_prediction_all_do():
    models = workload(8, 8, 12, 12)
    groups, strategy = find_groups(models), searched_apart(models)
    strategy.begin_with(lambda own: FirstStep(1.0, 0.6) if "task0_x" in tasks_of(own) else FirstStep())
    assert strategy.needs_sensitivity
    errors = {(group, o.task): 0.5 for group in groups for o in group.occurrences}
    losses = dict.fromkeys(models, ExpectedLoss(0.1))
    strategy.set_sensitivity(errors, errors, dict.fromkeys(models, 1.02), losses)
    (first,) = (part for part in strategy.parts if "task0_x" in part.curves)
    assert 0 < saved_bytes(first.propose()) < saved_bytes(first.groups), "as predicted, not everything"


def test_what_a_strategy_says_is_what_the_search_whose_turn_it_is_says():
    """Every property that Adaptive has in place of the one that all strategies have."""
    own = {name for name, value in vars(Adaptive).items() if isinstance(value, property) and hasattr(Strategy, name)}
    of_components = {name for name, value in vars(Components).items() if isinstance(value, property)}
    assert own <= of_components and {"trains_alone_at_length", "fits_to_what_is_kept"} <= own
    strategy = searched_apart(workload(8, 8, 12, 12))
    for phase in ABOUT_TO_DO:
        strategy.current.phase = phase
        for name in own - {"kept", "needs_sensitivity", "about_to_do"}:
            assert getattr(strategy, name) == getattr(strategy.current, name), name
