"""A task that several ranks compute parts of: the same losses, weights and configuration as in one process."""

import copy
from dataclasses import replace

import pytest
from pico import CPU
from rank_processes import on_ranks
from test_several_ranks import OPTIONS
from torch import nn

from gemel.environment import ranks
from gemel.sharing.groups import compared_layers, find_groups
from gemel.sharing.tying import tie
from gemel.training.context import RoundContext
from gemel.training.distillation import Teacher
from gemel.training.step import Member
from trainer import Round

SPLIT = {"north_pico": {0: 5, 1: 3}, "east_pico": {1: 4, 0: 4}}
OWNERS = {"north_pico": 0, "south_pico": 1, "east_pico": 1}


def session_of(tasks, data, teaches) -> Round:
    ranks.assign({name: owner % ranks.size() for name, owner in OWNERS.items()}, SPLIT if ranks.size() > 1 else None)
    models = nn.ModuleDict({name: task.model for name, task in tasks.items()})
    unmerged = copy.deepcopy(models).eval()
    groups = find_groups(models)
    tie(models, groups)
    members = {name: Member.of(task, data[name]) for name, task in tasks.items()}
    options = replace(OPTIONS, feature_weight=1.0 if teaches else 0.0)
    teachers = {
        name: Teacher(models[name], unmerged[name], compared_layers(models[name], name, groups))
        for name in ranks.taking_part(tasks)
    }
    return Round(models, members, options, RoundContext(device=CPU, seed=0), teachers if teaches else {})


def losses(tasks, data, teaches):
    session = session_of(tasks, data, teaches)
    found = []
    for _ in range(20):
        session.training.begin_stage(session.validation.active)
        assert session.training.step(session.validation.active) is None
        found.append(float(session.training.loss))
    session.training.finish()
    named = dict(session.training.models.named_parameters())
    return {"losses": found, "samples": session.training.samples, "state": {k: p.detach() for k, p in named.items()}}


@pytest.mark.parametrize("teaches", [False, True])
def test_losses(tasks, data, teaches):
    first, second = on_ranks(2, lambda: losses(tasks, data, teaches))
    one = losses(tasks, data, teaches)
    print(first["losses"], one["losses"])
    assert first["samples"] == second["samples"] == one["samples"]
    for found in (first, second):
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-5, abs=1e-5)
