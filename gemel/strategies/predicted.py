"""How much each group of a search is predicted to hurt each of its tasks; by bytes, as long as nothing is predicted."""

from collections.abc import Sequence

from gemel.sharing.groups import Configuration, Occurrence, saved_bytes
from gemel.strategies.base import Sensitivity


class Predicted:
    """The errors at the outputs of the models that tying the groups of a search is predicted to cause.

    errors: (index of a group, task) -> the error. Where there is none, a group counts by its share of the bytes that
    all of them save.
    """

    def __init__(self, groups: Configuration):
        self.groups = groups
        self.errors: dict[tuple[int, str], float] = {}

    def learn(self, errors: Sensitivity) -> None:
        """Takes the predicted errors."""
        index = {group.occurrences: i for i, group in enumerate(self.groups)}
        self.errors = {(index[group.occurrences], task): value for (group, task), value in errors.items()}

    def of(self, index: int, task: str) -> float:
        """As predicted; where it was not, in proportion to the bytes."""
        if (index, task) in self.errors:
            return self.errors[index, task]
        return self.groups[index].bytes / max(1, saved_bytes(self.groups))

    def density(self, index: int) -> float:
        """How much tying a group is expected to hurt the task that it hurts most, per byte."""
        return max(self.of(index, task) for task in self.groups[index].tasks) / self.groups[index].bytes

    def of_task(self, task: str) -> float:
        """Of all groups together, with those that count by their bytes."""
        return sum(self.of(i, task) for i, group in enumerate(self.groups) if task in group.tasks)

    def predicted_for(self, task: str) -> float:
        """Of all groups whose error is predicted."""
        return sum(value for (_, name), value in self.errors.items() if name == task)

    def tied_share(self, trial: Configuration, task: str) -> float:
        """The share of a task's sensitivity that the trial ties without an adapter."""
        tied = {o for group in trial if not group.rank for o in group.occurrences if o.task == task}
        total = self.of_task(task)
        among = (i for i, group in enumerate(self.groups) if tied.intersection(group.occurrences))
        return sum(self.of(i, task) for i in among) / total if total else 0.0

    def by_occurrence(self) -> dict[Occurrence, float]:
        """The errors of each layer of the groups that have them."""
        every = ((i, o) for i, group in enumerate(self.groups) for o in group.occurrences)
        return {o: self.errors[i, o.task] for i, o in every if (i, o.task) in self.errors}

    def state(self) -> list[list]:
        """As JSON values."""
        return [[index, task, value] for (index, task), value in self.errors.items()]

    def load_state(self, state: Sequence[Sequence]) -> None:
        """Continues from what `state` returned."""
        self.errors = {(index, task): value for index, task, value in state}
