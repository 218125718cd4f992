"""The training of what tasks below their targets hold alone."""

import copy
from dataclasses import replace

import pytest
import torch
from pico import merger_of

from gemel.environment.interrupts import Interrupted
from gemel.thresholds import THRESHOLDS
from gemel.training.options import TrainingOptions
from gemel.training.outcome import Outcome, Standing
from gemel.training.schedule import Schedule
from gemel.trials.evaluator import Accuracy
from gemel.trials.private_training import ALONE, IMITATION, PrivateTraining
from merger import Merger

IMAGES = {"north_pico": 24, "south_pico": 24, "east_pico": 18}


@pytest.fixture
def run(tasks, data, tmp_path):
    """The unmerged models are a twentieth above their targets."""
    run = merger_of(tasks, data, tmp_path / "results", strategy="adaptive")
    run.evaluator.accuracy = {name: Accuracy(1.05 * task.target_acc, 0.0) for name, task in tasks.items()}
    return run


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


def test_an_imitation_that_would_have_to_be_very_short_is_left_out(run, training, monkeypatch):
    """It loses more than it gains."""
    found = standings(run, north=0.9995, south=0.9995, east=1.2)
    steps = training.steps_for(found, IMAGES)
    assert 0 < min(steps.values()) < THRESHOLDS.private.fewest_imitation_steps
    monkeypatch.setattr(training, "_kind", lambda name: IMITATION)
    assert training.steps_for(found, IMAGES) == {}
    many = {name: 100 * count for name, count in IMAGES.items()}
    assert min(training.steps_for(found, many).values()) >= THRESHOLDS.private.fewest_imitation_steps


def test_nobody_is_trained_where_only_the_screening_subset_was_evaluated(run, training):
    found = {**standings(run, north=0.995), "south_pico": Standing(1.0)}
    assert training.steps_for(found, IMAGES) == {}


def test_what_was_gained_decides_what_is_tried_next(run, training):
    found = standings(run, north=0.994, south=1.0)
    many = {name: 100 * count for name, count in IMAGES.items()}
    lost = [{"task": "north_pico", "before": 0.99, "after": 0.985, "steps": 200}]
    gained = [{"task": "north_pico", "before": 0.5, "after": 1.0, "steps": 2}]

    def after(earlier) -> PrivateTraining:
        return PrivateTraining(
            run.state, run.evaluator, run.options.training, training.context, training.recover, earlier
        )

    assert training.steps_for(found, many) and not after(lost).steps_for(found, many)
    others = [{**lost[0], "task": "east_pico"}]
    assert after(others).steps_for(found, many), "what detectors gain says nothing of classifiers"
    farther = standings(run, north=0.98, south=1.0)
    assert after(lost).steps_for(standings(run, north=0.996, south=1.0), IMAGES), "what it lacks may be chance"
    assert not training.steps_for(farther, IMAGES) and after(gained).steps_for(farther, IMAGES)
    beyond = [{**gained[0], "after": 1.05}]
    steps = [after(earlier)._steps_to_target("north_pico", Standing(0.98)) for earlier in (gained, beyond)]
    assert steps[0] == steps[1], "what is gained beyond the target may be chance"


def test_no_step_is_spent_on_a_task_whose_unmerged_model_is_hardly_above_its_target(run, training):
    run.evaluator.accuracy["north_pico"].unmerged = 1.001 * run.tasks["north_pico"].target_acc
    assert training.steps_for(standings(run, north=0.9995, south=1.0), IMAGES) == {}


def test_at_length_a_task_has_the_steps_that_it_is_expected_to_take_if_a_round_has_as_many(run, training):
    assert training.steps_at_length("north_pico", Standing(0.97), 0) == 0, "in four short epochs"
    training.options = replace(run.options.training, max_epochs=100 / len(run.data["north_pico"].train))
    assert 40 < training.steps_at_length("north_pico", Standing(0.97), 0) < 100
    assert training.steps_at_length("north_pico", Standing(0.97), 90) == 0
    assert training.steps_at_length("north_pico", Standing(1.0), 0) == 0
    assert training.steps_at_length("south_pico", Standing(0.1), 0) == 0


def test_at_length_a_task_is_trained_again_as_long_as_that_is_expected_to_be_enough(run, training, monkeypatch):
    """On other batches each time; what a fit had left is what the search hears."""
    reached, spent, target = iter([0.98, 0.975, 1.001]), [], run.tasks["north_pico"].target_acc
    training.options = replace(run.options.training, max_epochs=400 / len(run.data["north_pico"].train))

    def train(name, steps, proposal, found, already, resumed):
        spent.append((name, already))
        return next(reached) * target, 10

    monkeypatch.setattr(training, "_train", train)
    found = standings(run, north=0.97, south=1.0, east=1.0)
    after = training.at_length(run.strategy.groups, found, lambda state, last: None)
    assert after["north_pico"].ratio == pytest.approx(1.001) and after["east_pico"] == found["east_pico"]
    assert spent == [("north_pico", 0), ("north_pico", 10), ("north_pico", 20)], "worse once is not the end"
    assert Outcome("", {}, (), 0, 0, private_training=training.of_round()).fitted_ratios == {"north_pico": 0.97}


