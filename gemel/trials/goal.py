"""Memory as the goal: whether it can be reached at all, and what it would take where it was missed."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from gemel.sharing.groups import Configuration, Group, affected_tasks, saved_bytes
from gemel.strategies.base import Ratios
from gemel.thresholds import THRESHOLDS
from gemel.training.outcome import Standing
from gemel.trials.evaluator import Evaluator
from gemel.trials.images import ImageSampler
from gemel.trials.initialisation import WeightFitter
from gemel.trials.state import MergeState
from gemel.workload import Problem, Task

MAX_REPLAYS = 6
STEP = 0.001  # in which tolerances are suggested


def goal_problems(goal: int | None, unmerged_bytes: int, most_saved_bytes: int) -> list[Problem]:
    """A goal (bytes) that is less than what is left when every identical layer is shared."""
    least = unmerged_bytes - most_saved_bytes
    if goal is None or goal >= least:
        return []
    allowed = f"at least {least} bytes ({_rounded_up(least)}): what is left when every identical layer is shared"
    return [Problem("options", "memory", f"{goal} bytes", allowed)]


def goal_part(goal: int | None, would_take: dict | None, merged_bytes: int) -> dict | None:
    """`goal` of the manifest's `run`; None without a goal."""
    return None if goal is None else {"bytes": goal, "met": merged_bytes <= goal, "would_take": would_take}


class GoalReplay:
    """Finds tolerances with which a failed trial would be kept, by making it again with them.

    donor_of: as WeightFitter has it. The state is left as it is.
    """

    def __init__(
        self,
        state: MergeState,
        evaluator: Evaluator,
        images: ImageSampler,
        donor_of: Callable[[Group], str | None],
    ):
        self.state, self.evaluator, self.images, self.donor_of = state, evaluator, images, donor_of

    def what_it_would_take(self, trial: Configuration, ratios: Ratios, number: int) -> dict | None:
        """`bytes` that the workload would take, the `tolerance` of each task that would need a lower one, its `target`
        now and the `accuracy` that it then reaches; None if none was found.

        ratios: what the trial reached, which for tasks below their targets may be an estimate. number: of the round.
        """
        tasks = self.evaluator.tasks
        names = affected_tasks(self.state.kept, trial)
        if not {task for group in trial for task in group.tasks} <= set(names):
            return None
        relaxed = dict(tasks)
        for _ in range(MAX_REPLAYS):
            lower = _lowered(relaxed, ratios)
            if lower is None:
                return None
            relaxed = lower
            found = self._replay(trial, names, relaxed, number)
            if all(standing.accuracy is not None and standing.ratio >= 1 for standing in found.values()):
                changed = [name for name in tasks if relaxed[name].tolerance < tasks[name].tolerance]
                return {
                    "bytes": self.state.unmerged_bytes - saved_bytes(trial),
                    "tolerance": {name: relaxed[name].tolerance for name in changed},
                    "target": {name: tasks[name].target_acc for name in changed},
                    "accuracy": {name: found[name].accuracy for name in changed},
                }
            ratios = {name: standing.ratio for name, standing in found.items()}
        return None

    def _replay(
        self, trial: Configuration, names: list[str], tasks: Mapping[str, Task], number: int
    ) -> dict[str, Standing]:
        """Where each task is after the fit that a fresh search with these tasks would make of the trial."""
        own = self.evaluator
        judge = Evaluator(tasks, own.data, own.unmerged, own.screening, own.rounding)
        judge.unmerged_on_screen = self.evaluator.unmerged_on_screen
        self.state.begin_trial(trial, "mean")
        try:
            self.state.reset_to_unmerged(trial, names)
            fitter = WeightFitter(self.state, judge, self.images, self.donor_of)
            return fitter.fit(trial, names, number, THRESHOLDS.fit.max_fits)
        finally:
            self.state.undo()


def _lowered(tasks: Mapping[str, Task], ratios: Ratios) -> dict[str, Task] | None:
    """The tasks with the tolerances that these ratios of accuracy to target meet; None if a task is at nothing."""
    lowered = {}
    for name, task in tasks.items():
        ratio = ratios.get(name, 1.0)
        tolerance = task.tolerance if ratio >= 1 else math.floor(ratio * task.tolerance / STEP) * STEP
        if tolerance <= 0:
            return None
        lowered[name] = replace(task, tolerance=task.tolerance if ratio >= 1 else round(tolerance, 3))
    return lowered


def _rounded_up(num_bytes: int) -> str:
    """As a size that is no less, as --memory takes it."""
    return f"{math.ceil(num_bytes / (1 << 20) * 100) / 100:.2f}MiB"
