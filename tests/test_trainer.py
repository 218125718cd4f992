import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pico import PicoNet
from torch import nn
from torch.nn import functional as F

from gemel.environment.clock import Clock
from gemel.environment.seeds import seeded
from gemel.evaluation.eval_method import evaluate
from gemel.fitting.batch_norm import reestimate_statistics
from gemel.sharing.groups import find_groups
from gemel.sharing.tying import tie
from gemel.training import step as step_module
from gemel.training import validation
from gemel.training.context import RoundContext
from gemel.training.early_stopping import Progress, loss_weight
from gemel.training.losses import task_losses
from gemel.training.options import TrainingOptions
from gemel.training.outcome import GIVEN_UP, MET, NOT_FINITE, TIME_OVER
from gemel.training.step import Member
from gemel.training.validation import Validation
from trainer import Round, recover

CPU = torch.device("cpu")
QUICK = TrainingOptions(learning_rate=0.01, max_epochs=60, patience_epochs=10)


@pytest.fixture
def models(tasks):
    return nn.ModuleDict({name: task.model for name, task in tasks.items()})


def run(models, tasks, data, options=QUICK, **more):
    return recover(models, tasks, data, options, RoundContext(device=CPU, seed=0, **more))


def session_of(models, tasks, data, options=QUICK) -> Round:
    members = {name: Member.of(task, data[name]) for name, task in tasks.items()}
    return Round(models, members, options, RoundContext(device=CPU, seed=0))


def step(session):
    return session.training.step(session.validation.active)


class Given:
    """Batches of a task that are one and the same."""

    def __init__(self, batch):
        self.batch = batch

    def next(self):
        return self.batch


def hard(task, **changes):
    """The task with another target."""
    return replace(task, unmerged_acc=1.0, tolerance=1.0, **changes)


def test_recovers_a_tied_workload_of_classifiers_and_a_detector(models, tasks, data):
    tie(models, find_groups(models))
    outcome = run(models, tasks, data)
    assert outcome.reason == MET and outcome.success
    for name, task in tasks.items():
        assert evaluate(task, data[name].val) == outcome.accuracies[name] >= task.target_acc
    assert not any(model.training for model in models.values())


def test_same_seed_same_weights(entries, tasks, models, data):
    tie(models, find_groups(models))
    start = {key: value.clone() for key, value in models.state_dict().items()}
    results = []
    for _ in range(2):
        models.load_state_dict(start)
        outcome = run(models, tasks, data, replace(QUICK, max_epochs=2), purpose=("round", 3))
        results.append((outcome, {key: value.clone() for key, value in models.state_dict().items()}))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][key]) for key, value in results[0][1].items())
    assert results[0][0].steps > 0 and 0 < results[0][0].reading_seconds < results[0][0].training_seconds


def test_a_step_with_nothing_tied_is_a_plain_step_of_each_model(models, tasks, data):
    """Invariant 6, bit for bit, for the classifiers and the detector."""
    plain = {name: copy.deepcopy(task.model).train() for name, task in tasks.items()}
    batches = {name: next(iter(data[name].train)) for name in tasks}
    session = session_of(models, tasks, data)
    for name, member in session.members.items():
        member.batches = Given(batches[name])
        member.progress.accuracy = member.progress.target  # at its target a task's loss has weight 1
        member.task.model.train()
    assert step(session) is None
    for name, model in plain.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=QUICK.learning_rate / QUICK.warmup_steps)
        images, targets = batches[name]
        output = model(images) if torch.is_tensor(images) else model(images, targets)
        loss = F.cross_entropy(output, targets) if torch.is_tensor(output) else sum(output.values())
        loss.backward()
        optimizer.step()
        ours = models[name].state_dict()
        assert all(torch.equal(value, ours[key]) for key, value in model.state_dict().items()), name