def test_at_length_a_training_goes_on_where_the_one_before_it_ended_though_that_was_worse(run, monkeypatch):
    """Accuracy is known to a few points only."""
    training, begun, reached = run.private_training, [], iter([0.965, 1.0])
    training.options = replace(run.options.training, max_epochs=400 / len(run.data["north_pico"].train))
    run.state.begin_trial(run.strategy.groups, "mean")

    def train(name, *more):
        bias = run.state.models[name].fc.bias.detach()
        begun.append(float(bias[0]))
        bias.add_(9)
        return next(reached) * run.tasks[name].target_acc, 10

    monkeypatch.setattr(training, "_train", train)
    found = standings(run, north=0.97, south=1.0, east=1.0)
    assert training.at_length(run.strategy.groups, found, lambda state, last: None)["north_pico"].ratio == 1.0
    assert begun[1] == pytest.approx(begun[0] + 9)


def test_at_length_a_task_that_twice_gains_nothing_is_given_up(run, training, monkeypatch):
    reached, target = iter([0.97, 0.98, 0.975, 0.974, 0.99]), run.tasks["north_pico"].target_acc
    training.options = replace(run.options.training, max_epochs=4000 / len(run.data["north_pico"].train))
    monkeypatch.setattr(training, "_train", lambda *given: (next(reached) * target, 10))
    found = standings(run, north=0.96, south=1.0, east=1.0)
    after = training.at_length(run.strategy.groups, found, lambda state, last: None)
    assert after["north_pico"].ratio == pytest.approx(0.974) and next(reached) == 0.99


def test_no_task_is_trained_at_length_that_nobody_would_share_with(run, training, monkeypatch):
    training.options = replace(run.options.training, max_epochs=400 / len(run.data["north_pico"].train))
    trained = []
    monkeypatch.setattr(training, "_train", lambda name, *more: (trained.append(name), (0.0, 10))[1])
    found = {"north_pico": Standing(0.97), "south_pico": Standing(0.0)}
    run.evaluator.accuracy["south_pico"].unmerged = run.tasks["south_pico"].target_acc
    assert training.at_length(run.strategy.groups, found, lambda state, last: None) == found and not trained


def test_trainings_at_length_go_on_where_they_ended(tasks, data, tmp_path, monkeypatch):
    """In the middle of the training of the second task: what comes out is equal to that of one go."""

    def begun(name) -> Merger:
        out_of_reach = {name: replace(task, unmerged_acc=2.0) for name, task in copy.deepcopy(tasks).items()}
        run = merger_of(out_of_reach, data, tmp_path / name, strategy="adaptive", max_epochs=8.0)
        run.evaluator.accuracy = {name: Accuracy(1.05 * task.target_acc, 0.0) for name, task in run.tasks.items()}
        run.state.begin_trial(run.strategy.groups, "mean")
        monkeypatch.setattr(run.private_training, "steps_at_length", lambda name, found, spent: 30 * (spent < 60))
        return run

    def go(run, save, saved=None) -> dict:
        found = {} if saved else standings(run, north=0.3, south=0.3, east=0.3)
        return run.private_training.at_length(run.strategy.groups, found, save, saved)

    whole, broken = begun("whole"), begun("broken")
    expected = go(whole, lambda state, last: None)
    states = []

    def end_in_the_second_task(state, last):
        states.append(copy.deepcopy(state[ALONE]))
        if len(state[ALONE]["names"]) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        go(broken, end_in_the_second_task)
    assert sorted(states[-1]["spent"].values()) == [0, 0, 60] and len(states[-1]["now"]) >= 2
    resumed = begun("resumed")
    assert go(resumed, lambda state, last: None, states[-1]) == expected
    assert resumed.private_training.of_round() == whole.private_training.of_round()
    for (name, value), other in zip(
        whole.state.models.state_dict().items(), resumed.state.models.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


def test_imitation_ends_with_small_steps():
    options = TrainingOptions(label_weight=0.0, probability_weight=1.0, private_epochs=1.0, warmup_steps=2)
    schedule, rates = Schedule(options, 12, has_private_stage=True), []
    for schedule.step in range(12):
        rates.append(schedule.rate())
    assert rates[0] == 5e-4 and set(rates[1:9]) == {1e-3}
    assert rates[9:] == pytest.approx([7.5e-4, 5e-4, 2.5e-4])
    by_labels = Schedule(replace(options, label_weight=1.0), 12, has_private_stage=True)
    by_labels.step = 11
    assert by_labels.rate() == 1e-3


def test_a_detector_that_learns_by_imitation_does_and_others_are_trained_by_labels(run, training, monkeypatch):
    trained = []

    def recover(models, tasks, data, options, context, teachers):
        rate = options.private_rate(tasks.values())
        trained.append((next(iter(tasks)), options.label_weight, options.imitates, rate))
        return Outcome("met", dict.fromkeys(tasks, 0.5), (), 3, 12)

    monkeypatch.setattr(training, "recover", recover)
    found = standings(run, north=0.9995, south=1.0, east=0.9995)
    monkeypatch.setattr("gemel.trials.private_training.learns_by_imitation", lambda model: True)
    training._trained("east_pico", 4, run.strategy.groups, found)
    training._trained("north_pico", 4, run.strategy.groups, found)
    monkeypatch.setattr("gemel.trials.private_training.learns_by_imitation", lambda model: False)
    training._trained("east_pico", 4, run.strategy.groups, found)
    east, north, by_labels = trained
    assert east == ("east_pico", 0.0, True, 1e-3) and north[:3] == ("north_pico", 1.0, False)
    assert by_labels == ("east_pico", 1.0, False, 3e-4)


def test_it_changes_only_what_the_task_holds_alone(run, monkeypatch):
    monkeypatch.setattr(PrivateTraining, "steps_for", lambda self, *given: {"north_pico": 8})
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

    def north_is_just_below(self, found, *given):
        return steps_for(self, {**found, **standings(run, north=0.9995)}, *given)

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
