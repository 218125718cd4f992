"""The adaptive strategy: everything at once, release layers where a task stays below its target, then fill in.

1. Jump: tie all groups that one set of weights is predicted to serve. A first layer, which reads the images, is tied
   even where no one set serves all tasks: it takes the weights of the most sensitive task (the donor), and what follows
   it in the other tasks is fitted to that.
2. Jump again without the groups of highest predicted sensitivity per byte, up to a five-hundredth of the saving (early
   layers, as a rule: they have few bytes, and an error in them reaches every layer behind).
3. Back off: release the most sensitive groups per byte for each task that failed (a group splits: the other tasks still
   share it) and try the rest; release more each time a task fails again.
4. Fill in: once every target is met, try what was held back or released, the largest savings first, in parts that are
   halved when they nearly work.
5. Fill in with adapters: if much is missing, try the same with a low-rank adapter per task (gemel/sharing/adapters.py).
   Up to here weights are fitted in closed form and not trained, which takes seconds.
6. Fill in with training: first with adapters, then without, in parts that are halved when they fail.

Where some tasks met their targets in a failed trial of steps 1 to 5, they keep what they share among themselves. No
trial is made twice.
"""

import hashlib
from collections.abc import Collection, Mapping

from torch import nn

from gemel.sharing.adapters import adapter_bytes, rank_within
from gemel.sharing.groups import Configuration, Group, find_groups, from_plain, joined, ordered, saved_bytes, to_plain
from gemel.sharing.signatures import find_layers
from gemel.strategies.base import NONE, Ratios, Sensitivity, Strategy
from gemel.thresholds import THRESHOLDS

JUMP, BACK_OFF, FILL, TRAIN, DONE = "jump", "back off", "fill in", "fill in with training", "done"
WITH_ADAPTERS, TRAIN_WITH_ADAPTERS = "fill in with adapters", "fill in with adapters and training"
FOLLOWING = {FILL: WITH_ADAPTERS, WITH_ADAPTERS: TRAIN_WITH_ADAPTERS, TRAIN_WITH_ADAPTERS: TRAIN, TRAIN: DONE}

Part = dict[int, tuple[str, ...]]  # what is tried as one: index of a group -> tasks that would join it


