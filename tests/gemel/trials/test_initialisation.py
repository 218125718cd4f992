"""What a trial begins with: predicted harm, fitted weights, channels lined up."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from pico import merger_of, thresholds
from torchvision.ops import FrozenBatchNorm2d

from gemel.fitting.importance import PIXELS
from gemel.sharing.tying import is_tied, retie
from gemel.strategies import adaptive
from gemel.strategies.base import FirstStep
from gemel.strategies.donors import first_layers
from gemel.thresholds import THRESHOLDS
from gemel.training.outcome import Standing
from gemel.trials import evaluator, fit_samples, images, initialisation, sensitivity
from gemel.trials.initialisation import WeightFitter, refit_frozen_normalisation
from gemel.trials.sensitivity import choose_first_step, sensitivity_if_all_were_tied
from gemel.trials.verified_part import saving_of_part
from gemel.workload import CLASSIFICATION


@pytest.fixture
def run(tasks, data, tmp_path):
    return merger_of(tasks, data, tmp_path / "results", strategy="adaptive", feature_weight=0.0, private_epochs=0.0)


@pytest.fixture
def fit(run):
    """Fits tied groups, as a trial of the first round does."""

    def fit(groups):
        fitter = WeightFitter(run.state, run.evaluator, run.images, run.strategy.donor_of)
        return fitter.fit(groups, run.tasks, 0, THRESHOLDS.fit.max_fits)

    return fit


def tie_all(run) -> None:
    retie(run.state.models, (), run.record.groups, run.state.unmerged, "mean")


def predict(run) -> None:
    run.strategy.set_sensitivity(*sensitivity_if_all_were_tied(run.state, run.images, run.record.groups))


def state_of(run) -> dict:
    return {key: value.clone() for key, value in run.state.models.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(value, second[key]) for key, value in first.items())


def test_predicting_changes_nothing_and_scores_every_group_and_task(run):
    before = state_of(run)
    predict(run)
    assert same(before, state_of(run)) and not any(is_tied(run.state.models, group) for group in run.record.groups)
    pairs = {(i, task) for i, group in enumerate(run.record.groups) for task in group.tasks}
    assert set(run.strategy.sensitivity.errors) == pairs and not run.strategy.needs_sensitivity
    assert all(value >= 0 for value in run.strategy.sensitivity.errors.values())


@pytest.fixture
def classifiers(tasks, data, tmp_path):
    own = {name: task for name, task in tasks.items() if task.kind == CLASSIFICATION}
    return merger_of(own, {name: data[name] for name in own}, tmp_path / "classifiers", strategy="adaptive")


def test_what_takes_long_is_decided_by_operations_on_the_images_of_a_fit(classifiers, run, monkeypatch):
    tasks = list(classifiers.tasks)
    given = (classifiers.strategy, classifiers.state, classifiers.images, classifiers.evaluator)
    flops = [
        classifiers.images.of_fits.flops(classifiers.state.unmerged, names, THRESHOLDS.fit.pixels)
        for names in (tasks, *([task] for task in tasks))
    ]
    assert flops[0] == sum(flops[1:]) and min(flops) > 0
    monkeypatch.setattr(classifiers.evaluator, "ratios", lambda: dict.fromkeys(tasks, 1.01))  # little to lose
    for limit, is_long in ((flops[0], False), (flops[0] / 2, True)):
        monkeypatch.setattr(sensitivity, "THRESHOLDS", thresholds(long_fit=limit))
        choose_first_step(*given)
        assert classifiers.strategy.trials_take_long is is_long
        assert classifiers.strategy.first_step.share == (THRESHOLDS.search.first_step if is_long else 0.0)
    with_goal = merger_of(run.tasks, run.data, run.results_path / "goal", strategy="adaptive", memory=1)
    choose_first_step(with_goal.strategy, with_goal.state, with_goal.images, run.evaluator)
    assert with_goal.strategy.goal_saving and not with_goal.strategy.trials_take_long
    choose_first_step(run.strategy, run.state, run.images, run.evaluator)
    assert run.strategy.trials_take_long
    assert not run.strategy.first_step.share, "no layer of a detector is safe without a prediction"


def test_classifiers_are_tied_at_once_where_that_is_likely_to_succeed(classifiers, monkeypatch):
    """By what tolerance and unmerged accuracy leave; with first layers, if weights show that they have one ancestor."""
    classifiers.preflight()
    given = (classifiers.state, classifiers.images, classifiers.evaluator)

    def first_step(ratio=1.05):
        monkeypatch.setattr(classifiers.evaluator, "ratios", lambda: dict.fromkeys(classifiers.tasks, ratio))
        choose_first_step(classifiers.strategy, *given)
        return classifiers.strategy.first_step

    apart = first_step()
    assert not apart.ties_stems
    unmerged, groups = classifiers.state.unmerged, classifiers.record.groups
    first, *others = unmerged.values()
    for other in others:
        own = other.state_dict()
        like = {key: value for key, value in first.state_dict().items() if key in own and own[key].shape == value.shape}
        other.load_state_dict(like, strict=False)
    alike = first_step()
    assert alike == apart._replace(ties_stems=True) and alike.share == 1.0 and 0.5 <= alike.chance < 1
    tied = [group for group, is_first in zip(groups, first_layers(unmerged, groups), strict=True) if not is_first]
    for occurrence in tied[-1].occurrences[1:]:
        unmerged[occurrence.task].get_submodule(occurrence.layer).weight.data.neg_()
    assert first_step() == alike, "only first layers count"
    assert first_step(ratio=1.01) == FirstStep(), "hardly any accuracy to lose"


def test_counting_operations_may_run_out_of_memory(classifiers, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no memory for counting")

    own = classifiers
    own.preflight()
    given = (own.strategy, own.state, own.images, own.evaluator)
    monkeypatch.setattr(classifiers.images.of_fits, "flops", full)
    choose_first_step(*given)
    assert classifiers.strategy.trials_take_long
    monkeypatch.setattr(classifiers.images.of_fits, "flops", lambda *_: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        choose_first_step(*given)


def test_where_fits_take_long_a_merge_ties_the_largest_layers_first(classifiers, monkeypatch):
    for module in (sensitivity, adaptive):
        monkeypatch.setattr(module, "THRESHOLDS", thresholds(long_fit=0.0, first_step=0.3))
    classifiers.preflight()
    classifiers.merge()
    first, second = classifiers.record.rounds[:2]
    optimal = first["optimal_saved_bytes"]
    assert 0.3 * optimal <= first["trial_saved_bytes"] < optimal
    assert second["trial_saved_bytes"] > first["saved_bytes"]
    assert not classifiers.strategy.needs_sensitivity, "which is predicted after that"


@pytest.mark.parametrize("chance, is_screened", [(0.9, False), (0.1, True)])
def test_what_is_expected_to_succeed_is_not_screened(classifiers, monkeypatch, chance, is_screened):
    """Neither are the unmerged models, of which it would be asked what they reach on the subset."""
    subset = {name: replace(data, screen=data.plain) for name, data in classifiers.data.items()}
    classifiers.data = classifiers.evaluator.data = subset
    monkeypatch.setattr(classifiers.strategy, "chance", lambda proposal: chance)
    classifiers.strategy.begin_with(lambda groups: FirstStep(0.9, chance))
    classifiers.preflight()
    classifiers.evaluator.screening = True
    classifiers.play_round(classifiers.strategy.propose())
    assert bool(classifiers.evaluator.unmerged_on_screen) == is_screened


def test_fitted_weights_come_near_to_what_each_task_could(run, fit):
    tie_all(run)
    mean = run.evaluator.standings(run.tasks)
    fitted = fit(run.record.groups)
    assert all(is_tied(run.state.models, group) for group in run.record.groups)
    assert min(fitted.values()) > min(mean.values()), "better than the mean for the task that suffers most"
    assert fitted == run.evaluator.standings(run.tasks), "what is returned is what the models are now"


def test_a_stem_may_be_given_by_one_task_and_the_rest_is_fitted_to_it(run, fit, monkeypatch):
    stem = next(group for group in run.record.groups if group.occurrences[0].layer == "conv1" and len(group.tasks) > 1)
    monkeypatch.setattr(run.strategy, "donor_of", lambda group: "south_pico" if group == stem else None)
    tie_all(run)
    before = state_of(run)
    fit(run.record.groups)
    donor = run.state.unmerged["south_pico"]
    for o in stem.occurrences:
        layer, norm = (run.state.models[o.task].get_submodule(name) for name in (o.layer, "bn1"))
        assert torch.equal(layer.weight, donor.conv1.weight) and torch.equal(norm.weight, donor.bn1.weight)
    assert is_tied(run.state.models, stem) and not same(
        {k: v for k, v in before.items() if "conv2" in k}, state_of(run)
    )
    run.state.models.load_state_dict(before)
    fit((stem,))
    assert not torch.equal(run.state.models["south_pico"].conv1.weight, donor.conv1.weight), (
        "nothing could be fitted to it"
    )


def test_fits_depend_on_the_seed_alone(run, fit):
    tie_all(run)
    start, states = state_of(run), []
    for _ in range(2):
        run.state.models.load_state_dict(start)
        fit(run.record.groups)
        states.append(state_of(run))
    assert same(*states)


def test_the_better_of_two_fits_is_kept(run, fit, monkeypatch):
    """The second fit weights tasks by what they lack; where it is worse, the first stays."""
    tie_all(run)
    given, answers = (
        [],
        iter([{"north_pico": 0.9, "south_pico": 1.1, "east_pico": 1.06}, dict.fromkeys(run.tasks, 0.85)]),
    )
    first = {}

    def fake(models, *more, task_weights, **options):
        given.append(dict(task_weights))
        with torch.no_grad():
            models["north_pico"].conv2.weight += len(given)

    def standings(names, *_):
        first.setdefault("state", state_of(run))
        return {name: Standing(ratio) for name, ratio in next(answers).items()}

    monkeypatch.setattr(initialisation, "fit_sequentially", fake)
    monkeypatch.setattr(run.evaluator, "standings", standings)
    assert fit(run.record.groups)["north_pico"].ratio == 0.9
    assert same(first["state"], state_of(run))
    assert set(given[0].values()) == {1.0}
    assert given[1]["north_pico"] > given[1]["east_pico"] > given[1]["south_pico"]
    assert sum(given[1].values()) == pytest.approx(3.0)


def test_there_is_no_other_fit_where_tasks_have_hardly_more_to_spare_than_others_lack(run, fit, monkeypatch):
    tie_all(run)
    fits = []
    reached = {"north_pico": 0.9, "south_pico": 1.1, "east_pico": 1.02}
    monkeypatch.setattr(initialisation, "fit_sequentially", lambda *more, **options: fits.append(1))
    monkeypatch.setattr(
        run.evaluator, "standings", lambda names, *_: {name: Standing(r) for name, r in reached.items()}
    )
    fit(run.record.groups)
    assert len(fits) == 1, "1.0067 of the targets are expected of all"
    reached["east_pico"] = 1.03
    fit(run.record.groups)
    assert len(fits) > 2, "1.01"


def test_the_fit_is_kept_whose_tasks_at_target_save_most(run, monkeypatch):
    """Two tasks at target share among themselves, though the worst task of the other fit is better."""
    tie_all(run)
    answers = iter(
        [
            {"north_pico": 0.98, "south_pico": 1.1, "east_pico": 0.98},
            {"north_pico": 1.01, "south_pico": 1.02, "east_pico": 0.9},
            {"north_pico": 0.99, "south_pico": 0.99, "east_pico": 0.99},
        ]
    )

    def standings(names, *_):
        return {name: Standing(ratio, ratio) for name, ratio in next(answers).items()}

    monkeypatch.setattr(initialisation, "fit_sequentially", lambda *args, **options: None)
    monkeypatch.setattr(run.evaluator, "standings", standings)
    saving_of = partial(saving_of_part, run.state, run.record.groups)
    fitter = WeightFitter(run.state, run.evaluator, run.images, run.strategy.donor_of, saving_of=saving_of)
    assert saving_of(["north_pico", "south_pico"]) > saving_of(["south_pico"]) == 0
    assert fitter.fit(run.record.groups, run.tasks, 0, 3)["east_pico"].ratio == 0.9


def test_where_fits_take_long_the_first_that_saves_something_is_kept_at_once(run, monkeypatch):
    """It is neither improved by training nor fitted again; once something is kept, fits may be."""
    trained, fits = [], []

    def improve(found, num_images):
        trained.append(found)
        return found

    def fitted(takes_first):
        fits.clear()
        given = (run.state, run.evaluator, run.images, run.strategy.donor_of, improve, len)
        WeightFitter(*given, takes_first=takes_first).fit(run.record.groups, run.tasks, 0, max_fits=2)
        return len(fits)

    reached = {"north_pico": 0.9, "south_pico": 1.1, "east_pico": 1.1}
    monkeypatch.setattr(initialisation, "fit_sequentially", lambda *more, **options: fits.append(1))
    monkeypatch.setattr(run.evaluator, "standings", lambda names, *_: {n: Standing(r, r) for n, r in reached.items()})
    tie_all(run)
    assert fitted(takes_first=True) == 1 and not trained
    assert fitted(takes_first=False) == 2 and len(trained) == 2
    run.state.kept = run.record.groups[:1]
    assert fitted(takes_first=True) == 2
    run.state.kept = ()
    reached.update(south_pico=0.9, east_pico=0.9)
    assert fitted(takes_first=True) == 1 and len(trained) == 5, "trained, as nothing would be saved"
    reached.update(north_pico=0.99, south_pico=0.99, east_pico=1.1)
    assert fitted(takes_first=True) == 1, "a trial that ties less comes sooner"
    assert fitted(takes_first=False) == 2


@pytest.mark.parametrize("has_more, spare", [(True, 1.01), (True, 1.001), (False, 1.01)])
def test_the_second_fit_is_on_twice_as_many_images(run, monkeypatch, has_more, spare):
    """Where all tasks together have what one lacks; hardly is enough then, where there are more images."""
    fits, trained, asked, draw = [], [], [], run.images.of_fits.of

    def of(teachers, groups, num_pixels):
        asked.append(num_pixels)
        images, samples = draw(teachers, groups, 1)
        drawn = copy.copy(samples)
        drawn.num_images = dict.fromkeys(samples.num_images, len(asked) if has_more else 1)
        return images, drawn

    monkeypatch.setattr(run.images.of_fits, "of", of)
    monkeypatch.setattr(initialisation, "fit_sequentially", lambda *more, **options: fits.append(options))
    reached = {"north_pico": 2 * spare - 0.995, "south_pico": 0.995, "east_pico": spare}
    monkeypatch.setattr(run.evaluator, "standings", lambda names, *_: {n: Standing(r, r) for n, r in reached.items()})

    def improve(found, num_images):
        trained.append(num_images)
        return found

    tie_all(run)
    fitter = WeightFitter(run.state, run.evaluator, run.images, run.strategy.donor_of, improve)
    fitter.fit(run.record.groups, run.tasks, 0, max_fits=2)
    assert asked == [THRESHOLDS.fit.pixels, 2 * THRESHOLDS.fit.pixels]
    is_refitted = has_more or spare >= THRESHOLDS.fit.refit_from
    assert len(fits) == 1 + is_refitted
    assert trained == [dict.fromkeys(run.tasks, 1 + has_more * attempt) for attempt in range(len(fits))]


def test_targets_that_no_weights_of_tasks_are_expected_to_meet_are_not_fitted_again(run, fit, monkeypatch):
    """Where all tasks together lack accuracy, what one gains the others lose."""
    tie_all(run)
    fits = []
    monkeypatch.setattr(initialisation, "fit_sequentially", lambda *args, **options: fits.append(1))
    found = {"north_pico": 0.98, "south_pico": 1.01, "east_pico": 0.99}
    monkeypatch.setattr(run.evaluator, "standings", lambda names, *_: {name: Standing(found[name]) for name in names})
    assert fit(run.record.groups)["north_pico"].ratio == 0.98
    assert len(fits) == 1


def test_a_fit_that_does_not_fit_the_memory_is_made_on_fewer_images(run, fit, monkeypatch, caplog):
    tie_all(run)
    start, asked_for = state_of(run), []
    images_of, real = images.plain_images, initialisation.fit_sequentially

    def plain_images(data, num_pixels, *more, **options):
        if num_pixels not in (PIXELS, 2 * PIXELS):  # those are of metrics
            asked_for.append(num_pixels)
        return images_of(data, num_pixels, *more, **options)

    def short_of_memory(models, *more, **options):
        if asked_for[-1] > THRESHOLDS.fit.pixels // 4:
            with torch.no_grad():
                models["north_pico"].conv2.weight += 1  # it had begun
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(models, *more, **options)

    monkeypatch.setattr(fit_samples, "THRESHOLDS", thresholds(more_images=1))
    monkeypatch.setattr(images, "plain_images", plain_images)
    monkeypatch.setattr(initialisation, "fit_sequentially", short_of_memory)
    fit(run.record.groups)
    assert [n for n in dict.fromkeys(asked_for) if n > 10] == [THRESHOLDS.fit.pixels // n for n in (1, 2, 4)]
    assert "out of memory" in caplog.text
    found = state_of(run)
    run.state.models.load_state_dict(start)
    monkeypatch.setattr(initialisation, "fit_sequentially", real)
    fewer = replace(THRESHOLDS.fit, pixels=THRESHOLDS.fit.pixels // 4, more_images=1)
    monkeypatch.setattr(initialisation, "THRESHOLDS", replace(THRESHOLDS, fit=fewer))
    fit(run.record.groups)
    assert same(found, state_of(run)), "as if it had begun with these"
    monkeypatch.setattr(initialisation, "fit_sequentially", lambda *more, **options: [].missing)
    with pytest.raises(AttributeError):
        fit(run.record.groups)


def test_a_trial_whose_fit_never_fits_the_memory_is_undone(run, monkeypatch):
    def fit(*more, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(initialisation, "fit_sequentially", fit)
    run.preflight()
    before = state_of(run)
    manifest = run.merge()
    assert manifest["memory"]["saved_bytes"] == 0 and all(not record["kept"] for record in manifest["run"]["rounds"])
    assert same(before, state_of(run))


def test_a_fit_starts_from_the_unmerged_models_whatever_was_tried_before(run):
    tie_all(run)
    start = state_of(run)
    with torch.no_grad():
        for tensor in run.state.models.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(0.5)
    run.state.reset_to_unmerged(run.record.groups, run.tasks)
    assert same(start, state_of(run)) and all(is_tied(run.state.models, group) for group in run.record.groups)


def test_lined_up_models_compute_the_same(run):
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before = [run.state.models[name].eval()(images) for name in ("north_pico", "south_pico")]
    object.__setattr__(run.options, "alignment", "activations")
    run._align_channels()
    after = [run.state.models[name](images) for name in ("north_pico", "south_pico")]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True))
    assert set(run.state.order.permutations) == set(run.tasks) and any(run.state.order.permutations.values())
    assert same(state_of(run), {k: v for k, v in run.state.unmerged.state_dict().items()}), (
        "teachers are permuted alike"
    )


def test_frozen_normalisation_is_refitted_behind_tied_layers(run):
    """The detector's only normalisation becomes torchvision's frozen one; conv1 in front of it is tied to the mean."""
    for models in (run.state.models, run.state.unmerged):
        own = models["east_pico"].bn1
        frozen = FrozenBatchNorm2d(own.num_features, own.eps)
        frozen.load_state_dict({key: value for key, value in own.state_dict().items() if "tracked" not in key})
        models["east_pico"].bn1 = frozen
    tie_all(run)
    batch = torch.stack([run.data["east_pico"].plain.dataset[i][0] for i in range(12)])

    def outputs(model):
        return model.bn1(model.conv1(batch)).mean((0, 2, 3)).detach()

    wanted, tied = outputs(run.state.unmerged["east_pico"]), outputs(run.state.models["east_pico"])
    others = {key: value.clone() for key, value in run.state.models["north_pico"].state_dict().items()}
    refit_frozen_normalisation(run.state, run.images, run.tasks, 0)
    refitted = outputs(run.state.models["east_pico"])
    assert (refitted - wanted).abs().max() < 0.3 * (tied - wanted).abs().max()
    assert same(others, run.state.models["north_pico"].state_dict()), "only what is frozen"


def test_models_are_judged_on_all_of_val_only_where_the_subset_is_met(run, monkeypatch):
    screens = {name: object() for name in run.tasks}
    run.evaluator.data = {name: replace(data, screen=screens[name]) for name, data in run.data.items()}
    looked_at = []

    def evaluate(task, loader, model=None):
        looked_at.append((task.name, loader is screens[task.name]))
        return 0.5 if (task.name, loader) == low else 1.0

    monkeypatch.setattr(evaluator, "evaluate", evaluate)
    monkeypatch.setattr(run.evaluator, "screen_targets", lambda names: dict.fromkeys(names, 0.9))
    low = ("south_pico", screens["south_pico"])
    found = run.evaluator.standings(run.tasks)
    assert found["south_pico"] == Standing(0.5 / 0.9) and found["north_pico"].accuracy is None
    assert all(on_screen for _, on_screen in looked_at)
    low = ("south_pico", run.data["south_pico"].val)
    found = run.evaluator.standings(run.tasks)
    assert found["south_pico"] == Standing(0.5 / run.tasks["south_pico"].target_acc, 0.5)
    assert found["north_pico"].accuracy == 1.0
    looked_at.clear()
    assert run.evaluator.standings(run.tasks, screens=False) == found
    assert not any(on_screen for _, on_screen in looked_at), "and no subset where none is asked for"
