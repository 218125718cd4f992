"""Peak memory of fits and of merges, at small size."""

import pytest

from benchmarks import fit_memory


@pytest.mark.exhaustive
def test_the_peak_of_a_fit_is_measured_in_a_process_of_its_own(capsys):
    assert fit_memory.main(["squeezenet1_1:2:128", "--images", "40"]) == 0
    row = capsys.readouterr().out.splitlines()[2].split()
    assert row[:3] == ["squeezenet1_1:2:128", "40", "2048"]
    predicted, above, in_all = (float(figure) for figure in row[3:6])
    assert 20 < predicted < above < in_all


def test_a_whole_merge_is_measured(tmp_path, monkeypatch):
    found = fit_memory.measure_merge(fit_memory.Workload("squeezenet1_1", 2, 32), 16, 256 << 20)
    assert found["in all"] > 100 and found["seconds"] > 0


@pytest.mark.parametrize(
    "wrong", ["resnet18", "resnet17:2:32", "resnet18:1:32", "resnet18:2", "fasterrcnn_resnet50_fpn:2:32"]
)
def test_what_is_no_workload_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        fit_memory.main([wrong])
    assert "allowed: MODEL:COUNT:SIZE" in capsys.readouterr().err
