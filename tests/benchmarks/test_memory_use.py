"""Memory that is predicted beside what is used, at small size."""

import pytest

from benchmarks import memory_use


def test_a_workload_is_measured(monkeypatch, capsys):
    small = memory_use.Workload({"squeezenet1_1": 2}, 32, 16, {"strategy": "all"})
    monkeypatch.setitem(memory_use.WORKLOADS, "small", small)
    found = memory_use.measure("small", "cpu")
    assert found["rounds"] == 1 and found["steps"] > 0 and found["trained"]
    assert found["before"] < found["used_bytes"] and found["predicted_by_phase"]["training"] > found["before"]


def test_an_unknown_workload_is_refused(capsys):
    with pytest.raises(SystemExit):
        memory_use.main(["--only", "nothing"])
    assert "classifiers_tied" in capsys.readouterr().err
