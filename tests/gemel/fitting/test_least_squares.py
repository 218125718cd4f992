import copy
import resource

import pytest
import torch
from pico import Mixed, PicoDetector, PicoNet
from torch import nn

from gemel.fitting import least_squares
from gemel.fitting.least_squares import FitSettings, by_depth, fit_least_squares, row_quota
from gemel.fitting.moments import moments_of
from gemel.fitting.ridge import solve_ridge, solve_weighted
from gemel.fitting.rows import Rows, collect_rows, matrix_of
from gemel.sharing.groups import find_groups
from gemel.sharing.tying import is_tied, tie


def generator():
    return torch.Generator().manual_seed(0)


def fit_all(models, teachers, groups, images, after_stage=None, **settings):
    how = {"generator": generator(), "settings": FitSettings(**settings), "after_stage": after_stage}
    return fit_least_squares(models, teachers, groups, images, **how)


def tied(**models):
    models = nn.ModuleDict(models)
    teachers = {task: copy.deepcopy(model) for task, model in models.items()}
    groups = find_groups(models)
    tie(models, groups)
    return models, teachers, groups


@pytest.mark.parametrize("rows", [40, 10])
def test_the_dual_form_gives_what_the_normal_equations_give(rows):
    torch.manual_seed(0)
    x, y = torch.rand(2, rows, 20), torch.rand(2, rows, 3)
    solution, ridge = solve_ridge(x, y, 0.05)
    scale = x.square().sum((1, 2)).view(2, 1, 1) / 20
    expected = torch.linalg.solve(x.mT @ x + 0.05 * scale * torch.eye(20), x.mT @ y)
    assert ridge == 0.05 and torch.allclose(solution, expected, atol=1e-4)


def test_a_system_that_is_singular_takes_a_larger_ridge():
    x = torch.ones(1, 30, 4) * 1000
    solution, ridge = solve_ridge(x, torch.ones(1, 30, 1), 0.0)
    assert ridge > 0 and torch.isfinite(solution).all()
    assert torch.isfinite(solve_ridge(torch.zeros(1, 30, 4), torch.ones(1, 30, 1), 0.01)[0]).all()


LAYERS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 5)),
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
    "normalised": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("teacher_inputs", [True, False])
def test_a_layer_that_can_serve_both_tasks_is_found(name, teacher_inputs):
    """The two teachers agree on the directions that their images have, so one layer does for both."""
    torch.manual_seed(0)
    models, teachers, groups = tied(a_x=LAYERS[name](), b_x=LAYERS[name]())
    a, b = torch.rand(40, 4, 6, 6), torch.rand(40, 4, 6, 6)
    a[:, 2:], b[:, :2] = 0, 0
    teachers["b_x"].load_state_dict(
        {k: v for k, v in teachers["b_x"].state_dict().items() if k.endswith("weight")}, False
    )
    for key, value in teachers["a_x"].state_dict().items():
        if key.endswith("bias"):
            teachers["b_x"].state_dict()[key].copy_(value)
    images = {"a_x": list(a.split(16)), "b_x": list(b.split(16))}
    options = {"ridge": 1e-6, "teacher_inputs": teacher_inputs}
    (fit,) = fit_all(models, teachers, groups, images, **options).values()
    assert fit.fitted and max(fit.after.values()) < 1e-3 < 0.05 < min(fit.before.values())
    assert is_tied(models, groups[0])


def test_it_is_the_minimum_of_the_weighted_relative_errors():
    torch.manual_seed(0)
    models, teachers, groups = tied(a_x=nn.Linear(6, 4), b_x=nn.Linear(6, 4))
    start, images = matrix_of(models["a_x"]), {t: [torch.rand(50, 6)] for t in models}
    options = {"task_weights": {"a_x": 5.0}, "ridge": 0.1}
    (fit,) = fit_all(models, teachers, groups, images, **options).values()
    assert fit.ridge == pytest.approx(0.1 * 2 * 7 / 100)  # less of it where rows abound: 7 inputs, 100 rows
    found = matrix_of(models["a_x"]).requires_grad_()
    rows = {t: collect_rows(teachers[t], {"": 500}, images[t], generator())[""] for t in models}
    energy = {t: r.y.square().sum() for t, r in rows.items()}
    weights = {"a_x": 5.0, "b_x": 1.0}
    scale = sum(weights[t] * r.x.square().sum() / energy[t] for t, r in rows.items()) / 7
    errors = sum(weights[t] * (r.x @ found - r.y).square().sum() / energy[t] for t, r in rows.items())
    (errors + fit.ridge * scale * (found - start).square().sum()).backward()
    assert found.grad.abs().max() < 1e-4


