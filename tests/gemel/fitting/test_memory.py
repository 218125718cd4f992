"""What a fit takes, and that it stays within what it may take."""

import copy
import gc

import pytest
import torch
from pico import PicoDetector, PicoNet
from torch import nn

from gemel.fitting import sequential_fit
from gemel.fitting.memory import FitMemory, Footprint, LayerFootprint, footprint_of, predicted_peak
from gemel.fitting.sequential_fit import fit_sequentially
from gemel.fitting.teacher_samples import TeacherSampler, sample_teachers, sizes_of
from gemel.sharing.groups import find_groups
from gemel.sharing.tying import tie

MIB = 1 << 20


def names_of(model):
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def test_a_footprint_counts_what_lives_at_each_layer():
    """Of 4-byte numbers an image: 2x8x8 inputs, 4x8x8 behind the first layer; the caller of a model holds its input."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 1, 8), nn.Flatten(), nn.Linear(1, 1))
    found = footprint_of(model.eval(), [*names_of(model)], torch.rand(3, 2, 8, 8))
    waiting = [layer.waiting for layer in found.layers.values()]
    assert [*found.layers] == ["0", "2", "4"] and waiting == [512, 512 + 1024, 512 + 4]
    assert [layer.positions for layer in found.layers.values()] == [64, 1, 1]
    assert found.peak >= 512 + 1024 + 4
    assert found.flops == 2 * (64 * 2 * 4 + 4 * 64 + 1), "a multiplication and an addition are two"
    twice = nn.Sequential(model[0], nn.Conv2d(4, 2, 1), model[0])
    assert footprint_of(twice, ["0"], torch.rand(3, 2, 8, 8)).layers["0"].positions == 128, "over all calls"


@pytest.mark.parametrize("images", [torch.rand(4, 3, 16, 16), [torch.rand(3, 16, 16)] * 4])
def test_a_footprint_changes_nothing(images):
    model = PicoNet() if torch.is_tensor(images) else PicoDetector()
    model.train()
    before = copy.deepcopy(model.state_dict())
    found = footprint_of(model, names_of(model), images)
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert {"conv1", "conv2"} <= set(found.layers) and found.peak >= max(x.waiting for x in found.layers.values())


FOOTPRINT = Footprint({"a": LayerFootprint(100.0, 9), "b": LayerFootprint(400.0, 9), "c": LayerFootprint(10.0, 1)}, 500)


def test_batches_that_wait_are_no_more_than_fit_at_any_layer_behind():
    for limit, counts in ((30_000, (2, 2, 5)), (1000, (1, 1, 1)), (10**9, (5, 5, 5))):
        memory = FitMemory(limit, num_tasks=2)
        found = memory.batches_that_wait(FOOTPRINT, "abc", [5, 5, 5, 5, 5])
        assert tuple(found.values()) == counts and [*found] == ["a", "b", "c"]
        if counts[0] > 1:
            both = {"x": FOOTPRINT, "y": FOOTPRINT}
            peak = predicted_peak(both, dict.fromkeys(both, [5] * 5), dict.fromkeys(both, found))
            assert peak == 2 * max(10 * 400, 25 * 10) + 5 * 500 or counts[0] == 5
            assert peak <= memory.in_flight
    found = FitMemory(25_000, 2).batches_that_wait(FOOTPRINT, "ac", [5] * 5)
    assert found == {"a": 5, "c": 5}, "nobody waits at b"


def test_a_batch_is_so_large_that_one_of_each_task_is_within_the_bound():
    memory = FitMemory(50_000, num_tasks=2)
    assert memory.largest_batch(FOOTPRINT) == 12 and FitMemory().largest_batch(FOOTPRINT) == float("inf")
    assert FitMemory(1000, 2).largest_batch(FOOTPRINT) == 2, "batch normalisation needs more than one image"


# ---- fits within a bound --------------------------------------------------------------------------------------------


class Waiting:
    """Counts the forward passes that wait in each task, at every moment of a fit."""

    def __init__(self, monkeypatch):
        self.now, self.most = {}, {}
        wait = sequential_fit.wait

        def counted(key):
            task, number = sequential_fit.current()
            is_norm = isinstance(key, sequential_fit.Norm)
            layer = key.name if is_norm else next(o.layer for o in key.occurrences if o.task == task)
            self.now[task] = self.now.get(task, 0) + 1
            self.most[task, layer] = max(self.most.get((task, layer), 0), self.now[task])
            wait(key)
            self.now[task] -= 1

        monkeypatch.setattr(sequential_fit, "wait", counted)


def tied(**models):
    torch.manual_seed(0)
    models = nn.ModuleDict(models)
    teachers = {task: copy.deepcopy(model) for task, model in models.items()}
    groups = find_groups(models)
    tie(models, groups)
    return models, teachers, groups


class Shrinking(nn.Module):
    """An image takes less memory the deeper it is."""

    def __init__(self, num_classes: int = 3):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, stride=4), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, images):
        images = torch.relu_(self.bn1(self.conv1(images)))
        images = torch.relu_(self.bn2(self.conv2(images)))
        return self.fc(images.mean((2, 3)))


def images_of(models, count=10):
    drawn = torch.Generator().manual_seed(0)
    return {t: [torch.rand(4, 3, 16, 16, generator=drawn) for _ in range(count)] for t in models}


def fit_within(limit, positions=500, **models):
    models, teachers, groups = tied(**models)
    images = images_of(models)
    memory = FitMemory(limit, len(models))
    sampler = TeacherSampler(teachers, 0, memory)
    samples = sampler.sample(groups, images, positions)
    fits = fit_sequentially(models, teachers, groups, images, teacher_samples=samples, reports_errors=True)
    return models, fits, samples, sampler


def total(errors):
    return sum(sum(of_group.values()) for of_group in errors)


def test_few_batches_wait_near_the_input_and_the_others_join_behind(monkeypatch):
    counted = Waiting(monkeypatch)
    models, fits, samples, sampler = fit_within(MIB, a_x=Shrinking(), b_x=Shrinking())
    assert all(fit.fitted for fit in fits.values())
    assert total(fit.after for fit in fits.values()) < total(fit.before for fit in fits.values())
    counts = {layer: samples["a_x", layer].num_batches for layer in ("conv1", "conv2", "fc")}
    assert 1 <= counts["conv1"] < counts["fc"] and [*counts.values()] == sorted(counts.values())
    assert counted.most == {(task, name): count for task in models for name, count in samples.waiting[task].items()}
    assert samples.waiting["a_x"]["conv1"] <= samples.waiting["a_x"]["bn1"] <= samples.waiting["a_x"]["conv2"]
    footprint = sampler.footprints["a_x"]
    held = max(footprint.layers[name].waiting * 4 * count for name, count in samples.waiting["a_x"].items())
    assert 2 * held + 4 * footprint.peak <= sampler.memory.in_flight
    rows = sum(len(call.picked) for calls in samples["a_x", "conv1"].calls for call in calls)
    assert 500 <= rows < 520, "as many rows as all images would have given"


def test_statistics_change_as_those_of_the_unmerged_model_would_on_the_images_that_wait():
    """So those that join late run with them, and their own are not needed."""
    models, fits, samples, sampler = fit_within(MIB, a_x=Shrinking(), b_x=Shrinking())
    waiting = samples.waiting["a_x"]["bn1"]
    assert waiting < 10
    with torch.no_grad():
        own, before = (
            torch.cat([model.conv1(batch) for batch in images_of(models)["a_x"][:waiting]])
            for model in (models["a_x"], sampler.teachers["a_x"])
        )
    old, new = sampler.teachers["a_x"].bn1, models["a_x"].bn1
    ratio = own.var((0, 2, 3)) / before.var((0, 2, 3))
    assert torch.allclose(new.running_var, old.running_var * ratio, atol=0.05)
    shift = (old.running_mean - before.mean((0, 2, 3))) * ratio.sqrt()
    assert torch.allclose(new.running_mean, own.mean((0, 2, 3)) + shift, atol=0.1)


def test_a_bound_that_is_large_changes_nothing():
    states = []
    for limit in (float("inf"), 1 << 40):
        models, *_ = fit_within(limit, a_x=Shrinking(), b_x=Shrinking(4))
        states.append(models.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_samples_are_drawn_once_and_do_not_depend_on_what_else_is_sampled():
    models, teachers, groups = tied(a_x=Shrinking(), b_x=Shrinking())
    images = images_of(models)
    calls = []
    teachers["a_x"].register_forward_hook(lambda *more: calls.append(1))
    sampler = TeacherSampler(teachers, 0)
    first = sampler.sample(groups[:2], images)
    assert len(calls) == 10
    both = sampler.sample(groups, images)
    assert len(calls) == 20 and all(both[key].calls is first[key].calls for key in first)
    again = sampler.sample(groups, images)
    assert len(calls) == 20 and again == both
    alone = TeacherSampler(teachers, 0).sample(groups, images)
    assert all(torch.equal(alone[key].outputs(), both[key].outputs()) for key in both)
    with torch.no_grad():
        teachers["a_x"].conv1.weight.mul_(2)
    changed = sampler.sample(groups, images)
    assert not torch.equal(changed["a_x", "conv1"].outputs(), both["a_x", "conv1"].outputs()), "another teacher"
    assert torch.equal(changed["b_x", "conv1"].outputs(), both["b_x", "conv1"].outputs())


def test_metrics_are_computed_once_for_a_model_and_go_to_all_samples_of_its_layers():
    models, teachers, groups = tied(a_x=Shrinking(), b_x=Shrinking())
    images = images_of(models)
    calls = []
    sampler = TeacherSampler(teachers, 0)

    def metrics():
        return sampler.metrics("a_x", lambda: calls.append(1) or images["a_x"])

    assert sampler.sample(groups[:1], images)["a_x", groups[0].occurrences[0].layer].metric is None
    first = metrics()
    assert metrics() is first and len(calls) == 1
    samples = sampler.sample(groups[1:], images)
    for group in groups[1:]:
        layer = group.occurrences[0].layer
        assert torch.equal(samples["a_x", layer].metric.load(), first[layer].matrix.load())
        assert samples["b_x", layer].metric is None, "that was not asked for"
    with torch.no_grad():
        teachers["a_x"].conv1.weight.mul_(2)
    assert metrics() is not first and len(calls) == 2, "another model"


def test_fewer_images_go_through_a_backward_pass_at_a_time_where_memory_is_short():
    footprint = Footprint({}, peak=10.0, total=90.0)
    assert FitMemory().images_with_gradients(footprint, 4) == 4
    for limit, count in ((10_000, 4), (800, 3), (500, 2), (100, 2)):
        assert FitMemory(limit).images_with_gradients(footprint, 4) == count


def storages() -> set[int]:
    """Of all tensors that there are."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def test_nothing_of_a_sample_stays_outside_the_blocks_of_the_store():
    """Small tensors that stay between activations that go would leave holes that the allocator cannot give back."""
    models, teachers, groups = tied(a_x=Shrinking(), b_x=Shrinking())
    images = images_of(models)
    sampler = TeacherSampler(teachers, 0)
    gc.collect()
    before = storages()
    samples = sampler.sample(groups, images)
    gc.collect()
    stay = storages() - before
    assert samples.norms and all(own.calls for own in samples.values())
    assert len(stay) == 1, "one block holds all of it"
    moments = samples.norms[next(iter(samples.norms))][0].load()
    assert moments.mean.shape == moments.var.shape and moments.num_values > 1


def test_rows_of_wide_layers_are_fewer_where_their_sums_would_not_fit():
    models, teachers, groups = tied(a_x=nn.Sequential(nn.Linear(600, 4)), b_x=nn.Sequential(nn.Linear(600, 4)))
    images = {t: [torch.rand(400, 600)] for t in models}
    counts = {}
    for limit in (float("inf"), 2 * MIB):
        samples = TeacherSampler(teachers, 0, FitMemory(limit, 2)).sample(groups, images, 400)
        counts[limit] = samples["a_x", "0"].outputs().shape[1]
    assert counts[float("inf")] == 400 and counts[2 * MIB] * 2 * 601 * 4 <= 0.2 * 2 * MIB < 400 * 2 * 601 * 4
    assert sizes_of(images["a_x"]) == [400]
    sample_teachers(teachers, groups, images, generator=torch.Generator())
