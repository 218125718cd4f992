"""The sequential test: how often it is wrong, how soon it is right, and that its capital is a fair game."""

import itertools
import random

import pytest

from gemel.edge.falling_mean import FallingMean


def fell_at(test: FallingMean, values) -> int | None:
    return next((count for count, value in enumerate(values, 1) if test.observe(value)), None)


def coins(mean: float, count: int, seed: int):
    rng = random.Random(seed)
    return (float(rng.random() < mean) for _ in range(count))


@pytest.mark.parametrize("level", [0.5, 0.9, 1.0])
def test_the_capital_of_a_fair_game_does_not_grow(level):
    """Over all sequences of coins whose mean is the level, its mean is exactly 1."""
    expected = 0.0
    for values in itertools.product((0.0, 1.0), repeat=8):
        test, probability = FallingMean(level, 1e-9), 1.0
        for value in values:
            test.observe(value)
            probability *= level if value else 1 - level
        if probability:
            expected += probability * test.evidence
            assert test.evidence >= 0
    assert expected == pytest.approx(1.0)


def test_false_alarms_at_the_level_itself_are_no_more_than_stated():
    """The worst case: the mean is just what is allowed. 1,000 observations, 200 runs, alpha 0.2."""
    wrong = sum(fell_at(FallingMean(0.9, 0.2), coins(0.9, 1000, seed)) is not None for seed in range(200))
    assert wrong <= 0.2 * 200


def test_a_fall_is_found_soon_also_after_a_long_time():
    for before in (0, 20_000):
        test = FallingMean(0.85, 0.05)
        assert fell_at(test, coins(0.95, before, 1)) is None
        assert fell_at(test, coins(0.5, 200, 2)) < 60


def test_partial_agreement_counts():
    """F1 of a detector lies between 0 and 1."""
    assert fell_at(FallingMean(0.9, 0.05), [0.6] * 200) < 100
    assert fell_at(FallingMean(0.9, 0.05), [0.9] * 5000) is None


def test_a_level_of_zero_is_never_undercut():
    assert fell_at(FallingMean(0.0, 0.05), [0.0] * 1000) is None


@pytest.mark.parametrize("level, alpha", [(-0.1, 0.05), (1.1, 0.05), (0.5, 0.0), (0.5, 1.0)])
def test_wrong_settings_are_refused(level, alpha):
    with pytest.raises(ValueError, match="allowed: level in"):
        FallingMean(level, alpha)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_wrong_observation_is_refused(value):
    with pytest.raises(ValueError, match="allowed: in"):
        FallingMean(0.5, 0.05).observe(value)