def test_rows_of_few_images_leave_the_ridge_of_wide_layers_as_it_is(monkeypatch):
    ridges = []
    for rows_per_image, wide in ((1, 4), (4, 4), (1000, 4), (1, 5)):
        monkeypatch.setattr("gemel.fitting.least_squares.ROWS_PER_IMAGE", rows_per_image)
        monkeypatch.setattr("gemel.fitting.least_squares.WIDE", wide)
        torch.manual_seed(0)
        models, teachers, groups = tied(a_x=nn.Conv2d(3, 4, 1), b_x=nn.Conv2d(3, 4, 1))
        images = {t: [torch.rand(2, 3, 16, 16)] for t in models}
        (fit,) = fit_all(models, teachers, groups, images, ridge=0.1).values()
        ridges.append(fit.ridge)
    assert ridges == pytest.approx([0.1, 0.1 * 2 * 4 / 16, 0.01, 0.01]), "4 inputs, rows of 4 images"


def test_a_task_that_counts_more_is_served_better():
    torch.manual_seed(0)
    errors = {}
    for weight in (1.0, 100.0):
        torch.manual_seed(0)
        models, teachers, groups = tied(a_x=nn.Linear(6, 4), b_x=nn.Linear(6, 4))
        images = {t: [torch.rand(50, 6)] for t in models}
        options = {"task_weights": {"a_x": weight}}
        (fit,) = fit_all(models, teachers, groups, images, **options).values()
        errors[weight] = fit.after
    assert errors[100.0]["a_x"] < 0.1 * errors[1.0]["a_x"] and errors[100.0]["b_x"] > errors[1.0]["b_x"]


def test_what_is_not_fitted_keeps_its_values_and_is_named():
    torch.manual_seed(0)
    models, teachers, groups = tied(a_x=Mixed(), b_x=Mixed())
    before = models["a_x"].attention.in_proj_weight.clone()
    images = {t: [torch.rand(6, 3, 16, 16)] for t in models}
    fits = fit_all(models, teachers, groups, images)
    reasons = {group.occurrences[0].layer: fit.reason for group, fit in fits.items()}
    assert {name for name, reason in reasons.items() if not reason} == {"conv1", "conv2", "fc"}
    assert "no linear map" in reasons["attention"] and "never called" in reasons["attention.out_proj"]
    assert torch.equal(models["a_x"].attention.in_proj_weight, before)


def test_untied_groups_and_inputs_that_are_not_finite_are_named():
    models, teachers, groups = tied(a_x=PicoNet(), b_x=PicoNet())
    images = {t: [torch.full((2, 3, 16, 16), float("nan"))] for t in models}
    before = models["a_x"].conv1.weight.clone()
    fits = fit_all(models, teachers, groups, images)
    assert all("not finite" in fit.reason for fit in fits.values()) and torch.equal(models["a_x"].conv1.weight, before)
    untied = nn.ModuleDict({t: copy.deepcopy(teachers[t]) for t in models})
    fits = fit_all(untied, teachers, groups, images)
    assert all(fit.reason == "not tied" for fit in fits.values())


def test_stages_follow_each_other_by_depth():
    torch.manual_seed(0)
    models, teachers, groups = tied(a_x=PicoNet(extra=2), b_x=PicoDetector())
    order = by_depth(models, groups)
    assert [g.occurrences[0].layer for g in order] == ["conv1", "conv2", "fc"]
    images = {"a_x": [torch.rand(4, 3, 16, 16)], "b_x": [[torch.rand(3, 16, 16)] * 4]}
    seen, conv1 = [], []

    def after_stage(stage):
        seen.append(stage)
        conv1.append(models["a_x"].conv1.weight.clone())

    fits = fit_all(models, teachers, groups, images, num_stages=3, after_stage=after_stage)
    assert seen == [0, 1, 2] and torch.equal(conv1[0], conv1[2])
    assert set(fits) == set(groups) and all(fit.fitted for fit in fits.values())


