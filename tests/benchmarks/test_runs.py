"""The settings of a run."""

from benchmarks import runs, strategies
from benchmarks.conditions import open_bench


def test_the_published_settings(arguments, workload_file):
    bench = open_bench(strategies.parse_arguments(arguments))
    published = runs.run_spec(bench, strategies.VARIANTS["gemel-published"], 3)
    ours = runs.run_spec(bench, strategies.VARIANTS["gemel"], 3)
    changed = {k for k, v in ours["settings"]["options"].items() if published["settings"]["options"][k] != v}
    expected = {"learning_rate", "initial_weights", "statistics_batches", "average_decay", "warmup_steps"}
    assert changed == expected and published["settings"]["options"]["seed"] == 3
