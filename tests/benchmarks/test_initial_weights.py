"""Every rule for the weights of tied layers runs on a pico workload."""

import pytest
import torch

from benchmarks import initial_weights
from gemel.sharing.groups import find_groups
from gemel.sharing.tying import is_tied


@pytest.mark.parametrize("name", initial_weights.METHODS)
def test_every_way_ties_everything_with_finite_weights(probe, name):
    groups = find_groups(probe.models)
    initial_weights.METHODS[name](probe, groups, 6)
    assert all(is_tied(probe.models, group) for group in groups)
    assert all(torch.isfinite(value).all() for value in probe.models.state_dict().values())
