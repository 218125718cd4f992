"""Adapters: what a layer computes with one, fits, ties and snapshots, the results folder, the search."""

import copy
import json

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

from gemel.fitting.least_squares import fit_group
from gemel.fitting.moments import moments_of
from gemel.fitting.rows import Rows, is_normalised
from gemel.results_store.files import ResultsError
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import seal
from gemel.results_store.verify import FAIL, verify
from gemel.results_store.write import repair, update_run, write_results
from gemel.sharing.adapters import (
    adapter_bytes,
    adapter_of,
    can_have_affine,
    fold,
    is_sound,
    max_rank,
    owns_its_weight,
    plain_state,
    rank_within,
    set_rank,
)
from gemel.sharing.groups import Group, Occurrence, find_groups, from_plain, joined, restrict, saved_bytes, to_plain
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.signatures import find_layers
from gemel.sharing.tying import is_tied, restore_snapshot, retie, take_snapshot, tie, untie
from gemel.strategies.adaptive import Adaptive

LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2, stride=2), (2, 6, 9, 9)),
    "circular": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular", bias=False), (2, 4, 8)),
    "dilated": (lambda: nn.Conv3d(3, 5, 2, dilation=2, padding="same"), (1, 3, 4, 5, 6)),
}


def filled(layer: nn.Module, rank: int = 2) -> nn.Module:
    """With an adapter whose output is not zero."""
    set_rank(layer, rank)
    for parameter in adapter_of(layer).parameters():
        nn.init.normal_(parameter)
    return layer


# ---- one layer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_its_adapter_is_a_layer_with_the_folded_weight(name):
    torch.manual_seed(0)
    layer, inputs = LAYERS[name][0](), torch.randn(LAYERS[name][1])
    model = nn.Sequential(layer)
    alone = model(inputs)
    set_rank(layer, 2)
    assert torch.equal(model(inputs), alone), "a new adapter adds nothing"
    both = nn.Sequential(filled(layer))(inputs)
    assert not torch.allclose(both, alone, atol=1e-2)
    assert adapter_bytes(layer, 2) == sum(p.nbytes for p in adapter_of(layer).parameters())
    plain = plain_state(model.state_dict(), ["0"])
    fold(layer)
    assert adapter_of(layer) is None and not layer._forward_hooks
    assert torch.allclose(model(inputs), both, atol=1e-5)
    assert plain.keys() == model.state_dict().keys()
    assert all(torch.equal(plain[key], value) for key, value in model.state_dict().items())


def test_adapters_are_moved_and_copied_with_their_layers():
    torch.manual_seed(0)
    model = nn.Sequential(filled(nn.Conv2d(3, 4, 3)))
    inputs = torch.randn(2, 3, 6, 6)
    expected = model(inputs)
    other = copy.deepcopy(model)
    nn.init.zeros_(other[0].low_rank.up.weight)
    assert torch.equal(model(inputs), expected) and not torch.allclose(other(inputs), expected)
    assert torch.allclose(model.double()(inputs.double()).float(), expected, atol=1e-5)
    assert torch.allclose(model.float().to(memory_format=torch.channels_last)(inputs), expected, atol=1e-5)


def test_ranks_within_a_budget():
    layer = nn.Conv2d(8, 16, 3, bias=False)  # 1152 numbers, 88 per rank
    assert rank_within(layer, 0.125) == 1 and rank_within(layer, 0.25) == 3 and rank_within(layer, 0.05) == 0
    assert max_rank(layer) == 16 and max_rank(nn.Conv2d(8, 8, 3, groups=8)) == 1
    for other in (nn.ConvTranspose2d(4, 4, 3), nn.Embedding(3, 4), nn.LayerNorm(4)):
        assert max_rank(other) == 0 and rank_within(other, 0.4) == 0
        with pytest.raises(ValueError, match="allowed: 0 to 0"):
            set_rank(other, 1)
    state = torch.get_rng_state()
    set_rank(layer, 3)
    assert torch.equal(torch.get_rng_state(), state), "other random numbers stay the same"


def test_a_layer_that_cannot_have_additions():
    """Its weight or bias is computed from others, or it uses their names itself."""
    plain, computed, named = (nn.Linear(4, 4) for _ in range(3))
    of_bias = nn.Linear(4, 4)
    nn.utils.parametrizations.weight_norm(computed)
    nn.utils.parametrize.register_parametrization(of_bias, "bias", nn.Tanh())
    named.low_rank = named.affine = "a user's own"
    assert owns_its_weight(plain) and owns_its_weight(nn.Linear(4, 4, bias=False)) and owns_its_weight(named)
    assert max_rank(plain) == 4 and can_have_affine(plain)
    for layer in (computed, of_bias, nn.BatchNorm2d(4, affine=False), nn.ReLU()):
        assert not owns_its_weight(layer)
    for layer in (computed, of_bias, named, nn.LayerNorm(4)):
        assert max_rank(layer) == rank_within(layer, 1.0) == 0 and not can_have_affine(layer)


