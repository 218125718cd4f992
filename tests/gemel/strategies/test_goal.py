"""Configurations that just reach a memory goal, and the order in which the adaptive strategy tries them."""

import json

import pytest
from pico import PicoNet

from gemel.sharing.groups import find_groups, saved_bytes
from gemel.strategies.adaptive import Adaptive
from gemel.strategies.curves import ExpectedLoss
from gemel.strategies.goal import just_enough


def models(num_tasks: int = 3) -> dict:
    return {f"task{i}_x": PicoNet(extra=2) for i in range(num_tasks)}


def costs_of(groups, **of_layer: float) -> dict:
    return {(i, o.task): of_layer.get(o.layer, 0.01) for i, group in enumerate(groups) for o in group.occurrences}


def layers_in(configuration) -> set:
    return {(o.task, o.layer) for group in configuration for o in group.occurrences}


@pytest.mark.parametrize("num_tasks", [2, 3])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_just_enough_saves_enough_and_can_release_nothing_more(num_tasks, share):
    groups = find_groups(models(num_tasks))
    saving = int(share * saved_bytes(groups))
    found = just_enough(groups, costs_of(groups, conv1=0.5), saving)
    assert saved_bytes(found) >= saving
    assert all(saved_bytes(found) - group.bytes < saving for group in found)
    assert (found == groups) == (share == 1.0)


def test_what_cannot_be_saved_is_nothing():
    groups = find_groups(models())
    assert just_enough(groups, costs_of(groups), saved_bytes(groups) + 1) is None


def test_the_most_expensive_layer_per_byte_is_released_first():
    groups = find_groups(models(2))
    conv2 = next(group for group in groups if group.occurrences[0].layer == "conv2")
    found = just_enough(groups, costs_of(groups, conv2=0.5), saved_bytes(groups) - conv2.bytes)
    assert found == tuple(group for group in groups if group != conv2)


def test_the_task_that_loses_most_is_the_one_that_is_released():
    groups = find_groups(models(3))
    costs = {key: cost * (1 + 9 * (key[1] == "task1_x")) for key, cost in costs_of(groups).items()}
    found = just_enough(groups, costs, saved_bytes(groups) - min(group.bytes for group in groups))
    assert [task for task, _ in layers_in(groups) - layers_in(found)] == ["task1_x"]


def test_what_has_no_cost_is_never_released():
    groups = find_groups(models(2))
    assert just_enough(groups, {}, 0) == groups


def adaptive(goal_share: float | None = 0.5, **of_layer: float) -> Adaptive:
    strategy = Adaptive(models())
    groups = strategy.groups
    if goal_share is not None:
        strategy.goal_saving = int(goal_share * saved_bytes(groups))
    found = {(groups[i], task): cost for (i, task), cost in costs_of(groups, **of_layer).items()}
    losses = {"task0_x": ExpectedLoss(0.3), "task1_x": ExpectedLoss(0.3), "task2_x": ExpectedLoss(2.0)}
    strategy.set_sensitivity(found, losses=losses)
    return strategy


def goal_trials(strategy: Adaptive, ratios) -> list:
    """What is proposed, and fails with these ratios of the goal's trials in turn, before the search goes on."""
    trials = []
    while strategy.closest_to_goal() is None:
        trials.append(strategy.propose())
        strategy.record(False, (), ratios(len(trials)))
    return trials


def failing(*values: float):
    """The number of the trial -> its ratios: the worst task's as given, the last value for all that follow."""
    return lambda number: {"task0_x": 0.9, "task1_x": values[min(number, len(values)) - 1], "task2_x": 0.95}


def test_the_first_trial_just_reaches_the_goal_and_releases_the_most_sensitive_layers():
    strategy = adaptive(conv1=0.5)
    first = strategy.propose()
    assert strategy.goal_saving <= saved_bytes(first) < 1.3 * strategy.goal_saving
    assert not {layer for _, layer in layers_in(first)} & {"conv1"}


def test_every_search_tries_the_same_trials_whatever_they_reach():
    """So that what one of them reached also holds for a search with other targets."""
    one, other = goal_trials(adaptive(), failing(0.8)), goal_trials(adaptive(), failing(0.2, 0.99, 0.1))
    assert set(one) == set(other) and len(one) == len(set(one)) > 1
    assert one[0] == other[0]
    assert all(saved_bytes(trial) >= adaptive().goal_saving for trial in one)


def test_the_closest_trial_is_the_one_whose_worst_task_is_best():
    strategy = adaptive()
    trials = goal_trials(strategy, failing(0.7, 0.85, 0.6))
    assert strategy.closest_to_goal() == (trials[1], failing(0.85)(1))


def test_the_search_goes_on_when_no_trial_reaches_the_goal():
    strategy = adaptive()
    tried = set(goal_trials(strategy, failing(0.97)))
    following = strategy.propose()
    assert following is not None and following not in tried


def test_the_state_survives_json_but_not_another_goal():
    strategy = adaptive()
    first = strategy.propose()
    strategy.record(False, (), failing(0.8)(1))
    state = json.loads(json.dumps(strategy.state()))
    same, other = adaptive(), adaptive(0.6)
    for resumed in (same, other):
        resumed.load_state(json.loads(json.dumps(state)))
    assert same.propose() == strategy.propose() != first
    assert same.goal_ratios == strategy.goal_ratios != {}
    assert other.goal_ratios == {} and saved_bytes(other.propose()) >= other.goal_saving


def test_without_a_goal_nothing_is_tried_for_it():
    strategy = adaptive(None)
    strategy.record(False, (), failing(0.8)(1))
    assert strategy.goal_ratios == {} and strategy.closest_to_goal() is None
