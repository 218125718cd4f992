"""Merges whose first trial takes many training steps, and a round by itself, for tests of what interrupts them."""

import torch
from torch import nn

from gemel.training.context import RoundContext
from gemel.training.options import TrainingOptions
from gemel.training.step import Member
from merge_workloads import merge_workload
from trainer import Round

CPU = torch.device("cpu")
QUICK = {"learning_rate": 0.02, "max_epochs": 60, "patience_epochs": 10, "tolerance": 0.85}
# Everything tied at random weights: the trial takes many steps, and several validations.
SLOW = {**QUICK, "strategy": "all", "initial_weights": "first", "learning_rate": 0.005}


def merge(entries, results, datasets, **options) -> dict:
    return merge_workload(entries, results, datasets=datasets, device="cpu", **{**SLOW, **options})


def state_of(entries) -> dict:
    models = nn.ModuleDict({name: entry["model"] for name, entry in entries.items()})
    return {key: value.clone() for key, value in models.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def round_of(models, tasks, data, options=None) -> Round:
    members = {name: Member.of(task, data[name]) for name, task in tasks.items()}
    return Round(models, members, options or TrainingOptions(), RoundContext(CPU, 0))
