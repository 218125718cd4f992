import copy

import pytest
import torch
from pico import PicoDetector, PicoNet
from torch import nn

from gemel.fitting import sequential_fit
from gemel.fitting.batch_norm import reestimate_statistics
from gemel.fitting.least_squares import FitSettings, by_depth, fit_least_squares
from gemel.fitting.memory import FitMemory
from gemel.fitting.rows import matrix_of, sample_inputs
from gemel.fitting.sequential_fit import fit_sequentially
from gemel.fitting.teacher_samples import TeacherSampler, sample_teachers
from gemel.sharing.groups import Group, Occurrence, find_groups
from gemel.sharing.tying import tie

CPU = torch.device("cpu")


def generator():
    return torch.Generator().manual_seed(0)


def fit(models, teachers, groups, images, positions=2048, has_metrics=True, **options):
    samples = sample_teachers(teachers, groups, images, generator=generator(), positions=positions)
    for own in samples.values():
        own.metric = own.metric if has_metrics else None
    how = {"teacher_samples": samples, "reports_errors": True, **options}
    return fit_sequentially(models, teachers, groups, images, **how)


def tied(groups=None, **models):
    torch.manual_seed(0)
    models = nn.ModuleDict(models)
    teachers = {task: copy.deepcopy(model) for task, model in models.items()}
    groups = groups or find_groups(models)
    tie(models, groups)
    return models, teachers, groups


def test_it_equals_one_stage_per_layer_with_statistics_in_between():
    """One pass does what a pass per layer does."""
    states = []
    for sequentially in (True, False):
        torch.manual_seed(0)
        own = {"a_x": PicoNet(extra=1), "b_x": PicoNet(4, extra=1)}
        images = {t: [torch.rand(2, 3, 16, 16, generator=generator())] for t in own}
        for task, model in own.items():  # with the statistics of these images, as if they were all there are
            reestimate_statistics(model, [(batch, None) for batch in images[task]], CPU)
        models, teachers, groups = tied(**own)

        def statistics(stage=0, models=models, images=images):
            for task in models:
                reestimate_statistics(models[task], [(batch, None) for batch in images[task]], CPU)

        if sequentially:
            fits = fit(models, teachers, groups, images, positions=10_000, has_metrics=False)
        else:
            statistics()
            how = {"generator": generator(), "settings": FitSettings(positions=10_000, num_stages=len(groups))}
            fit_least_squares(models, teachers, groups, images, after_stage=statistics, **how)
        states.append(models.state_dict())
    assert all(fit.fitted for fit in fits.values())
    assert all(torch.allclose(states[0][key], states[1][key], atol=1e-3) for key in states[0])


def test_statistics_of_what_no_fit_changes_stay_as_they_are():
    """However few the images: what they have in common with the unmerged model's, and not with all images, cancels."""
    models, teachers, groups = tied(a_x=PicoNet(extra=1), b_x=PicoNet(extra=1))
    last = [group for group in groups if group.occurrences[0].layer == "conv2"]
    models = nn.ModuleDict({task: copy.deepcopy(teacher) for task, teacher in teachers.items()})
    tie(models, last)
    fit(models, teachers, last, {t: [torch.rand(2, 3, 8, 8, generator=generator())] for t in models})
    for task, model in models.items():
        assert torch.allclose(model.bn1.running_mean, teachers[task].bn1.running_mean, atol=1e-5)
        assert torch.allclose(model.bn1.running_var, teachers[task].bn1.running_var, rtol=1e-4)


def test_batches_of_a_task_are_fitted_together_and_modes_are_kept():
    results = []
    for size in (8, 4):
        torch.manual_seed(0)
        models, teachers, groups = tied(a_x=nn.Sequential(nn.Linear(6, 4)), b_x=nn.Sequential(nn.Linear(6, 4)))
        models["a_x"].train()
        images = {t: list(torch.rand(8, 6, generator=generator()).split(size)) for t in models}
        fit(models, teachers, groups, images)
        assert models["a_x"].training and not models["a_x"][0]._forward_pre_hooks
        results.append(matrix_of(models["b_x"][0]))
    assert torch.allclose(results[0], results[1], atol=1e-5)


def test_detectors_and_classifiers_advance_together():
    models, teachers, groups = tied(a_x=PicoNet(), b_x=PicoDetector())
    images = {"a_x": [torch.rand(4, 3, 16, 16)] * 2, "b_x": [[torch.rand(3, 16, 16)] * 3] * 3}
    fits = fit(models, teachers, groups, images)
    assert {g.occurrences[0].layer for g in groups} == {"conv1", "conv2", "fc"}
    assert all(fit.fitted for fit in fits.values())
    assert sum(sum(fit.after.values()) for fit in fits.values()) < sum(
        sum(fit.before.values()) for fit in fits.values()
    )


class Crossed(nn.Module):
    """The same layers in one order or the other."""

    def __init__(self, names: str):
        super().__init__()
        self.order = names
        self.p, self.q, self.r, self.s = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, images):
        for name in self.order:
            images = torch.relu(getattr(self, name)(images))
        return images


def test_tied_layers_in_different_orders_do_not_wait_for_ever():
    groups = tuple(
        Group(name, 80, (Occurrence("a_x", name), Occurrence("b_x", name), Occurrence("c_x", name))) for name in "pq"
    )
    models, teachers, groups = tied(groups, a_x=Crossed("pq"), b_x=Crossed("qp"), c_x=Crossed("pq"))
    images = {t: [torch.rand(20, 4)] for t in models}
    fits = fit(models, teachers, groups, images)
    assert all(fit.fitted for fit in fits.values())


