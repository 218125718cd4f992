"""The baseline strategies: the published heuristic, everything at once, a shared stem."""

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import nn

from gemel.sharing.groups import (
    Configuration,
    Group,
    find_groups,
    find_stem,
    from_plain,
    joined,
    ordered,
    restrict,
    saved_bytes,
    to_plain,
)
from gemel.sharing.precision import groups_as_stored
from gemel.sharing.signatures import find_layers
from gemel.strategies.base import NONE, Ratios, Strategy


class All(Strategy):
    """Everything at once; if tasks fail, everything once more among the tasks that met their targets."""

    tied_share = 1.0

    def __init__(self, models: Mapping[str, nn.Module], groups: Configuration | None = None):
        self.groups = find_groups(models) if groups is None else groups
        self.tasks = tuple(models)
        self.succeeded = self.done = False

    @property
    def kept(self) -> Configuration:
        return self._trial() if self.succeeded else self.adopted

    def propose(self) -> Configuration | None:
        trial = self._trial()
        return trial if trial != self.kept and not self.done else None

    def record(self, kept: bool, met: Collection[str], ratios: Ratios = NONE) -> None:
        left = tuple(task for task in self.tasks if task in met)
        self.succeeded = kept
        self.done = kept or left == self.tasks
        self.tasks = self.tasks if self.done else left

    def state(self) -> dict:
        own = {"succeeded": self.succeeded, "tasks": list(self.tasks), "done": self.done}
        return {**own, "adopted": to_plain(self.adopted)}

    def load_state(self, state: dict) -> None:
        self.tasks, self.succeeded, self.done = tuple(state["tasks"]), state["succeeded"], state["done"]
        self.adopted = from_plain(state["adopted"])

    def _trial(self) -> Configuration:
        return self.with_adopted(restrict(self.groups, self.tasks))


class Gemel(Strategy):
    """The published heuristic: one unit of groups at a time, the largest first, never taking back what was kept.

    A unit holds the groups with one signature and one set of tasks. When a trial fails, the tasks that met their target
    stay, the rest is halved, until the next unit is worth more than what is left of this one.
    Source: Padmanabhan et al., "Gemel", NSDI 2023, section 5.3.
    """

    def __init__(self, models: Mapping[str, nn.Module], groups: Configuration | None = None):
        self.units = gemel_units(find_groups(models) if groups is None else groups)
        self.trimmed: dict[int, tuple[str, ...]] = {}  # kept unit -> the tasks that share it
        self.index = 0
        self.tasks = self._tasks_of(0)

    @property
    def kept(self) -> Configuration:
        own = ordered(group for i, tasks in self.trimmed.items() for group in restrict(self.units[i], tasks))
        return self.with_adopted(own)

    def propose(self) -> Configuration | None:
        while self.index < len(self.units):
            trial = restrict(self.units[self.index], self.tasks)
            if trial and (len(self.tasks) == len(self._tasks_of(self.index)) or self._worth_trying(trial)):
                proposal = joined(self.kept, trial)
                if proposal != self.kept:
                    return proposal
            self._advance()
        return None

    def record(self, kept: bool, met: Collection[str], ratios: Ratios = NONE) -> None:
        if kept:
            self.trimmed[self.index] = self.tasks
            self._advance()
            return
        stay = [task for task in self.tasks if task in met]
        rest = [task for task in self.tasks if task not in met]
        if not rest:  # a task outside this unit failed: nobody here is to blame, so halve all
            stay, rest = [], stay
        self.tasks = (*stay, *rest[: len(rest) // 2])

    def state(self) -> dict:
        trimmed = [[index, list(tasks)] for index, tasks in self.trimmed.items()]
        own = {"trimmed": trimmed, "index": self.index, "tasks": list(self.tasks)}
        return {**own, "adopted": to_plain(self.adopted)}

    def load_state(self, state: dict) -> None:
        self.trimmed = {index: tuple(tasks) for index, tasks in state["trimmed"]}
        self.index, self.tasks = state["index"], tuple(state["tasks"])
        self.adopted = from_plain(state["adopted"])

    def _worth_trying(self, trial: Configuration) -> bool:
        following = self.units[self.index + 1] if self.index + 1 < len(self.units) else ()
        return saved_bytes(trial) >= saved_bytes(following)

    def _advance(self) -> None:
        self.index += 1
        self.tasks = self._tasks_of(self.index)

    def _tasks_of(self, index: int) -> tuple[str, ...]:
        return self.units[index][0].tasks if index < len(self.units) else ()


class Stem(Strategy):
    """Shares only a prefix of layers counted from the input; bisects for the longest that meets the targets.

    Source: Jiang et al., "Mainstream", ATC 2018 (there the prefix is frozen, here it is retrained like any other tie).
    """

    def __init__(self, models: Mapping[str, nn.Module], store_dtype: torch.dtype = torch.float32):
        depth = max((len(find_layers(model)) for model in models.values()), default=0)
        stems = dict.fromkeys(
            groups_as_stored(find_stem(models, d), models, store_dtype) for d in range(depth + 1)
        )  # in order, without repeats
        self.stems = tuple(stems)  # stems[0] is empty
        self.longest_kept = 0
        self.shortest_failed = len(self.stems)

    @property
    def kept(self) -> Configuration:
        return self.with_adopted(self.stems[self.longest_kept])

    def propose(self) -> Configuration | None:
        while self._next() > self.longest_kept:
            trial = self.with_adopted(self.stems[self._next()])
            if trial != self.kept:
                return trial
            self.longest_kept = self._next()  # tied already by what was adopted
        return None

    def record(self, kept: bool, met: Collection[str], ratios: Ratios = NONE) -> None:
        if kept:
            self.longest_kept = self._next()
        else:
            self.shortest_failed = self._next()

    def state(self) -> dict:
        own = {"longest_kept": self.longest_kept, "shortest_failed": self.shortest_failed}
        return {**own, "adopted": to_plain(self.adopted)}

    def load_state(self, state: dict) -> None:
        self.longest_kept, self.shortest_failed = state["longest_kept"], state["shortest_failed"]
        self.adopted = from_plain(state["adopted"])

    def _next(self) -> int:
        untried = self.shortest_failed == len(self.stems)
        return len(self.stems) - 1 if untried else (self.longest_kept + self.shortest_failed) // 2


def gemel_units(groups: Configuration) -> list[Configuration]:
    """Groups gathered by signature and set of tasks, by their total saving, largest first."""
    units: dict[tuple[str, tuple[str, ...]], list[Group]] = defaultdict(list)
    for group in groups:
        units[group.signature, group.tasks].append(group)
    return sorted(map(ordered, units.values()), key=lambda unit: (-saved_bytes(unit), unit[0].signature, unit[0].tasks))
