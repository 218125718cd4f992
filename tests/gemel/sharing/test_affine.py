"""Private scale and bias: what a layer computes with them, fits, ties and snapshots, the results folder, the search."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from pico import PicoNet
from results_samples import (
    HISTORY,
    assert_loaded_as_written,
    assert_plain_files_compute_the_same,
    fresh_models,
    pico_models,
    same_state,
    write,
)
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from gemel.fitting.least_squares import fit_group, sums_of, with_affine
from gemel.fitting.rows import Rows, is_normalised
from gemel.merging.resume import new_strategy
from gemel.options import MergeOptions
from gemel.results_store.files import ResultsError
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import seal
from gemel.results_store.verify import FAIL, verify
from gemel.results_store.write import repair, write_results
from gemel.sharing.adapters import adapter_bytes, adapter_of, fold, give_affine, plain_state, set_rank
from gemel.sharing.affine import affine_bytes, affine_of, is_sound
from gemel.sharing.groups import Group, Occurrence, find_groups, from_plain, joined, reconciled, saved_bytes, to_plain
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.signatures import find_layers
from gemel.sharing.tying import reset, restore_snapshot, retie, take_snapshot

LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (3, 4, 5)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2, stride=2), (2, 6, 9, 9)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 8, 8)),
    "without bias": (lambda: nn.Conv1d(4, 6, 3, bias=False), (2, 4, 8)),
}


def filled(layer: nn.Module) -> nn.Module:
    """With a scale and bias that have an effect."""
    give_affine(layer, True)
    for parameter in affine_of(layer).parameters():
        nn.init.uniform_(parameter, 0.5, 2.0)
    return layer


# ---- one layer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_scale_and_bias_is_a_layer_with_the_folded_weight(name, rank):
    torch.manual_seed(0)
    layer, inputs = LAYERS[name][0](), torch.randn(LAYERS[name][1])
    model = nn.Sequential(layer)
    alone = model(inputs)
    set_rank(layer, rank)  # before the affine: their order does not matter
    give_affine(layer, True)
    assert torch.equal(model(inputs), alone), "a new scale and bias have no effect"
    assert affine_bytes(layer) == sum(p.nbytes for p in affine_of(layer).parameters())
    filled(layer)
    if rank:
        nn.init.normal_(adapter_of(layer).up.weight)
    both = model(inputs)
    assert not torch.allclose(both, alone, atol=1e-2)
    plain = plain_state(model.state_dict(), ["0"])
    fold(layer)
    assert affine_of(layer) is None and adapter_of(layer) is None and not layer._forward_hooks
    assert torch.allclose(model(inputs), both, atol=1e-5)
    assert plain.keys() == model.state_dict().keys()
    assert all(torch.equal(plain[key], value) for key, value in model.state_dict().items())


def test_shapes_that_are_not_those_of_a_layer_and_its_scale_and_bias():
    own = {"weight": (7, 5), "bias": (7,)}
    assert is_sound(own, {"scale": (7,), "bias": (7,)}) and is_sound({"weight": (7, 5)}, {"scale": (7,)})
    assert not is_sound({}, {"scale": (7,)}), "no weight"
    assert not is_sound(own, {"scale": (7,)}) and not is_sound({"weight": (7, 5)}, {"scale": (7,), "bias": (7,)})
    assert not is_sound({**own, "bias": (5,)}, {"scale": (7,), "bias": (7,)}), "the layer's own bias"
    assert not is_sound(own, {"scale": (5,), "bias": (7,)}) and not is_sound(own, {"scale": (7,), "bias": (7, 1)})


def test_scale_and_bias_are_copied_with_their_layers_and_are_no_layer_of_their_own():
    torch.manual_seed(0)
    model = PicoNet()
    names, normalised = [layer.name for layer in find_layers(model)], is_normalised(model, "conv1")
    filled(model.conv1)
    assert [layer.name for layer in find_layers(model)] == names
    assert is_normalised(model, "conv1") == normalised is True
    other, inputs = copy.deepcopy(model).eval(), torch.rand(2, 3, 8, 8)
    before = model.eval()(inputs)
    assert torch.equal(other(inputs), before)
    other.conv1.affine.reset()
    assert torch.equal(model(inputs), before) and not torch.allclose(other(inputs), before)


def test_other_layers_cannot_have_them():
    for layer in (nn.ConvTranspose2d(4, 4, 3), nn.Embedding(3, 4), nn.LayerNorm(4)):
        with pytest.raises(ValueError, match="allowed: linear layers and convolutions"):
            give_affine(layer, True)


# ---- fits -----------------------------------------------------------------------------------------------


def models_and_group(bias: bool = True) -> tuple[nn.ModuleDict, Group]:
    models = nn.ModuleDict({name: nn.Sequential(nn.Linear(10, 6, bias)) for name in "ab"})
    group = Group("x", 240 + 24 * bias, (Occurrence("a", "0"), Occurrence("b", "0")))
    return models, replace(group, affine_bytes=affine_bytes(models["a"][0]))


@pytest.mark.parametrize("bias", [True, False])
def test_layers_that_differ_by_scale_and_bias_alone_are_fitted_exactly(bias):
    torch.manual_seed(0)
    models, group = models_and_group(bias)
    weight, rows = torch.randn(10, 6), {}
    for name, scale in (("a", torch.linspace(0.5, 1.5, 6)), ("b", torch.linspace(1.5, 0.5, 6))):
        x = torch.randn(1, 400, 10) + 1
        y = x @ weight * scale + bias * torch.randn(6)
        rows[name] = Rows(torch.cat([x, torch.ones(1, 400, 1)], 2) if bias else x, y)
    assert group.affine_bytes == 24 * (1 + bias)
    retie(models, (), (group,), copy.deepcopy(models))
    sums = {(name, "0"): sums_of(models, group, r) for name, r in rows.items()}
    fit = fit_group(models, group, sums, None, 1e-6, 800, reports_errors=True)
    for name, (x, y) in rows.items():
        left = (models[name](x[..., :10]).detach() - y).square().sum() / y.square().sum()
        assert float(left) < 1e-4 and fit.after[name] < 1e-4
    plain = Group(group.signature, group.bytes, group.occurrences)
    retie(models, (group,), (plain,), models)
    sums = {(name, "0"): sums_of(models, plain, r) for name, r in rows.items()}
    alone = fit_group(models, plain, sums, None, 1e-6, 800, reports_errors=True)
    assert min(alone.after.values()) > 0.05, "one set of weights does not serve both"


def test_an_adapter_is_fitted_to_what_scale_and_bias_leave_over():
    torch.manual_seed(0)
    rows = {
        n: Rows(torch.cat([torch.randn(1, 400, 10), torch.ones(1, 400, 1)], 2), torch.randn(1, 400, 6)) for n in "ab"
    }
    errors = []
    for rank in (0, 2, 6):
        models, group = models_and_group()
        if rank:
            group = replace(group, rank=rank, adapter_bytes=adapter_bytes(models["a"][0], rank))
        retie(models, (), (group,), copy.deepcopy(models))
        sums = {(n, "0"): sums_of(models, group, r) for n, r in rows.items()}
        fit = fit_group(models, group, sums, None, 1e-6, 800, reports_errors=True)
        errors.append(sum(fit.after.values()))
        for name, (x, y) in rows.items():
            left = (models[name](x[..., :10]).detach() - y).square().sum()
            centred = (y - y.mean(1, keepdim=True)).square().sum()
            assert float(left / centred) == pytest.approx(fit.after[name], abs=1e-4), "the bias has the adapter's mean"
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1] + 0.01


def test_which_layers_have_them():
    def net(*behind: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), *behind)

    def found(first: nn.Module, second: nn.Module) -> int:
        models = {"a_x": first, "b_x": second}
        return with_affine(models, find_groups(models)[0]).affine_bytes

    assert found(net(nn.GroupNorm(2, 4)), net(nn.ReLU())) == 32
    assert found(net(nn.BatchNorm2d(4)), net()) == 32, "one task does not normalise"
    assert found(net(nn.BatchNorm2d(4)), net(nn.BatchNorm2d(4))) == 0
    assert found(net(FrozenBatchNorm2d(4)), net(FrozenBatchNorm2d(4))) == 0
    assert found(nn.Linear(15, 5), nn.Linear(15, 5)) == 40
    assert found(nn.Linear(14, 5), nn.Linear(14, 5)) == 0, "more than an eighth of the layer"
    assert found(nn.ConvTranspose2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3)) == 0


# ---- configurations -------------------------------------------------------------------------------------


def with_all(models) -> tuple:
    groups = tuple(with_affine(models, group) for group in find_groups(models))
    assert any(group.affine_bytes for group in groups) and not all(group.affine_bytes for group in groups)
    return groups


def test_savings_are_net_and_survive_json():
    models = nn.ModuleDict({"a_x": PicoNet(), "b_x": PicoNet(), "c_x": PicoNet()})
    before, free, groups = distinct_bytes(models), find_groups(models), with_all(models)
    assert saved_bytes(groups) < saved_bytes(free)
    assert set(from_plain(json.loads(json.dumps(to_plain(groups))))) == set(groups)
    assert "affine_bytes" not in to_plain(free)[0]
    unmerged = copy.deepcopy(models)
    retie(models, (), groups, unmerged)
    assert before - distinct_bytes(models) == saved_bytes(groups)
    assert set(joined(groups, free)) == set(free) == set(reconciled(groups, free)), "the later configuration decides"
    retie(models, groups, free, unmerged)
    assert before - distinct_bytes(models) == saved_bytes(free)
    retie(models, free, (), unmerged)
    assert distinct_bytes(models) == before and same_state(unmerged, models)


def test_an_adapter_takes_the_place_of_scale_and_bias():
    models = nn.ModuleDict({"a_x": PicoNet(), "b_x": PicoNet()})
    groups, unmerged = with_all(models), copy.deepcopy(models)
    group = next(group for group in groups if group.affine_bytes)
    task, layer = group.occurrences[0]
    retie(models, (), (group,), unmerged)
    adapted = group.with_adapters(1, adapter_bytes(models[task].get_submodule(layer), 1))
    before = distinct_bytes(models)
    retie(models, (group,), (adapted,), unmerged)
    found = [models[o.task].get_submodule(o.layer) for o in group.occurrences]
    assert all(affine_of(one) is None and adapter_of(one).rank == 1 for one in found)
    assert distinct_bytes(models) - before == group.saved_bytes - adapted.saved_bytes


def fill_all(models, groups) -> None:
    for group in groups:
        for o in group.occurrences if group.affine_bytes else ():
            filled(models[o.task].get_submodule(o.layer))


def test_undo_restores_them_and_a_reset_is_without_effect():
    models = nn.ModuleDict({"a_x": PicoNet(), "b_x": PicoNet()}).eval()
    groups, unmerged = with_all(models), copy.deepcopy(models)
    plain = take_snapshot(models)
    retie(models, (), groups, unmerged)
    inputs = torch.rand(2, 3, 8, 8)
    tied = models["a_x"](inputs)
    fill_all(models, groups)
    expected, filled_in = models["a_x"](inputs), take_snapshot(models)
    assert not torch.allclose(tied, expected)
    reset(models, groups, unmerged)
    assert torch.equal(models["a_x"](inputs), tied)
    restore_snapshot(filled_in)
    assert torch.equal(models["a_x"](inputs), expected)
    retie(models, groups, (), unmerged)
    assert same_state(unmerged, models)
    restore_snapshot(filled_in)
    assert torch.equal(models["a_x"](inputs), expected)
    restore_snapshot(plain)
    assert same_state(unmerged, models) and not any(module._forward_hooks for module in models.modules())


# ---- the results folder ---------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    """(folder, models, manifest) of a result in which some layers have scales and biases, and one an adapter."""
    models = pico_models()
    groups = [*with_all(models)]
    index = next(i for i, group in enumerate(groups) if group.affine_bytes)
    task, layer = groups[index].occurrences[0]
    groups[index] = replace(groups[index], rank=1, adapter_bytes=adapter_bytes(models[task].get_submodule(layer), 1))
    retie(models, find_groups(models), tuple(groups), copy.deepcopy(models))
    fill_all(models, groups)
    for o in groups[index].occurrences:
        nn.init.normal_(adapter_of(models[o.task].get_submodule(o.layer)).up.weight)
    merged, saved = distinct_bytes(models), saved_bytes(tuple(groups))
    record = {"unmerged_acc": 0.9, "measured_unmerged_acc": 0.9, "target_acc": 0.8, "merged_acc": 0.85, "met": True}
    optimal = saved_bytes(find_groups(models))
    manifest = {
        "tasks": {n: {"task": "image_classification", "architecture": None, **record} for n in models},
        "shared_layers": to_plain(tuple(groups)),
        "memory": {
            "unmerged_bytes": merged + saved,
            "merged_bytes": merged,
            "saved_bytes": saved,
            "optimal_saved_bytes": optimal,
        },
        "run": {"history": HISTORY},
    }
    statistics = {"total_bytes": merged + saved, "optimal_saved_bytes": optimal, "history": HISTORY}
    return tmp_path, models, write_results(tmp_path, models, manifest, statistics)


def test_they_are_loaded_into_modules_that_have_none(written):
    path, models, _ = written
    assert_loaded_as_written(path, models)


def test_those_that_the_result_does_not_have_are_removed(tmp_path):
    models, handed_in = pico_models(1), fresh_models()
    write(tmp_path, models)
    filled(handed_in["b_x"].conv2)
    with pytest.raises(ResultsError, match="c_x: the results do not fit"):
        load_merged(tmp_path, {**handed_in, "c_x": PicoNet(9)})
    assert affine_of(handed_in["b_x"].conv2) is not None, "it is left as it was"
    assert same_state(models, load_merged(tmp_path, handed_in))
    assert affine_of(handed_in["b_x"].conv2) is None and not handed_in["b_x"].conv2._forward_hooks


def test_plain_files_hold_the_folded_weights(written):
    path, models, _ = written
    assert_plain_files_compute_the_same(path, models)
    assert not [check for check in verify(path) if check.status == FAIL]
    content = (path / "weights" / "a_x.pt").read_bytes()
    (path / "weights" / "a_x.pt").unlink()
    assert any("a_x.pt: rebuilt" in line for line in repair(path))
    assert (path / "weights" / "a_x.pt").read_bytes() == content


WRONG = {
    "no number": lambda group: group.update(affine_bytes="8"),
    "nothing": lambda group: group.update(affine_bytes=0),
    "other bytes": lambda group: group.update(affine_bytes=group["affine_bytes"] + 4),
    "none any more": lambda group: group.pop("affine_bytes"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_manifest_that_says_otherwise_than_the_store_is_refused(written, what):
    path, _, manifest = written
    handed_in = fresh_models()
    before = {name: list(model.state_dict()) for name, model in handed_in.items()}
    WRONG[what](next(group for group in manifest["shared_layers"] if "affine_bytes" in group))
    (path / "merged.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(ResultsError, match=r"affine_bytes|saved_bytes"):
        load_merged(path, handed_in)
    assert before == {name: list(model.state_dict()) for name, model in handed_in.items()}


def test_bytes_of_a_layer_without_scale_and_bias_are_refused(written):
    """The sums agree, but the layers are others."""
    path, _, manifest = written
    group = next(g for g in manifest["shared_layers"] if "affine_bytes" in g)
    other = next(g for g in manifest["shared_layers"] if "affine_bytes" not in g)
    assert len(group["occurrences"]) == len(other["occurrences"])
    other["affine_bytes"] = group.pop("affine_bytes")
    (path / "merged.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(ResultsError, match="has no private scale and bias in"):
        load_merged(path, fresh_models())


def test_a_model_that_cannot_have_them_is_refused_and_stays_as_it_is(written):
    path, _, _ = written
    handed_in = {**fresh_models(), "b_x": PicoNet(9)}
    with pytest.raises(ResultsError, match="b_x: the results do not fit the model"):
        load_merged(path, handed_in)
    assert not any(affine_of(module) for model in handed_in.values() for module in model.modules())


# ---- the search -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adaptive", "gemel", "all", "stem"])
def test_strategies_that_start_from_fitted_weights_propose_them(name):
    models = {f"task{i}_x": PicoNet() for i in range(2)}
    for initial_weights in ("least_squares", "mean"):
        options = MergeOptions(strategy=name, initial_weights=initial_weights)
        proposal = new_strategy(options, models, find_groups(models)).propose()
        fits = initial_weights == "least_squares" and name != "stem"
        assert any(group.affine_bytes for group in proposal) == fits


def test_the_search_of_adaptive_goes_on_with_them():
    models = {f"task{i}_x": PicoNet() for i in range(2)}
    strategy = new_strategy(MergeOptions(), models, find_groups(models))
    sensitivity = {(group, task): 0.1 for group in find_groups(models) for task in group.tasks}
    strategy.set_sensitivity(sensitivity, sensitivity)
    proposal = strategy.propose()
    expected = {group.occurrences for group in with_all(models) if group.affine_bytes}
    assert {group.occurrences for group in proposal if group.affine_bytes} == expected
    again = new_strategy(MergeOptions(), models, find_groups(models))
    again.load_state(json.loads(json.dumps(strategy.state())))
    assert again.propose() == proposal
