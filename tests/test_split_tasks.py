"""A task that several ranks compute parts of: the same losses, weights and configuration as in one process."""

import copy
from dataclasses import replace

import pytest
import test_several_ranks
import torch
from pico import CPU
from rank_processes import on_ranks
from test_several_ranks import OPTIONS, flat, merge
from torch import nn

from gemel.environment import ranks
from gemel.merging import placement
from gemel.sharing.groups import compared_layers, find_groups
from gemel.sharing.tying import tie
from gemel.training.batches import own_part, split
from gemel.training.context import RoundContext
from gemel.training.distillation import Teacher
from gemel.training.step import Member
from gemel.training.united import united_state
from trainer import Round

PARTS = {"north_pico": {0: 4, 1: 2}, "south_pico": {1: 6}, "east_pico": {1: 3, 0: 3}}


def assign(parts):
    if ranks.size() > 1:
        ranks.assign({name: next(iter(on)) for name, on in parts.items()}, parts)


# ---- a step -----------------------------------------------------------------------------------------------------


def session_of(tasks, data, teaches: bool) -> Round:
    assign(PARTS)
    models = nn.ModuleDict({name: task.model for name, task in tasks.items()})
    unmerged, groups = copy.deepcopy(models).eval(), find_groups(models)
    if not ranks.is_first():  # as after a fit, which runs on the task's own rank alone
        models["north_pico"].fc.weight.data.zero_()
    tie(models, groups)
    members = {name: Member.of(task, data[name]) for name, task in tasks.items()}
    teachers = {
        name: Teacher(models[name], unmerged[name], compared_layers(models[name], name, groups))
        for name in ranks.taking_part(tasks)
    }
    options = replace(OPTIONS, feature_weight=float(teaches))
    return Round(models, members, options, RoundContext(device=CPU, seed=0), teachers if teaches else {})


def trained(tasks, data, teaches: bool) -> dict:
    """20 steps, both stages among them."""
    session = session_of(tasks, data, teaches)
    step, losses = session.training, []
    for _ in range(20):
        step.begin_stage(session.validation.active)
        assert step.step(session.validation.active) is None
        losses.append(float(step.loss))
    own = {key: value.clone() for key, value in step.own.state_dict().items()}
    moments = [state["exp_avg"].clone() for state in step.optimizer.state.values()]
    step.finish()
    state = {k: v for k, v in step.models.state_dict().items() if not k.endswith(("conv1.bias", "bn1.running_mean"))}
    return {"losses": losses, "samples": step.samples, "own": own, "moments": moments, "state": state}


@pytest.mark.parametrize("teaches", [False, True])
def test_losses_and_weights_of_20_steps_are_those_of_one_process(tasks, data, teaches):
    first, second = on_ranks(2, lambda: trained(tasks, data, teaches))
    one = trained(tasks, data, teaches)
    for found in (first, second):
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-5, abs=1e-5)
        assert found["samples"] == one["samples"]
        for key, value in one["state"].items():
            assert torch.allclose(found["state"][key].float(), value.float(), atol=1e-4), key


def test_both_ranks_hold_the_same_weights_statistics_and_moments_of_a_split_task(tasks, data):
    first, second = on_ranks(2, lambda: trained(tasks, data, True))
    split_tasks = [key for key in first["own"] if not key.startswith("south")]
    assert {key.split(".")[0] for key in first["own"]} == {"north_pico", "east_pico"}
    assert split_tasks and all(torch.equal(first["own"][key], second["own"][key]) for key in split_tasks)
    north = [key for key in first["own"] if key.startswith("north_pico.bn1.running")]
    assert all(first["own"][key].abs().sum() > 0 for key in north)
    assert len(first["moments"]) < len(second["moments"]), "what south_pico holds alone is with its own rank"


def test_parts_of_a_batch_follow_each_other():
    def cut():
        assign(PARTS)
        images, labels = torch.arange(6), list(range(6))
        own = [own_part((images, labels), task)[1] for task in ranks.taking_part(PARTS)]
        return [
            own,
            own_part((images[:3], labels[:3]), "north_pico")[1],
            len(split((images[:3], labels[:3]), 9, "north_pico")),
        ]

    first, second = on_ranks(2, cut)
    assert first == [[[0, 1, 2, 3], [3, 4, 5]], [0, 1], 2]
    assert second == [[[4, 5], list(range(6)), [0, 1, 2]], [2], 2]


