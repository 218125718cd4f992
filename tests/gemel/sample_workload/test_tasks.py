"""The tasks of the embedded default: their models."""

import pytest
import torch

from gemel.sample_workload import tasks as sample_tasks
from gemel.sample_workload.tasks import TASKS
from gemel.sharing.groups import find_groups
from gemel.workload import CLASSIFICATION


def test_backbones_have_the_same_layers_and_one_ancestor(prepared):
    """All four share layers, and a task's weights are nearer to its ancestor than to fresh ones."""
    models = {name: sample_tasks.load_trained(name, prepared) for name in TASKS}
    assert any(len(group.occurrences) == len(TASKS) for group in find_groups(models))
    for name, task in TASKS.items():
        prefix = "" if task.kind == CLASSIFICATION else "backbone.body."
        weight = models[name].state_dict()[f"{prefix}layer3.0.conv2.weight"].flatten()
        ancestor = sample_tasks.load_trained("ancestor_resnet12", prepared).state_dict()["layer3.0.conv2.weight"]
        assert torch.cosine_similarity(weight, ancestor.flatten(), dim=0) > 0.5
        assert not torch.equal(weight, ancestor.flatten())


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="no_such_task.*main_2nd_vehicles_resnet10"):
        sample_tasks.load_trained("no_such_task")
