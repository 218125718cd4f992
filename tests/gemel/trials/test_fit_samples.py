"""Images and samples of fits: drawn once, and within the memory of a fit."""

import copy
import logging

import pytest
import torch
from pico import PicoNet, thresholds
from torch import nn

from gemel.fitting.sequential_fit import fit_sequentially
from gemel.sharing.groups import find_groups
from gemel.sharing.tying import tie
from gemel.thresholds import THRESHOLDS
from gemel.trials import fit_samples
from gemel.trials.fit_samples import FitSamples, memory_of_fits

CPU = torch.device("cpu")
PIXELS = 40 * 16 * 16


@pytest.fixture
def tied():
    torch.manual_seed(0)
    models = nn.ModuleDict({"a_x": PicoNet(extra=1), "b_x": PicoNet(4, extra=1)})
    unmerged = copy.deepcopy(models).eval()
    groups = find_groups(models)
    tie(models, groups)
    return models, unmerged, groups


class Drawing:
    """Draws batches of 8 images, and remembers how often."""

    def __init__(self):
        self.asked = []

    def __call__(self, task, num_pixels, max_batch):
        self.asked.append((task, num_pixels))
        count = max(8, num_pixels // 256)
        images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(len(task)))
        return list(images.split(int(min(8, max_batch))))


def test_rounds_fit_on_the_same_images_which_are_drawn_once(tied):
    models, unmerged, groups = tied
    draw = Drawing()
    samples = FitSamples(draw, 1 << 30, 2, 0)
    images, found = samples.of(unmerged, groups, PIXELS)
    count = len(draw.asked)
    again, fewer = samples.of(unmerged, groups, PIXELS), samples.of(unmerged, groups[:1], PIXELS)
    assert len(draw.asked) == count and again[0] == images and again[1] == found
    assert all(fewer[1][key] is found[key] for key in fewer[1])
    assert {sum(batches.sizes) for batches in images.values()} == {40}
    fits = fit_sequentially(models, unmerged, groups, images, teacher_samples=found)
    assert all(fit.fitted for fit in fits.values())


def test_more_images_where_rows_are_few(tied, monkeypatch):
    _, unmerged, groups = tied
    monkeypatch.setattr(fit_samples, "THRESHOLDS", thresholds(more_images=3))
    samples = FitSamples(Drawing(), 1 << 30, 2, 0)
    wide = [group for group in groups if group.occurrences[0].layer in ("conv1", "more.0")]
    images, _ = samples.of(unmerged, tuple(wide), 8 * 256)
    assert sum(images["a_x"].sizes) == 8, "256 rows an image"
    unmerged["a_x"].fc = unmerged["b_x"].fc = nn.Linear(8, 3)
    heads = find_groups(nn.ModuleDict({task: nn.ModuleDict({"fc": model.fc}) for task, model in unmerged.items()}))
    for num_inputs, num_images in ((100, 24), (30, 16)):
        monkeypatch.setattr("gemel.fitting.teacher_samples.shape_of", lambda layer, d=num_inputs: (1, d, 3))
        images, _ = samples.of(unmerged, heads, 8 * 256)
        assert sum(images["a_x"].sizes) == num_images, "8 rows for so many inputs"


def test_what_a_fit_is_predicted_to_take_is_logged(tied, caplog):
    _, unmerged, groups = tied
    with caplog.at_level(logging.DEBUG, "gemel.trials.fit_samples"):
        FitSamples(Drawing(), 1 << 30, 2, 0).of(unmerged, groups, PIXELS)
    assert "a fit: 80 images, " in caplog.text and "MiB of activations" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


def test_batches_are_made_smaller_where_one_of_each_task_does_not_fit_and_figures_are_named(tied, caplog):
    _, unmerged, groups = tied
    limit = 512 << 10
    images, _ = FitSamples(Drawing(), limit, 2, 0).of(unmerged, groups, PIXELS)
    (sizes,) = {tuple(batches.sizes) for batches in images.values()}
    assert 2 <= sizes[0] < 8 and sum(sizes) == 40, "no image is lost"
    assert f"a_x: weights are fitted on batches of {sizes[0]} images instead of 8" in caplog.text
    assert "fit_memory: 0 MiB" in caplog.text and "may run out of memory" not in caplog.text
    FitSamples(Drawing(), 64 << 10, 2, 0).of(unmerged, groups, PIXELS)
    assert "may run out of memory" in caplog.text


def test_the_memory_of_a_fit_is_what_was_given_or_suits_the_device(monkeypatch):
    assert memory_of_fits(CPU, None) == THRESHOLDS.fit.memory == 2 << 30 and memory_of_fits(CPU, 1 << 28) == 1 << 28
    monkeypatch.setattr(fit_samples, "total_memory", lambda device: 80 << 30)
    assert memory_of_fits(CPU, None) == 20 << 30
