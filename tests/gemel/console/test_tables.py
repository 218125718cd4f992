"""What people read: columns that stay where they are, and numbers that are those of the manifest."""

import pytest
from pico import PicoNet, classification_entry

from gemel.console import tables
from gemel.sharing.groups import find_groups
from gemel.sharing.memory import distinct_bytes
from gemel.workload import read_workload

ROW = {
    "round": 3,
    "what": "Conv2d(64, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)",
    "num_new_groups": 7,
    "tasks": ["a_x", "b_x"],
    "trained": ["a_x", "b_x", "c_x"],
    "met": ["b_x", "c_x"],
    "accuracies": {"a_x": 0.4, "b_x": 0.9, "c_x": 0.9},
    "targets": {"a_x": 0.5, "b_x": 0.8, "c_x": 0.8},
    "kept": False,
    "reason": "given up",
    "saved_bytes": 3 << 20,
    "optimal_saved_bytes": 4 << 20,
    "steps": 120,
    "seconds": 61.4,
}


def test_a_round_is_one_row_under_its_header():
    undone, kept = tables.round_row(ROW), tables.round_row({**ROW, "met": ROW["trained"], "kept": True})
    header = tables.round_header()
    undone, below = undone.split("\n")
    assert undone.startswith("3      7 groups, 2 tasks ") and "2/3 undone: given up" in undone
    for title, cell in (("at target", "2/3"), ("saved", "3.00 MiB"), ("of optimal", "75.0 %"), ("time", "61 s")):
        assert undone.index(cell) == header.index(title)
    assert below == "       below target: a_x 0.400 of 0.500" and max(map(len, (header, undone, kept))) <= tables.WIDTH
    assert "3/3 kept" in kept and kept.endswith("61 s") and "\n" not in undone


@pytest.mark.parametrize("test_acc, last", [(0.5, "0.600 -> 0.500"), (None, "-")])
def test_the_closing_table_says_who_met_the_target_and_what_was_saved(test_acc, last):
    task = {"measured_unmerged_acc": 0.9, "target_acc": 0.855, "merged_acc": 0.86, "met": True}
    tested = {"unmerged_test_acc": None if test_acc is None else 0.6, "test_acc": test_acc}
    memory = {
        "unmerged_bytes": 8 << 20,
        "merged_bytes": 6 << 20,
        "saved_bytes": 2 << 20,
        "optimal_saved_bytes": 4 << 20,
    }
    lines = tables.closing_table({"tasks": {"a_x": {**task, **tested}}, "memory": memory, "run": {"seconds": 65}})
    *_, row, summary = lines.split("\n")
    assert row.split() == ["a_x", "0.900", "0.855", "0.860", "yes", *last.split()]
    assert summary == "memory 8.00 MiB -> 6.00 MiB: saved 2.00 MiB (25.0 %), 50.0 % of the optimal 4.00 MiB, in 65 s"
    rounds = [{**ROW, "training_seconds": 2.5, "reading_seconds": 0.25}, {**ROW, "steps": 0}]
    trained = {"tasks": {"a_x": {**task, **tested}}, "memory": memory, "run": {"seconds": 65, "rounds": rounds}}
    last_line = tables.closing_table(trained).splitlines()[-1]
    assert last_line == "training: 120 steps in 2.5 s, of which 0.2 s waiting for images"


def test_what_could_be_saved_before_anything_is_trained():
    tasks, _ = read_workload({f"{name}_x": classification_entry(PicoNet(width=64), 0.5) for name in "abc"})
    models = {name: task.model for name, task in tasks.items()}
    groups, total = find_groups(models), distinct_bytes(models)
    header, _, *rows, summary = tables.workload_table(tasks, models, groups).split("\n")
    assert header.split() == ["task", "kind", "model", "layers", "size", "shareable", "unmerged", "target"]
    assert [row.split()[0] for row in rows] == list(tasks) and rows[0].split()[-2:] == ["0.500", "0.475"]
    saved = sum(group.saved_bytes for group in groups)
    assert f"{total / 2**20:.2f} MiB in all" in summary and f"would save {saved / 2**20:.2f} MiB" in summary
    plan = tables.plan_table(groups, total, limit=1).split("\n")
    assert plan[2].startswith("Conv2d(64, 64") and plan[3].startswith("and 2 more, ")
    assert plan[4] == f"in all {saved / 2**20:.2f} MiB of {total / 2**20:.2f} MiB ({100 * saved / total:.1f} %)"


def test_nothing_of_nothing_is_all_of_it():
    assert tables.share(0, 0) == "100.0 %" and tables.share(1, 4) == "25.0 %"
