"""Probes: images in memory and the rank correlation."""

import pytest
import torch

from benchmarks.probes import load_split, spearman, take


def test_rank_correlation():
    assert spearman([1, 2, 3, 4], [10, 100, 1000, 1001]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826816681233)
    assert spearman([3.0, 1.0, 3.0, 9.0], [1.5, 0, 1.5, 3]) == pytest.approx(1), "equal values share their mean rank"


def test_samples_are_taken_in_a_random_order_by_the_seed_and_of_the_size_asked_for(probe, tasks, datasets):
    assert {n: sum(map(len, batches)) for n, batches in probe.images.items()} == dict.fromkeys(probe.models, 6)
    again = take(tasks["north_pico"], load_split(tasks["north_pico"], [datasets], "train", 0), 6)[0][0]
    other = take(tasks["north_pico"], load_split(tasks["north_pico"], [datasets], "train", 1), 6)[0][0]
    assert torch.equal(again, probe.images["north_pico"][0]) and not torch.equal(again, other)
