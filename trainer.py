"""Joint retraining of tied models until each task meets its target, or cannot.

One optimizer holds every distinct parameter once, so a tied parameter is stepped once, with the sum of its tasks'
gradients. Each task brings its own batches, loss and weight; validation decides when the round is over.
"""

import contextlib
import io
import itertools
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from dataset_manager import TaskData, reseed
from environment import seeded
from losses import task_losses
from sharing.statistics import reestimate_statistics
from workload import CLASSIFICATION, Task

NEARLY_THERE = 0.98  # share of the target from which validation is as frequent as it may be

log = logging.getLogger(__name__)

MET, GIVEN_UP, EPOCHS_SPENT, NOT_FINITE, TIME_OVER = "met", "given up", "epochs spent", "loss not finite", "time over"


@dataclass(frozen=True)
class TrainingOptions:
    """How a round is trained. The defaults were chosen by trying, on models fine-tuned on photographs.

    All 52 layers of three MobileNetV2 tied: 9984 images until all targets were met with batches of 32 and without the
    average of weights, 3648 with these. Tied heads of three FCOS detectors after 40 steps: mAP 0.36 of 0.43 at this
    learning rate, 0.23 at 1e-3.
    """

    learning_rate: float = 3e-4  # of AdamW, reached after `warmup_steps`, a fifth of it after the first stall
    warmup_steps: int = 10
    classification_batch_size: int = 16
    detection_batch_size: int = 4
    max_epochs: float = 4.0  # an epoch is one pass over the largest train split among the tasks that are trained
    patience_epochs: float = 0.75  # a stall as long as this first lowers the learning rate, then gives the task up
    statistics_batches: int = 8  # per task, to re-estimate batch normalisation before a trial is judged
    average_decay: float = 0.95  # of the moving average of weights that is validated and kept
    validation_share: float = 0.25  # of the time of training that validation may take, as far as can be planned

    def batch_size(self, task: Task) -> int:
        default = self.classification_batch_size if task.kind == CLASSIFICATION else self.detection_batch_size
        return task.batch_size or default


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    reason: str
    accuracies: dict[str, float]  # per trained task, when it was last evaluated
    met: tuple[str, ...]  # tasks at their target when last evaluated, and not given up
    steps: int
    samples: int

    @property
    def success(self) -> bool:
        """Every task was at its target with the weights as they are now."""
        return self.reason == MET


def evaluate(task: Task, loader, model: nn.Module | None = None) -> float:
    """The task's accuracy by its own eval method, whose prints go to the debug log.

    Raises ValueError when that returns no number in [0, 1].
    """
    printed = io.StringIO()  # pycocotools, for one, prints pages
    with contextlib.redirect_stdout(printed):
        value = task.eval_method(task.model if model is None else model, loader)
    if printed.getvalue():
        log.debug("%s: eval_method printed:\n%s", task.name, printed.getvalue())
    try:
        accuracy = float(value)
    except (TypeError, ValueError):
        accuracy = math.nan
    if not 0 <= accuracy <= 1:
        raise ValueError(f"{task.name}: eval_method: got {value!r}; allowed: a number in [0, 1]")
    return accuracy


def loss_weight(accuracy: float, target: float) -> float:
    """Weight of a task's loss by how far it is from its target, from 1 (at target) to 10.

    Source: Gemel, NSDI 2023: (target / accuracy) ** 0.75, at most 10.
    """
    return 10.0 if accuracy <= 0 else min(10.0, max(1.0, (target / accuracy) ** 0.75))


