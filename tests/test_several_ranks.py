"""What several processes make of a merge is what one process makes of it; docs/multi_gpu.md."""

import copy
from dataclasses import replace

import pytest
import torch
from pico import same_state
from rank_processes import on_ranks
from torch import nn

from gemel.environment import ranks
from gemel.environment.clock import Clock
from gemel.environment.interrupts import Interrupted
from gemel.fitting.sequential_fit import fit_sequentially
from gemel.sharing.groups import find_groups
from gemel.sharing.holders import held_by, synchronise
from gemel.sharing.tying import tie
from gemel.training.context import RoundContext
from gemel.training.options import TrainingOptions
from gemel.training.outcome import Standing
from gemel.training.reduction import Reduction
from gemel.training.step import Member
from gemel.training.united import united_state
from gemel.trials.fit_samples import FitSamples
from merge_workloads import merge_workload
from trainer import Round, recover

CPU = torch.device("cpu")
OPTIONS = TrainingOptions(learning_rate=0.01, max_epochs=8, private_epochs=1.0, feature_weight=0.0)
OWNERS = {"north_pico": 0, "south_pico": 1, "east_pico": 0}


def assign():
    """The tasks to at most two ranks, a shared layer's tasks to both of them."""
    ranks.assign({name: owner % ranks.size() for name, owner in OWNERS.items()})


def merge(entries, results, datasets, **options) -> dict:
    manifest = merge_workload(entries, results, datasets=datasets, device="cpu", **options)
    states = {name: entry["model"].state_dict() for name, entry in entries.items()}
    kept = [[row["kept"], row["accuracies"], row["steps"], row["samples"]] for row in manifest["run"]["rounds"]]
    return {"shared": manifest["shared_layers"], "rounds": kept, "states": states}


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("strategy", ["adaptive", pytest.param("gemel", marks=pytest.mark.exhaustive)])
def test_a_merge_is_the_same_with_any_number_of_ranks(entries, datasets, tmp_path, strategy, num_ranks):
    rate = 0.02 if strategy == "adaptive" else 0.001  # large steps make much of the last bit of a gradient's sum
    options = {"strategy": strategy, "tolerance": 0.85, "learning_rate": rate, "max_epochs": 6}
    several = on_ranks(num_ranks, lambda: merge(entries, tmp_path / "several", datasets, **options))
    one = merge(entries, tmp_path / "one", datasets, **options)
    assert any(steps for _, _, steps, _ in one["rounds"]) or strategy == "adaptive"
    for found in several:
        assert found["shared"] == one["shared"] != []
        assert [row[0] for row in found["rounds"]] == [row[0] for row in one["rounds"]]
        assert [row[2:] for row in found["rounds"]] == [row[2:] for row in one["rounds"]]
        for name, state in one["states"].items():
            for key, value in state.items():
                assert torch.allclose(value, found["states"][name][key], atol=1e-5), (name, key)


# ---- a step -----------------------------------------------------------------------------------------------------


def session_of(tasks, data, **more) -> Round:
    assign()
    models = nn.ModuleDict({name: task.model for name, task in tasks.items()})
    tie(models, find_groups(models))
    members = {name: Member.of(task, data[name]) for name, task in tasks.items()}
    return Round(models, members, OPTIONS, RoundContext(device=CPU, seed=0, **more))


def losses(tasks, data, give_up: str = "") -> list[float]:
    """Of 20 steps, both stages among them; a task can be given up after half of them."""
    session = session_of(tasks, data)
    found = []
    for number in range(20):
        if number == 10 and give_up:
            session.members[give_up].progress.given_up = True
        session.training.begin_stage(session.validation.active)
        assert session.training.step(session.validation.active) is None
        found.append(float(session.training.loss))
    session.training.finish()
    named = dict(session.training.models.named_parameters())
    for name in [name for name in named if "conv1.bias" in name]:
        del named[name]  # its gradient is rounding alone, as batch normalisation is behind it: Adam makes steps of it
    return [*found, *(float(p.detach().double().sum()) for p in named.values())]