def test_where_memory_is_short_the_other_rank_starts_the_step_again(tasks, data, monkeypatch):
    """What is not split is tried in smaller parts, after all ranks have come to the end of the step."""

    def trained_with_little() -> list:
        session = session_of(tasks, data, False)
        fails, model = [True], tasks["south_pico"].model
        if ranks.is_mine("south_pico"):
            model.register_forward_pre_hook(lambda *_: fail(fails))
        session.training.begin_stage(session.validation.active)
        reason = session.training.step(session.validation.active)
        return [reason, float(session.training.loss), session.members["south_pico"].num_parts]

    def fail(fails):
        if fails.pop() if fails else False:
            raise torch.OutOfMemoryError("no memory")

    first, second = on_ranks(2, trained_with_little)
    assert first[0] is second[0] is None and first[1] == second[1]
    assert [first[2], second[2]] == [1, 2]


def test_memory_that_runs_out_in_a_split_task_ends_the_run(tasks, data, monkeypatch):
    """Its other ranks wait in the middle of their parts."""
    session = session_of(tasks, data, False)
    monkeypatch.setattr(ranks, "parts_of", lambda task: {0: 6})

    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    tasks["south_pico"].model.register_forward_pre_hook(fail)
    session.training.begin_stage(session.validation.active)
    with pytest.raises(RuntimeError, match="south_pico: out of memory; allowed: a smaller batch_size"):
        session.training.step(session.validation.active)


# ---- a round that is resumed ------------------------------------------------------------------------------------


def test_a_round_is_saved_and_goes_on_with_any_number_of_ranks(tasks, data, monkeypatch):
    """What is saved is that of one process, and what is loaded and saved again is the same, bit by bit."""
    one = flat(test_several_ranks.interrupted(tasks, data))
    monkeypatch.setattr(test_several_ranks, "assign", lambda: assign(PARTS))
    saved, of_second = on_ranks(2, lambda: test_several_ranks.interrupted(tasks, data))
    expected = flat(saved)
    assert of_second == {} and expected.keys() == one.keys()
    assert [*saved["optimizer"]["state"]] == sorted(saved["optimizer"]["state"])

    def again() -> dict:
        session = test_several_ranks.session_of(tasks, data, saved=saved)
        session._begin()
        return copy.deepcopy(united_state(session._state(), session.training.models))

    for num_ranks in (1, 3):
        found = flat(on_ranks(num_ranks, again)[0])
        assert found.keys() == expected.keys()
        for path, value in expected.items():
            assert torch.equal(found[path], value) or "random" in path, path


def without_bias(model: nn.Module) -> None:
    """Takes away the bias in front of batch normalisation: its gradient is rounding alone, of which Adam makes steps,
    and running means follow it slowly, so that what a merge decides would depend on the order of sums."""
    model.bn1.running_mean -= model.conv1.bias.detach()
    model.conv1.bias = None


# ---- a merge ----------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["adaptive", "gemel"])
def test_a_merge_is_that_of_one_process(entries, datasets, tmp_path, monkeypatch, strategy):
    for entry in entries.values():
        without_bias(entry["model"])
    rate = 0.02 if strategy == "adaptive" else 0.001  # large steps make much of the last bit of a gradient's sum
    options = {"strategy": strategy, "tolerance": 0.85, "learning_rate": rate, "max_epochs": 6}
    monkeypatch.setattr(placement, "spread", lambda work, num_ranks, apart: {name: PARTS[name] for name in work})
    monkeypatch.setattr(placement, "evaluation_seconds", lambda task, data, device: (0.0, 1.0))
    several = on_ranks(2, lambda: merge(entries, tmp_path / "several", datasets, **options))
    one = merge(entries, tmp_path / "one", datasets, **options)
    assert any(steps for _, _, steps, _ in one["rounds"]) or strategy == "adaptive"
    for found in several:
        assert found["shared"] == one["shared"] != []
        assert found["rounds"] == one["rounds"]
        for name, state in one["states"].items():
            for key, value in state.items():
                assert torch.allclose(value, found["states"][name][key], rtol=1e-3, atol=1e-4), (name, key)
