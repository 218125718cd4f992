"""The accuracies of a workload: of the unmerged models, on the screening subset, merged, and reloaded from disk."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from gemel.datasets.folders import SampleError
from gemel.datasets.loaders import TaskData
from gemel.environment.clock import Clock
from gemel.environment.events import emit
from gemel.evaluation.eval_method import evaluate
from gemel.merging.diagnosis import explanations
from gemel.thresholds import THRESHOLDS
from gemel.training.outcome import Standing
from gemel.workload import DETECTION, Problem, Task


@dataclass
class Accuracy:
    """What was measured of one task, on val and (where there is one) on test."""

    unmerged: float
    merged: float
    unmerged_test: float | None = None
    merged_test: float | None = None
    per_class: dict[str, dict] | None = None  # class id -> {"unmerged": measures, "merged": measures}, on val


class Evaluator:
    """Evaluates the tasks of a workload and remembers what was measured.

    unmerged: copies of the models as they came. screening: whether a subset of val is evaluated first.
    """

    def __init__(
        self, tasks: Mapping[str, Task], data: Mapping[str, TaskData], unmerged: nn.ModuleDict, screening: bool
    ):
        self.tasks, self.data, self.unmerged, self.screening = tasks, data, unmerged, screening
        self.accuracy: dict[str, Accuracy] = {}
        self.unmerged_on_screen: dict[str, float] = {}

    # ---- the unmerged models ---------------------------------------------------------------------------------

    def measure_unmerged(self, clock: Clock) -> list[Problem]:
        """Measures every task that was not measured yet; a problem for each that fails or is below its own target.

        Raises Interrupted or TimeOver.
        """
        problems = []
        for name, task in self._shown("evaluating the unmerged models"):
            if name in self.accuracy:
                continue
            try:
                with clock.interruptible():
                    measured = evaluate(task, self.data[name].val)
            except SampleError:
                raise
            except Exception as error:  # a user's eval method may raise anything
                got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                problems.append(Problem(name, "eval_method", got, "f(model, data_loader) -> float in [0, 1]"))
                continue
            self.accuracy[name] = Accuracy(measured, measured)
            if (test := self.data[name].test) is not None:
                on_test = evaluate(task, test)
                self.accuracy[name].unmerged_test = self.accuracy[name].merged_test = on_test
            if measured < task.target_acc:
                problems.append(_below_its_target(task, measured, explanations(task, self.data[name].val, measured)))
        return problems

    def screen_targets(self, names: Iterable[str]) -> dict[str, float]:
        """What the unmerged models reach on the screening subset, times the tolerance; measured when first needed.

        Without those whose subset is all of val, and those that reach nothing on it.
        """
        if not self.screening:
            return {}
        names = list(names)
        for name in names:
            data = self.data[name]
            if name not in self.unmerged_on_screen and data.screen is not data.val:
                self.unmerged_on_screen[name] = evaluate(self.tasks[name], data.screen, self.unmerged[name])
        measured = (name for name in names if self.unmerged_on_screen.get(name))  # where it is 0 it says nothing
        return {name: self.tasks[name].tolerance * self.unmerged_on_screen[name] for name in measured}

    # ---- the merged models -----------------------------------------------------------------------------------

    def standings(self, names: Iterable[str]) -> dict[str, Standing]:
        """Where each task is on the screening subset and, if all are near their targets there, on all of val."""
        names = list(names)
        targets = self.screen_targets(names)
        found = {}
        for name in names:
            task, data = self.tasks[name], self.data[name]
            whole = name not in targets
            accuracy = evaluate(task, data.val if whole else data.screen)
            found[name] = Standing(accuracy / targets.get(name, task.target_acc), accuracy if whole else None)
        if min(standing.ratio for standing in found.values()) >= THRESHOLDS.fit.full_validation_from:
            for name in (name for name, standing in found.items() if standing.accuracy is None):
                accuracy = evaluate(self.tasks[name], self.data[name].val)
                found[name] = Standing(accuracy / self.tasks[name].target_acc, accuracy)
        return found

    def measure(self, name: str, model: nn.Module) -> float:
        """The accuracy of a model in the place of a task's, on all of val."""
        return evaluate(self.tasks[name], self.data[name].val, model)

    def measure_reloaded(self, reloaded: Mapping[str, nn.Module], per_class: bool) -> None:
        """Measures what decides nothing, of models as they were loaded from disk: the test split, and every class.

        The test split only of tasks whose weights were changed by a kept round since it was measured.
        """
        for name, task in self._shown("evaluating what was written"):
            accuracy, data = self.accuracy[name], self.data[name]
            if data.test is not None and accuracy.merged_test is None:
                accuracy.merged_test = evaluate(task, data.test, reloaded[name])
            if per_class:
                accuracy.per_class = self._per_class(task, reloaded[name])

    def keep(self, accuracies: Mapping[str, float]) -> None:
        """Takes over what a kept trial measured."""
        for name, accuracy in accuracies.items():
            known = self.accuracy[name]
            known.merged, known.merged_test, known.per_class = accuracy, None, None

    def ratios(self) -> dict[str, float]:
        """Task -> accuracy / target, of what is kept."""
        return {name: self.accuracy[name].merged / task.target_acc for name, task in self.tasks.items()}

    @property
    def num_met(self) -> int:
        """Tasks that are at their targets."""
        return sum(self.accuracy[name].merged >= task.target_acc for name, task in self.tasks.items())

    def _per_class(self, task: Task, merged: nn.Module) -> dict[str, dict] | None:
        """Measures by class before and after merging; None if the task's eval method has no `per_class`.

        Classes are ids of the dataset: the background of a detector is taken off.
        """
        measure = getattr(task.eval_method, "per_class", None)
        if measure is None:
            return None
        val = self.data[task.name].val
        before, after = measure(self.unmerged[task.name], val), measure(merged, val)
        first = int(task.kind == DETECTION and task.background_class)
        return {str(label - first): {"unmerged": before[label], "merged": after[label]} for label in before}

    def _shown(self, title: str) -> Iterator[tuple[str, Task]]:
        """The tasks; each is said to begin."""
        for number, (name, task) in enumerate(self.tasks.items(), 1):
            emit("doing", what=f"{title}: {name} ({number} of {len(self.tasks)})")
            yield name, task

    # ---- resuming --------------------------------------------------------------------------------------------

    def state(self) -> dict:
        return {name: asdict(accuracy) for name, accuracy in self.accuracy.items()}

    def load_state(self, state: Mapping, names: Iterable[str]) -> None:
        self.accuracy = {name: Accuracy(**state[name]) for name in names}


def _below_its_target(task: Task, measured: float, found: Sequence[str]) -> Problem:
    got = (
        f"an unmerged model that reaches {measured:.4f} on val, {task.target_acc - measured:.4f} below its "
        f"target {task.target_acc:.4f} ({task.tolerance:g} x unmerged_acc {task.unmerged_acc:g}). Measured: "
        f"{'; '.join(found)}"
    )
    allowed = "the accuracy that the model has on the val split"
    if task.kind == DETECTION:
        allowed += ", in batches whose images have one size (padding to a larger image changes what is found)"
    return Problem(task.name, "unmerged_acc", got, allowed)
