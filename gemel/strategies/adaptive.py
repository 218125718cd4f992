"""The adaptive strategy: what is expected to save most, by the accuracies that were measured so far.

1. Search: of several configurations, from cautious to everything, try the one that is expected to save most, as long
   as that is worth a trial. Of each task the most sensitive layers per byte are released first (a group splits: the
   other tasks still share it); how many, follows from what the task reached with more and with less tied (curves.py).
   The first trial may come before sensitivity is predicted; after a failure that kept little a small one follows.
   A first layer that no one set of weights can serve takes those of the most sensitive task (the donor).
2. Fill in: try what is missing, the largest savings first, in parts that are halved when they nearly work; parts with
   which a task is predicted to fail are not tried.
3. Fill in with adapters: if much is missing, try the same with a low-rank adapter per task, of higher rank where tying
   hurts more, then with ever smaller ones. So far shared weights are fitted; a task may be trained in what it holds.
4. Fill in with training: first with adapters, then without, in parts that are halved when they fail.

With a memory goal the search begins with configurations that just reach it, each sparing other tasks most (goal.py).

Where some tasks met their targets in a failed trial of steps 1 to 3, they keep what they share among themselves. No
trial is made twice.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import nn

from gemel.sharing.groups import (
    Configuration,
    Group,
    Occurrence,
    find_groups,
    from_plain,
    joined,
    ordered,
    saved_bytes,
    to_plain,
)
from gemel.strategies.adapted_groups import AdaptedGroups
from gemel.strategies.base import NONE, FirstStep, Ratios, Sensitivity, Strategy
from gemel.strategies.curves import Curve, ExpectedLoss, expected_saving
from gemel.strategies.donors import Donors
from gemel.strategies.goal import just_enough, least_sensitive
from gemel.strategies.parts import Part, by_tasks, digest_of, halves
from gemel.strategies.phases import (
    ABOUT_TO_DO,
    DONE,
    FILL,
    SEARCH,
    SMALLER_ADAPTERS,
    TRAIN,
    UNTRAINED,
    WITH_ADAPTERS,
    WITH_ANY_ADAPTERS,
    following,
    least_gain,
)
from gemel.strategies.predicted import Predicted
from gemel.thresholds import THRESHOLDS

ALL_ALIKE = ""  # spared in the first trial that just reaches the goal
RISKS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)  # each task's probability to meet its target


class Adaptive(Strategy):
    """See the header of this file; benchmarks/LOG.md has what was measured."""

    tied_share = 0.5  # the first one ties everything, and those that follow a failure ever less

    def __init__(
        self, models: Mapping[str, nn.Module], groups: Configuration | None = None, adapter_budget: float = 0.0
    ):
        self.groups = find_groups(models) if groups is None else groups
        self.adapted = AdaptedGroups(self.groups, models, adapter_budget)
        self.sensitivity = Predicted(self.groups)
        self.donors = Donors(models, self.groups)
        self.curves = {name: Curve() for name in models}
        self.own: Configuration = ()
        self.part: Configuration = ()  # kept of a failed trial, of more saving than what whole trials kept
        self.phase = SEARCH
        self.adapters_first: bool | None = None  # whether they came before the search was over; False: that failed
        self.working: Configuration = ()  # the failed trial that a training continues
        self.parts: list[Part] = []  # to fill in, in this order
        self.smallest = 0.0  # bytes that a part would have to save to be halved without training
        self.tried: set[str] = set()
        self.goal_ratios: dict[str, dict[str, float]] = {}  # who was spared -> what that trial reached

    @property
    def base(self) -> Configuration:
        """What every proposal ties: what whole trials, or earlier runs, kept."""
        return self.with_adopted(self.own)

    @property
    def kept(self) -> Configuration:
        return self.part if saved_bytes(self.part) > saved_bytes(self.base) else self.base

    @property
    def continues_failed_trial(self) -> bool:
        return self.phase not in UNTRAINED and bool(self.working)

    @property
    def needs_sensitivity(self) -> bool:
        if self.phase != SEARCH or self.sensitivity.errors:
            return False
        missing = saved_bytes(self.groups) - saved_bytes(self.kept)
        is_worth_it = missing > 0 and missing >= THRESHOLDS.fill.worth_training * saved_bytes(self.groups)
        return is_worth_it and (bool(self.tried) or self._small_step() is None)

    @property
    def refits_all_changes(self) -> bool:
        """Of parts that fill in only where they hold all that is missing: smaller ones are fitted behind what is kept,
        which is quicker and does not move tasks that met their targets."""
        fills_in = self.phase in (FILL, WITH_ADAPTERS)
        return self.parts[:1] == [self._missing(self.phase)] if fills_in else not self.fits_to_what_is_kept

    @property
    def fits_to_what_is_kept(self) -> bool:
        return self.phase == SMALLER_ADAPTERS

    @property
    def releases_before_training(self) -> bool:
        return self.phase in UNTRAINED

    @property
    def trains_alone_at_length(self) -> bool:
        return self.phase in (WITH_ADAPTERS, SMALLER_ADAPTERS)

    @property
    def keeps_verified_part(self) -> bool:
        """As long as trials are not trained: a training that fails is continued, in smaller parts."""
        return self.phase in UNTRAINED

    @property
    def about_to_do(self) -> str:
        return ABOUT_TO_DO[self.phase]

    @property
    def effort(self) -> int:
        return list(ABOUT_TO_DO).index(self.phase)

    def begin_with(self, choose: Callable[[Configuration], FirstStep]) -> None:
        if not self.tried:  # else something came first
            self.first_step = choose(self.groups)

    def predicted_sensitivity(self) -> dict[Occurrence, float]:
        return self.sensitivity.by_occurrence()

    def keep_part(self, kept: Configuration) -> None:
        """The search does not build on a part, since what serves some tasks can be in the way of all together."""
        self.part = kept
        if self.phase != SEARCH:
            self._build_on_part()

    def _build_on_part(self) -> None:
        if self.part and self.kept == self.part:
            self.own, self.adopted = self.part, ()  # it may have split what was adopted
        self.part = ()

    def keep_more(self, kept: Configuration) -> None:
        self.own, self.part, self.adopted = kept, (), ()  # a part that was kept may have split what was adopted

    def propose(self) -> Configuration | None:
        """The next configuration; skips what was tried already, ties nothing new, or is predicted to fail."""
        while self.phase != DONE:
            if (next_goal := self._next_goal_trial()) is not None:
                return next_goal[1]
            if self.phase == SEARCH:
                if (step := self._small_step()) is not None:
                    return step
                trial = self._most_promising()
                if trial is not None and (self.adapters_first is not None or not self._promises_little(trial)):
                    return trial
                self.adapters_first = trial is not None or self.adapters_first
                self._begin_filling(following(self.phase, self.adapters_first))
            elif not self.parts and self.phase == SMALLER_ADAPTERS and self.adapted.make_smaller(self.kept):
                self._begin_filling(SMALLER_ADAPTERS)
            elif not self.parts:
                self._begin_filling(following(self.phase, self.adapters_first))
            elif not self._is_new(trial := self._filled(self.parts[0])):
                self._give_up_part(met=())
            elif self.phase == FILL and not self._is_worth_a_trial(trial):
                self._give_up_part(met=[t for t, p in self._probabilities(trial).items() if p >= 0.5])
            else:
                return trial
        return None

    # ---- a memory goal ---------------------------------------------------------------------------------------

    def _spared(self) -> list[str]:
        """Who is spared in the trials that just reach the goal: all tasks alike, then each of the most sensitive."""
        most = sorted(self.curves, key=lambda task: (-self.curves[task].slope, task))
        return [ALL_ALIKE, *most[: THRESHOLDS.goal.spared_tasks]]

    def _goal_trial(self, spared: str, base: Configuration) -> Configuration | None:
        """Ties the base, and just enough to save `goal_saving`; None: nothing saves that."""
        tied = {occurrence for group in base for occurrence in group.occurrences}
        costs = {}
        for i, group in enumerate(self.groups):
            for o in group.occurrences:
                if o not in tied:
                    weight = THRESHOLDS.goal.spared_weight if o.task == spared else 1.0
                    costs[i, o.task] = weight * self._expected_loss(i, o.task)
        assert self.goal_saving is not None
        found = just_enough(self.groups, costs, self.goal_saving)
        return joined(base, found) if base and found is not None else found

    def _next_goal_trial(self) -> tuple[str, Configuration] | None:
        """(who is spared, the trial): the next one, first for the task that the last one hurt most."""
        if self.goal_saving is None or self.phase != SEARCH or saved_bytes(self.kept) >= self.goal_saving:
            return None
        reached = next(reversed(self.goal_ratios.values()), {})
        for spared in sorted(self._spared(), key=lambda name: -1.0 if name == ALL_ALIKE else reached.get(name, 1.0)):
            if spared not in self.goal_ratios:
                trial = self._goal_trial(spared, self.base)
                if trial is not None and self._is_new(trial) and saved_bytes(trial) >= self.goal_saving:
                    return spared, trial
        return None

    def closest_to_goal(self) -> tuple[Configuration, Ratios] | None:
        if not self.goal_ratios or self._next_goal_trial() is not None:
            return None
        spared = max(self.goal_ratios, key=lambda name: min(self.goal_ratios[name].values(), default=0.0))
        trial = self._goal_trial(spared, ())
        return None if trial is None else (trial, self.goal_ratios[spared])

    # ---- the search ------------------------------------------------------------------------------------------

    def _small_step(self) -> Configuration | None:
        """What is least sensitive: first of all where the first trial is not to wait for sensitivity, and after one
        that failed and kept little."""
        has_failed = any(curve.failed for curve in self.curves.values())
        is_first = not self.tried and not self.sensitivity.errors
        share = self.first_step.share if is_first else THRESHOLDS.search.small_step * has_failed
        if self.goal_saving is not None or saved_bytes(self.kept) >= share * saved_bytes(self.groups):
            return None
        step = self._first_step() if is_first else self._least_sensitive(range(len(self.groups)), share)
        return step if self._is_new(step) else None

    def _first_step(self) -> Configuration:
        """What is tried before sensitivity is predicted, if anything is."""
        among = [i for i, is_stem in enumerate(self.donors.stems) if self.first_step.ties_stems or not is_stem]
        return self._least_sensitive(among, self.first_step.share)

    def _least_sensitive(self, among: Sequence[int], share: float) -> Configuration:
        """What is kept, and the least sensitive of these groups, as many as save this share of what all of them do."""
        groups, density = tuple(self.groups[i] for i in among), [self.sensitivity.density(i) for i in among]
        return joined(self.base, least_sensitive(groups, density, share * saved_bytes(groups)))

    def _most_promising(self) -> Configuration | None:
        """Of several configurations, from cautious to everything, the new one with the largest expected saving."""
        trials = dict.fromkeys(self._at_risk(risk) for risk in RISKS)
        new = [trial for trial in trials if self._is_new(trial) and self._is_worth_a_trial(trial)]
        return max(new, key=self._worth, default=None)

    def _worth(self, trial: Configuration) -> float:
        """Its expected saving, less what one more trial counts, times the probability that one will be needed."""
        everything, one_more = saved_bytes(self.groups), THRESHOLDS.search.one_more_trial
        ties_everything = saved_bytes(trial) == saved_bytes(joined(self.base, self.groups))
        return self._expected_saving(trial) - (1 - ties_everything * self.chance(trial)) * one_more * everything

    def _at_risk(self, risk: float) -> Configuration:
        """What is kept, and as much of all groups as each task bears with this probability."""
        released = {(i, task) for task in self.curves for i in self._released(task, risk)}
        left = (g.restricted_to({t for t in g.tasks if (i, t) not in released}) for i, g in enumerate(self.groups))
        return joined(self.base, ordered(group for group in left if len(group.occurrences) > 1))

    def _released(self, task: str, risk: float) -> list[int]:
        """The most sensitive groups per byte of the task, until it meets its target with this probability."""
        own = [i for i, group in enumerate(self.groups) if task in group.tasks]
        own.sort(key=lambda i: -self.sensitivity.of(i, task) / self.groups[i].bytes)
        tied = total = sum(self.sensitivity.of(i, task) for i in own)
        for number, i in enumerate(own):
            if self.curves[task].probability(tied / total if total else 1.0) >= risk:
                return own[:number]
            tied -= self.sensitivity.of(i, task)
        return own

    def _probabilities(self, trial: Configuration) -> dict[str, float]:
        """Task -> the probability that it meets its target in an untrained trial without adapters."""
        tied_share = self.sensitivity.tied_share
        return {task: curve.probability(tied_share(trial, task)) for task, curve in self.curves.items()}

    def chance(self, proposal: Configuration) -> float:
        if not self.sensitivity.errors:
            return 0.0 if self.tried else self.first_step.chance
        return math.prod(self._probabilities(proposal).values()) if self.phase == SEARCH else 0.0

    def _expected_saving(self, trial: Configuration) -> float:
        tied = {o for group in self.kept for o in group.occurrences}
        return expected_saving(trial, self._probabilities(trial), tied)

    def _promises_little(self, trial: Configuration) -> bool:
        """Whether adapters, with tasks that learn quickly in what they hold alone, promise far more than the trial."""
        possible = saved_bytes(self._filled(self._missing(WITH_ADAPTERS), self.adapted.full)) - saved_bytes(self.kept)
        gain = self._expected_saving(trial) - saved_bytes(self.kept)
        is_much = possible >= max(THRESHOLDS.search.much * saved_bytes(self.groups), gain / THRESHOLDS.search.little)
        return is_much and bool(self.kept) and len(self.learn_quickly) > 1

    def _is_worth_a_trial(self, trial: Configuration) -> bool:
        gain = self._expected_saving(trial) - saved_bytes(self.kept)
        return gain >= THRESHOLDS.search.worth_a_trial * saved_bytes(self.groups)

    def _expected_loss(self, index: int, task: str) -> float:
        """Of the task by one group: as much of the loss by all of them as it has of their sensitivity."""
        slope = self.curves[task].slope
        return self.sensitivity.of(index, task) * (slope / self.sensitivity.of_task(task) if slope else 1.0)

    def _observe(self, trial: Configuration, met: Collection[str], ratios: Ratios) -> None:
        """Adds what an untrained trial without adapters measured to the curves."""
        if self.phase not in (SEARCH, FILL):
            return
        for task in sorted({task for group in trial for task in group.tasks}):
            share = self.sensitivity.tied_share(trial, task)
            if task in met:
                self.curves[task].add(share, max(1.0, ratios.get(task, 1.0)))
            elif task in ratios or not ratios:
                self.curves[task].add(share, min(ratios.get(task, 0.9), 1 - 1e-6))

    def donor_of(self, group: Group) -> str | None:
        return self.donors.of(group)

    def set_sensitivity(
        self,
        sensitivity: Sensitivity,
        misfit: Sensitivity = NONE,
        reached: Ratios = NONE,
        losses: Mapping[str, ExpectedLoss] = NONE,
    ) -> None:
        """Begins the curve of each task; what the first step reached is of another share of its sensitivity now."""
        first = self._first_step()
        by_bytes = {task: self.sensitivity.tied_share(first, task) for task in self.curves}
        self.sensitivity.learn(sensitivity)
        self.donors.learn(misfit)
        for task, curve in self.curves.items():
            curve.begin(reached.get(task, 1.0), {by_bytes[task]: self.sensitivity.tied_share(first, task)})
            if task in losses:
                curve.expect(losses[task], self.sensitivity.predicted_for(task))

    def record(self, kept: bool, met: Collection[str], ratios: Ratios = NONE) -> None:
        trial = self.propose()
        assert trial is not None, "a recorded trial must have been proposed"
        if (next_goal := self._next_goal_trial()) is not None:
            self.goal_ratios[next_goal[0]] = {**dict.fromkeys(met, 1.0), **ratios}
        self._observe(trial, met, ratios)
        self.tried.add(self._key(trial))
        self.working = ()
        if kept:
            self.own, self.part, self.parts = trial, (), self.parts[1:]
        elif self.phase == WITH_ADAPTERS and self.adapters_first:  # the search goes on
            self.phase, self.parts, self.adapters_first = SEARCH, [], False
        elif self.phase != SEARCH:
            self._give_up_part(met, ratios)
            while self.phase not in (TRAIN, DONE) and not self.parts:
                self._begin_filling(following(self.phase, self.adapters_first))
            if self.parts and self._is_new(trial) and self._filled(self.parts[0]) == trial:
                self.working = trial  # training continues from the fitted weights

    def _begin_filling(self, phase: str) -> None:
        """One part with all that is missing; with adapters only where enough is missing."""
        self._build_on_part()
        part = self._missing(phase)
        if phase == WITH_ADAPTERS and not any(group.rank for group in self.kept):
            self.adapted.allocate({i: self.sensitivity.density(i) for i in part})
        self.phase, self.working = phase, ()
        gain, possible = self._gain(part), saved_bytes(self.groups)
        self.smallest = max(THRESHOLDS.fill.worth_a_fit * possible, THRESHOLDS.fill.smallest_part * gain)
        self.parts = [part] if part and gain >= least_gain(phase, THRESHOLDS.fill) * possible else []

    def _missing(self, phase: str) -> Part:
        """What could still be tied: with adapters only layers that can have one, and with training also what is tied
        with adapters and may do without."""
        if phase == SMALLER_ADAPTERS:
            larger = {o for group in self.kept if group.rank for o in group.occurrences}
            parts = {i: tuple(o.task for o in g.occurrences if o in larger) for i, g in enumerate(self.groups)}
            return {i: tasks for i, tasks in parts.items() if tasks and self.adapted.smaller[i].rank}
        tied = {o for group in self.kept if phase != TRAIN or not group.rank for o in group.occurrences}
        missing = {i: tuple(o.task for o in group.occurrences if o not in tied) for i, group in enumerate(self.groups)}
        needs_adapter = phase in WITH_ANY_ADAPTERS
        return {i: tasks for i, tasks in missing.items() if tasks and (self.adapted.full[i].rank or not needs_adapter)}

    def _give_up_part(self, met: Collection[str], ratios: Ratios = NONE) -> None:
        """Replaces the first part by two smaller ones: tasks at target and below it, or half of the groups each.

        A part that is far from its targets after a fit, or small, is left to the next phases.
        """
        part = self.parts.pop(0)
        is_far = any(ratio < THRESHOLDS.fill.far for ratio in ratios.values())
        if self.phase in UNTRAINED and (is_far or self._gain(part) < self.smallest):
            return
        good, bad = by_tasks(part, met)
        if not bad or self._gain(good) <= 0:  # the tasks at target share nothing without the others
            if len(part) < 2:
                self.parts += [bad] if good and bad else []
                return
            good, bad = halves(part)
        self.parts = [good, *self.parts, bad]

    def _gain(self, part: Part) -> int:
        return saved_bytes(self._filled(part)) - saved_bytes(self.kept)

    def _filled(self, part: Part, groups: Sequence[Group] | None = None) -> Configuration:
        """What is kept, and the part: its tasks join the tasks of each group that are tied or in the part."""
        tied = {occurrence for group in self.kept for occurrence in group.occurrences}
        if groups is None:
            groups = self.adapted.full if self.phase in WITH_ANY_ADAPTERS else self.groups
            groups = self.adapted.smaller if self.phase == SMALLER_ADAPTERS else groups
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
        how = "" if self.phase in UNTRAINED else " trained"
        return digest_of(trial) + (f" of {saved_bytes(trial)}" if self.phase == SMALLER_ADAPTERS else how)

    def state(self) -> dict:
        return {
            "sensitivity": self.sensitivity.state(),
            "first_step": self.first_step._asdict(),
            **self.donors.state(),
            "curves": {task: curve.state() for task, curve in self.curves.items()},
            **{key: to_plain(getattr(self, key)) for key in ("own", "part", "working", "adopted")},
            **{key: getattr(self, key) for key in ("phase", "adapters_first", "smallest")},
            "ranks": self.adapted.ranks,
            "parts": [[[index, list(tasks)] for index, tasks in part.items()] for part in self.parts],
            "tried": sorted(self.tried),
            "goal": {"saving": self.goal_saving, "ratios": self.goal_ratios},
        }

    def load_state(self, state: dict) -> None:
        self.sensitivity.load_state(state["sensitivity"])
        self.first_step = FirstStep(**state.get("first_step", {}))  # earlier versions have none
        self.donors.load_state(state)
        self.curves = {task: Curve.of(curve) for task, curve in state["curves"].items()}
        self.own, self.part, self.working = (from_plain(state[key]) for key in ("own", "part", "working"))
        self.phase, self.smallest, self.adapters_first = state["phase"], state["smallest"], state.get("adapters_first")
        self.adapted.set_ranks(state.get("ranks", self.adapted.ranks))  # neither is in states of earlier versions
        self.parts = [{index: tuple(tasks) for index, tasks in part} for part in state["parts"]]
        self.tried, self.adopted = set(state["tried"]), from_plain(state["adopted"])
        goal = state["goal"]
        self.goal_ratios = goal["ratios"] if goal["saving"] == self.goal_saving else {}  # of this goal only
