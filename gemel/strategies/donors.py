"""First layers that no one set of weights can serve: one task gives them its own, and the others follow."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from gemel.forward.modes import Models
from gemel.sharing.groups import Configuration, Group
from gemel.sharing.signatures import find_layers
from gemel.strategies.base import Sensitivity
from gemel.thresholds import THRESHOLDS


def first_layers(models: Models, groups: Configuration) -> list[bool]:
    """Of each group, whether its layer is the first one of every model that holds it."""
    first = {name: next((layer.name for layer in find_layers(model)), None) for name, model in models.items()}
    return [all(first[o.task] == o.layer for o in group.occurrences) for group in groups]


class Donors:
    """Which task gives a first layer its weights, by the errors that fitted weights are predicted to have."""

    def __init__(self, models: Mapping[str, nn.Module], groups: Configuration):
        self.groups, self.names = groups, sorted(models)
        self.stems = first_layers(models, groups)
        self.misfit: dict[int, float] = {}  # index of a group -> error of its fitted weights, for the worst task
        self.donor: str | None = None  # the task with the highest sum of errors of fitted weights

    def learn(self, misfit: Sensitivity) -> None:
        """Takes the predicted errors at the outputs of the groups' layers."""
        index = {group.occurrences: i for i, group in enumerate(self.groups)}
        for (group, _), value in misfit.items():
            i = index[group.occurrences]
            self.misfit[i] = max(value, self.misfit.get(i, 0.0))
        totals = {task: sum(v for (_, t), v in misfit.items() if t == task) for task in self.names}
        self.donor = max(totals, key=totals.__getitem__, default=None)

    def of(self, group: Group) -> str | None:
        """The task whose weights a group takes as they are; None: they are fitted to all of its tasks."""
        for i, (other, is_stem) in enumerate(zip(self.groups, self.stems, strict=True)):
            cannot_serve = self.misfit.get(i, 0.0) > THRESHOLDS.sensitivity.misfit
            if is_stem and cannot_serve and set(group.occurrences) <= set(other.occurrences):
                return self.donor if self.donor in group.tasks else None
        return None

    def state(self) -> dict:
        """As JSON values."""
        return {"misfit": [[index, value] for index, value in self.misfit.items()], "donor": self.donor}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` returned."""
        self.misfit, self.donor = {index: value for index, value in state["misfit"]}, state["donor"]
