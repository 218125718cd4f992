"""The adaptive strategy: everything at once, back off where a task stays below target, then fill in.

The first jump ties all groups that one set of weights is predicted to serve. (Layers that read the images themselves
are tied even if they are not: they are given the weights of the task that is at most risk, and what follows them in the
other tasks is fitted to that.) The second leaves out those that hurt most for what they save, up to a five-hundredth of
the saving (early layers, as a rule: their few bytes spoil the input of all that follows). Where that fails as well, the
groups that hurt a failing task most for what they save are released *for that task* (a group splits: the others go on
sharing) and the rest is tried, with more released each time. Once
every target is met, what was held back or released is tried, the largest savings first, in parts that are halved when
they nearly work; if much is missing then, the same at a price (sharing/low_rank.py). Up to here weights are fitted in
closed form and not trained, which takes seconds. What is missing still is filled in with training, in parts that are
halved when they fail: at a price, and then without, until nothing is left. No trial is made twice.
"""

import hashlib
from collections.abc import Collection, Mapping

from torch import nn

from gemel.sharing.adapters import adapter_bytes, rank_within
from gemel.sharing.groups import Configuration, Group, find_groups, from_plain, joined, ordered, saved_bytes, to_plain
from gemel.sharing.signatures import find_layers
from gemel.strategies.base import NONE, Adopting, Ratios, Sensitivity

NEAR = 0.93  # of its target: from here on a task that fails needs little
FAR = 0.8  # of its target: below, halving twice would not be enough, if the harm halves along (benchmarks/LOG.md)
# Of the bytes that it shares; twice as much each time it fails again.
RELEASED_WHEN_NEAR, RELEASED_WHEN_FAR = 0.03, 0.25
HELD_BACK = 0.002  # of the possible saving: what the jump leaves out at most, but for what is infeasible
INFEASIBLE = 0.25  # predicted harm of a group from which it is left to training (benchmarks/LOG.md)
INFEASIBLE_SHARE = 0.25  # of the possible saving: what is left to training from the start at most, the worst first
WORTH_A_FIT = 0.01  # of the possible saving: smaller parts that a fit does not bring to target are left to training
SMALLEST_PART = 0.25  # of what was missing before it was filled in: the same (benchmarks/LOG.md)
WORTH_ADAPTERS = 0.03  # of the possible saving: if less is missing, it is left to training without residuals
JUMP, BACK_OFF, FILL, TRAIN, DONE = "jump", "back off", "fill in", "fill in with training", "done"
WITH_ADAPTERS, TRAIN_WITH_ADAPTERS = "fill in at a price", "fill in at a price with training"
FOLLOWING = {FILL: WITH_ADAPTERS, WITH_ADAPTERS: TRAIN_WITH_ADAPTERS, TRAIN_WITH_ADAPTERS: TRAIN, TRAIN: DONE}

Part = dict[int, tuple[str, ...]]  # what is tried as one: index of a group -> tasks that would join it


