"""Measured and predicted sensitivity on a pico workload."""

import copy

import torch
from torch import nn

from benchmarks import sensitivity
from benchmarks.probes import Probe
from gemel.sharing.groups import find_groups


def test_sensitivity_is_measured_without_changing_the_models(probe):
    states = copy.deepcopy(probe.models.state_dict())
    classifiers = Probe(
        probe.tasks,
        nn.ModuleDict({n: probe.models[n] for n in ("north_pico", "south_pico")}),
        probe.teachers,
        probe.images,
        probe.val,
        probe.device,
    )
    groups = sensitivity.sample_groups(find_groups(classifiers.models), 2, 0)
    measured = sensitivity.measured_sensitivity(classifiers, groups, 6)
    pairs = {(group, task) for group in groups for task in group.tasks}
    assert all(set(scores) == pairs for scores in measured.values())
    assert len(set(measured["cross-entropy"].values())) == 4
    found = sensitivity.predictions(classifiers, groups, 6, 0)
    assert all(set(scores) == pairs for scores, _ in found.values())
    assert all(torch.equal(states[key], value) for key, value in probe.models.state_dict().items())


def test_detectors_are_refused(probe, monkeypatch, capsys):
    monkeypatch.setattr(sensitivity, "open_probe", lambda *_: probe)
    assert sensitivity.main([]) == 2
    assert "east_pico: task: got 'object_detection'; allowed: image_classification" in capsys.readouterr().err
