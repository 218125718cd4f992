"""The live models of a merge: what is kept of a trial, and what is undone."""

import copy

import pytest
import torch
from pico import CPU, merger_of, same_state

from gemel.environment.clock import TimeOver
from gemel.sharing.adapters import has_additions, own_modules
from gemel.sharing.affine import affine_of
from gemel.sharing.groups import find_groups, verified_part
from gemel.sharing.tying import is_tied
from gemel.training.outcome import OUT_OF_MEMORY
from gemel.trials import state as module
from gemel.trials.initialisation import WeightFitter
from gemel.trials.state import MergeState
from gemel.workload import CLASSIFICATION


@pytest.fixture
def run(tasks, data, tmp_path):
    return merger_of(tasks, data, tmp_path / "results", strategy="adaptive", num_threads=1)


def additions(model) -> set[str]:
    return {name for name, module in own_modules(model) if has_additions(module)}


@pytest.mark.parametrize("met", [["north_pico"], ["north_pico", "south_pico"]])
def test_a_part_has_scales_where_it_shares_and_weights_with_them_where_it_does_not(run, met):
    """A task at target shares a layer with tasks that failed: alone, the layer takes in its private scale and bias."""
    proposal = run.strategy.propose()
    private = [group for group in proposal if group.private_bytes]
    assert any(set(met) < set(group.tasks) for group in private)
    run.state.begin_trial(proposal, "mean")
    torch.manual_seed(0)
    for o in (o for group in private for o in group.occurrences):
        torch.nn.init.uniform_(affine_of(run.state.models[o.task].get_submodule(o.layer)).scale, 0.5, 2.0)
    part = verified_part((), proposal, met)
    shared = {o for group in part if group.private_bytes for o in group.occurrences}
    assert bool(shared) == (len(met) > 1)
    images, models = torch.rand(2, 3, 16, 16), run.state.models.eval()
    with torch.no_grad():
        before = {task: models[task](images) for task in met}
        run.state.keep_part(part, met)
        assert all(torch.allclose(models[task](images), before[task], atol=1e-5) for task in met)
    for task, model in models.items():
        assert additions(model) == {o.layer for o in shared if o.task == task}
    for task in set(models) - set(met):
        own = models[task].state_dict()
        assert all(torch.equal(value, own[key]) for key, value in run.state.unmerged[task].state_dict().items())


def test_looking_at_what_tying_all_would_do_leaves_no_trace_even_if_its_end_is_interrupted(tasks, monkeypatch):
    state = MergeState(tasks, CPU)
    groups, before = find_groups(state.models), copy.deepcopy(state.models.state_dict())
    with state.all_tied(groups):
        assert all(is_tied(state.models, group) for group in groups)
    assert same_state(state.models.state_dict(), before) and not any(is_tied(state.models, g) for g in groups)

    def cut_short(snapshot):
        raise TimeOver

    with pytest.raises(TimeOver), monkeypatch.context() as patched, state.all_tied(groups):
        patched.setattr(module, "restore_snapshot", cut_short)
    state.undo()
    assert same_state(state.models.state_dict(), before) and not any(is_tied(state.models, g) for g in groups)


def test_smaller_adapters_are_fitted_to_what_is_kept_not_to_the_unmerged_models(tasks, data, tmp_path):
    """What a task learned while it was trained with larger adapters stays; shared weights begin as they are."""
    run = merger_of(tasks, data, tmp_path / "results", strategy="adaptive", adapter_budget=0.3)
    state, groups = run.state, tuple(run.strategy.adapted.full)
    assert any(group.rank > 1 for group in groups)
    state.begin_trial(groups, "mean")
    torch.manual_seed(0)
    with torch.no_grad():  # trained: something else than the unmerged models do
        for parameter in state.models.parameters():
            parameter.add_(0.1 * parameter.std(unbiased=False) * torch.randn_like(parameter))
    state.keep(groups)
    smaller = tuple(g.with_adapters(g.rank - 1, g.adapter_bytes) if g.rank > 1 else g for g in groups)
    new = tuple(group for group in smaller if group not in set(groups))
    errors = {}
    for needs_copies in (True, False):
        kept = copy.deepcopy(state.models)
        state.begin_trial(smaller, "mean", needs_copies)
        assert (state.as_kept is not None) == needs_copies
        if state.as_kept is not None:
            assert all(is_tied(state.as_kept, group) for group in groups)
            live = set(map(id, state.models.parameters()))
            assert not any(p.requires_grad or id(p) in live for p in state.as_kept.parameters())
        fitter = WeightFitter(state, run.evaluator, run.images, run.strategy.donor_of)
        fitter.fit(new, run.tasks, 1, 1)
        errors[needs_copies] = difference(run, kept)
        state.undo()
        assert same_state(state.models.state_dict(), kept.state_dict())
    assert errors[True] < 0.5 * errors[False]


def test_memory_that_runs_out_while_the_kept_models_are_copied_undoes_the_round(run, monkeypatch):
    def no_memory(models):
        raise torch.OutOfMemoryError("no memory for copies")

    run.preflight()
    run.store()
    before = copy.deepcopy(run.state.models.state_dict())
    monkeypatch.setattr(type(run.strategy), "fits_to_what_is_kept", True)
    monkeypatch.setattr(module, "deep_copy", no_memory)
    assert run.play_round(run.strategy.propose()), "the search goes on"
    assert run.record.rounds[-1]["reason"] == OUT_OF_MEMORY
    assert not run.state.tied and same_state(run.state.models.state_dict(), before)


def test_unused_memory_is_given_back_before_each_trial(tasks, monkeypatch):
    state, given_back = MergeState(tasks, CPU), []
    monkeypatch.setattr(module, "give_back_unused", lambda: given_back.append(state.tied))
    state.begin_trial(find_groups(state.models), "mean")
    assert given_back == [()]


def difference(run, others) -> float:
    """Of what live models put out to what others do, of classifiers, relative to that."""
    found = []
    for name, task in run.tasks.items():
        if task.kind == CLASSIFICATION:
            images = run.images.first_of(name, 16, "test")
            with torch.no_grad():
                outputs, wanted = run.state.models[name].eval()(images), others[name].eval()(images)
            found.append(float((outputs - wanted).square().sum() / wanted.square().sum()))
    return max(found)
