"""Why a group is not shared: the word and the number are those of the round that failed."""

from gemel.merging.why_not import add_attempts, not_shared
from gemel.sharing.groups import Group, Occurrence


def group(size: int, *tasks: str, layer: str = "conv") -> Group:
    return Group(f"Conv2d({size}, {size}): weight", size, tuple(Occurrence(task, layer) for task in tasks))


def row(accuracies, met, reason="given up"):
    return {
        "trained": sorted(accuracies),
        "met": met,
        "accuracies": accuracies,
        "targets": dict.fromkeys(accuracies, 0.5),
        "reason": reason,
    }


def entry_of(whole, kept, rounds=(), attempts=None, untried=None, sensitivity=None):
    (entry,) = not_shared((whole,), kept, rounds, attempts or {}, sensitivity or {}, untried)
    return entry


def test_a_group_that_is_wholly_shared_has_no_entry():
    whole = group(10, "a", "b", "c")
    assert not_shared((whole,), (whole,), [], {}, {}, None) == []


def test_what_a_part_leaves_out_and_what_it_would_still_save():
    whole = group(10, "a", "b", "c", "d")
    part, other = whole.restricted_to("abc"), group(10, "c", "d")
    entry = entry_of(whole, (part,), untried="the time was over")
    assert entry["occurrences"] == [{"task": "d", "layer": "conv"}] and entry["could_save_bytes"] == 10
    assert (entry["why"], entry["detail"]) == ("not tried", "the time was over")
    split = entry_of(whole, (whole.restricted_to("ab"), other))
    assert split["could_save_bytes"] == 10 and [o["task"] for o in split["occurrences"]] == ["c", "d"]


def test_the_task_that_failed_and_its_round():
    whole, attempts = group(10, "a", "b"), {}
    add_attempts(attempts, 1, (whole,), ())
    add_attempts(attempts, 2, (whole,), ())
    rounds = [row({"a": 0.1, "b": 0.9}, ["b"]), row({"a": 0.4, "b": 0.3, "c": 0.1}, [])]
    entry = entry_of(whole, (), rounds, attempts, sensitivity={Occurrence("a", "conv"): 0.25})
    assert (entry["why"], entry["round"], entry["task"]) == ("below target", 2, "b"), "c has no layer in the group"
    assert (entry["accuracy"], entry["target"], entry["sensitivity"]) == (0.3, 0.5, 0.25)


def test_a_round_without_memory_says_so():
    whole, attempts = group(10, "a", "b"), {}
    add_attempts(attempts, 1, (whole,), ())
    entry = entry_of(whole, (), [row({"a": 0.0, "b": 0.0}, [], "out of memory")], attempts)
    assert (entry["why"], entry["round"]) == ("out of memory", 1) and "task" not in entry


def test_what_was_kept_is_no_failed_attempt():
    whole, attempts = group(10, "a", "b", "c"), {}
    add_attempts(attempts, 1, (whole,), (whole.restricted_to("ab"),))
    assert attempts == {"c": {"conv": 1}}


def test_everything_was_tried_but_not_this():
    assert entry_of(group(10, "a", "b"), ())["why"] == "not worth a trial"
