"""What comes before sensitivity is predicted, and after a failure that kept little."""

import json

import pytest
from pico import PicoNet

from gemel.sharing.groups import restrict, saved_bytes
from gemel.strategies.adaptive import Adaptive
from gemel.strategies.base import FirstStep
from gemel.strategies.curves import ExpectedLoss

NAMES = ("task0_x", "task1_x", "task2_x")


def models(**more) -> dict:
    return {name: PicoNet(**more) for name in NAMES}


def step_of(strategy: Adaptive):
    """The small step that is proposed, and what it saves of what is possible."""
    step = strategy.propose()
    return step, saved_bytes(step) / saved_bytes(strategy.groups)


def test_where_trials_take_long_the_largest_layers_come_before_the_prediction():
    strategy = Adaptive(models(width=32))
    strategy.begin_with(lambda groups: FirstStep(0.9))
    assert not strategy.needs_sensitivity, "not before the small step"
    step, share = step_of(strategy)
    largest = sorted(strategy.groups, key=lambda group: -group.bytes)
    assert 0.9 <= share < 1 and set(step) == set(largest[: len(step)])
    assert share - largest[len(step) - 1].saved_bytes / saved_bytes(strategy.groups) < 0.9, "one fewer saves too little"
    strategy.record(True, NAMES, dict.fromkeys(NAMES, 1.03))
    assert strategy.kept == step and strategy.needs_sensitivity
    errors = {(group, task): 0.01 for group in strategy.groups for task in group.tasks}
    strategy.set_sensitivity(
        errors, reached=dict.fromkeys(NAMES, 1.03), losses=dict.fromkeys(NAMES, ExpectedLoss(0.01))
    )
    tied = len(step) / len(strategy.groups)
    assert tied < share, "of sensitivity, which is the same for all groups here"
    for curve in strategy.curves.values():
        assert curve.points == [(pytest.approx(tied), 1.03)], "what was reached with that share of sensitivity"
    assert strategy.propose() == strategy.groups


def test_a_small_step_that_fails_is_not_made_again():
    strategy = Adaptive(models(width=32))
    strategy.begin_with(lambda groups: FirstStep(0.9))
    step, _ = step_of(strategy)
    strategy.record(False, (), dict.fromkeys(NAMES, 0.9))
    assert strategy.needs_sensitivity
    again = Adaptive(models(width=32))
    again.begin_with(lambda groups: FirstStep(0.9))
    again.load_state(json.loads(json.dumps(strategy.state())))
    assert again.needs_sensitivity and again.propose() != step


def test_what_is_likely_to_succeed_is_tied_at_once_and_nothing_is_predicted_where_it_does():
    strategy = Adaptive(models(width=32))
    strategy.begin_with(lambda groups: FirstStep(1.0, 0.8))
    assert strategy.propose() == strategy.groups and strategy.chance(strategy.groups) == 0.8
    assert not strategy.needs_sensitivity
    strategy.record(True, NAMES, dict.fromkeys(NAMES, 1.03))
    assert not strategy.needs_sensitivity and strategy.propose() is None


def test_where_it_fails_sensitivity_is_predicted_and_what_was_reached_counts():
    strategy = Adaptive(models(width=32))
    strategy.begin_with(lambda groups: FirstStep(1.0, 0.8))
    strategy.record(False, NAMES[1:], {NAMES[0]: 0.95})
    assert strategy.needs_sensitivity and strategy.chance(strategy.groups) == 0.0
    errors = {(group, task): 0.01 for group in strategy.groups for task in group.tasks}
    strategy.set_sensitivity(errors, reached=dict.fromkeys(NAMES, 1.05))
    assert strategy.curves[NAMES[0]].points == [(1.0, 0.95)] and strategy.curves[NAMES[0]].unshared == 1.05
    assert strategy.propose() != strategy.groups


def stem_of(strategy: Adaptive):
    (stem,) = (group for group, is_stem in zip(strategy.groups, strategy.donors.stems, strict=True) if is_stem)
    return stem


def test_first_layers_of_models_trained_apart_wait_for_a_donor():
    strategy = Adaptive(models(width=8))
    strategy.begin_with(lambda groups: FirstStep(1.0, 0.8, ties_stems=False))
    stem = stem_of(strategy)
    assert set(strategy.propose()) == {*strategy.groups} - {stem} and strategy.chance(strategy.propose()) == 0.8
    strategy.record(True, NAMES, dict.fromkeys(NAMES, 1.03))
    assert strategy.needs_sensitivity, "which says who gives it"
    errors = {(group, task): 0.01 for group in strategy.groups for task in group.tasks}
    strategy.set_sensitivity(errors, misfit={**dict.fromkeys(errors, 0.1), (stem, NAMES[1]): 0.5})
    assert strategy.propose() == strategy.groups and strategy.donor_of(stem) == NAMES[1]


def test_nothing_is_predicted_for_a_first_layer_that_saves_next_to_nothing():
    strategy = Adaptive(models(width=128, extra=16))
    strategy.begin_with(lambda groups: FirstStep(1.0, 0.8, ties_stems=False))
    assert stem_of(strategy).saved_bytes < 0.002 * saved_bytes(strategy.groups)
    strategy.record(True, NAMES, dict.fromkeys(NAMES, 1.03))
    assert not strategy.needs_sensitivity and strategy.propose() is None


def test_where_a_first_step_without_first_layers_fails_what_it_reached_counts():
    """Also in a search that goes on from its state."""
    strategy = Adaptive(models(width=8))
    strategy.begin_with(lambda groups: FirstStep(1.0, 0.8, ties_stems=False))
    step = strategy.propose()
    strategy.record(False, NAMES[1:], {NAMES[0]: 0.95})
    again = Adaptive(models(width=8))
    again.load_state(json.loads(json.dumps(strategy.state())))
    again.begin_with(lambda groups: FirstStep(0.5))  # by what is reached when it goes on: too late
    for search in (strategy, again):
        stem = stem_of(search)
        errors = {(group, task): 1.0 if group == stem else 0.1 for group in search.groups for task in group.tasks}
        search.set_sensitivity(errors, reached=dict.fromkeys(NAMES, 1.05))
        ((share, ratio),) = search.curves[NAMES[0]].points
        assert ratio == 0.95 and share == pytest.approx(0.1 * len(step) / (1 + 0.1 * len(step)))
        assert search.propose() not in (step, search.groups)


def test_with_a_memory_goal_nothing_is_tied_before_the_prediction():
    strategy = Adaptive(models(width=32))
    strategy.goal_saving = saved_bytes(strategy.groups) // 2
    strategy.begin_with(lambda groups: FirstStep(1.0, 0.8))
    assert strategy.needs_sensitivity


def test_after_a_failure_that_keeps_little_the_least_sensitive_half_comes_next():
    strategy = Adaptive(models(width=32, extra=2))
    most = max(strategy.groups, key=lambda group: group.bytes)
    errors = {(group, task): 1.0 if group == most else 0.001 for group in strategy.groups for task in group.tasks}
    strategy.set_sensitivity(errors, reached=dict.fromkeys(NAMES, 1.5))
    assert strategy.propose() == strategy.groups
    strategy.record(False, (), dict.fromkeys(NAMES, 0.7))
    step, share = step_of(strategy)
    assert 0.5 <= share < 1 and most not in step
    strategy.keep_part(restrict(strategy.groups, NAMES[:2]))
    assert saved_bytes(strategy.kept) >= 0.5 * saved_bytes(strategy.groups)
    assert strategy.propose() != step, "as much is kept already"
