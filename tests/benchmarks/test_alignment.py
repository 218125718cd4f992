"""Ways to match layers and to align channels, compared on a pico workload."""

from benchmarks import alignment


def test_every_combination_is_a_row(workload_file, datasets, monkeypatch, capsys):
    monkeypatch.setattr(alignment, "MATCHINGS", ("order", "weights"))
    arguments = ["--workload", str(workload_file), "--datasets", str(datasets), "--device", "cpu", "--batches", "1"]
    assert alignment.main(arguments) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert "north_pico" in header and len(rows) == 2 * (1 + len(alignment.METHODS))
    assert [row.split()[1:3] for row in rows[:2]] == [["order", "-"], ["order", next(iter(alignment.METHODS))]]


def test_wrong_input_is_reported(tmp_path, capsys):
    assert alignment.main(["--workload", str(tmp_path / "none.py")]) == 2
    assert "which is no file" in capsys.readouterr().err
