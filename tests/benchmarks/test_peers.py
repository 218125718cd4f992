"""The peers: closed forms against values computed by hand, everything tied, and the rows of the table."""

import copy

import pytest
import torch
from pico import PicoNet
from torch import nn

from benchmarks import peers
from benchmarks.peer_checkouts import pleas, zipit
from benchmarks.peer_methods import METHODS, Case, averaged, regmean, regmean_plus_plus, solve_regmean
from gemel.sharing.groups import find_groups
from gemel.sharing.tying import is_tied, tie

CPU = torch.device("cpu")


def column(*values):
    """Weights [1, inputs, 1] of one output."""
    return torch.tensor(values, dtype=torch.float).view(1, -1, 1)


def chain(*weights):
    """Linear layers of one input and one output each."""
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in weights))
    for layer, weight in zip(model, weights, strict=True):
        nn.init.constant_(layer.weight, weight)
    return model


def case_of(one, other, images=None, others=None):
    models = nn.ModuleDict({"one": one, "other": other})
    images = torch.ones(1, 1) if images is None else images
    return Case(models, {"one": [images], "other": [images if others is None else others]}, CPU, 0)


def weights_of(case):
    return [layer.weight.item() for layer in case.models["one"]]


def test_regmean_weighs_by_the_inputs():
    # G = 1 + 1 and 2 * 2, W = 3 and 6: (2 * 3 + 4 * 6) / (2 + 4)
    inputs = [torch.ones(1, 2, 1), torch.full((1, 1, 1), 2.0)]
    assert solve_regmean(inputs, [column(3), column(6)]).item() == pytest.approx(5, rel=1e-4)


def test_regmean_shrinks_what_is_off_the_diagonal():
    # G = [[1, .5], [.5, 1]] and the identity, W = (1, 0) and (0, 1): [[2, .5], [.5, 2]] W = (1, 1.5)
    inputs = [torch.ones(1, 1, 2), torch.eye(2).unsqueeze(0)]
    found = solve_regmean(inputs, [column(1, 0), column(0, 1)], kept=0.5)
    assert found.flatten().tolist() == pytest.approx([1 / 3, 2 / 3], rel=1e-4)


def test_inputs_that_are_always_zero_get_the_mean_of_the_weights():
    inputs = [torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 0.0]]])]
    found = solve_regmean(inputs, [column(1, 5), column(3, 7)])
    assert found.flatten().tolist() == pytest.approx([2, 6], rel=1e-3)


def test_regmean_takes_the_inputs_of_the_unmerged_models():
    # first layers 1 and 3, inputs 1 each: 2; second layers 2 and 4, their inputs 1 and 3: (1 * 2 + 9 * 4) / 10
    case = case_of(chain(1, 2), chain(3, 4))
    regmean()(case)
    assert weights_of(case) == pytest.approx([2, 3.8], rel=1e-3)


def test_regmean_plus_plus_takes_the_inputs_of_the_merged_model():
    # behind the merged first layer both second layers have the input 2: (4 * 2 + 4 * 4) / 8
    case = case_of(chain(1, 2), chain(3, 4))
    regmean_plus_plus()(case)
    assert weights_of(case) == pytest.approx([2, 3], rel=1e-3)


def test_regmean_plus_plus_weighs_by_each_tasks_own_images():
    # images 1 and 2: (1 * 1 + 4 * 3) / 5 = 2.6; behind it 2.6 and 5.2: (1 * 2 + 4 * 4) / 5
    case = case_of(chain(1, 2), chain(3, 4), others=torch.full((1, 1), 2.0))
    regmean_plus_plus()(case)
    assert weights_of(case) == pytest.approx([2.6, 3.6], rel=1e-3)


class Repeated(nn.Module):
    """A layer that is called twice, the second time on ten times its inputs."""

    def __init__(self, before, weight):
        super().__init__()
        self.before, self.layer = chain(before), chain(weight)[0]

    def forward(self, images):
        images = self.before(images)
        return self.layer(images) + self.layer(10 * images)