def test_shapes_that_are_not_those_of_a_layer_and_its_adapter():
    own, adapter = {"weight": (8, 3, 3, 3), "bias": (8,)}, {"down.weight": (4, 3, 3, 3), "down.bias": (4,)}
    up = {"up.weight": (8, 2, 1, 1)}
    assert is_sound(own, {**adapter, **up}, 2), "two groups"
    assert is_sound({"weight": (8, 5)}, {"down.weight": (2, 5), "up.weight": (8, 2)}, 2)
    assert not is_sound(own, {**adapter, "up.weight": (8, 0, 1, 1)}, 0) and not is_sound(own, {**adapter, **up}, 3)
    assert not is_sound({"weight": (9, 3, 3, 3), "bias": (9,)}, {**adapter, "up.weight": (9, 2, 1, 1)}, 2)
    for part in ({"down.weight": (4, 3, 3, 1)}, {"down.weight": (5, 3, 3, 3)}, {"down.bias": (5,)}):
        assert not is_sound(own, {**adapter, **up, **part}, 2)
    for wrong in ((7, 2, 1, 1), (8, 4, 1, 1), (8, 2, 1), (8, 2, 1, 3)):
        assert not is_sound(own, {**adapter, "up.weight": wrong}, 2)
    assert not is_sound({"bias": (8,)}, {**adapter, **up}, 2) and not is_sound(own, adapter, 2)
    assert not is_sound({**own, "bias": (4,)}, {**adapter, **up}, 2)


def test_layers_with_adapters_of_their_own_are_tied():
    models = {"a_x": PicoNet(), "b_x": PicoNet()}
    group = find_groups(models)[0]
    layers = [models[o.task].get_submodule(o.layer) for o in group.occurrences]
    assert not is_tied(models, group)
    tie(models, (group,))
    for layer in layers:
        set_rank(layer, 1)
    assert is_tied(models, group) and adapter_of(layers[0]) is not adapter_of(layers[1])
    untie(models, group.occurrences[0])
    assert not is_tied(models, group)


def test_an_adapter_is_no_layer_of_its_own():
    model = PicoNet()
    names, normalised = [layer.name for layer in find_layers(model)], is_normalised(model, "conv1")
    filled(model.conv1)
    assert [layer.name for layer in find_layers(model)] == names
    assert is_normalised(model, "conv1") == normalised is True


def test_an_adapter_is_fitted_to_the_error_of_the_shared_weights():
    """The higher the rank, the smaller the error; with full rank it is that of a layer for each task."""
    torch.manual_seed(0)
    rows = {name: Rows(torch.randn(1, 400, 10), torch.randn(1, 400, 6)) for name in "ab"}
    errors = []
    for rank in (0, 1, 3, 6):
        models = nn.ModuleDict({name: nn.Sequential(nn.Linear(10, 6, bias=False)) for name in "ab"})
        group = Group("x", 240, (Occurrence("a", "0"), Occurrence("b", "0")))
        if rank:
            group = group.with_adapters(rank, adapter_bytes(models["a"][0], rank))
        retie(models, (), (group,), copy.deepcopy(models))
        sums = {(n, "0"): moments_of(r) for n, r in rows.items()}
        fit = fit_group(models, group, sums, None, 1e-6, 800, reports_errors=True)
        errors.append(sum(fit.after.values()))
        for name, (x, y) in rows.items():
            left = (models[name](x).detach() - y).square().sum() / y.square().sum()
            assert float(left) == pytest.approx(fit.after[name], abs=1e-4), "the reported error is that of the layer"
    alone = sum(
        float((y - x @ torch.linalg.lstsq(x, y).solution).square().sum() / y.square().sum()) for x, y in rows.values()
    )
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1] + 0.01
    assert errors[-1] == pytest.approx(alone, abs=1e-3)


# ---- configurations -------------------------------------------------------------------------------------


def adapted(models, adapter_budget: float = 0.3) -> tuple:
    """Every group, with adapters where the budget allows for a rank of 1."""
    groups = []
    for group in find_groups(models):
        layer = models[group.occurrences[0].task].get_submodule(group.occurrences[0].layer)
        rank = rank_within(layer, adapter_budget)
        groups.append(group.with_adapters(rank, adapter_bytes(layer, rank)) if rank else group)
    assert any(group.rank for group in groups)
    return tuple(groups)


