"""The measured unmerged workload of a comparison."""

from dataclasses import replace

import pytest

from benchmarks import strategies
from benchmarks.conditions import measure_unmerged, open_bench
from gemel.evaluation.eval_method import evaluate
from gemel.workload import WorkloadError


def test_the_unmerged_workload_is_measured(arguments, tasks, data):
    bench = open_bench(strategies.parse_arguments([*arguments, "--jobs", "2"]))
    for name, accuracies in bench.unmerged.accuracies.items():
        test = data[name].test
        assert accuracies == (evaluate(tasks[name], data[name].val), test and evaluate(tasks[name], test))
    assert bench.unmerged.total_bytes > bench.unmerged.optimal_saved_bytes > 0
    assert bench.settings.jobs == 2 and set(bench.unmerged.fingerprints) == set(bench.workload.tasks)


def test_every_task_below_its_target_is_named(tasks, data):
    def broken(model, loader):
        raise RuntimeError("no such metric")

    wrong = dict(tasks)
    wrong["north_pico"] = replace(tasks["north_pico"], eval_method=lambda model, loader: 0.25, unmerged_acc=0.5)
    wrong["south_pico"] = replace(tasks["south_pico"], eval_method=broken)
    with pytest.raises(WorkloadError, match="2 problems") as error:
        measure_unmerged(wrong, data)
    assert "north_pico: unmerged_acc: got an unmerged model that reaches 0.2500 on val, 0.2250 below" in str(
        error.value
    )
    assert "south_pico: eval_method: got RuntimeError: no such metric" in str(error.value)
    assert set(measure_unmerged(tasks, data)) == set(tasks)
