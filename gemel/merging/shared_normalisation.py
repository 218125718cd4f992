"""Sharing normalisation in the first layers, once the search is over (`share_norm`).

Tasks whose transforms make the same of an image can run their first layers once a frame, up to the first layer in which
they differ. Those layers are tied mostly, and what the search left out is tied first (first_layers.py). What differs
then is the normalisation behind them. So normalisation is shared as well, from the first layer on, in closed form
(gemel/fitting/shared_norm.py), as deep as all tasks stay at their targets: all of it is tried, then fewer layers by
bisection, then without the task that fares worst.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from gemel.environment.clock import Clock
from gemel.environment.events import emit
from gemel.fitting.shared_norm import Source, follow_statistics, shared_values
from gemel.forward.modes import deep_copy
from gemel.merging.first_layers import FirstLayers
from gemel.merging.joint_training import JointTraining, sharing_with
from gemel.merging.model_traces import common_layers
from gemel.merging.records import RunRecord
from gemel.options import MergeOptions
from gemel.sharing.computation import Member, members_of
from gemel.sharing.groups import Configuration, Occurrence, saved_bytes
from gemel.sharing.normalisation import can_share, group_of, own_tensors, tie_normalisation
from gemel.sharing.signatures import layer_signature
from gemel.sharing.tying import Snapshot, restore_snapshot, take_snapshot
from gemel.strategies.base import Strategy
from gemel.thresholds import THRESHOLDS
from gemel.training.outcome import Outcome
from gemel.trials.evaluator import Accuracy, Evaluator
from gemel.trials.images import ImageSampler
from gemel.trials.state import MergeState
from gemel.workload import Task


def share_norms(
    options: MergeOptions,
    state: MergeState,
    evaluator: Evaluator,
    images: ImageSampler,
    clock: Clock,
    record: RunRecord,
    strategy: Strategy,
    recover: Callable[..., Outcome],
) -> None:
    """Shares normalisation, if that is asked for and not done yet; the run is not finished before.

    recover: of trainer.py. Raises Interrupted or TimeOver; then all is as before.
    """
    if not options.share_norm or state.shared_norms:
        return
    finished, record.finished = record.finished, False
    training = JointTraining(state, evaluator, clock, recover, options)
    first_layers = FirstLayers(state, evaluator, images, clock, training, record, strategy)
    record.shared_normalisation = SharedNormalisation(state, evaluator, images, clock, training, first_layers).run()
    strategy.keep_more(state.kept)
    record.finished = finished


@dataclass(frozen=True)
class Layer:
    """A normalisation layer that tasks could share, and what it would hold."""

    occurrences: tuple[Occurrence, ...]
    values: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Before:
    """What is restored where nothing is shared in the end."""

    snapshot: Snapshot
    kept: Configuration
    shared: dict[Occurrence, tuple[Occurrence, ...]]
    accuracies: dict[str, Accuracy]


class SharedNormalisation:
    """Finds what can be shared, and shares it, in the models of the state."""

    def __init__(
        self,
        state: MergeState,
        evaluator: Evaluator,
        images: ImageSampler,
        clock: Clock,
        training: JointTraining,
        first_layers: FirstLayers,
    ):
        self.state, self.evaluator, self.images, self.clock = state, evaluator, images, clock
        self.training, self.first_layers = training, first_layers
        self.tasks: Mapping[str, Task] = evaluator.tasks
        self.traces = first_layers.traces
        self.shared: dict[Occurrence, tuple[Occurrence, ...]] = {}  # occurrence -> those that are one with it
        self.trials = 0

    def run(self) -> dict[str, Any]:
        """Shares what can be shared, in the models, `state.kept` and `state.shared_norms`; returns the record of it.

        Raises Interrupted or TimeOver: then nothing is shared, and all is as before.
        """
        self.state.waiting.end()
        before, ratios = self._remember(self.tasks), dict(self.evaluator.ratios())
        try:
            emit("doing", what="looking for first layers that tasks compute alike")
            with self.clock.interruptible():
                alike = self.first_layers.tasks_alike()
            groups = [group for tasks in alike for group in self._share(tasks)]
        except BaseException:
            self._restore(before)
            raise
        self.state.shared_norms = self._groups()
        after = self.evaluator.ratios()
        return {
            "trials": self.trials + self.first_layers.trials,
            "steps": self.training.steps,
            "tied_layers": len(set(self.state.kept) - set(before.kept)),
            "layers": len(self.state.shared_norms),
            "saved_bytes": saved_bytes(self.state.shared_norms),
            "groups": [{name: round(member.share, 4) for name, member in group.items()} for group in groups],
            "accuracy_of_target": {name: [ratios[name], after[name]] for group in groups for name in group},
        }

    # ---- what could be shared ----------------------------------------------------------------------------------

    def _candidates(self, tasks: Sequence[str]) -> list[tuple[Occurrence, ...]]:
        """The normalisation layers of the longest prefix that the tasks have in common, from the first one on."""
        traces, found = self.traces.of(tasks, self._stands_for), []
        for occurrences in common_layers(traces, tasks, self._can_share):
            signatures = {layer_signature(self.state.models[o.task], o.layer) for o in occurrences}
            if len(occurrences) < len(tasks) or len(signatures) > 1:
                break
            found.append(occurrences)
        return found

    def _stands_for(self, occurrence: Occurrence) -> str | None:
        return "normalisation" if self._can_share(occurrence) else None

    def _can_share(self, occurrence: Occurrence) -> bool:
        return can_share(self.state.models[occurrence.task].get_submodule(occurrence.layer))

    # ---- sharing it --------------------------------------------------------------------------------------------

    def _share(self, tasks: Sequence[str]) -> list[dict[str, Member]]:
        """Shares as deep as these tasks stay at their targets; then without the one that fares worst.

        Returns the groups that then run layers once. If there is none, nothing is shared.
        """
        before = self._remember(sharing_with(tasks, self.state.kept))
        self.first_layers.tie(tasks)
        teachers = {name: deep_copy(self.state.models[name]) for name in tasks}
        left = list(tasks)
        while len(left) > 1 and (worst := self._share_deepest(left, teachers)) is not None:
            left.remove(worst)
        groups = members_of(self.traces.of(tasks, lambda occurrence: None), tasks)
        if not groups:
            self._restore(before)
        return groups

    def _share_deepest(self, tasks: Sequence[str], teachers: Mapping[str, nn.Module]) -> str | None:
        """Shares as deep as all these tasks stay at their targets; the one that fares worst beyond, if any does."""
        with self.clock.interruptible():
            layers = self._fitted(self._candidates(tasks), teachers)
        kept = sum(self._is_shared(layer.occurrences) for layer in layers)  # with the tasks that were left out
        failed, worst = len(layers) + 1, None
        while failed - kept > 1:
            depth = (kept + failed) // 2 if worst else len(layers)
            met, ratios = self._try(tasks, layers[:depth], teachers, len(layers))
            if met:
                kept = depth
            else:
                failed, worst = depth, min(ratios, key=lambda name: ratios[name])
        return worst

    def _fitted(self, candidates: Sequence[tuple[Occurrence, ...]], teachers: Mapping[str, nn.Module]) -> list[Layer]:
        """The layers with what they would hold, each fitted behind those before it; models stay as they are."""
        models, found = self.state.models, []
        snapshot = take_snapshot(self._container(teachers))
        images = self._images(teachers)
        try:
            for occurrences in candidates:
                if self._is_shared(occurrences):
                    values = own_tensors(models[occurrences[0].task].get_submodule(occurrences[0].layer))
                    found.append(Layer(occurrences, {key: value.detach().clone() for key, value in values.items()}))
                    continue
                sources = [Source(models[o.task], teachers[o.task], o.layer, images[o.task]) for o in occurrences]
                found.append(Layer(occurrences, shared_values(sources)))
                tie_normalisation(models, group_of(models, occurrences), found[-1].values)
        finally:
            restore_snapshot(snapshot)
        return found

    def _try(
        self, tasks: Sequence[str], layers: Sequence[Layer], teachers: Mapping[str, nn.Module], most: int
    ) -> tuple[bool, dict[str, float]]:
        """Ties these layers and judges: (whether all tasks are at their targets, else it is undone, accuracy / target).

        most: layers that there are.
        """
        emit("doing", what=f"sharing normalisation: {len(layers)} of {most} layers of {len(tasks)} tasks")
        models, images = self.state.models, self._images(teachers)
        self.trials += 1
        snapshot = take_snapshot(self._container(sharing_with(teachers, self.state.kept)))
        kept, measured = False, {}
        try:
            with self.clock.interruptible():
                for layer in layers:
                    if not self._is_shared(layer.occurrences):
                        tie_normalisation(models, group_of(models, layer.occurrences), layer.values)
                for name in tasks:
                    shared = {o.layer for layer in layers for o in layer.occurrences if o.task == name}
                    shared |= {o.layer for o in self.shared if o.task == name}
                    follow_statistics(models[name], teachers[name], images[name], shared)
                measured = self.evaluator.measure_all({name: models[name] for name in tasks})
            if not self._all_met(measured):
                measured = self.training.train(measured, [o for layer in layers for o in layer.occurrences])
            kept = self._all_met(measured)
        finally:
            if not kept:
                restore_snapshot(snapshot)
        if kept:
            self.state.round_weights()
            self.evaluator.keep(measured)
            new = [layer.occurrences for layer in layers if not self._is_shared(layer.occurrences)]
            self.shared |= {occurrence: occurrences for occurrences in new for occurrence in occurrences}
        return kept, {name: measured[name] / self.tasks[name].target_acc for name in tasks}

    def _all_met(self, measured: Mapping[str, float]) -> bool:
        return all(accuracy >= self.tasks[name].target_acc for name, accuracy in measured.items())

    def _is_shared(self, occurrences: Sequence[Occurrence]) -> bool:
        return all(o in self.shared for o in occurrences)

    def _images(self, teachers: Mapping[str, nn.Module]) -> dict[str, list]:
        return self.images.of_tasks(teachers, THRESHOLDS.sensitivity.pixels, "shared normalisation")

    def _container(self, names: Iterable[str]) -> nn.ModuleDict:
        return nn.ModuleDict({name: self.state.models[name] for name in names})

    def _remember(self, names: Iterable[str]) -> _Before:
        names = list(names)
        accuracies = {name: replace(self.evaluator.accuracy[name]) for name in names}
        return _Before(take_snapshot(self._container(names)), self.state.kept, dict(self.shared), accuracies)

    def _restore(self, before: _Before) -> None:
        restore_snapshot(before.snapshot)
        self.state.set_kept(before.kept)
        self.shared = before.shared
        self.evaluator.accuracy |= before.accuracies

    def _groups(self) -> Configuration:
        distinct = {id(occurrences): occurrences for occurrences in self.shared.values()}
        return tuple(group_of(self.state.models, occurrences) for occurrences in distinct.values())