@dataclass
class _Progress:
    """Where one task stands in a round."""

    task: Task
    data: TaskData
    batches: object  # endless iterator over the train loader
    accuracy: float = 0.0
    patient_since: int = 0  # step
    accuracy_then: float = 0.0
    given_up: bool = False
    validated: list[tuple[int, float]] = field(default_factory=list)  # (step, accuracy)

    @property
    def ratio(self) -> float:
        return self.accuracy / self.task.target_acc

    @property
    def met(self) -> bool:
        return self.accuracy >= self.task.target_acc

    def note(self, step: int, accuracy: float) -> None:
        self.accuracy = accuracy
        if not self.validated:
            self.restart_patience(step)
        self.validated.append((step, accuracy))

    def restart_patience(self, step: int) -> None:
        self.patient_since, self.accuracy_then = step, self.accuracy

    def stalled(self, step: int, patience: float, max_steps: int) -> bool:
        """Whether the gain since patience began, carried on, would miss the target in the steps that are left."""
        waited = step - self.patient_since
        if waited < patience:
            return False
        pace = (self.accuracy - self.accuracy_then) / waited
        hopeless = self.accuracy + pace * (max_steps - step) < self.task.target_acc
        if not hopeless:
            self.restart_patience(step)
        return hopeless

    def steps_to_target(self) -> float:
        """Steps still needed if the last two evaluations lie on a line; infinite without progress."""
        if len(self.validated) < 2:
            return math.inf
        (step0, accuracy0), (step1, accuracy1) = self.validated[-2:]
        slope = (accuracy1 - accuracy0) / max(1, step1 - step0)
        return (self.task.target_acc - accuracy1) / slope if slope > 0 else math.inf


def recover(
    models: nn.ModuleDict,
    tasks: Mapping[str, Task],
    data: Mapping[str, TaskData],
    options: TrainingOptions,
    *,
    device: torch.device,
    seed: int,
    purpose: tuple = (),
    deadline: float = math.inf,
) -> Outcome:
    """Trains the given tasks, whose models are tied as they shall be, until all are at target or it is decided.

    tasks: those whose weights the new ties change; other models of the workload are not touched. The random numbers of
    the round depend on seed and purpose alone. deadline: on time.monotonic(). Models are left in eval mode.
    """
    with seeded(seed, *purpose):
        for name in tasks:
            reseed(data[name], seed, *purpose)
        return _Round(models, tasks, data, options, device, deadline).run()