class Adaptive(Adopting):
    """See the header of this file; what it is worth was measured in benchmarks/LOG.md."""

    def __init__(self, models: Mapping[str, nn.Module], groups: Configuration | None = None, price: float = 0.0):
        self.groups = find_groups(models) if groups is None else groups
        self.adapted = [_with_adapters(group, models, price) for group in self.groups]
        self.infeasible: Configuration = ()  # what the first jump leaves out
        self.held_back: Configuration = ()  # what the second leaves out, should the first fail
        self.predicted: list[float] = []  # predicted harm of each of `groups` for the task that it hurts most
        first = {name: next(iter(find_layers(model)), None) for name, model in models.items()}
        self.stems = [all(first[o.task].name == o.layer for o in group.occurrences) for group in self.groups]
        self.most_sensitive: str | None = None  # the task that all groups together are predicted to hurt most
        self.own: Configuration = ()
        self.phase = JUMP
        self.working: Configuration = ()  # what a failed trial of this descent has left to try, or to train
        self.failures: dict[str, int] = {}  # task -> trials of this descent in which it failed
        self.parts: list[Part] = []  # to fill in, in this order
        self.smallest = 0.0  # bytes that a part would have to save to be halved without training
        self.tried: set[str] = set()

    @property
    def kept(self) -> Configuration:
        return self.with_adopted(self.own)

    @property
    def continues_failed_trial(self) -> bool:
        return self.phase in (TRAIN_WITH_ADAPTERS, TRAIN) and bool(self.working)

    @property
    def uses_sensitivity(self) -> bool:
        return self.phase in (JUMP, BACK_OFF)

    @property
    def refits_all_changes(self) -> bool:
        """Smaller parts are fitted behind what is kept, which is quicker and leaves the targets that were met alone."""
        return self.phase not in (FILL, WITH_ADAPTERS) or self.parts[:1] == [self._missing(self.phase)]

    @property
    def releases_before_training(self) -> bool:
        return self.phase not in (TRAIN_WITH_ADAPTERS, TRAIN)

    def propose(self) -> Configuration | None:
        """The next configuration; what has been tried, or ties nothing new, is passed over."""
        if self.phase == JUMP and (jump := self._next_jump()) is not None:
            return jump
        if self.phase == BACK_OFF and self._is_new(self.working):
            return self.working
        if self.phase in (JUMP, BACK_OFF):
            self._begin_filling(FILL)
        while self.phase in FOLLOWING:
            if not self.parts:
                self._begin_filling(FOLLOWING[self.phase])
            elif self._is_new(self._filled(self.parts[0])):
                return self._filled(self.parts[0])
            else:
                self._give_up_part(met=())
        return None

    def _next_jump(self) -> Configuration | None:
        for left_out in (self.infeasible, self.held_back):
            jump = joined(self.kept, tuple(group for group in self.groups if group not in left_out))
            if self._is_new(jump):
                return jump
        return None

    def donor_of(self, group: Group) -> str | None:
        """Stems that no one set of weights is predicted to serve have those of the task at most risk."""
        for other, is_stem, harm in zip(self.groups, self.stems, self.predicted, strict=False):
            if is_stem and harm > INFEASIBLE and set(group.occurrences) <= set(other.occurrences):
                return self.most_sensitive if self.most_sensitive in group.tasks else None
        return None

    def set_sensitivity(self, harm: Sensitivity) -> None:
        """Chooses what the jumps leave out: what no fit can serve, and of the rest the most harm per byte first."""
        left = HELD_BACK * saved_bytes(self.groups)
        risk = {task: sum(h for (_, name), h in harm.items() if name == task) for _, task in harm}
        self.most_sensitive = max(sorted(risk), key=risk.__getitem__, default=None)
        worst = {group: max(harm.get((group, task), 0.0) for task in group.tasks) for group in self.groups}
        self.predicted = list(worst.values())
        held = self._infeasible(worst)
        self.infeasible = ordered(held)
        for group in sorted(set(self.groups) - set(held), key=lambda g: (-worst[g] / g.bytes, g.occurrences)):
            if group.saved_bytes <= left:
                held.append(group)
                left -= group.saved_bytes
        self.held_back = ordered(held)

    def _infeasible(self, worst: Mapping[Group, float]) -> list[Group]:
        """Groups that no one set of weights is predicted to serve."""
        left = INFEASIBLE_SHARE * saved_bytes(self.groups)
        chosen = []
        for group in sorted(worst, key=lambda group: (-worst[group], group.occurrences)):
            if worst[group] > INFEASIBLE and group.saved_bytes <= left and self.donor_of(group) is None:
                chosen.append(group)
                left -= group.saved_bytes
        return chosen

    def record(self, kept: bool, met: Collection[str], ratios: Ratios = NONE, harm: Sensitivity = NONE) -> None:
        trial = self.propose()
        assert trial is not None, "a trial is recorded that was never proposed"
        self.tried.add(self._key(trial))
        self.working = ()
        if kept:
            self.own = trial
            if self.phase in FOLLOWING:
                self.parts.pop(0)
            else:
                self._begin_filling(FILL)
        elif self.phase in FOLLOWING:
            self._give_up_part(met, ratios)
            while self.phase in (FILL, WITH_ADAPTERS, TRAIN_WITH_ADAPTERS) and not self.parts:
                self._begin_filling(FOLLOWING[self.phase])
            if self.phase in (TRAIN_WITH_ADAPTERS, TRAIN) and self.parts and self._filled(self.parts[0]) == trial:
                self.working = trial  # training goes on from what was fitted
        elif self.phase == BACK_OFF or self._next_jump() is None:
            self._back_off(trial, set(met), ratios, harm)

    def _back_off(self, trial: Configuration, met: set[str], ratios: Ratios, harm: Sensitivity) -> None:
        failing = sorted({task for group in trial for task in group.tasks} - met)
        released = set()
        for task in failing or sorted({task for group in trial for task in group.tasks}):
            at_first = RELEASED_WHEN_NEAR if ratios.get(task, 1.0) >= NEAR else RELEASED_WHEN_FAR
            share = min(1.0, at_first * 2 ** self.failures.get(task, 0))
            self.failures[task] = self.failures.get(task, 0) + 1
            released |= {(group, task) for group in most_sensitive_groups(trial, task, share, harm, self.kept)}
        left = (group.restricted_to({t for t in group.tasks if (group, t) not in released}) for group in trial)
        self.working = joined(self.kept, ordered(group for group in left if len(group.occurrences) > 1))
        self.phase = BACK_OFF

    def _begin_filling(self, phase: str) -> None:
        """One part of all that is missing; at a price only where it is worth it."""
        part = self._missing(phase)
        self.phase, self.parts, self.working = phase, [part] if part else [], ()
        self.smallest = max(WORTH_A_FIT * saved_bytes(self.groups), SMALLEST_PART * self._gain(part))
        if phase in (WITH_ADAPTERS, TRAIN_WITH_ADAPTERS) and self._gain(part) < WORTH_ADAPTERS * saved_bytes(
            self.groups
        ):
            self.parts = []

    def _missing(self, phase: str) -> Part:
        """What could be tied: not what no fit can serve where there is neither price nor training, at a price only what
        can have a residual, and with training also what is tied at a price and may do without."""
        settled = [group for group in self.kept if phase != TRAIN or not group.rank]
        tied = {occurrence for group in settled for occurrence in group.occurrences}
        missing = {i: tuple(o.task for o in group.occurrences if o not in tied) for i, group in enumerate(self.groups)}
        left_out: list[Group] = []
        if phase == FILL:
            left_out = self._infeasible(dict(zip(self.groups, self.predicted, strict=False)))
        elif phase in (WITH_ADAPTERS, TRAIN_WITH_ADAPTERS):
            left_out = [group for group, adapted in zip(self.groups, self.adapted, strict=True) if not adapted.rank]
        return {i: tasks for i, tasks in missing.items() if tasks and self.groups[i] not in left_out}

    def _give_up_part(self, met: Collection[str], ratios: Ratios = NONE) -> None:
        """Puts two smaller parts in the place of the first: the tasks that failed apart, or else half of the groups.

        What is far from its targets after a fit, or small, is left to the phases that follow.
        """
        part = self.parts.pop(0)
        is_far = any(ratio < FAR for ratio in ratios.values())
        if self.phase in (FILL, WITH_ADAPTERS) and (is_far or self._gain(part) < self.smallest):
            return
        good, bad = (
            {i: left for i, tasks in part.items() if (left := tuple(t for t in tasks if (t in met) == is_good))}
            for is_good in (True, False)
        )
        if not bad or self._gain(good) <= 0:  # those that met their targets share nothing without the others
            if len(part) < 2:
                self.parts += [bad] if good and bad else []
                return
            indices = sorted(part)  # the largest savings first
            half = (len(indices) + 1) // 2
            good, bad = ({i: part[i] for i in chosen} for chosen in (indices[:half], indices[half:]))
        self.parts = [good, *self.parts, bad]

    def _gain(self, part: Part) -> int:
        return saved_bytes(self._filled(part)) - saved_bytes(self.kept)

    def _filled(self, part: Part) -> Configuration:
        """What is kept, and the part: its tasks join those of the group that are tied, or in the part as well."""
        tied = {occurrence for group in self.kept for occurrence in group.occurrences}
        groups = self.adapted if self.phase in (WITH_ADAPTERS, TRAIN_WITH_ADAPTERS) else self.groups
        added = [
            groups[i].restricted_to({o.task for o in groups[i].occurrences if o in tied or o.task in tasks})
            for i, tasks in part.items()
        ]
        return joined(self.kept, ordered(group for group in added if self._is_worth_it(group)))

    def _is_worth_it(self, group: Group) -> bool:
        """Whether it saves more than what is kept of it: at a price that all pay, one more task may not pay off."""
        replaced = [other for other in self.kept if set(other.occurrences) & set(group.occurrences)]
        return len(group.occurrences) > 1 and group.saved_bytes > saved_bytes(tuple(replaced))

    def _is_new(self, trial: Configuration) -> bool:
        return self._key(trial) not in self.tried and saved_bytes(trial) > saved_bytes(self.kept)

    def _key(self, trial: Configuration) -> str:
        """A trial is known by what it ties, and by whether it is trained."""
        named = sorted(",".join(f"{o.task}:{o.layer}" for o in g.occurrences) + "+" * bool(g.rank) for g in trial)
        digest = hashlib.sha256(";".join(named).encode()).hexdigest()[:16]
        return f"{digest} trained" if self.phase in (TRAIN_WITH_ADAPTERS, TRAIN) else digest

    def state(self) -> dict:
        return {
            "infeasible": to_plain(self.infeasible),
            "held_back": to_plain(self.held_back),
            "predicted": self.predicted,
            "most_sensitive": self.most_sensitive,
            "own": to_plain(self.own),
            "phase": self.phase,
            "working": to_plain(self.working),
            "failures": self.failures,
            "parts": [[[index, list(tasks)] for index, tasks in part.items()] for part in self.parts],
            "smallest": self.smallest,
            "tried": sorted(self.tried),
            "adopted": to_plain(self.adopted),
        }

    def load_state(self, state: dict) -> None:
        self.infeasible, self.held_back = from_plain(state.get("infeasible", [])), from_plain(state["held_back"])
        self.predicted, self.most_sensitive = list(state["predicted"]), state.get("most_sensitive")
        self.own, self.working = from_plain(state["own"]), from_plain(state["working"])
        self.phase, self.failures = state["phase"], dict(state["failures"])
        self.parts = [{index: tuple(tasks) for index, tasks in part} for part in state["parts"]]
        self.smallest = state.get("smallest", 0.0)
        self.tried, self.adopted = set(state["tried"]), from_plain(state["adopted"])


def _with_adapters(group: Group, models: Mapping[str, nn.Module], price: float) -> Group:
    """The group with the residuals that the price buys; without, where it buys none."""
    first = group.occurrences[0]
    layer = models[first.task].get_submodule(first.layer)
    rank = rank_within(layer, price)
    return group.with_adapters(rank, adapter_bytes(layer, rank)) if rank else group


def most_sensitive_groups(
    trial: Configuration, task: str, share: float, harm: Sensitivity, kept: Configuration = ()
) -> list[Group]:
    """Groups of the task to release: the most harm per byte first, until `share` of the bytes it shares is reached.

    Groups that are kept already are not released. Without a measure of harm the largest go first.
    """
    held = {occurrence for group in kept for occurrence in group.occurrences}
    own = [g for g in trial if task in g.tasks and not {o for o in g.occurrences if o.task == task} <= held]
    own.sort(key=lambda g: -harm.get((g, task), float(g.bytes)) / g.bytes)
    wanted = share * sum(group.bytes for group in own)
    chosen, released = [], 0
    for group in own:
        if chosen and released >= wanted:
            break
        chosen.append(group)
        released += group.bytes
    return chosen