def test_a_tied_parameter_is_stepped_once_with_the_sum_of_gradients(models, tasks, data):
    """Published fault: a tied layer is stepped once per model."""
    tie(models, find_groups(models))
    session = session_of(models, tasks, data)
    held = [id(p) for group in session.training.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    shared = models["north_pico"].conv1.weight
    batches = {name: next(iter(data[name].train)) for name in tasks}
    gradients = []
    for name, task in tasks.items():
        task.model.train()
        loss = sum(task_losses(task, batches[name], CPU).values())
        gradients.append(torch.autograd.grad(loss, shared)[0])
    for name, member in session.members.items():
        member.batches = Given(batches[name])
        member.progress.accuracy = member.progress.target
    step(session)
    assert session.training.optimizer.state[shared]["step"] == 1
    assert torch.allclose(shared.grad, sum(gradients), rtol=1e-4, atol=1e-6)


def test_what_is_validated_and_kept_is_the_average_of_the_weights(models, tasks, data, monkeypatch):
    session = session_of(models, tasks, data)
    start = models["north_pico"].conv1.weight.detach().clone()
    seen = []
    step = session.training.step
    monkeypatch.setattr(session.training, "step", lambda members: step(members) or seen.append(value_of(models)))
    session.schedule.next_validation = 3
    session.train()
    average = session.training.averaged.module["north_pico"].conv1.weight
    expected = seen[0]
    for n, value in enumerate(seen[1:], 1):
        expected = torch.lerp(expected, value, 1 - (1 + n) / (10 + n))
    assert torch.allclose(average, expected, atol=1e-6) and not torch.equal(seen[0], start)
    monkeypatch.setattr(validation, "evaluate", lambda task, loader, model: 1.0 if model is not task.model else 0.0)
    assert session.validation.validate() == MET


def value_of(models) -> torch.Tensor:
    return models["north_pico"].conv1.weight.detach().clone()


def test_other_models_of_the_workload_are_not_touched(models, tasks, data):
    before = {key: value.clone() for key, value in models["east_pico"].state_dict().items()}
    some = {name: hard(tasks[name]) for name in ("north_pico", "south_pico")}
    run(models, some, data, replace(QUICK, max_epochs=1))
    assert all(torch.equal(value, before[key]) for key, value in models["east_pico"].state_dict().items())


def test_a_stalled_task_is_given_up_and_that_is_never_done(models, tasks, data, monkeypatch):
    """Published fault: a stalled model can make training "done" with nobody at target."""
    fixed = {"north_pico": 0.3, "south_pico": 0.3, "east_pico": 0.3}
    monkeypatch.setattr(validation, "evaluate", lambda task, loader, model=None: fixed[task.name])
    outcome = run(models, {name: hard(task) for name, task in tasks.items()}, data)
    assert outcome.reason == GIVEN_UP and not outcome.success and outcome.met == ()
    assert outcome.steps < QUICK.max_epochs * max(len(d.train) for d in data.values())


def test_a_task_is_given_up_once_and_the_others_are_told_apart(models, tasks, data, monkeypatch):
    given_up = []
    give_up = Validation.give_up_if_stalled

    def counted(self, member):
        gone = give_up(self, member)
        given_up.extend([member.task.name] * gone)
        return gone

    monkeypatch.setattr(Validation, "give_up_if_stalled", counted)
    monkeypatch.setattr(
        validation, "evaluate", lambda task, loader, model=None: 0.2 if task.name == "south_pico" else 0.99
    )
    outcome = run(models, tasks, data)
    assert given_up == ["south_pico"] and outcome.reason == GIVEN_UP and not outcome.success
    assert set(outcome.met) == {"north_pico", "east_pico"}


def test_a_first_stall_lowers_the_learning_rate_only(models, tasks, data, monkeypatch):
    session = session_of(models, {n: hard(t) for n, t in tasks.items()}, data)
    patience = math.ceil(session.schedule.patience)
    member = next(iter(session.members.values()))
    p = member.progress
    verdicts = []
    for step in (0, patience - 1, patience, patience + 1, 2 * patience):
        session.schedule.step = step
        p.note(step, 0.3 if step else 0.5)
        verdicts.append(
            (session.validation.give_up_if_stalled(member), session.schedule.learning_rate == QUICK.learning_rate)
        )
    assert verdicts == [(False, True), (False, True), (False, False), (False, False), (True, False)]
    assert p.given_up


def test_a_task_is_stalled_when_its_pace_will_not_do(tasks):
    p = Progress.of(hard(tasks["north_pico"]))
    p.note(0, 0.2)
    p.note(100, 0.3)  # 0.1 in 100 steps: 0.7 more take 700
    assert not p.stalled(100, patience=101, max_steps=200)
    assert p.stalled(100, patience=100, max_steps=799)
    assert not p.stalled(100, patience=100, max_steps=801)
    assert p.patient_since == 100 and p.accuracy_then == 0.3, "while there is hope, the next stretch is judged anew"


def test_validation_takes_the_likeliest_to_fail_first_and_stops_when_it_is_decided(models, tasks, data, monkeypatch):
    asked = []
    accuracy = {"north_pico": 0.9, "south_pico": 0.2, "east_pico": 0.5}
    monkeypatch.setattr(
        validation, "evaluate", lambda task, loader, model=None: asked.append(task.name) or accuracy[task.name]
    )
    session = session_of(models, {n: hard(t) for n, t in tasks.items()}, data)
    session.validation.validate(everything=True)
    assert set(asked) == set(tasks)
    asked.clear()
    session.validation.validate()
    assert asked == ["south_pico"]
    accuracy["south_pico"] = 1.0
    asked.clear()
    assert session.validation.validate() is None
    assert asked == ["south_pico", "east_pico"]
    accuracy.update(north_pico=1.0, east_pico=1.0)
    assert session.validation.validate() == MET


def test_a_loss_that_is_not_finite_ends_the_round(models, tasks, data, monkeypatch):
    def not_finite(task, *more):
        return {"loss": next(task.model.parameters()).sum() * math.nan}

    before = {key: value.clone() for key, value in models.named_parameters()}
    monkeypatch.setattr(step_module, "task_losses", not_finite)
    monkeypatch.setattr(validation, "evaluate", lambda task, loader, model=None: 0.3)
    outcome = run(models, tasks, data)
    assert outcome.reason == NOT_FINITE and not outcome.success and outcome.steps == 0
    assert all(torch.equal(value, before[key]) for key, value in models.named_parameters())


def test_the_deadline_ends_the_round(models, tasks, data, monkeypatch):
    monkeypatch.setattr(validation, "evaluate", lambda task, loader, model=None: 0.3)
    outcome = run(models, tasks, data, clock=Clock(time_budget=-1.0))
    assert outcome.reason == TIME_OVER and not outcome.success and outcome.steps == 0


@pytest.mark.parametrize("value", [-1, 1.01, math.nan, "high", None, [0.5, 0.5]])
def test_an_eval_method_that_returns_no_accuracy_is_refused(tasks, data, value):
    """Published fault: -1 (no ground truth) flows on as an accuracy."""
    task = replace(tasks["north_pico"], eval_method=lambda model, loader: value)
    with pytest.raises(ValueError, match="north_pico: eval_method: got .*allowed: a number in"):
        evaluate(task, data["north_pico"].val)


def test_loss_weight_is_the_published_one_from_one_to_ten():
    assert loss_weight(0.4, 0.8) == pytest.approx(2**0.75)
    assert loss_weight(0.9, 0.8) == 1.0 and loss_weight(0.0, 0.8) == 10.0 and loss_weight(1e-9, 0.8) == 10.0


def test_validation_comes_sooner_near_the_target_and_costs_a_bounded_share(models, tasks, data):
    session = session_of(models, tasks, data)
    for member in session.members.values():
        member.progress.accuracy = 1.0
    worst = session.members["south_pico"]
    worst.progress.accuracy, session.schedule.steps_per_epoch = 0.1, 1000
    worst.data = replace(data["south_pico"], val=SimpleNamespace(dataset=range(2400)))
    far = session.validation.interval()
    images_per_step = sum(task.batch_size for task in tasks.values())
    assert far == 4 * math.ceil(2400 / 3 / images_per_step / QUICK.validation_share)
    worst.progress.note(0, 0.1)
    worst.progress.note(100, worst.task.target_acc - 0.01)
    assert session.validation.interval() == far / 4


def test_inception_like_outputs_get_auxiliary_losses(tasks):
    class Auxiliary(PicoNet):
        def forward(self, images):
            logits = super().forward(images)
            return SimpleNamespace(logits=logits, aux_logits=logits)

    task = replace(tasks["north_pico"], model=Auxiliary())
    losses = task_losses(task, (torch.rand(2, 3, 16, 16), torch.tensor([0, 1])), CPU)
    assert losses["aux_logits"].item() == pytest.approx(0.4 * losses["cross_entropy"].item())


@pytest.mark.parametrize("name, got", [("north_pico", "a classifier"), ("east_pico", "a detector")])
def test_a_model_that_returns_something_else_is_named(tasks, data, name, got):
    class Wrong(nn.Module):
        def forward(self, *inputs):
            return [1]

    task = replace(tasks[name], model=Wrong())
    with pytest.raises(ValueError, match=f"{name}: model: got list from {got} in training; allowed"):
        task_losses(task, next(iter(data[name].train)), CPU)


def test_statistics_are_reestimated_and_modes_restored(tasks, data):
    model = tasks["north_pico"].model.eval()
    batches = list(data["north_pico"].train)
    model.bn1.running_mean.fill_(7.0)
    model.bn1.momentum = 0.25
    reestimate_statistics(model, batches, CPU)
    with torch.no_grad():
        expected = torch.stack([model.conv1(images).mean((0, 2, 3)) for images, _ in batches]).mean(0)
    assert torch.allclose(model.bn1.running_mean, expected, atol=1e-5)
    assert model.bn1.momentum == 0.25 and not any(m.training for m in model.modules())


def test_statistics_are_reestimated_before_a_trial_is_judged(models, tasks, data):
    tasks = {name: replace(task, tolerance=0.8) for name, task in tasks.items()}
    for name, task in tasks.items():
        task.model.bn1.running_mean.fill_(7.0)
        assert evaluate(task, data[name].val) < task.target_acc
    outcome = run(models, tasks, data)
    assert outcome.reason == MET and outcome.steps == 0


def test_a_round_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1, "x"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(1, "x"):
        assert torch.equal(torch.rand(3), first)
    with seeded(1, "y"):
        assert not torch.equal(torch.rand(3), first)


def test_without_average_of_weights_the_trained_weights_themselves_are_kept(models, tasks, data):
    """Published settings: no average of weights, no warm-up."""
    session = session_of(models, tasks, data, replace(QUICK, average_decay=0, warmup_steps=0))
    for member in session.members.values():
        member.task.model.train()
    for _ in range(3):
        assert step(session) is None
    assert session.training.optimizer.param_groups[0]["lr"] == QUICK.learning_rate
    kept = session.training.averaged.module.state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in session.training.models.state_dict().items())


