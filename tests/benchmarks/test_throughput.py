"""Ratios of training steps, measured at small size."""

import pytest

from benchmarks import throughput


def test_steps_and_layouts_are_compared(capsys):
    small = ["--device", "cpu", "--pixels", "32", "--batch", "2", "--repeats", "1", "--only", "step", "layout"]
    throughput.main([*small, "--models", "mobilenet_v3_small"])
    lines = capsys.readouterr().out.splitlines()
    titles = [line.partition(":")[0].replace("bfloat16, as", "float32, as") for line in lines]  # either may be chosen
    assert titles == [
        "joint step of 3 tied mobilenet_v3_small / sum of plain steps, 32 px",
        "plain step of resnet18 in NCHW and float32 / channels-last",
        "plain step of resnet18 in NCHW and float32 / bfloat16 autocast",
        "plain step of resnet18 in NCHW and float32 / both",
        "plain step of resnet18 in NCHW and float32 / channels-last in float32, as chosen",
    ]
    assert all(0 < float(line.split(": ")[1].split()[0]) < 100 for line in lines)


@pytest.mark.exhaustive
def test_steps_on_files_are_compared_with_steps_on_tensors(capsys, monkeypatch):
    monkeypatch.setattr(throughput, "NUM_FILES", 8)
    monkeypatch.setattr(throughput, "FILE_SIZE", (64, 64))
    throughput.main(["--device", "cpu", "--pixels", "32", "--batch", "4", "--repeats", "1", "--only", "data"])
    lines = capsys.readouterr().out.splitlines()
    kinds = ("image_classification", "object_detection")
    parts = ("training, {}, first pass", "training, {}", "evaluation, {}")
    wanted = [f"data path, {part.format(kind)}" for kind in kinds for part in parts]
    assert [line.partition(":")[0] for line in lines] == wanted
    assert all(0 < float(line.split(": ")[1].split()[0]) < 100 for line in lines)


@pytest.mark.exhaustive
def test_a_whole_merge_and_the_metric_are_measured(capsys, monkeypatch):
    monkeypatch.setattr(throughput, "NUM_FILES", 8)
    monkeypatch.setattr(throughput, "FILE_SIZE", (64, 64))
    small = ["--device", "cpu", "--pixels", "32", "--batch", "4", "--repeats", "1"]
    throughput.main([*small, "--only", "merge", "metric"])
    lines = capsys.readouterr().out.splitlines()
    merges = [line for line in lines if line.startswith("whole merge")]
    assert ["classification" in line for line in merges] == [True, False]
    assert all(0 < float(line.split("on the device: ")[1].split()[0]) < 100 for line in merges)
    shares = [line for line in lines if line.startswith("evaluation of 2 detectors, 8 images each: by_pycocotools")]
    assert len(shares) == 1 and 0 < float(shares[0].split("takes ")[1].split("%")[0]) < 100