def test_later_calls_of_a_layer_are_taken_with_their_inputs_in_the_unmerged_model():
    # behind the merged 2: inputs 2 and, unmerged, 10 and 30: ((4 + 100) * 2 + (4 + 900) * 4) / (104 + 904)
    case = case_of(Repeated(1, 2), Repeated(3, 4))
    regmean_plus_plus()(case)
    assert case.models["one"].layer.weight.item() == pytest.approx((104 * 2 + 904 * 4) / 1008, rel=1e-3)


def test_mean_and_first():
    for rule, expected in (("mean", [2, 3]), ("first", [1, 2])):
        case = case_of(chain(1, 2), chain(3, 4))
        averaged(rule)(case)
        assert weights_of(case) == expected


@pytest.mark.parametrize("alignment", ["weights", "activations"])
def test_git_re_basin_undoes_a_permutation(alignment):
    torch.manual_seed(0)
    one = PicoNet(3).eval()
    other, order = copy.deepcopy(one), torch.tensor([3, 1, 0, 2, 7, 4, 6, 5])
    with torch.no_grad():
        for tensor in (other.conv1.weight, other.conv1.bias, *other.bn1.state_dict().values()):
            if tensor.dim():
                tensor.copy_(tensor[order])
        other.conv2.weight.copy_(other.conv2.weight[:, order])
    assert not torch.equal(other.conv1.weight, one.conv1.weight)
    case = case_of(one, other, torch.randn(8, 3, 16, 16))
    expected = copy.deepcopy(one.state_dict())
    averaged("mean", alignment)(case)
    assert torch.allclose(case.models["other"].conv1.weight, expected["conv1.weight"], atol=1e-6)
    assert torch.allclose(case.models["other"].conv2.weight, expected["conv2.weight"], atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_ties_everything_with_finite_weights(probe, name):
    models = copy.deepcopy(probe.models).eval()
    METHODS[name](Case(models, probe.images, CPU, 0))
    assert all(is_tied(models, group) for group in find_groups(models))
    assert all(torch.isfinite(value).all() for value in models.state_dict().values())
    peers.check_everything_is_tied(name, models, probe.models)


def test_a_method_that_ties_less_is_refused(probe):
    models = copy.deepcopy(probe.models)
    tie(models, find_groups(models)[1:])
    with pytest.raises(AssertionError, match="saves"):
        peers.check_everything_is_tied("lazy", models, probe.models)


def test_a_row_has_medians_over_the_seeds():
    found = [([0.5, 0.9], 3.0), ([0.7, 0.6], 1.0), ([0.9, 0.8], 2.0)]
    assert peers.row_of("mean", found) == ["mean", "0.700", "0.800", "0.600", "2.0"]
    assert peers.row_of("mean", [*found, "cannot be run: x"]) == ["mean", "cannot be run: x"]


def test_the_command_prints_a_row_per_method_and_says_why_a_checkout_cannot_be_run(
    workload_file, datasets, tmp_path, capsys
):
    flags = ["--workload", str(workload_file), "--datasets", str(datasets), "--device", "cpu", "--images", "6"]
    chosen = ["--seeds", "0", "1", "--methods", "mean", "first"]
    assert peers.main([*flags, *chosen, "--pleas", str(tmp_path), "--zipit", str(tmp_path)]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert "north_pico" in header and "south_pico" in header and "worst" in header
    names = [row.split("  ")[0] for row in rows]
    assert names == ["mean", "first", "PLeaS", "ZipIt"]
    assert "No module named 'pleas'" in rows[2] and "No module named 'graphs'" in rows[3]
    assert 0 < float(rows[0].split()[1]) <= 2


def test_an_unknown_task_is_named(workload_file, datasets, capsys):
    flags = ["--workload", str(workload_file), "--datasets", str(datasets), "--device", "cpu"]
    assert peers.main([*flags, "--tasks", "north_pico", "west_pico"]) == 2
    error = capsys.readouterr().err
    assert "'west_pico'" in error and "south_pico" in error


@pytest.mark.parametrize("method", [pleas, zipit])
def test_checkouts_want_two_models_with_an_fc(method, tmp_path):
    case = case_of(PicoNet(3), chain(1), torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match="other: got Sequential"):
        method(tmp_path)(case)
    alone = Case(nn.ModuleDict({"one": PicoNet(3)}), {"one": []}, CPU, 0)
    with pytest.raises(ValueError, match="got 1; --tasks"):
        method(tmp_path)(alone)