def test_the_same_seed_gives_the_same_weights_and_nothing_else_changes():
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        models, teachers, groups = tied(a_x=PicoNet(), b_x=PicoNet())
        models["a_x"].train()
        states = {t: copy.deepcopy(m.state_dict()) for t, m in teachers.items()}
        images = {t: [torch.rand(4, 3, 16, 16)] for t in models}
        before = models["a_x"].bn1.running_mean.clone()
        fit_all(models, teachers, groups, images, positions=30)
        assert torch.equal(models["a_x"].bn1.running_mean, before) and models["a_x"].bn1.training
        assert all(torch.equal(v, states[t][k]) for t in teachers for k, v in teachers[t].state_dict().items())
        results.append(models.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_rows_that_would_not_fit_are_held_part_by_part(monkeypatch):
    torch.manual_seed(0)
    models, teachers, groups = tied(a_x=PicoNet(), b_x=PicoNet())
    monkeypatch.setattr(least_squares, "MAX_ROWS_BYTES", 1)
    images = {t: [torch.rand(4, 3, 16, 16)] for t in models}
    fits = fit_all(models, teachers, groups, images)
    assert len(least_squares.parts_of(models, groups, 100)) == len(groups) and all(f.fitted for f in fits.values())


def test_a_large_layer_stays_in_bounds():
    """The first linear layer of a VGG: its normal equations would take 2.5 GB."""
    torch.manual_seed(0)
    models, teachers, groups = tied(a_x=nn.Linear(25088, 64), b_x=nn.Linear(25088, 64))
    assert row_quota(models["a_x"], 10**6, 10) * 10 <= least_squares.MAX_SYSTEM
    images = {t: [torch.rand(100, 25088)] for t in models}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (fit,) = fit_all(models, teachers, groups, images).values()
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert fit.fitted and max(fit.after.values()) < 0.01 and grown_mib < 400


def sums(x, y):
    return [moments_of(Rows(a, b)) for a, b in zip(x, y, strict=True)]


def test_columns_with_weights_of_their_own_come_near_to_their_own_solutions():
    torch.manual_seed(0)
    x, y = [torch.rand(1, 200, 8) for _ in range(3)], [torch.rand(1, 200, 4) for _ in range(3)]
    weights = torch.rand(3, 1, 4) ** 3
    weights = weights / weights.sum(0)
    found, _ = solve_weighted(sums(x, y), torch.zeros(1, 8, 4), weights, 0.1)
    means = weights.mean((1, 2))
    scale = sum(m * a.square().sum() / 200 for m, a in zip(means, x, strict=True)) / 8
    for column in range(4):
        w = weights[:, 0, column]
        system = sum(w[t] * x[t][0].T @ x[t][0] / 200 for t in range(3)) + 0.1 * scale * torch.eye(8)
        target = sum(w[t] * x[t][0].T @ y[t][0, :, column] / 200 for t in range(3))
        expected = torch.linalg.solve(system, target)
        assert torch.allclose(found[0, :, column], expected, rtol=0.02, atol=0.01)


def test_with_fewer_rows_than_inputs_tasks_count_with_their_mean_weight():
    torch.manual_seed(0)
    x, y = [torch.rand(1, 5, 20) for _ in range(2)], [torch.rand(1, 5, 3) for _ in range(2)]
    uneven = torch.tensor([[[0.9, 0.5, 0.1]], [[0.1, 0.5, 0.9]]])
    start = torch.rand(1, 20, 3)
    found, even = (solve_weighted(sums(x, y), start, w, 0.1)[0] for w in (uneven, torch.full((2, 1, 3), 0.5)))
    assert torch.allclose(found, even)
    expected, _ = solve_ridge(torch.cat(x, 1), torch.cat(y, 1) - torch.cat(x, 1) @ start, 0.1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_scale_of_normalised_outputs_is_free():
    """Two models that differ only in the scale of a convolution, which each normalises away, share it at no cost."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    second = copy.deepcopy(first)
    with torch.no_grad():
        second[0].weight *= torch.tensor([0.1, 1.0, 3.0, 10.0]).view(4, 1, 1, 1)
    models, teachers, groups = tied(a_x=first, b_x=second)
    images = {t: [torch.rand(20, 3, 8, 8)] for t in models}
    (fit,) = fit_all(models, teachers, groups, images, ridge=1e-4).values()
    assert max(fit.after.values()) < 1e-3


def test_the_gain_of_channels_that_are_hit_badly_is_lowered():
    torch.manual_seed(0)
    models, teachers, groups = tied(
        a_x=nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval(),
        b_x=nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval(),
    )
    images = {t: [torch.rand(20, 3, 8, 8)] for t in models}
    fit_all(models, teachers, groups, images)
    gains = torch.stack([model[1].weight.detach() for model in models.values()])
    assert (gains <= 1).all() and gains.min() < 0.95 and (gains > 0).all()
    assert all((teacher[1].weight == 1).all() for teacher in teachers.values())


def test_where_no_error_arrives_at_the_outputs_errors_count_by_gains():
    """Of a task whose metric is zero, as where all is zero behind the layer; the other's counts as it does."""
    torch.manual_seed(0)
    rows = [Rows(torch.randn(1, 50, 6), torch.randn(1, 50, 4)) for _ in range(2)]
    metric = torch.randn(1, 4, 8)
    sums = [moments_of(rows[0], torch.zeros(1, 4, 4)), moments_of(rows[1], metric @ metric.mT)]
    weights = torch.rand(2, 1, 4) + 0.5
    found = least_squares._metrics(sums, weights)
    assert torch.isfinite(found).all() and torch.allclose(found[0], torch.diag_embed(weights[0]))
    assert not torch.allclose(found[1], torch.diag_embed(weights[1]))
