"""Random generators by seed and purpose; the global generators are restored."""

import random

import numpy as np
import torch

from gemel.environment.seeds import derive_seed, generator, random_state, seeded, set_random_state


def draws():
    return torch.rand(2).tolist(), random.random(), np.random.rand()


def test_a_generator_depends_on_seed_and_purpose_alone():
    first = torch.rand(3, generator=generator(0, "loader", "task"))
    torch.manual_seed(9)
    assert torch.equal(torch.rand(3, generator=generator(0, "loader", "task")), first)
    seeds = [derive_seed(0, "loader"), derive_seed(1, "loader"), derive_seed(0, "fit"), derive_seed(0, "loader", 1)]
    assert len(set(seeds)) == 4 and all(0 <= seed < 1 << 63 for seed in seeds)


def test_seeding_restores_the_global_generators():
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = draws()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    with seeded(1, "x"):
        first = draws()
    assert draws() == expected
    with seeded(1, "x"):
        assert draws() == first
    with seeded(1, "y"):
        assert draws() != first


def test_the_state_of_the_global_generators_goes_through_a_file(tmp_path):
    with seeded(3, "x"):
        torch.save(random_state(), tmp_path / "state.pt")
        expected = draws()
        set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
        assert draws() == expected
