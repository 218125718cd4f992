"""The order of turns against all orders and random ones; batch sizes against all of them."""

import itertools
import random

import pytest
from edge_samples import profile_of, random_blocks

from gemel.edge.schedule import EXACT_TASKS, best_batches, best_order, cycle_bytes
from gemel.edge.simulator import Load, Plan, simulate


@pytest.mark.parametrize("num_tasks, seeds", [(3, 8), (5, 4), (6, 1)])
def test_no_order_moves_less(num_tasks, seeds):
    for seed in range(seeds):
        blocks = random_blocks(num_tasks, seed)
        tasks = list(blocks.needs)
        for factor in (1.0, 1.6):
            budget = int(factor * blocks.bytes_of(blocks.largest))
            found = best_order(blocks, budget)
            assert sorted(found) == sorted(tasks) and found[0] == tasks[0]
            others = ((tasks[0], *rest) for rest in itertools.permutations(tasks[1:]))
            least = min(cycle_bytes(blocks, order, budget) for order in others)
            assert cycle_bytes(blocks, found, budget) == least


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(3))
def test_no_order_of_eight_moves_less(seed):
    assert EXACT_TASKS == 8
    blocks = random_blocks(8, seed)
    tasks = list(blocks.needs)
    budget = int(1.3 * blocks.bytes_of(blocks.largest))
    others = ((tasks[0], *rest) for rest in itertools.permutations(tasks[1:]))
    least = min(cycle_bytes(blocks, order, budget) for order in others)
    assert cycle_bytes(blocks, best_order(blocks, budget), budget) == least


@pytest.mark.parametrize(
    "num_tasks, orders, seeds",
    [(10, 100, 1), pytest.param(40, 10000, 1, marks=pytest.mark.exhaustive)],
)
def test_many_models_move_little_more_than_in_the_best_random_order(num_tasks, orders, seeds):
    for seed in range(seeds):
        blocks = random_blocks(num_tasks, seed)
        rng = random.Random(seed)
        for factor in (1.0, 2.0):
            budget = int(factor * blocks.bytes_of(blocks.largest))
            tasks = list(blocks.needs)
            best = min(cycle_bytes(blocks, rng.sample(tasks, num_tasks), budget) for _ in range(orders))
            found = best_order(blocks, budget)
            assert sorted(found) == sorted(tasks)
            assert cycle_bytes(blocks, found, budget) <= 1.1 * best


def test_neighbours_share_most():
    """Two families whose members alternate in the results."""
    for seed in range(30):
        blocks = random_blocks(4, seed)
        budget = blocks.bytes_of(blocks.largest)
        given = cycle_bytes(blocks, list(blocks.needs), budget)
        found = cycle_bytes(blocks, best_order(blocks, budget), budget)
        assert found <= given
        if found < given:
            return
    pytest.fail("no workload on which the order mattered")


def test_batches_raise_the_least_share():
    """Against all sizes: within 3 points of the best, with far fewer simulations than there are combinations."""
    for seed in range(3):
        blocks = random_blocks(3, seed)
        profile, load = profile_of(blocks, 20, 5000), Load(30, 0.6, 600)
        budget = blocks.bytes_of(blocks.largest)

        def least(batches, blocks=blocks, profile=profile, load=load, budget=budget):
            counts = simulate(blocks, profile, budget, load, Plan(batches=batches))
            return min(task.share for task in counts.tasks.values())

        found = best_batches(blocks, profile, budget, load)
        all_sizes = itertools.product((1, 2, 4), repeat=3)
        best = max(least(dict(zip(blocks.needs, sizes, strict=True))) for sizes in all_sizes)
        assert least(found) >= best - 0.03
        assert least(found) >= least(dict.fromkeys(blocks.needs, 1))
