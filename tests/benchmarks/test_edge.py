"""The benchmark of the edge at small size."""

import pytest

from benchmarks import edge


def test_a_row_per_budget(capsys):
    command = ["--architectures", "squeezenet1_1", "squeezenet1_1", "--size", "32", "--budgets", "2"]
    assert edge.main([*command, "--seconds", "0.1", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "2 tasks" in printed and len(printed.strip().splitlines()) == 5
    assert "other" not in printed, "bytes are as simulated"


@pytest.mark.exhaustive
def test_a_long_run_says_what_memory_it_takes(capsys):
    command = ["--architectures", "squeezenet1_1", "squeezenet1_1", "--size", "32"]
    edge.main([*command, "--minutes", "0.05"])  # flat or not: of a run of seconds it says nothing
    printed = capsys.readouterr().out
    assert "from the second tenth on within" in printed
    assert "not counted: task0_squeezenet1_1 0, task1_squeezenet1_1 0" in printed
