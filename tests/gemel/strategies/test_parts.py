"""Parts of what is missing, and how they are split."""

from gemel.strategies.parts import by_tasks, halves

PART = {0: ("a", "b"), 3: ("b",), 4: ("a", "b", "c"), 9: ("c",)}


def test_by_tasks_splits_every_group_and_leaves_none_without_a_task():
    assert by_tasks(PART, {"a", "c"}) == ({0: ("a",), 4: ("a", "c"), 9: ("c",)}, {0: ("b",), 3: ("b",), 4: ("b",)})
    assert by_tasks(PART, ()) == ({}, PART)
    assert by_tasks(PART, "abc") == (PART, {})


def test_halves_have_the_first_groups_first():
    assert halves(PART) == ({0: PART[0], 3: PART[3]}, {4: PART[4], 9: PART[9]})
    assert halves({9: ("c",), 0: ("a", "b"), 4: ("b",)}) == ({0: ("a", "b"), 4: ("b",)}, {9: ("c",)})
