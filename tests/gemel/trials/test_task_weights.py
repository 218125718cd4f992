"""How much each task counts in the next fit."""

import pytest

from gemel.thresholds import THRESHOLDS
from gemel.trials.task_weights import TaskWeights


def test_balance_moves_weight_to_what_lacks_and_learns_how_much_it_takes():
    balance = TaskWeights(["a", "b"])
    assert balance.update({"a": 0.96, "b": 1.04}) == pytest.approx(1.0)
    assert balance.weights["a"] > 1 > balance.weights["b"] and sum(balance.weights.values()) == pytest.approx(2)
    before = dict(balance.weights)
    assert balance.update({"a": 1.0, "b": 1.0}) == pytest.approx(1.0)
    assert balance.weights == pytest.approx(before), "level already"
    steep = TaskWeights(["a", "b"])
    steep.update({"a": 0.9, "b": 1.1})
    moved = steep.weights["a"]
    steep.update({"a": 1.1, "b": 0.9})
    assert max(steep.slopes.values()) <= THRESHOLDS.balance.max_slope
    assert steep.weights["a"] < moved, "too much was moved, some of it comes back"
