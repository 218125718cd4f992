"""Tying what a search left out of the first layers of tasks that may see the same frames (`share_norm`).

A search goes by bytes. A first layer takes few of them and is sensitive, so a search may release a task from it; but
tasks that differ there compute nothing alike, however much they share else. So what is missing from their common first
layers is tied in trials of its own: fitted with all layers behind it, trained where that misses a target, undone where
a task is below its target still. All that is missing is tried first, then fewer layers by bisection, counted from the
first one, then without the task that fares worst.
"""

import logging
from collections.abc import Mapping, Sequence

from gemel.environment.clock import Clock
from gemel.environment.events import emit
from gemel.environment.failures import is_out_of_memory
from gemel.merging.joint_training import JointTraining
from gemel.merging.model_traces import ModelTraces, common_layers
from gemel.merging.records import RunRecord
from gemel.merging.resume import groups_to_tie
from gemel.options import LEAST_SQUARES, MergeOptions
from gemel.results_store.files import first_line
from gemel.sharing.computation import members_of, with_equal_entries
from gemel.sharing.groups import Configuration, Group, Occurrence, affected_tasks, joined
from gemel.sharing.normalisation import can_share
from gemel.strategies.base import Strategy
from gemel.thresholds import THRESHOLDS
from gemel.training.outcome import GIVEN_UP, MET, Outcome
from gemel.trials.evaluator import Evaluator
from gemel.trials.images import ImageSampler
from gemel.trials.initialisation import WeightFitter, refit_frozen_normalisation, rule_of
from gemel.trials.judged_as_stored import judged_as_stored
from gemel.trials.state import MergeState

log = logging.getLogger(__name__)


