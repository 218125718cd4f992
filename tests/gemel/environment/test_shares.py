import random

import pytest

from gemel.environment.ranks import placed
from gemel.environment.shares import (
    Evaluation,
    Work,
    evaluators,
    loads,
    shares_of_threads,
    split_first,
    spread,
)


def longest(work, num_ranks: int) -> float:
    """The most that a rank has to do, over the total divided by the number of ranks."""
    total = sum(one.seconds for one in work.values())
    return max(loads(work, spread(work, num_ranks), num_ranks)) / (total / num_ranks)


def of_costs(costs, num_images: int = 8, split_seconds: float = 0.0) -> dict:
    return {task: Work(seconds, num_images, split_seconds) for task, seconds in costs.items()}


def computing(costs) -> dict:
    return {task: Evaluation(0.0, seconds) for task, seconds in costs.items()}


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("num_images", [2, 16])
def test_64_uneven_tasks_are_evened_out(num_ranks, num_images):
    for seed in range(5):
        source = random.Random(seed)
        costs = {f"task{i}": 30 ** source.random() for i in range(64)}
        assert longest(of_costs({**costs, "task0": 40.0}, num_images, 0.5), num_ranks) <= 1.1


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_a_task_that_costs_a_quarter_of_all_is_split_over_as_few_ranks_as_needed(num_ranks):
    costs = {f"task{i}": 1.0 for i in range(63)} | {"heavy": 21.0}
    parts = spread(of_costs(costs), num_ranks)
    assert [task for task, on in parts.items() if len(on) > 1] == (["heavy"] if num_ranks == 8 else [])
    assert len(parts["heavy"]) == (2 if num_ranks == 8 else 1)
    assert longest(of_costs(costs), num_ranks) <= 1.1


def test_three_equal_tasks_on_two_ranks():
    parts = spread(of_costs({"a": 1.0, "b": 1.0, "c": 1.0}), 2)
    assert sorted(len(on) for on in parts.values()) == [1, 1, 2]
    assert all(sum(on.values()) == 8 for on in parts.values())
    assert sorted(parts["a"].values()) == [4, 4]


def test_nothing_is_split_that_is_even_or_cannot_be_or_costs_too_much():
    even = {f"task{i}": 1.0 for i in range(8)}
    costs = {"a": 1.0, "b": 1.0, "c": 1.0}
    for work in (
        of_costs(even),
        of_costs(costs, num_images=1),
        of_costs(costs, split_seconds=0.6),
        of_costs(costs, split_seconds=float("inf")),
        of_costs({"a": 0.0}),
    ):
        owners = placed({task: one.seconds for task, one in work.items()}, 2)
        assert spread(work, 2) == {task: {owners[task]: work[task].num_images} for task in work}


def test_sets_that_are_worked_on_apart_are_evened_out_apart():
    work = of_costs({"a": 4.0, "b": 3.0, "c": 1.0})
    assert all(len(on) == 1 for on in spread(work, 2).values())
    parts = spread(work, 2, [["a", "c"], ["b"]])
    assert len(parts["b"]) == 2 and len(parts["a"]) == 2


def test_the_ranks_of_a_split_task_begin_and_end_it_together():
    work = of_costs({"alone": 1.0, "split": 4.0}, split_seconds=0.5)
    parts = {"alone": {1: 8}, "split": {0: 4, 1: 4}}
    assert loads(work, parts, 3) == [2.5, 3.5, 0.0]
    assert split_first(work, parts) == ["split", "alone"]


def test_the_same_costs_give_the_same_parts():
    source = random.Random(1)
    work = of_costs({f"task{i}": 30 ** source.random() for i in range(20)}, split_seconds=0.1)
    assert spread(work, 8) == spread(dict(work), 8)


def test_evaluations_are_shared_so_that_all_ranks_are_done_at_the_same_time():
    costs, owners = {"a": 8.0, "b": 5.0, "c": 1.0}, {"a": 0, "b": 1, "c": 0}
    assert evaluators(computing(costs), owners, 2) == {"a": {0: 0.75, 1: 0.25}, "b": {1: 1.0}, "c": {0: 1.0}}
    even = {"a": 5.0, "b": 5.0}
    assert evaluators(computing(even), owners, 2) == {"a": {0: 1.0}, "b": {1: 1.0}}
    assert evaluators(computing({"a": 4.0, "b": 0.0}), owners, 2) == {"a": {0: 0.5, 1: 0.5}, "b": {1: 1.0}}
    assert evaluators(computing({"a": 0.0}), owners, 2) == {"a": {0: 1.0}}


def test_the_rank_of_a_task_reads_all_of_its_images():
    shares = evaluators({"a": Evaluation(reading=1.0, computing=2.0)}, {"a": 0}, 2)["a"]
    assert shares == pytest.approx({0: 0.4, 1: 0.6})
    assert 1.0 + 2.0 * shares[0] == pytest.approx((1.0 + 2.0) * shares[1])


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_evaluations_of_uneven_tasks(num_ranks):
    source = random.Random(num_ranks)
    costs = {f"task{i}": 30 ** source.random() for i in range(8)}
    shares = evaluators(computing(costs), {task: i % num_ranks for i, task in enumerate(costs)}, num_ranks)
    busy = [sum(costs[task] * own.get(rank, 0.0) for task, own in shares.items()) for rank in range(num_ranks)]
    assert max(busy) <= 1.1 * sum(busy) / num_ranks
    assert all(sum(own.values()) == pytest.approx(1.0) for own in shares.values())


@pytest.mark.parametrize(
    ("costs", "owners", "rank", "expected"),
    [
        ({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": [0], "b": [1], "c": [1]}, 1, {"b": 1, "c": 2}),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": [0], "b": [1], "c": [1]}, 0, {"a": 1}),
        ({"a": 1.5, "b": 1.0, "c": 1.0}, {"a": [0], "b": [1], "c": [1]}, 1, {"b": 1, "c": 1}),  # a is not done yet
        ({"b": 1.0, "c": 1.0}, {"b": [1], "c": [1]}, 1, {"b": 2, "c": 2}),  # a was given up
        ({"a": 1.0, "b": 1.0, "s": 2.0}, {"s": [0, 1], "a": [1], "b": [1]}, 1, {"a": 2, "b": 2}),
    ],
)
def test_a_rank_takes_the_threads_of_those_that_are_done(costs, owners, rank, expected):
    parts = {task: dict.fromkeys(on, 8 // len(on)) for task, on in owners.items()}
    assert shares_of_threads(of_costs(costs), parts, rank, range(2)) == expected


def test_threads_of_other_machines_cannot_be_taken():
    costs, parts = {"a": 1.0, "b": 1.0}, {"a": {2: 8}, "b": {2: 8}}
    assert shares_of_threads(of_costs(costs), parts, 2, [2, 3]) == {"a": 2, "b": 2}
    assert shares_of_threads(of_costs(costs), parts, 2, [2]) == {"a": 1, "b": 1}
