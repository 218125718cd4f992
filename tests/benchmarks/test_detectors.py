"""The check of every detector: one that works, and what is reported for those that do not."""

import pytest

from benchmarks import detectors


def test_a_detector_is_built_tied_fitted_and_trained():
    cells, good = detectors.row_of("fcos_model")
    assert good and len(cells) == len(detectors.HEADER), cells
    assert "99." in cells[4] and "100 % of bytes fitted" in cells[5]


@pytest.mark.exhaustive
def test_failed_steps_are_reported(monkeypatch, capsys):
    monkeypatch.setattr(detectors, "frcnn_eval", lambda model, loader: 1.5)
    monkeypatch.setattr(detectors, "LEARNING_RATE", 0.0)
    assert detectors.main(["fcos_model"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: AssertionError: 1.5" in printed and "the losses rose" in printed


def test_a_detector_that_cannot_be_built_is_a_row_too(monkeypatch, capsys):
    def build(name, num_classes, **arguments):
        raise ValueError("no such part")

    monkeypatch.setattr(detectors, "build", build)
    assert detectors.main(["fcos_model", "yolov3"]) == 1
    assert capsys.readouterr().out.count("FAILED: ValueError: no such part") == 4, "when it is done, and in the table"


def test_an_unknown_detector_is_refused(capsys):
    with pytest.raises(SystemExit):
        detectors.main(["resnet50"])
    assert "got resnet50; allowed: " in capsys.readouterr().err