@pytest.mark.parametrize("most_bytes", [1 << 20, 0])
def test_one_pass_of_a_teacher_gives_the_inputs_of_all_layers_that_its_model_comes_to_late(most_bytes, monkeypatch):
    """ "qrp" comes to q and r before the others are through with p, so it takes part in the fit of p only afterwards:
    the same weights as where a pass gives the inputs of one layer, and fewer passes."""
    monkeypatch.setattr(sequential_fit, "MAX_LATE_BYTES", most_bytes)
    asked, states = [], []

    def counted(model, samples, images, **options):
        asked.append(list(samples))
        return sample_inputs(model, samples, images, **options)

    monkeypatch.setattr(sequential_fit, "sample_inputs", counted)
    names = ("a_x", "b_x", "c_x")
    groups = tuple(Group(n, 80, tuple(Occurrence(task, n) for task in names)) for n in "pqrs")
    for how in ("foreseen", "one by one"):
        if how == "one by one":
            monkeypatch.setattr(sequential_fit._SequentialFit, "foreseen_late", lambda self: {})
        models, teachers, _ = tied(groups, a_x=Crossed("pqrs"), b_x=Crossed("srqp"), c_x=Crossed("pqrs"))
        images = {t: list(torch.rand(2, 20, 4, generator=generator())) for t in models}
        samples = TeacherSampler(teachers, 0, FitMemory(1 << 30, len(models))).sample(groups, images)
        fits = fit_sequentially(models, teachers, groups, images, teacher_samples=samples)
        assert all(fit.fitted for fit in fits.values())
        states.append(models.state_dict())
        asked.append(how)
    together, one_by_one = asked[: asked.index("foreseen")], asked[asked.index("foreseen") + 1 : -1]
    assert {name for names in together for name in names} == {name for names in one_by_one for name in names}
    assert one_by_one == [["p"], ["p"], ["q"], ["q"], ["r"], ["r"]]
    assert len(together) == (2 if most_bytes else len(one_by_one)), "one of each batch"
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


class Levels(nn.Module):
    """A head that is called once per level, and a layer that no forward pass reaches."""

    def __init__(self):
        super().__init__()
        self.stem, self.head, self.idle = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.Linear(7, 7)

    def forward(self, images):
        features = self.stem(images)
        return self.head(features), self.head(features[..., ::2, ::2])


def test_a_head_over_levels_is_fitted_behind_the_stem_and_an_idle_layer_is_named():
    """Its first call is judged on what it gets behind the fitted stem, so it does better there than a fit on the
    teachers' inputs."""
    torch.manual_seed(0)
    models, teachers, groups = tied(a_x=Levels(), b_x=Levels())
    images = {t: [torch.rand(4, 3, 8, 8)] for t in models}
    found = fit(models, teachers, groups, images, ridge=1e-3, has_metrics=False)
    fits = {group.occurrences[0].layer: fit for group, fit in found.items()}
    assert fits["stem"].fitted and fits["head"].fitted and "never called" in fits["idle"].reason
    own = nn.ModuleDict(copy.deepcopy(teachers))
    tie(own, groups)
    settings = FitSettings(teacher_inputs=True, ridge=1e-3)
    fit_least_squares(own, teachers, groups, images, generator=generator(), settings=settings)

    @torch.no_grad()
    def error(fitted):
        pairs = ((fitted[t](*images[t])[0], teachers[t](*images[t])[0]) for t in teachers)
        return sum((a - b).square().sum() / b.square().sum() for a, b in pairs)

    assert error(models) < 0.95 * error(own)


def test_an_error_of_a_forward_pass_is_raised_and_leaves_no_hooks():
    class Broken(PicoNet):
        def forward(self, images):
            super().forward(images)
            if self.fc.weight is models["a_x"].fc.weight:
                raise RuntimeError("out of luck")

    models, teachers, groups = tied(a_x=Broken(), b_x=PicoNet())
    images = {t: [torch.rand(4, 3, 16, 16)] for t in models}
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(models, teachers, groups, images)
    assert not models["b_x"].conv1._forward_pre_hooks and models["b_x"].bn1.momentum == 0.1


def test_order_of_depth_is_that_of_the_forward_pass():
    models, _, groups = tied(a_x=PicoNet(extra=1), b_x=PicoNet(extra=1))
    assert [g.occurrences[0].layer for g in by_depth(models, groups)] == ["conv1", "conv2", "more.0", "fc"]


def test_a_layer_with_far_fewer_rows_than_inputs_is_noticed():
    models, teachers, groups = tied(a_x=PicoNet(), b_x=PicoNet())
    few, enough = ({t: [torch.rand(count, 3, 16, 16, generator=generator())] for t in models} for count in (4, 12))

    def is_short(images, groups, positions=10_000):
        return TeacherSampler(teachers, 0).is_short_of_rows(groups, images, positions)

    linear = [group for group in groups if group.occurrences[0].layer == "fc"]
    assert is_short(few, linear), "4 rows, 9 inputs with the bias"
    assert not is_short(enough, linear)
    convolutions = [group for group in groups if group not in linear]
    assert not is_short(few, convolutions) and not is_short(few, convolutions, positions=30), "no more than is drawn"
