import random

import pytest
import torch
from rank_processes import on_ranks

from gemel.environment import ranks


def told() -> dict:
    me = ranks.rank()
    found = {
        "gathered": ranks.gathered({"rank": me, "text": "x" * 9000 * me}),
        "united": ranks.united({f"of {me}": me}),
        "any": [ranks.any_of(me == 1), ranks.any_of(False)],
        "total": ranks.total_of(me + 0.5),
        "first": ranks.of_first(lambda: {"asked": me}),
        "sent": [bytes_.decode() for bytes_ in ranks.sent_to_first(f"from {me}".encode())],
    }
    tensors = {f"{me}/{name}": torch.full(shape, me + 1.0) for name, shape in (("a", (2, 3)), ("b", ()), ("c", (0,)))}
    found["tensors"] = ranks.united_tensors(tensors, torch.device("cpu"))
    large = torch.full((3, 5), float(me)).to(memory_format=torch.contiguous_format).t()
    ranks.broadcast([large, torch.zeros(2, dtype=torch.int64)], 2)
    return {**found, "large": large}


def test_ranks_tell_each_other_what_they_found():
    for number, found in enumerate(on_ranks(3, told)):
        assert [len(part["text"]) for part in found["gathered"]] == [0, 9000, 18000]
        assert found["united"] == {"of 0": 0, "of 1": 1, "of 2": 2}
        assert found["any"] == [True, False] and found["total"] == 4.5
        assert found["first"] == {"asked": 0}
        assert found["sent"] == (["from 0", "from 1", "from 2"] if number == 0 else [])
        assert {name: float(t.sum()) for name, t in found["tensors"].items() if name.endswith("a")} == {
            "0/a": 6.0,
            "1/a": 12.0,
            "2/a": 18.0,
        }
        assert len(found["tensors"]) == 9 and found["large"].eq(2.0).all()


def failing() -> list[str]:
    found = []
    for work in (first_fails, one_is_out_of_memory):
        try:
            work()
        except Exception as error:
            found.append(type(error).__name__)
    return found


def first_fails():
    def make():
        raise ValueError("no")

    ranks.of_first(make)


def one_is_out_of_memory():
    def work():
        if ranks.rank() == 1:
            raise MemoryError
        return {"done": True}

    ranks.together(work)


def test_errors_reach_all_ranks():
    """Else the others would wait for the one that failed."""
    assert on_ranks(2, failing) == [["ValueError", "OutOfMemoryError"], ["FirstRankFailed", "OutOfMemoryError"]]


def test_one_process_is_told_what_it_says():
    assert ranks.size() == 1 and ranks.is_first() and ranks.is_mine("anything")
    assert ranks.gathered({"a": 1}) == [{"a": 1}] and ranks.total_of(0.1) == 0.1
    assert ranks.of_first(lambda: (1, 2)) == (1, 2)  # not through JSON
    with pytest.raises(ZeroDivisionError):
        ranks.together(lambda: {"a": 1 / 0})


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_tasks_are_placed_by_cost(num_ranks):
    source = random.Random(num_ranks)
    costs = {f"task{i}": source.uniform(0.2, 3.0) for i in range(64)}
    owners = ranks.placed(costs, num_ranks)
    loads = [sum(costs[task] for task, owner in owners.items() if owner == number) for number in range(num_ranks)]
    assert list(owners) == list(costs)
    assert max(loads) <= 1.1 * sum(costs.values()) / num_ranks


def test_tasks_that_are_worked_on_apart_are_each_spread_over_the_ranks():
    costs = {"a1": 8.0, "a2": 8.0, "b1": 1.0, "b2": 1.0, "alone": 4.0}
    owners = ranks.placed(costs, 2, [["a1", "a2"], ["b1", "b2"]])
    assert owners["a1"] != owners["a2"] and owners["b1"] != owners["b2"]
    uneven = ranks.placed({"a1": 8.0, "a2": 1.0, "b1": 8.0, "b2": 1.0}, 2, [["a1", "a2"], ["b1", "b2"]])
    assert uneven["a1"] != uneven["b1"], "of equal ones the rank that has least to do in all"
