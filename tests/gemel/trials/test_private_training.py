"""The short training of what tasks just below their targets hold alone."""

import pytest
import torch
from pico import merger_of

from gemel.training.outcome import Standing
from gemel.trials.private_training import PrivateTraining

IMAGES = {"north_pico": 24, "south_pico": 24, "east_pico": 18}


@pytest.fixture
def run(tasks, data, tmp_path):
    return merger_of(tasks, data, tmp_path / "results", strategy="adaptive")


@pytest.fixture
def training(run) -> PrivateTraining:
    return run.private_training


def standings(run, **ratios: float) -> dict[str, Standing]:
    """All of val was evaluated."""
    return {f"{n}_pico": Standing(r, r * run.tasks[f"{n}_pico"].target_acc) for n, r in ratios.items()}


def test_tasks_just_below_their_targets_are_trained_and_no_others(run, training):
    steps = training.steps_for(standings(run, north=0.9995, south=1.0, east=1.2), IMAGES)
    assert list(steps) == ["north_pico"] and steps["north_pico"] > 0


def test_as_long_as_another_fit_takes_and_no_longer(run, training):
    steps = training.steps_for(standings(run, north=0.9995, south=0.9995, east=1.2), IMAGES)
    images = 2 * IMAGES["north_pico"] + len(run.data["north_pico"].val.dataset)
    size = run.options.training.batch_size(run.tasks["north_pico"])
    assert steps["north_pico"] * size * 3 <= images * 3 / 2 < (steps["north_pico"] + 1) * size * 3


@pytest.mark.parametrize("far", [{"north": 0.9, "south": 1.0}, {"north": 0.995, "south": 0.9}])
def test_nobody_is_trained_where_one_task_is_too_far_from_its_target(run, training, far):
    assert training.steps_for(standings(run, **far), IMAGES) == {}


def test_nobody_is_trained_where_only_the_screening_subset_was_evaluated(run, training):
    found = {**standings(run, north=0.995), "south_pico": Standing(1.0)}
    assert training.steps_for(found, IMAGES) == {}


def test_what_was_gained_decides_what_is_tried_next(run, training):
    found = standings(run, north=0.9995, south=1.0)
    lost = [{"task": "north_pico", "before": 0.99, "after": 0.985, "steps": 200}]
    gained = [{"task": "north_pico", "before": 0.95, "after": 1.05, "steps": 10}]

    def after(earlier) -> PrivateTraining:
        return PrivateTraining(
            run.state, run.evaluator, run.options.training, training.context, training.recover, earlier
        )

    assert training.steps_for(found, IMAGES) and not after(lost).steps_for(found, IMAGES)
    others = [{**lost[0], "task": "east_pico"}]
    assert after(others).steps_for(found, IMAGES), "what detectors gain says nothing of classifiers"
    farther = standings(run, north=0.98, south=1.0)
    assert not training.steps_for(farther, IMAGES) and after(gained).steps_for(farther, IMAGES)


def test_it_changes_only_what_the_task_holds_alone(run, monkeypatch):
    monkeypatch.setattr(PrivateTraining, "steps_for", lambda self, found, num_images: {"north_pico": 8})
    groups = run.strategy.groups
    run.state.begin_trial(groups, "mean")
    shared = {id(p) for group in groups for o in group.occurrences for p in _layer(run, o).parameters(recurse=False)}
    before = {name: p.detach().clone() for name, p in run.state.models.named_parameters()}
    others = {key: value.clone() for key, value in run.state.models["south_pico"].state_dict().items()}

    reached = run.private_training.improve(groups, standings(run, north=0.0, south=1.0, east=1.0), IMAGES)

    changed = {name for name, p in run.state.models.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("north_pico") for name in changed)
    assert not any(id(p) in shared for name, p in run.state.models.named_parameters() if name in changed)
    assert all(torch.equal(v, others[k]) for k, v in run.state.models["south_pico"].state_dict().items())
    assert all(p.requires_grad for p in run.state.models.parameters()) and not run.state.models["north_pico"].training
    assert reached["north_pico"].accuracy == run.evaluator.measure_all(run.state.models)["north_pico"]
    assert reached["south_pico"].ratio == 1.0
    (gained,) = run.private_training.of_round()
    assert gained["task"] == "north_pico" and gained["after"] == reached["north_pico"].ratio and gained["steps"] > 0


def test_a_task_that_is_worse_afterwards_gets_back_what_the_fit_gave_it(run, monkeypatch):
    run.state.begin_trial(run.strategy.groups, "mean")
    before = {key: value.clone() for key, value in run.state.models.state_dict().items()}
    found = standings(run, north=0.9995, south=1.0, east=1.0)
    monkeypatch.setattr(run.private_training, "_train", lambda name, *more: (spoil(run.state.models[name]), 7))
    assert run.private_training.improve(run.strategy.groups, found, IMAGES) == found
    assert all(torch.equal(value, before[key]) for key, value in run.state.models.state_dict().items())
    (lost,) = run.private_training.of_round()
    assert lost["after"] == 0 and lost["steps"] == 7, "the next decision knows"


def spoil(model) -> float:
    """Its accuracy then."""
    with torch.no_grad():
        model.fc.bias.add_(9)
    return 0.0


def test_a_round_records_what_was_gained_and_the_search_learns_what_the_fit_reached(run, monkeypatch):
    """Of a task that training brought to its target, the strategy hears where the fit had left it."""
    run.preflight()
    heard = []
    honest = run.strategy.record
    monkeypatch.setattr(run.strategy, "record", lambda k, met, ratios: (heard.append(ratios), honest(k, met, ratios)))
    steps_for = PrivateTraining.steps_for

    def north_is_just_below(self, found, num_images):
        return steps_for(self, {**found, **standings(run, north=0.9995)}, num_images)

    monkeypatch.setattr("gemel.trials.initialisation.worst", lambda found: 0.9995)
    monkeypatch.setattr(PrivateTraining, "steps_for", north_is_just_below)
    run.store()
    run.play_round(run.strategy.groups)
    recorded = run.record.rounds[0]["private_training"]
    assert {gained["task"] for gained in recorded} == {"north_pico"}
    assert heard[0]["north_pico"] == recorded[-1]["before"]
    assert run.record.private_trainings() == recorded


def _layer(run, occurrence):
    return run.state.models[occurrence.task].get_submodule(occurrence.layer)
