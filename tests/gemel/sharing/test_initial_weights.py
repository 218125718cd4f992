import pytest
import torch
from pico import PicoNet
from torch import nn

from gemel.sharing.groups import find_groups
from gemel.sharing.initial_weights import INITIAL_WEIGHTS
from gemel.sharing.tying import tie

A, B, FAR = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 4.0]]), torch.tensor([[90.0, 3.0]])


def test_the_first_is_a_copy_of_the_first():
    values = INITIAL_WEIGHTS["first"]([A, B], [1.0, 5.0])
    assert torch.equal(values, A) and values.data_ptr() != A.data_ptr()


def test_the_mean_is_weighted_by_task():
    assert torch.allclose(INITIAL_WEIGHTS["mean"]([A, B]), torch.tensor([[0.0, 3.0]]))
    assert torch.allclose(INITIAL_WEIGHTS["mean"]([A, B], [3.0, 1.0]), torch.tensor([[0.0, 2.5]]))


def test_an_outlier_counts_little_in_the_similar():
    """The geometric median of a tight pair and a far point lies by the pair."""
    assert (INITIAL_WEIGHTS["similar"]([A, B, FAR]) - torch.tensor([[0.0, 3.0]])).norm() < 1.5
    assert INITIAL_WEIGHTS["mean"]([A, B, FAR])[0, 0] == 30
    assert torch.allclose(INITIAL_WEIGHTS["similar"]([A, B]), torch.tensor([[0.0, 3.0]]))


@pytest.mark.parametrize("name", INITIAL_WEIGHTS)
def test_equal_occurrences_stay_as_they_are(name):
    zero = torch.zeros(2, 3)
    assert torch.allclose(INITIAL_WEIGHTS[name]([A, A.clone(), A.clone()]), A)
    assert torch.equal(INITIAL_WEIGHTS[name]([zero, zero]), zero)


def test_tie_takes_weights_of_tasks():
    models = nn.ModuleDict({"a_x": PicoNet(), "b_x": PicoNet()})
    wanted = 0.75 * models["a_x"].conv2.bias + 0.25 * models["b_x"].conv2.bias
    tie(models, find_groups(models), "mean", {"a_x": 3.0, "b_x": 1.0, "c_x": 9.0})
    assert torch.allclose(models["b_x"].conv2.bias, wanted)