class _Round:
    """One trial: the optimizer, the step count and where each task stands."""

    def __init__(self, models, tasks, data, options: TrainingOptions, device: torch.device, deadline: float):
        self.options, self.device, self.deadline = options, device, deadline
        self.progress = {name: _Progress(task, data[name], _endless(data[name].train)) for name, task in tasks.items()}
        container = nn.ModuleDict({name: models[name] for name in tasks})  # yields a tied parameter once
        parameters = [p for p in container.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate)
        self.container, self.averaged = container, AveragedModel(container, multi_avg_fn=self.average, use_buffers=True)
        self.learning_rate = options.learning_rate
        self.steps_per_epoch = max(len(p.data.train) for p in self.progress.values())
        self.max_steps = math.ceil(options.max_epochs * self.steps_per_epoch)
        self.step = self.samples = 0
        self.reason: str | None = None

    @property
    def active(self) -> list[_Progress]:
        return [p for p in self.progress.values() if not p.given_up]

    def run(self) -> Outcome:
        with tqdm(total=self.max_steps, desc="retraining", unit="step", leave=False, disable=None) as bar:
            for p in self.progress.values():
                batches = itertools.islice(p.data.train, self.options.statistics_batches)
                reestimate_statistics(p.task.model, list(batches), self.device)
            self.validate(everything=True)
            while self.reason is None:
                self.train(self.interval(), bar)
                if self.reason is None:
                    self.validate(everything=self.step >= self.max_steps)
                bar.set_postfix_str(self.summary())
        if self.step:
            self.container.load_state_dict(self.averaged.module.state_dict())
        self.container.eval()
        return self.outcome()

    def outcome(self) -> Outcome:
        accuracies = {name: p.accuracy for name, p in self.progress.items()}
        met = tuple(name for name, p in self.progress.items() if p.met and not p.given_up)
        return Outcome(self.reason, accuracies, met, self.step, self.samples)

    def summary(self) -> str:
        return " ".join(f"{p.accuracy:.3f}/{p.task.target_acc:.3f}" for p in self.progress.values())

    # ---- training ---------------------------------------------------------------------------------------

    def train(self, num_steps: int, bar: tqdm) -> None:
        for p in self.progress.values():
            p.task.model.train()
        for _ in range(min(num_steps, self.max_steps - self.step)):
            if time.monotonic() > self.deadline:
                self.reason = TIME_OVER
                return
            if not self.train_step():
                self.reason = NOT_FINITE
                return
            bar.update()

    def train_step(self) -> bool:
        """One batch of every active task and one step of the optimizer; False if a loss was not finite."""
        warmup = min(1.0, (self.step + 1) / max(1, self.options.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * warmup
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for p in self.active:
            batch = next(p.batches)
            loss = sum(task_losses(p.task, batch, self.device).values())
            (loss * loss_weight(p.accuracy, p.task.target_acc)).backward()
            total += loss.detach()
            self.samples += len(batch[0])
        if not torch.isfinite(total):
            return False
        self.optimizer.step()
        self.averaged.update_parameters(self.container)
        self.step += 1
        return True

    def average(self, averages: list[Tensor], values: list[Tensor], num_averaged: int) -> None:
        """Moves the averages towards the values; at first quickly, so that where the trial began is soon forgotten.

        What is validated, and kept, is this average: it is as good as what a lowered learning rate would come to, at
        any time. Source: Izmailov et al., "Averaging Weights Leads to Wider Optima", UAI 2018.
        """
        decay = min(self.options.average_decay, (1 + int(num_averaged)) / (10 + int(num_averaged)))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)

    # ---- validation -------------------------------------------------------------------------------------

    def interval(self) -> int:
        """Steps until the next validation: sooner the nearer the worst task seems to be to its target.

        Bounded below so that evaluating that one task (a forward pass costs about a third of a training step on the
        same images) takes no more than its share of the time. Counts only, no clock: the same seed, the same result.
        """
        worst = min(self.active, key=lambda p: p.ratio)
        images_per_step = sum(self.options.batch_size(p.task) for p in self.active)
        cost_in_steps = len(worst.data.val.dataset) / 3 / images_per_step
        shortest = min(max(5, math.ceil(cost_in_steps / self.options.validation_share)), self.steps_per_epoch)
        if worst.ratio > NEARLY_THERE:
            return shortest
        return int(min(max(shortest, worst.steps_to_target() / 2), 4 * shortest))

    def validate(self, everything: bool = False) -> None:
        """Evaluates the tasks most likely to fail first and stops at the first that does, unless all are asked for."""
        for p in sorted(self.active, key=lambda p: p.ratio):
            model = self.averaged.module[p.task.name] if self.step else p.task.model
            p.note(self.step, evaluate(p.task, p.data.val, model))
            log.debug("step %d: %s %.4f of %.4f", self.step, p.task.name, p.accuracy, p.task.target_acc)
            if not p.met and not self.give_up_if_stalled(p) and not everything:
                return
        self.decide()

    def give_up_if_stalled(self, p: _Progress) -> bool:
        """A first stall lowers the learning rate for all; a task that then stalls again is given up for good."""
        if not p.stalled(self.step, self.options.patience_epochs * self.steps_per_epoch, self.max_steps):
            return False
        if self.learning_rate == self.options.learning_rate:
            self.learning_rate /= 5
            for other in self.active:
                other.restart_patience(self.step)
            return False
        p.given_up = True
        return True

    def decide(self) -> None:
        """The round is over when all tasks meet their targets, or when fewer than two are left that could share."""
        gave_up = len(self.active) < len(self.progress)
        if all(p.met for p in self.active):
            self.reason = GIVEN_UP if gave_up else MET
        elif gave_up and len(self.active) < 2:
            self.reason = GIVEN_UP
        elif self.step >= self.max_steps:
            self.reason = EPOCHS_SPENT


def _endless(loader):
    while True:
        yield from loader