def test_savings_are_net_and_survive_json():
    models = nn.ModuleDict({"a_x": PicoNet(), "b_x": PicoNet(), "c_x": PicoNet()})
    before, free, groups = distinct_bytes(models), find_groups(models), adapted(models)
    assert saved_bytes(groups) < saved_bytes(free)
    assert set(from_plain(json.loads(json.dumps(to_plain(groups))))) == set(groups)
    assert "rank" not in to_plain(free)[0]
    unmerged = copy.deepcopy(models)
    retie(models, (), groups, unmerged)
    assert before - distinct_bytes(models) == saved_bytes(groups)
    assert {group.rank for group in joined(groups, free)} == {0}, "the later configuration decides"
    retie(models, groups, free, unmerged)
    assert before - distinct_bytes(models) == saved_bytes(free)
    retie(models, free, (), unmerged)
    assert distinct_bytes(models) == before and same_state(unmerged, models)


def test_undo_restores_adapters_and_removes_new_ones():
    models = nn.ModuleDict({"a_x": PicoNet(), "b_x": PicoNet()}).eval()
    groups, unmerged = adapted(models), copy.deepcopy(models)
    plain = take_snapshot(models)
    retie(models, (), groups, unmerged)
    filled(models["a_x"].conv2, adapter_of(models["a_x"].conv2).rank)
    state, inputs = copy.deepcopy(models.state_dict()), torch.rand(2, 3, 8, 8)
    expected, with_adapters = models["a_x"](inputs), take_snapshot(models)
    retie(models, groups, find_groups(models)[:1], unmerged)
    assert adapter_of(models["a_x"].conv2) is None
    restore_snapshot(with_adapters)
    assert torch.equal(models["a_x"](inputs), expected)
    assert all(torch.equal(value, state[key]) for key, value in models.state_dict().items())
    restore_snapshot(plain)
    assert same_state(unmerged, models) and torch.equal(models["a_x"](inputs), unmerged["a_x"](inputs))
    assert not models["a_x"].conv2._forward_hooks


# ---- the results folder ---------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    """(folder, models, manifest) of a result in which some shared layers have adapters."""
    models = pico_models()
    groups = adapted(models)
    retie(models, find_groups(models), groups, copy.deepcopy(models))
    for group in groups:
        for o in group.occurrences if group.rank else ():
            filled(models[o.task].get_submodule(o.layer), group.rank)
    merged = distinct_bytes(models)
    record = {"unmerged_acc": 0.9, "measured_unmerged_acc": 0.9, "target_acc": 0.8, "merged_acc": 0.85, "met": True}
    manifest = {
        "tasks": {n: {"task": "image_classification", "architecture": None, **record} for n in models},
        "shared_layers": to_plain(groups),
        "memory": {
            "unmerged_bytes": merged + saved_bytes(groups),
            "merged_bytes": merged,
            "saved_bytes": saved_bytes(groups),
            "optimal_saved_bytes": saved_bytes(find_groups(models)),
        },
        "run": {"history": HISTORY},
    }
    memory = manifest["memory"]
    statistics = {
        "total_bytes": memory["unmerged_bytes"],
        "optimal_saved_bytes": memory["optimal_saved_bytes"],
        "history": HISTORY,
    }
    return tmp_path, models, write_results(tmp_path, models, manifest, statistics)


def test_adapters_are_loaded_into_modules_that_have_none(written):
    path, models, _ = written
    assert_loaded_as_written(path, models)


def test_plain_files_hold_the_weights_with_the_adapters_folded_in(written):
    path, models, _ = written
    assert_plain_files_compute_the_same(path, models)
    checks = list(verify(path))
    assert not [check for check in checks if check.status == FAIL]
    assert any("adapters, scales and biases folded in" in check.what for check in checks)
    content = (path / "weights" / "a_x.pt").read_bytes()
    (path / "weights" / "a_x.pt").unlink()
    assert any("a_x.pt: rebuilt" in line for line in repair(path))
    assert (path / "weights" / "a_x.pt").read_bytes() == content


def test_adapters_that_the_result_does_not_have_are_removed(written, tmp_path):
    models = pico_models(1)
    write(tmp_path / "plain", models)
    handed_in = fresh_models()
    filled(handed_in["b_x"].conv2)
    assert same_state(models, load_merged(tmp_path / "plain", handed_in))
    assert adapter_of(handed_in["b_x"].conv2) is None


