"""The loss that sensitivity is expected to cost follows what trials measured."""

import json
import math

import pytest

from benchmarks.expected_losses import Outcome, collect, compare, main, surprise
from gemel.strategies.curves import Curve, ExpectedLoss
from gemel.thresholds import THRESHOLDS


def write_result(folder, names, loss: ExpectedLoss, kind="image_classification", by_components=False):
    """A merge whose trials cost exactly that, at three shares of sensitivities of .01, .1, 1."""
    curves, sensitivity = {}, []
    for number, name in enumerate(names):
        total = 0.01 * 10**number
        sensitivity += [[0, name, 0.25 * total], [1, name, 0.75 * total]]
        points = [(share, 1.05 - loss.factor * (total * share) ** loss.exponent) for share in (0.1, 0.5, 1.0)]
        curves[name] = Curve(1.05, 0.3, points).state()
    state = {"curves": curves, "sensitivity": sensitivity}
    run = {"strategy_state": {"components": [state]} if by_components else state}
    folder.mkdir(parents=True)
    manifest = {"tasks": {name: {"task": kind} for name in names}, "run": run}
    (folder / "merged.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_outcomes_are_read_of_every_workload_once(tmp_path):
    loss = ExpectedLoss(0.2, 0.5)
    write_result(tmp_path / "first", ["a", "b"], loss)
    write_result(tmp_path / "again", ["b", "a"], loss)
    write_result(tmp_path / "deep" / "down", ["c"], loss, by_components=True)
    write_result(tmp_path / "detectors", ["d"], loss, kind="object_detection")
    found = collect([tmp_path], "image_classification")
    assert {name: len(outcomes) for name, outcomes in found.items()} == {"a, b": 6, "c": 3}
    for outcomes in found.values():
        for sensitivity, cost in outcomes:
            assert cost == pytest.approx(0.2 * math.sqrt(sensitivity))
    assert set(collect([tmp_path], "object_detection")) == {"d"}


def test_a_merge_that_needed_no_prediction_says_nothing(tmp_path):
    write_result(tmp_path / "predicted", ["a"], ExpectedLoss(0.2, 0.5))
    write_result(tmp_path / "at_once", ["b"], ExpectedLoss(0.2, 0.5))
    file = tmp_path / "at_once" / "merged.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    manifest["run"]["strategy_state"]["sensitivity"] = []
    file.write_text(json.dumps(manifest), encoding="utf-8")
    assert set(collect([tmp_path], "image_classification")) == {"a"}


def test_surprise_is_the_negative_logarithm_of_a_normal_density():
    search = THRESHOLDS.search
    spread = math.hypot(search.noise, search.uncertainty * 0.1)
    expected = -math.log(math.exp(-0.5 * (0.05 / spread) ** 2) / (spread * math.sqrt(2 * math.pi)))
    assert surprise(ExpectedLoss(0.2, 0.5), [Outcome(0.25, 0.15)]) == pytest.approx(expected)


def test_the_loss_that_made_the_outcomes_is_chosen_with_every_workload_left_out(tmp_path):
    truth = ExpectedLoss(0.06, 0.5)
    for name in "uvw":
        write_result(tmp_path / name, [f"{name}{i}" for i in range(3)], truth)
    text = compare(collect([tmp_path], "image_classification"), ExpectedLoss(2.0))
    rows = [line.split() for line in text.splitlines()]
    assert rows[2][:2] == ["2", "1"] and rows[2][-2:] == ["in", "use"]
    surprises = [float(row[2]) for row in rows[3:8]]
    assert surprises == sorted(surprises) and surprises[0] < float(rows[2][2])
    factor, exponent = map(float, rows[3][:2])
    assert exponent == truth.exponent and truth.factor / 2 < factor <= truth.factor, "doubts grow with the factor"
    assert f"left out: {factor:g} and 0.5 3 times" in text


def test_the_command_says_when_there_is_nothing_to_fit_to(tmp_path, capsys):
    write_result(tmp_path / "one", ["a"], ExpectedLoss(0.1))
    assert main([str(tmp_path)]) == 1
    assert "image_classification: 3 outcomes of 1 workloads" in capsys.readouterr().out
    write_result(tmp_path / "two", ["b"], ExpectedLoss(0.1))
    assert main([str(tmp_path)]) == 0
    assert "in use" in capsys.readouterr().out