def test_while_private_parameters_are_trained_the_average_keeps_the_weights_that_it_began_with(models, tasks, data):
    tie(models, find_groups(models))
    options = replace(QUICK, private_epochs=1.0, warmup_steps=0, private_average_decay=0.75)
    session = session_of(models, tasks, data, options)
    session.training.begin_stage(session.validation.active)
    private, expected = models["north_pico"].bn1.weight, models["north_pico"].bn1.weight.detach().clone()
    shared = models["north_pico"].conv1.weight.detach().clone()
    for _ in range(2):
        assert session.schedule.private_only and step(session) is None
        expected = expected.lerp(private.detach(), 0.25)
    average = session.training.averaged.module["north_pico"]
    assert torch.allclose(average.bn1.weight, expected, atol=1e-6) and not torch.equal(average.bn1.weight, private)
    assert torch.equal(average.conv1.weight, shared)


@pytest.mark.parametrize("statistics_batches, unchanged", [(0, True), (8, False)])
def test_statistics_are_left_alone_on_request(models, tasks, data, statistics_batches, unchanged):
    before = models["north_pico"].bn1.running_mean.clone()
    easy = {name: replace(task, tolerance=0.01) for name, task in tasks.items()}
    outcome = run(models, easy, data, replace(QUICK, statistics_batches=statistics_batches))
    assert outcome.reason == MET and outcome.steps == 0
    assert torch.equal(before, models["north_pico"].bn1.running_mean) == unchanged


def test_a_buffer_that_a_layer_replaces_is_averaged_as_it_is_now(models, tasks, data):
    """A user's own normalisation may write `self.mean = ...` in each forward pass instead of changing the tensor."""

    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, features):
            if self.training:
                self.calls = self.calls + 1
            return features

    models["north_pico"].more = Counts()
    session = session_of(models, tasks, data, replace(QUICK, average_decay=0, warmup_steps=0))
    session.training.begin_stage(list(session.members.values()))
    for _ in range(3):
        assert step(session) is None
    assert models["north_pico"].more.calls == 3
    assert session.training.averaged.module["north_pico"].more.calls == 3
