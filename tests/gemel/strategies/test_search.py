"""What the adaptive search expects of a trial, what it learns of one, and how it keeps a part of a failed one."""

import itertools
import json
import math

import pytest
from pico import PicoNet

from gemel.sharing.groups import find_groups, restrict, saved_bytes, verified_part
from gemel.strategies.adaptive import RISKS, Adaptive

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
    while (trial := strategy.propose()) is not None:
        trials.append(trial)
        strategy.record(False, ())
    assert len(trials) > 2 and not [group for trial in trials for group in trial if group.rank]


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
    bytes_of = [strategy._sensitivity_of(i, "task0_x") / group.bytes for i, group in enumerate(strategy.groups)]
    assert bytes_of == pytest.approx([1 / saved_bytes(strategy.groups)] * len(bytes_of))
    strategy.set_sensitivity({(first, "task0_x"): 0.7}, losses={"task0_x": 2.0}, reached={"task0_x": 1.1})
    assert strategy.predicted_sensitivity() == {first.occurrences[0]: 0.7} and not strategy.needs_sensitivity
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
    assert all(group.rank for group in strategy.adapted[:2])
    whole = strategy._tied_share(strategy.groups, "task0_x")
    without = strategy._tied_share((strategy.adapted[0], *strategy.groups[1:]), "task0_x")
    assert whole == pytest.approx(1.0)
    own = [group for group in find_groups(models(width=32)) if "task0_x" in group.tasks]
    assert without == pytest.approx(1 - own[0].bytes / sum(group.bytes for group in own))