def test_a_result_of_an_earlier_version_is_loaded_verified_and_updated(written):
    """There, `adapter_bytes` is called `residual_bytes`."""
    path, models, manifest = written
    kept = from_plain(manifest["shared_layers"])
    for group in manifest["shared_layers"]:
        if "adapter_bytes" in group:
            group["residual_bytes"] = group.pop("adapter_bytes")
    (path / "merged.json").write_text(json.dumps(seal(manifest)))
    assert same_state(models, load_merged(path, fresh_models(), verify=True))
    assert not [check for check in verify(path) if check.status == FAIL]
    (path / "weights" / "a_x.pt").unlink()
    assert len(repair(path)) == 1
    updated = update_run(path, {"history": HISTORY})
    assert from_plain(updated["shared_layers"]) == kept and any(group.adapter_bytes for group in kept)


WRONG = {
    "another rank": lambda group: group.update(rank=group["rank"] + 1),
    "a rank that is no number": lambda group: group.update(rank="2"),
    "a negative rank": lambda group: group.update(rank=-1),
    "a rank without bytes": lambda group: group.pop("adapter_bytes"),
    "other bytes": lambda group: group.update(adapter_bytes=group["adapter_bytes"] + 4),
    "both names of its bytes": lambda group: group.update(residual_bytes=group["adapter_bytes"]),
    "no rank any more": lambda group: (group.pop("rank"), group.pop("adapter_bytes")),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_manifest_with_other_adapters_than_the_store_is_refused(written, what):
    path, _, manifest = written
    handed_in = fresh_models()
    before = copy.deepcopy({name: model.state_dict() for name, model in handed_in.items()})
    group = next(group for group in manifest["shared_layers"] if group.get("rank"))
    WRONG[what](group)
    (path / "merged.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(ResultsError, match=r"adapter|saved_bytes|rank"):
        load_merged(path, handed_in)
    assert before.keys() == handed_in.keys()
    for name, state in before.items():
        assert handed_in[name].state_dict().keys() == state.keys()


def test_a_model_that_does_not_fit_stays_without_adapters(written):
    path, _, _ = written
    handed_in = {**fresh_models(), "b_x": PicoNet(9)}
    with pytest.raises(ResultsError, match="b_x: the results do not fit the model"):
        load_merged(path, handed_in)
    assert not any(adapter_of(module) for model in handed_in.values() for module in model.modules())


# ---- the search -----------------------------------------------------------------------------------------


def test_a_group_that_fails_is_tried_with_adapters_and_then_with_training():
    models = {f"task{i}_x": PicoNet(extra=1) for i in range(3)}
    strategy = Adaptive(models, adapter_budget=0.3)
    refused = max(strategy.groups, key=lambda group: group.bytes)
    phases, judged = [], []
    while (proposal := strategy.propose()) is not None:
        phases.append(strategy.phase)
        found = next((g for g in proposal if g.occurrences == refused.occurrences), None)
        judged.append(found and found.rank)
        good = found is None or found.rank > 0
        strategy.record(good, {task for g in proposal for task in g.tasks} if good else set())
    kept = next(g for g in strategy.kept if g.occurrences == refused.occurrences)
    assert kept.rank > 0 and len(strategy.kept) == len(strategy.groups)
    assert phases.index("fill in with adapters") < phases.index("fill in with training")
    assert 0 in judged[phases.index("fill in with training") :], "then without adapters"
    again = Adaptive(models, adapter_budget=0.3)
    again.load_state(json.loads(json.dumps(strategy.state())))
    assert again.kept == strategy.kept and again.propose() is None


def test_without_a_budget_no_group_has_adapters():
    strategy = Adaptive({f"task{i}_x": PicoNet(extra=1) for i in range(3)})
    while (proposal := strategy.propose()) is not None:
        assert not any(group.rank for group in proposal) and "adapters" not in strategy.phase
        strategy.record(False, set())


def test_adapters_for_all_tasks_must_save_more_than_one_task_fewer_without():
    strategy = Adaptive({f"task{i}_x": PicoNet(extra=1) for i in range(4)}, adapter_budget=0.3)
    strategy.own, strategy.phase = restrict(strategy.groups, ["task0_x", "task1_x", "task2_x"]), "fill in with adapters"
    assert strategy.adapted.full[0].saved_bytes < strategy.kept[0].saved_bytes, (
        "four adapters are larger than the layer"
    )
    assert strategy._filled({0: ("task3_x",)}) == strategy.kept
    strategy.own = restrict(strategy.groups, ["task0_x", "task1_x"])
    assert any(group.rank for group in strategy._filled({0: ("task2_x", "task3_x")}))