@pytest.mark.parametrize("num_ranks, give_up", [(2, ""), (2, "south_pico"), (2, "north_pico"), (3, "")])
def test_losses_and_weights_of_20_steps_are_those_of_one_process(tasks, data, num_ranks, give_up):
    """Also with a rank that holds nothing of what is shared."""
    several = on_ranks(num_ranks, lambda: losses(tasks, data, give_up))
    expected = losses(tasks, data, give_up)
    for found in several:
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_summed_gradients_lie_as_their_parameters_lie(tasks, data):
    """Also where the ranks' parameters lie differently: that of the first rank counts, and values are right."""

    def summed():
        assign()
        models = nn.ModuleDict({name: task.model for name, task in tasks.items()})
        tie(models, find_groups(models))
        if ranks.is_first():
            models.to(memory_format=torch.channels_last)
        shared = [models["north_pico"].conv1.weight, models["north_pico"].conv2.weight]
        reduction = Reduction(models, shared, CPU)
        for number, parameter in enumerate(shared[: 2 - ranks.rank()]):  # the second has a gradient on one rank
            parameter.grad = torch.arange(parameter.numel()).view(parameter.shape) * (1.0 + number + ranks.rank())
        reduction.reduce(torch.zeros(()), 1, False)
        return [[p.grad.clone(), p.grad.is_contiguous(memory_format=torch.channels_last)] for p in shared]

    for (first, lies_first), (second, lies_second) in on_ranks(2, summed):
        assert torch.equal(first.flatten(), torch.arange(first.numel()) * 3.0) and lies_first
        assert torch.equal(second.flatten(), torch.arange(second.numel()) * 2.0) and lies_second


@pytest.mark.parametrize("name", ["north_pico", "south_pico"])
def test_one_task_alone_is_trained_in_what_it_holds_alone(tasks, data, name):
    """Wherever it is: the other ranks, which train nothing, come to the same end and the same weights."""

    def trained():
        assign()
        models = nn.ModuleDict({task: tasks[task].model for task in tasks})
        tie(models, find_groups(models))
        options = replace(OPTIONS, max_epochs=2.0, private_epochs=2.0)
        context = RoundContext(device=CPU, seed=0, fitted={name: Standing(0.9, 0.1)}, beside=tuple(tasks))
        outcome = recover(models, {name: tasks[name]}, data, options, context)
        state = {key: value.clone() for key, value in models.state_dict().items()}
        return [outcome.reason, outcome.steps, outcome.accuracies, state]

    several = on_ranks(2, trained)
    before = {key: value.clone() for key, value in tasks[name].model.state_dict().items()}
    expected = trained()
    assert expected[1] > 0 and any(not torch.equal(v, before[k]) for k, v in tasks[name].model.state_dict().items())
    for found in several:
        assert found[:3] == expected[:3]
        assert all(torch.allclose(found[3][key], value, atol=1e-5) for key, value in expected[3].items())


def test_a_loss_that_is_not_finite_ends_the_round_on_all_ranks(tasks, data):
    def reasons():
        session = session_of(tasks, data)
        if ranks.is_mine("south_pico"):
            tasks["south_pico"].model.fc.bias.data.fill_(torch.nan)
        session.training.begin_stage(session.validation.active)
        return session.training.step(session.validation.active)

    assert on_ranks(2, reasons) == ["loss not finite"] * 2


def test_what_is_private_is_held_by_its_own_rank_alone(tasks, data):
    def held():
        training = session_of(tasks, data).training
        holders = held_by(training.models)
        private = {p for p, owners in holders.items() if len(owners) == 1}
        of_others = [p for p in training.optimizer.param_groups[0]["params"] if holders[p] == {1 - ranks.rank()}]
        averaged = sum(p.numel() for p in training.averaged.parameters())
        return [len(of_others), len(private), averaged]

    (none, _, first), (also_none, _, second) = on_ranks(2, held)
    assert none == also_none == 0
    whole = sum(p.numel() for p in session_of(tasks, data).training.averaged.parameters())
    assert max(first, second) < whole


