"""The accuracies of a workload: of the unmerged models, on the screening subset, merged, and reloaded from disk."""

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from gemel.datasets.folders import SampleError
from gemel.datasets.loaders import TaskData
from gemel.environment import ranks
from gemel.environment.clock import Clock
from gemel.environment.events import emit
from gemel.evaluation.agreement import have_equal_tensors, mean_agreement
from gemel.evaluation.eval_method import EvalMethodError, evaluate
from gemel.evaluation.split_outputs import measured_with_others
from gemel.forward import STORE_TYPES
from gemel.forward.modes import Models
from gemel.sharing.precision import as_stored, overflows
from gemel.thresholds import THRESHOLDS
from gemel.training.outcome import Standing
from gemel.trials.diagnosis import explanations
from gemel.trials.rounding import Rounding
from gemel.workload import DETECTION, Problem, Task

log = logging.getLogger(__name__)


@dataclass
class Accuracy:
    """What was measured of one task, on val and (where there is one) on test."""

    unmerged: float
    merged: float
    unmerged_test: float | None = None
    merged_test: float | None = None
    per_class: dict[str, dict] | None = None  # class id -> {"unmerged": measures, "merged": measures}, on val
    agreement: float | None = None  # of the merged and the unmerged model, on val; None: not measured


class Evaluator:
    """Evaluates the tasks of a workload and remembers what was measured.

    unmerged: copies of the models as they came. screening: whether a subset of val is evaluated first. rounding:
    to the type of the store's weights: what may ship is judged with them.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        data: Mapping[str, TaskData],
        unmerged: nn.ModuleDict,
        screening: bool,
        rounding: Rounding,
    ):
        self.tasks, self.data, self.unmerged, self.screening = tasks, data, unmerged, screening
        self.store_dtype, self.rounding = rounding.store_dtype, rounding
        self.accuracy: dict[str, Accuracy] = {}
        self.unmerged_on_screen: dict[str, float] = {}

    # ---- the unmerged models ---------------------------------------------------------------------------------

    def measure_unmerged(self, clock: Clock) -> list[Problem]:
        """Measures every task that was not measured yet; a problem for each that fails or is below its own target.

        Raises Interrupted or TimeOver.
        """
        problems = []
        missing = [name for name in self.tasks if name not in self.accuracy]
        shown = {name: (self.tasks[name].model, self.data[name].val) for name in missing}
        title = "evaluating the unmerged models"
        with clock.interruptible():
            found = ranks.together(lambda: self._each(title, missing, self._unmerged, shown))
        for name in missing:
            if (error := found[name].get("error")) is not None:
                problems.append(Problem(name, "eval_method", *error))
                continue
            measured, stored, on_test = (found[name][key] for key in ("val", "as_stored", "test"))
            self.accuracy[name] = Accuracy(measured, stored, on_test, None if self.rounds else on_test)
            if measured < self.tasks[name].target_acc:
                problems.append(_below_its_target(self.tasks[name], measured, found[name]["explanations"]))
            elif stored < self.tasks[name].target_acc:
                problems.append(self._below_as_stored(self.tasks[name], measured, stored))
        return problems

    def _unmerged(self, name: str) -> dict:
        """What the task's model reaches on val and test, or what its eval method raised."""
        task, data = self.tasks[name], self.data[name]
        try:
            measured = evaluate(task, data.val)
            stored = self._as_loaded(name, self.rounding.of_unmerged(name, task.model)) if self.rounds else measured
        except SampleError:
            raise
        except EvalMethodError as error:
            return {"error": (error.got, error.allowed)}
        except Exception as error:  # a user's eval method may raise anything
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return {"error": (said, "f(model, data_loader) -> float in [0, 1]")}
        found = {"val": measured, "as_stored": stored, "test": None if data.test is None else evaluate(task, data.test)}
        missed = measured < task.target_acc
        return {**found, "explanations": list(explanations(task, data.val, measured)) if missed else []}

    def screen_targets(self, names: Iterable[str]) -> dict[str, float]:
        """What the unmerged models reach on the screening subset, times the tolerance; measured when first needed.

        Without those whose subset is all of val, and those that reach nothing on it.
        """
        if not self.screening:
            return {}
        names = list(names)
        missing = [n for n in names if n not in self.unmerged_on_screen and self.data[n].screen is not self.data[n].val]
        self.unmerged_on_screen |= self._of_all(
            missing,
            lambda name: evaluate(self.tasks[name], self.data[name].screen, self.unmerged[name]),
            {name: (self.unmerged[name], self.data[name].screen) for name in missing},
        )
        measured = (name for name in names if self.unmerged_on_screen.get(name))  # where it is 0 it says nothing
        return {name: self.tasks[name].tolerance * self.unmerged_on_screen[name] for name in measured}

    # ---- the merged models -----------------------------------------------------------------------------------

    def standings(self, names: Iterable[str], screens: bool = True) -> dict[str, Standing]:
        """Where each task is on the screening subset and, if all are near their targets there, on all of val.

        screens: whether there is such a subset; else all of val is evaluated.
        """
        names = list(names)
        targets = self.screen_targets(names) if screens else {}

        models = {name: self.tasks[name].model for name in names}
        first_on = {n: (models[n], self.data[n].screen if n in targets else self.data[n].val) for n in names}
        first = self._of_all(names, lambda name: evaluate(self.tasks[name], first_on[name][1]), first_on)
        found = {}
        for name in names:
            task, accuracy = self.tasks[name], first[name]
            whole = name not in targets
            found[name] = Standing(accuracy / targets.get(name, task.target_acc), accuracy if whole else None)
        if min(standing.ratio for standing in found.values()) >= THRESHOLDS.fit.full_validation_from:
            left = [name for name, standing in found.items() if standing.accuracy is None]
            left_on = {name: (models[name], self.data[name].val) for name in left}
            on_val = self._of_all(left, lambda name: evaluate(self.tasks[name], left_on[name][1]), left_on)
            for name in left:
                found[name] = Standing(on_val[name] / self.tasks[name].target_acc, on_val[name])
        return found

    def _of_all(
        self,
        names: Iterable[str],
        measure: Callable[[str], float],
        shown: Mapping[str, tuple[nn.Module, DataLoader]] = MappingProxyType({}),
    ) -> dict[str, float]:
        """What is measured of every named task, each on its own rank, at the same time; shown: which model it shows
        which images, of which other ranks may take their share."""
        names = list(names)
        found = ranks.together(lambda: measured_with_others(names, measure, shown)) if names else {}
        return {name: found[name] for name in names}

    def measure_all(self, models: Mapping[str, nn.Module]) -> dict[str, float]:
        """The accuracies of models in the place of their tasks', on all of val, as they will be loaded."""
        live = [name for name in models if models[name] is self.tasks[name].model and not self.rounds]
        shown = {name: (models[name], self.data[name].val) for name in live}
        return self._of_all(models, lambda name: self._as_loaded(name, models[name]), shown)

    def _as_loaded(self, name: str, model: nn.Module) -> float:
        """What the model will reach on val when it is loaded from the store.

        0 where a weight is beyond the range of the store's type: eval methods need not know what to do with NaN.
        """
        if self.rounds and overflows(model, self.store_dtype):
            return 0.0
        return evaluate(self.tasks[name], self.data[name].val, as_stored(model, self.store_dtype))

    def measure_reloaded(self, reloaded: Models, per_class: bool) -> None:
        """Measures what decides nothing, of models as they were loaded from disk: the test split, every class, and how
        much they agree with the unmerged models.

        All but the classes only of tasks whose weights were changed by a kept round since it was measured.
        """

        def measure(name: str) -> dict:
            task, test = self.tasks[name], self.data[name].test  # a model is loaded only where something is measured
            found: dict[str, Any] = {"merged_test": self.accuracy[name].merged_test}
            if test is not None and found["merged_test"] is None:
                found["merged_test"] = evaluate(task, test, reloaded[name])
            if self.accuracy[name].agreement is None:
                found["agreement"] = self._agreement(task, reloaded[name])
            return found | ({"per_class": self._per_class(task, reloaded[name])} if per_class else {})

        title = "evaluating what was written"
        found = ranks.together(lambda: self._each(title, self.tasks, measure))
        self.accuracy |= {name: replace(self.accuracy[name], **values) for name, values in found.items()}

    def keep(self, accuracies: Mapping[str, float]) -> None:
        """Takes over what a kept trial measured."""
        for name, accuracy in accuracies.items():
            known = self.accuracy[name]
            known.merged, known.merged_test, known.per_class, known.agreement = accuracy, None, None, None

    def ratios(self) -> dict[str, float]:
        """Task -> accuracy / target, of what is kept."""
        return {name: self.accuracy[name].merged / task.target_acc for name, task in self.tasks.items()}

    @property
    def num_met(self) -> int:
        """Tasks that are at their targets."""
        return sum(self.accuracy[name].merged >= task.target_acc for name, task in self.tasks.items())

    @property
    def rounds(self) -> bool:
        """Whether the store's weights are rounded."""
        return self.store_dtype != torch.float32

    def _below_as_stored(self, task: Task, measured: float, stored: float) -> Problem:
        name = str(self.store_dtype).removeprefix("torch.")
        got = (
            f"{name}, in which the unmerged model reaches {stored:.4f} on val, {task.target_acc - stored:.4f} below "
            f"its target {task.target_acc:.4f}; in float32 it reaches {measured:.4f}"
        )
        others = [other for other in STORE_TYPES if other != name]
        return Problem(task.name, "store_dtype", got, f"{' or '.join(others)}, or a lower tolerance of this task")

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

    def _agreement(self, task: Task, merged: nn.Module) -> float | None:
        """How much a merged model agrees with the unmerged one as it would be stored; None where outputs tell nothing.

        Of these models' own outputs: an eval method may treat them in a way of its own. A model that shares nothing is
        the unmerged one, which need not be run twice.
        """
        unmerged = as_stored(self.unmerged[task.name], self.store_dtype)
        if have_equal_tensors(merged, unmerged):
            return 1.0
        try:
            return mean_agreement(task.kind, self.data[task.name].val, merged, unmerged)
        except SampleError:
            raise
        except Exception as error:  # a user's model may put out anything
            log.warning("%s: no agreement of merged and unmerged model: %s: %s", task.name, type(error).__name__, error)
            return None

    def _each(
        self,
        title: str,
        names: Iterable[str],
        measure: Callable[[str], Any],
        shown: Mapping[str, tuple[nn.Module, DataLoader]] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """What `measure` returns for each of this rank's tasks; each is said to begin. shown: as in `_of_all`."""
        numbers, num_own = itertools.count(1), len(ranks.mine(names))

        def begun(name: str) -> Any:
            emit("doing", what=f"{title}: {name} ({next(numbers)} of {num_own})")
            return measure(name)

        return measured_with_others(names, begun, shown)

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