class Adaptive(Strategy):
    """See the header of this file; benchmarks/LOG.md has what was measured."""

    def __init__(
        self, models: Mapping[str, nn.Module], groups: Configuration | None = None, adapter_budget: float = 0.0
    ):
        self.groups = find_groups(models) if groups is None else groups
        self.adapted = [_with_adapters(group, models, adapter_budget) for group in self.groups]
        self.infeasible: Configuration = ()  # what the first jump leaves out
        self.held_back: Configuration = ()  # what the second leaves out, should the first fail
        self.predicted: list[float] = []  # sensitivity of the most sensitive task of each of `groups`
        first = {name: next((layer.name for layer in find_layers(model)), None) for name, model in models.items()}
        self.stems = [all(first[o.task] == o.layer for o in group.occurrences) for group in self.groups]
        self.most_sensitive: str | None = None  # the task with the highest sum of predicted sensitivities
        self.own: Configuration = ()
        self.part: Configuration = ()  # kept of a failed trial, of more saving than what whole trials kept
        self.phase = JUMP
        self.working: Configuration = ()  # what a failed trial leaves to try, or to train
        self.failures: dict[str, int] = {}  # task -> trials of this back-off in which it failed
        self.parts: list[Part] = []  # to fill in, in this order
        self.smallest = 0.0  # bytes that a part would have to save to be halved without training
        self.tried: set[str] = set()

    @property
    def base(self) -> Configuration:
        """What every proposal ties: what whole trials, or earlier runs, kept."""
        return self.with_adopted(self.own)

    @property
    def kept(self) -> Configuration:
        return self.part if saved_bytes(self.part) > saved_bytes(self.base) else self.base

    @property
    def continues_failed_trial(self) -> bool:
        return self.phase in (TRAIN_WITH_ADAPTERS, TRAIN) and bool(self.working)

    @property
    def uses_sensitivity(self) -> bool:
        return self.phase in (JUMP, BACK_OFF)

    @property
    def refits_all_changes(self) -> bool:
        """Only for a part that holds all that is missing: smaller ones are fitted behind what is kept.

        That is quicker, and does not move tasks that met their targets.
        """
        return self.phase not in (FILL, WITH_ADAPTERS) or self.parts[:1] == [self._missing(self.phase)]

    @property
    def releases_before_training(self) -> bool:
        return self.phase not in (TRAIN_WITH_ADAPTERS, TRAIN)

    @property
    def keeps_verified_part(self) -> bool:
        """As long as trials are not trained: a training that fails is continued, in smaller parts."""
        return self.phase not in (TRAIN_WITH_ADAPTERS, TRAIN)

    def keep_part(self, kept: Configuration) -> None:
        """Jumps and back-off do not build on a part, since what serves some tasks can be in the way of all together."""
        self.part = kept
        if self.phase in FOLLOWING:
            self._build_on_part()

    def _build_on_part(self) -> None:
        if self.part and self.kept == self.part:
            self.own, self.adopted = self.part, ()  # it may have split what was adopted
        self.part = ()

    def propose(self) -> Configuration | None:
        """The next configuration; skips what was tried already or ties nothing new."""
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
            jump = joined(self.base, tuple(group for group in self.groups if group not in left_out))
            if self._is_new(jump):
                return jump
        return None

    def donor_of(self, group: Group) -> str | None:
        """The most sensitive task, for first layers that no one set of weights is predicted to serve."""
        for other, is_stem, sensitivity in zip(self.groups, self.stems, self.predicted, strict=False):
            if (
                is_stem
                and sensitivity > THRESHOLDS.sensitivity.infeasible
                and set(group.occurrences) <= set(other.occurrences)
            ):
                return self.most_sensitive if self.most_sensitive in group.tasks else None
        return None

    def set_sensitivity(self, sensitivity: Sensitivity) -> None:
        """Chooses what the jumps leave out: infeasible groups, and of the rest the most sensitive per byte."""
        left = THRESHOLDS.sensitivity.held_back * saved_bytes(self.groups)
        total = {task: sum(s for (_, name), s in sensitivity.items() if name == task) for _, task in sensitivity}
        self.most_sensitive = max(sorted(total), key=total.__getitem__, default=None)
        worst = {group: max(sensitivity.get((group, task), 0.0) for task in group.tasks) for group in self.groups}
        self.predicted = list(worst.values())
        held = self._infeasible(worst)
        self.infeasible = ordered(held)
        for group in sorted(set(self.groups) - set(held), key=lambda g: (-worst[g] / g.bytes, g.occurrences)):
            if group.saved_bytes <= left:
                held.append(group)
                left -= group.saved_bytes
        self.held_back = ordered(held)

    def _infeasible(self, worst: Mapping[Group, float]) -> list[Group]:
        """Groups that no one set of weights is predicted to serve, the most sensitive first, within their share."""
        left = THRESHOLDS.sensitivity.infeasible_share * saved_bytes(self.groups)
        chosen = []
        for group in sorted(worst, key=lambda group: (-worst[group], group.occurrences)):
            if (
                worst[group] > THRESHOLDS.sensitivity.infeasible
                and group.saved_bytes <= left
                and self.donor_of(group) is None
            ):
                chosen.append(group)
                left -= group.saved_bytes
        return chosen

    def record(self, kept: bool, met: Collection[str], ratios: Ratios = NONE, sensitivity: Sensitivity = NONE) -> None:
        trial = self.propose()
        assert trial is not None, "a recorded trial must have been proposed"
        self.tried.add(self._key(trial))
        self.working = ()
        if kept:
            self.own, self.part = trial, ()
            if self.phase in FOLLOWING:
                self.parts.pop(0)
            else:
                self._begin_filling(FILL)
        elif self.phase in FOLLOWING:
            self._give_up_part(met, ratios)
            while self.phase in (FILL, WITH_ADAPTERS, TRAIN_WITH_ADAPTERS) and not self.parts:
                self._begin_filling(FOLLOWING[self.phase])
            if self.phase in (TRAIN_WITH_ADAPTERS, TRAIN) and self.parts and self._filled(self.parts[0]) == trial:
                self.working = trial  # training continues from the fitted weights
        elif self.phase == BACK_OFF or self._next_jump() is None:
            self._back_off(trial, set(met), ratios, sensitivity)

    def _back_off(self, trial: Configuration, met: set[str], ratios: Ratios, sensitivity: Sensitivity) -> None:
        failing = sorted({task for group in trial for task in group.tasks} - met)
        released = set()
        for task in failing or sorted({task for group in trial for task in group.tasks}):
            at_first = (
                THRESHOLDS.release.share_when_near
                if ratios.get(task, 1.0) >= THRESHOLDS.release.near
                else THRESHOLDS.release.share_when_far
            )
            share = min(1.0, at_first * 2 ** self.failures.get(task, 0))
            self.failures[task] = self.failures.get(task, 0) + 1
            released |= {(group, task) for group in most_sensitive_groups(trial, task, share, sensitivity, self.base)}
        left = (group.restricted_to({t for t in group.tasks if (group, t) not in released}) for group in trial)
        self.working = joined(self.base, ordered(group for group in left if len(group.occurrences) > 1))
        self.phase = BACK_OFF

    def _begin_filling(self, phase: str) -> None:
        """One part with all that is missing; with adapters only where enough is missing."""
        self._build_on_part()
        part = self._missing(phase)
        self.phase, self.parts, self.working = phase, [part] if part else [], ()
        self.smallest = max(
            THRESHOLDS.fill.worth_a_fit * saved_bytes(self.groups), THRESHOLDS.fill.smallest_part * self._gain(part)
        )
        if phase in (WITH_ADAPTERS, TRAIN_WITH_ADAPTERS) and self._gain(
            part
        ) < THRESHOLDS.fill.worth_adapters * saved_bytes(self.groups):
            self.parts = []

    def _missing(self, phase: str) -> Part:
        """What could still be tied: with fitted weights alone no infeasible group, with adapters only layers that can
        have one, and with training also what is tied with adapters and may do without."""
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
        """Replaces the first part by two smaller ones: tasks at target and below it, or half of the groups each.

        A part that is far from its targets after a fit, or small, is left to the next phases.
        """
        part = self.parts.pop(0)
        is_far = any(ratio < THRESHOLDS.fill.far for ratio in ratios.values())
        if self.phase in (FILL, WITH_ADAPTERS) and (is_far or self._gain(part) < self.smallest):
            return
        good, bad = (
            {i: left for i, tasks in part.items() if (left := tuple(t for t in tasks if (t in met) == is_good))}
            for is_good in (True, False)
        )
        if not bad or self._gain(good) <= 0:  # the tasks at target share nothing without the others
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
        """What is kept, and the part: its tasks join the tasks of each group that are tied or in the part."""
        tied = {occurrence for group in self.kept for occurrence in group.occurrences}
        groups = self.adapted if self.phase in (WITH_ADAPTERS, TRAIN_WITH_ADAPTERS) else self.groups
        added = [
            groups[i].restricted_to({o.task for o in groups[i].occurrences if o in tied or o.task in tasks})
            for i, tasks in part.items()
        ]
        return joined(self.kept, ordered(group for group in added if self._is_worth_it(group)))

    def _is_worth_it(self, group: Group) -> bool:
        """Whether it saves more than what is kept of it: where every task gets an adapter, one more may not pay off."""
        replaced = [other for other in self.kept if set(other.occurrences) & set(group.occurrences)]
        return len(group.occurrences) > 1 and group.saved_bytes > saved_bytes(tuple(replaced))

    def _is_new(self, trial: Configuration) -> bool:
        return self._key(trial) not in self.tried and saved_bytes(trial) > saved_bytes(self.kept)

    def _key(self, trial: Configuration) -> str:
        """Identifies a trial: what it ties, with which adapters, and whether it is trained."""
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
            "part": to_plain(self.part),
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
        self.part = from_plain(state["part"])
        self.phase, self.failures = state["phase"], dict(state["failures"])
        self.parts = [{index: tuple(tasks) for index, tasks in part} for part in state["parts"]]
        self.smallest = state.get("smallest", 0.0)
        self.tried, self.adopted = set(state["tried"]), from_plain(state["adopted"])


def _with_adapters(group: Group, models: Mapping[str, nn.Module], adapter_budget: float) -> Group:
    """The group with the largest adapters that the budget allows; without, where it allows none."""
    first = group.occurrences[0]
    layer = models[first.task].get_submodule(first.layer)
    rank = rank_within(layer, adapter_budget)
    return group.with_adapters(rank, adapter_bytes(layer, rank)) if rank else group


def most_sensitive_groups(
    trial: Configuration, task: str, share: float, sensitivity: Sensitivity, kept: Configuration = ()
) -> list[Group]:
    """Groups to release for the task: the most sensitive per byte first, until `share` of the bytes it shares.

    Groups that are kept already are not released. Groups of unknown sensitivity go first, the largest first.
    """
    held = {occurrence for group in kept for occurrence in group.occurrences}
    own = [g for g in trial if task in g.tasks and not {o for o in g.occurrences if o.task == task} <= held]
    own.sort(key=lambda g: -sensitivity.get((g, task), float(g.bytes)) / g.bytes)
    wanted = share * sum(group.bytes for group in own)
    chosen: list[Group] = []
    released = 0
    for group in own:
        if chosen and released >= wanted:
            break
        chosen.append(group)
        released += group.bytes
    return chosen