# ---- a round that is resumed ------------------------------------------------------------------------------------


class EndsAfter(Clock):
    """Somebody asks for an end after so many steps."""

    def __init__(self, num_steps: int):
        super().__init__()
        self.left = num_steps

    def stop_asked(self) -> bool:
        self.left -= 1
        return self.left < 0


def interrupted(tasks, data) -> dict:
    """The state of a round that is interrupted, as it is written."""
    saved = {}
    models = nn.ModuleDict({name: task.model for name, task in tasks.items()})
    tie(models, find_groups(models))
    assign()

    def save(state, last):
        saved.update(copy.deepcopy(united_state(state, models)))

    context = RoundContext(device=CPU, seed=0, clock=EndsAfter(18), save=save)
    with pytest.raises(Interrupted):
        recover(models, tasks, data, OPTIONS, context)
    return saved


def flat(state, name: str = "") -> dict:
    """Every number and tensor of a state, by its path; without those of a bias that rounding alone decides."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {path: value for key, item in items for path, value in flat(item, f"{name}/{key}").items()}
    return {name: torch.as_tensor(state, dtype=torch.float64)} if isinstance(state, torch.Tensor | float | int) else {}


def test_the_state_of_a_round_is_that_of_one_process(tasks, data):
    """Also what the optimizer holds of each parameter, by its position among those of all tasks."""
    (several, _), one = on_ranks(2, lambda: interrupted(tasks, data)), interrupted(tasks, data)
    found, expected = flat(several), flat(one)
    assert found.keys() == expected.keys() and several["step"] == one["step"] > 0
    assert [*several["optimizer"]["state"]] == sorted(one["optimizer"]["state"])
    for path, value in expected.items():
        if "random" not in path and "conv1.bias" not in path:
            scale = float(value.abs().max())
            assert torch.allclose(found[path], value, atol=1e-3 * scale + 1e-5, rtol=1e-3), path


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_round_goes_on_with_another_number_of_ranks(tasks, data, num_ranks):
    """What is loaded and saved again is the same, bit by bit."""
    saved = on_ranks(2, lambda: interrupted(tasks, data))[0]

    def again() -> dict:
        session = session_of(tasks, data, saved=saved)
        session._begin()
        return copy.deepcopy(united_state(session._state(), session.training.models))

    found, expected = flat(on_ranks(num_ranks, again)[0]), flat(saved)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert torch.equal(found[path], value) or "random" in path, path


# ---- a fit ------------------------------------------------------------------------------------------------------


def fitted(tasks, images, memory: float) -> dict:
    assign()
    models = nn.ModuleDict({name: task.model for name, task in tasks.items()})
    unmerged = copy.deepcopy(models).eval()
    groups = find_groups(models)
    tie(models, groups)
    samples = FitSamples(lambda task, pixels, largest: cut(images[task], largest), memory, len(tasks), 0)
    own, teacher_samples = samples.of(unmerged, groups, 1)
    fits = fit_sequentially(models, unmerged, groups, own, teacher_samples=teacher_samples)
    synchronise(models)
    return {
        "states": {name: model.state_dict() for name, model in models.items()},
        "reasons": [f.reason for f in fits.values()],
    }


def cut(batches, largest: float) -> list:
    size = int(min(largest, 8))
    return [batch[start : start + size] for batch in batches for start in range(0, len(batch), size)]


@pytest.mark.parametrize("memory", [1 << 30, 1 << 20], ids=["at once", "in turn"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_fitted_weights_are_those_of_one_process(tasks, num_ranks, memory):
    source = torch.Generator().manual_seed(0)
    images = {name: [torch.rand(8, 3, 16, 16, generator=source) for _ in range(4)] for name in tasks}
    images["east_pico"] = [list(batch) for batch in images["east_pico"]]
    several = on_ranks(num_ranks, lambda: fitted(tasks, images, memory))
    one = fitted(tasks, images, memory)
    assert not any(one["reasons"])
    for found in several:
        assert all(same_state(state, found["states"][name]) for name, state in one["states"].items())