class FirstLayers:
    """Finds the tasks that could compute their first layers alike, and ties what is missing for that.

    Groups are tied in `state.kept`; the strategy, which decides what a layer's donor is, does not know of them.
    """

    def __init__(
        self,
        state: MergeState,
        evaluator: Evaluator,
        images: ImageSampler,
        clock: Clock,
        training: JointTraining,
        record: RunRecord,
        strategy: Strategy,
    ):
        self.state, self.evaluator, self.images, self.clock = state, evaluator, images, clock
        self.training, self.record, self.strategy = training, record, strategy
        self.options: MergeOptions = training.options
        self.traces = ModelTraces(state, evaluator)
        groups = groups_to_tie(self.options, state.models, record.groups)
        # A private scale and bias would make their outputs differ.
        self.group_of = {o: group for group in groups if not group.private_bytes for o in group.occurrences}
        self.trials = 0
        self.failed: dict[Configuration, dict[str, float]] = {}  # trial -> accuracy / target that it reached

    def tasks_alike(self) -> list[list[str]]:
        """Sets of tasks that could compute their first layers alike, if all were shared that can be."""
        traces = self.traces.of(list(self.evaluator.tasks), self._stands_for)
        groups = [group for tasks in with_equal_entries(traces) for group in members_of(traces, tasks)]
        return [list(group) for group in groups]

    def tie(self, tasks: Sequence[str]) -> None:
        """Ties as much of the common first layers of these tasks as they stay at their targets with.

        Raises Interrupted or TimeOver; then what was tied before stays so.
        """
        left = list(tasks)
        while len(left) > 1 and (worst := self._tie_deepest(left)) is not None:
            left.remove(worst)

    def _tie_deepest(self, tasks: Sequence[str]) -> str | None:
        """Ties as deep as these tasks stay at their targets; who fares worst beyond, if nothing can be tied."""
        missing = self._missing(tasks)
        tied, failed, worst = 0, len(missing) + 1, None
        while failed - tied > 1:
            depth = (tied + failed) // 2 if worst else len(missing)
            met, ratios = self._try(missing[:depth])
            if met:
                tied = depth
            else:
                failed, worst = depth, min(ratios, key=lambda name: ratios[name])
        return None if tied or worst not in tasks else worst

    def _missing(self, tasks: Sequence[str]) -> list[Group]:
        """The groups of the common first layers of these tasks that are not tied yet, in the order of the pass."""
        with self.clock.interruptible():
            traces = self.traces.of(tasks, self._stands_for)
            layers = common_layers(traces, tasks, self.group_of.__contains__)
        missing = []
        for occurrences in layers:
            group = self.group_of[occurrences[0]]
            held = [set(kept.occurrences) for kept in self.state.kept if set(kept.occurrences) & set(group.occurrences)]
            if len(occurrences) < len(tasks) or not all(own <= set(group.occurrences) for own in held):
                break  # earlier runs paired its layers otherwise
            if not any(set(occurrences) <= own for own in held):
                missing.append(group.restricted_to(tasks))
        return missing

    def _stands_for(self, occurrence: Occurrence) -> object:
        """Layers of one group, and normalisation that could be shared, are alike."""
        if (group := self.group_of.get(occurrence)) is not None:
            return "group", group.occurrences
        layer = self.state.models[occurrence.task].get_submodule(occurrence.layer)
        return "normalisation" if can_share(layer) else None

    # ---- a trial -----------------------------------------------------------------------------------------------

    def _try(self, new: Sequence[Group]) -> tuple[bool, dict[str, float]]:
        """Ties these groups and judges: (whether all tasks are at their targets, else it is undone, accuracy / target).

        Of all tasks whose weights change.
        """
        proposal = joined(self.state.kept, tuple(new))
        if proposal in self.failed:  # the task that was left out shares these layers with the others already
            return False, self.failed[proposal]
        emit("doing", what=f"tying {len(new)} first layers of {len(new[0].occurrences)} tasks")
        self.trials += 1
        names = affected_tasks(self.state.kept, proposal)
        reached = dict.fromkeys(names, 0.0)
        self.state.begin_trial(proposal, rule_of(self.options.initial_weights))
        try:
            outcome = self._recovered(tuple(new), proposal, names)
            reached = outcome.accuracies
            if outcome.success:
                self.state.keep(proposal)
                self.evaluator.keep(reached)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            log.warning("out of memory in a trial of first layers, which is undone: %s", first_line(error))
        finally:
            self.state.undo()  # to what is kept
        ratios = {name: accuracy / self._target(name) for name, accuracy in reached.items()}
        if not (met := self.state.kept == proposal):
            self.failed[proposal] = ratios
        return met, ratios

    def _recovered(self, new: Configuration, proposal: Configuration, names: Sequence[str]) -> Outcome:
        """Fits the tied layers, trains where that is not enough, and judges as stored."""
        with self.clock.interruptible():
            self._fit(new, proposal, names)
            measured = self.evaluator.measure_all({name: self.state.models[name] for name in names})
        if not self._all_met(measured):
            measured = self.training.train(measured)
        reason = MET if self._all_met(measured) else GIVEN_UP
        outcome = Outcome(reason, measured, tuple(measured), 0, 0)
        return judged_as_stored(self.state, self.evaluator, self.clock, outcome)

    def _fit(self, new: Configuration, proposal: Configuration, names: Sequence[str]) -> None:
        """Fits what is tied, or, once weights were trained, what is new, as rounds of the search do."""
        number = len(self.record.rounds)
        if self.options.initial_weights != LEAST_SQUARES:
            refit_frozen_normalisation(self.state, self.images, names, number)
            return
        fitter = WeightFitter(self.state, self.evaluator, self.images, self.strategy.donor_of)
        if self.record.has_trained:
            changed = tuple(group for group in proposal if group not in set(self.state.kept))
            fitter.fit(changed, names, number, max_fits=2)
            return
        groups = tuple(group for group in proposal if set(group.tasks) <= set(names))
        self.state.reset_to_unmerged(groups, names)
        fitter.fit(groups, names, number, max_fits=THRESHOLDS.fit.max_fits)

    def _all_met(self, measured: Mapping[str, float]) -> bool:
        return all(accuracy >= self._target(name) for name, accuracy in measured.items())

    def _target(self, name: str) -> float:
        return self.evaluator.tasks[name].target_acc
