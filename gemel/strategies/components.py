"""Tasks that can share nothing with others are searched by themselves: one search for each connected component.

A trial changes the tasks of one component alone, so a task that fails costs no fit and no evaluation of tasks that it
can share nothing with. Searches take turns: those whose next trial only fits weights come before those that train.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from gemel.sharing.groups import Configuration, Group, Occurrence, ordered, restrict, saved_bytes
from gemel.strategies.base import NONE, FirstStep, Ratios, Sensitivity, Strategy
from gemel.strategies.curves import ExpectedLoss

KEY = "components"  # of the state of a search by components
Make = Callable[[Mapping[str, nn.Module], Configuration], Strategy]


def components_of(groups: Configuration) -> list[list[str]]:
    """Tasks that share groups, directly or through others, each component in order; the one that saves most first."""
    found: list[set[str]] = []
    for group in groups:
        joined = [part for part in found if part & set(group.tasks)]
        found = [part for part in found if part not in joined] + [set(group.tasks).union(*joined)]
    return sorted(map(sorted, found), key=lambda tasks: (-saved_bytes(restrict(groups, tasks)), tasks))


class Components(Strategy):
    """One strategy for each component.

    make: of the models of some tasks and the groups that they can share, a strategy that has tried nothing.
    """

    def __init__(self, models: Mapping[str, nn.Module], groups: Configuration, make: Make):
        self.models, self.groups, self.make = models, groups, make
        self._begin(groups)

    def _begin(self, connected: Configuration) -> None:
        """New searches, apart where none of these groups connects tasks."""
        self.tasks = components_of(connected)
        self.parts = [self._search_of(tasks) for tasks in self.tasks]
        self.turn = 0  # whose trial was proposed last
        self._proposed: dict[int, Configuration | None] = {}  # what a search proposes, until it is told an outcome

    def _search_of(self, tasks: Collection[str]) -> Strategy:
        groups = tuple(group for group in self.groups if set(group.tasks) <= set(tasks))
        return self.make({name: model for name, model in self.models.items() if name in tasks}, groups)

    @property
    def current(self) -> Strategy:
        """The search whose trial was proposed last."""
        return self.parts[self.turn]

    @property
    def searched_apart(self) -> list[list[str]]:
        return self.tasks

    @property
    def kept(self) -> Configuration:
        return ordered(group for part in self.parts for group in part.kept)

    def propose(self) -> Configuration | None:
        for number, part in enumerate(self.parts):
            if number not in self._proposed:
                self._proposed[number] = part.propose()
        left = [number for number, trial in self._proposed.items() if trial is not None]
        if not left:
            return None
        if not (self.current.continues_failed_trial and self.turn in left):
            self.turn = min(left, key=lambda number: (self.parts[number].effort, -self._gain(number), number))
        trial = self._proposed[self.turn]
        assert trial is not None
        return ordered((*trial, *(group for part in self._others() for group in part.kept)))

    def _others(self) -> list[Strategy]:
        return [part for part in self.parts if part is not self.current]

    def _gain(self, number: int) -> int:
        return saved_bytes(self._proposed[number] or ()) - saved_bytes(self.parts[number].kept)

    def record(self, kept: bool, met: Collection[str], ratios: Ratios = NONE) -> None:
        del self._proposed[self.turn]
        self.current.record(kept, met, ratios)

    def keep_part(self, kept: Configuration) -> None:
        self._proposed.pop(self.turn, None)
        self.current.keep_part(restrict(kept, self.tasks[self.turn]))

    # ---- what the search whose turn it is says ---------------------------------------------------------------

    @property
    def about_to_do(self) -> str:
        return f"{len(self.parts)} sets of tasks that share nothing with each other: {self.current.about_to_do}"

    @property
    def tied_share(self) -> float:  # type: ignore[override]
        return self.current.tied_share

    @property
    def effort(self) -> int:
        return self.current.effort

    @property
    def refits_all_changes(self) -> bool:
        return self.current.refits_all_changes

    @property
    def fits_to_what_is_kept(self) -> bool:
        return self.current.fits_to_what_is_kept

    @property
    def releases_before_training(self) -> bool:
        return self.current.releases_before_training

    @property
    def trains_alone_at_length(self) -> bool:
        return self.current.trains_alone_at_length

    @property
    def continues_failed_trial(self) -> bool:
        return self.current.continues_failed_trial

    @property
    def keeps_verified_part(self) -> bool:
        return self.current.keeps_verified_part

    def donor_of(self, group: Group) -> str | None:
        return self.current.donor_of(group)

    def chance(self, proposal: Configuration) -> float:
        return self.current.chance(proposal)

    def begin_with(self, choose: Callable[[Configuration], FirstStep]) -> None:
        for part in self.parts:
            part.begin_with(choose)

    @property
    def trials_take_long(self) -> bool:
        return self.current.trials_take_long

    # ---- predictions -----------------------------------------------------------------------------------------

    @property
    def needs_sensitivity(self) -> bool:
        return any(part.needs_sensitivity for part in self.parts)

    def set_sensitivity(
        self,
        sensitivity: Sensitivity,
        misfit: Sensitivity = NONE,
        reached: Ratios = NONE,
        losses: Mapping[str, ExpectedLoss] = NONE,
    ) -> None:
        self._proposed = {}
        for tasks, part in zip(self.tasks, self.parts, strict=True):
            if not part.predicted_sensitivity():
                errors, worst = (
                    {key: v for key, v in values.items() if key[1] in tasks} for values in (sensitivity, misfit)
                )
                ratios = {name: ratio for name, ratio in reached.items() if name in tasks}
                part.set_sensitivity(errors, worst, ratios, {n: loss for n, loss in losses.items() if n in tasks})

    def predicted_sensitivity(self) -> Mapping[Occurrence, float]:
        return {o: value for part in self.parts for o, value in part.predicted_sensitivity().items()}

    # ---- resuming --------------------------------------------------------------------------------------------

    def adopt(self, kept: Configuration) -> None:
        self._begin((*self.groups, *kept))
        for tasks, part in zip(self.tasks, self.parts, strict=True):
            part.adopt(restrict(kept, tasks))

    def keep_more(self, kept: Configuration) -> None:
        for tasks, part in zip(self.tasks, self.parts, strict=True):
            part.keep_more(restrict(kept, tasks))

    def state(self) -> dict:
        return {KEY: [part.state() for part in self.parts], "tasks": self.tasks, "turn": self.turn}

    def load_state(self, state: dict) -> None:
        self.tasks, self.turn, self._proposed = state["tasks"], state["turn"], {}
        self.parts = [self._search_of(tasks) for tasks in self.tasks]
        for part, own in zip(self.parts, state[KEY], strict=True):
            part.load_state(own)


def is_by_components(state: Mapping[str, Any]) -> bool:
    """Whether a state is that of a search by components."""
    return KEY in state
