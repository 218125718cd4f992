"""Sharing normalisation in the first layers, once the search is over (`share_norm`).

Tasks whose transforms make the same of an image can run their first layers once a frame, up to the first layer in which
they differ. Those layers are tied mostly; what differs first is the normalisation behind them. So normalisation is
shared as well, from the first layer on, in closed form (gemel/fitting/shared_norm.py), as deep as all tasks stay at
their targets: all of it is tried, then fewer layers by bisection, then without the task that fares worst.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors

from gemel.datasets.folders import load_image
from gemel.environment.clock import Clock, TimeOver
from gemel.environment.events import emit
from gemel.fitting.shared_norm import Source, follow_statistics, shared_values
from gemel.forward.modes import deep_copy
from gemel.forward.trace import Trace, trace
from gemel.merging.evaluator import Evaluator
from gemel.merging.images import ImageSampler
from gemel.merging.options import MergeOptions
from gemel.merging.records import RunRecord
from gemel.merging.state import MergeState
from gemel.merging.teachers import teachers_of
from gemel.sharing.computation import Member, common_points, members_of, with_equal_entries
from gemel.sharing.groups import Configuration, Occurrence, saved_bytes
from gemel.sharing.normalisation import can_share, group_of, own_tensors, tie_normalisation
from gemel.sharing.signatures import layer_signature
from gemel.sharing.tying import restore_snapshot, take_snapshot
from gemel.thresholds import THRESHOLDS
from gemel.training.context import RoundContext
from gemel.training.outcome import TIME_OVER, Outcome, Standing
from gemel.workload import CLASSIFICATION, Task

log = logging.getLogger(__name__)


def share_norms(
    options: MergeOptions,
    state: MergeState,
    evaluator: Evaluator,
    images: ImageSampler,
    clock: Clock,
    record: RunRecord,
    recover: Callable[..., Outcome],
) -> None:
    """Shares normalisation, if that is asked for and not done yet; the run is not finished before.

    recover: of trainer.py. Raises Interrupted or TimeOver; then all is as before.
    """
    if not options.share_norm or state.shared_norms:
        return
    finished, record.finished = record.finished, False
    sharing = SharedNormalisation(state, evaluator, images, clock, recover, options)
    record.shared_normalisation = sharing.run()
    record.finished = finished


@dataclass(frozen=True)
class Layer:
    """A normalisation layer that tasks could share, and what it would hold."""

    occurrences: tuple[Occurrence, ...]
    values: Mapping[str, Tensor]


class SharedNormalisation:
    """Finds what can be shared, and shares it, in the models of the state."""

    def __init__(
        self,
        state: MergeState,
        evaluator: Evaluator,
        images: ImageSampler,
        clock: Clock,
        recover: Callable[..., Outcome],
        options: MergeOptions,
    ):
        self.state, self.evaluator, self.images, self.clock = state, evaluator, images, clock
        self.recover, self.options = recover, options
        self.tasks: Mapping[str, Task] = evaluator.tasks
        self.shared: dict[Occurrence, tuple[Occurrence, ...]] = {}  # occurrence -> those that are one with it
        self.trials = self.steps = 0

    def run(self) -> dict[str, Any]:
        """Shares what can be shared, in the models and in `state.shared_norms`; returns the record of it.

        Raises Interrupted or TimeOver: then nothing is shared, and all is as before.
        """
        snapshot, before = take_snapshot(self.state.models), dict(self.evaluator.ratios())
        accuracies = {name: replace(accuracy) for name, accuracy in self.evaluator.accuracy.items()}
        try:
            emit("doing", what="looking for first layers that tasks compute alike")
            with self.clock.interruptible():
                traces = self._traces(list(self.tasks), wildcard=True)
                alike = [group for tasks in with_equal_entries(traces) for group in members_of(traces, tasks)]
            groups = [group for tasks in alike for group in self._share(list(tasks))]
        except BaseException:
            restore_snapshot(snapshot)
            self.evaluator.accuracy |= accuracies
            raise
        self.state.shared_norms = self._groups()
        after = self.evaluator.ratios()
        return {
            "trials": self.trials,
            "steps": self.steps,
            "layers": len(self.state.shared_norms),
            "saved_bytes": saved_bytes(self.state.shared_norms),
            "groups": [{name: round(member.share, 4) for name, member in group.items()} for group in groups],
            "accuracy_of_target": {name: [before[name], after[name]] for group in groups for name in group},
        }

    # ---- what could be shared ----------------------------------------------------------------------------------

    def _traces(self, names: Sequence[str], wildcard: bool) -> dict[str, Trace]:
        """The traces of models on one image. wildcard: as if all normalisation that could be shared were equal."""
        found = {}
        for name in names:
            model = self.state.models[name]
            image = _input(self.tasks[name], self._image).to(self.state.device)
            images: Any = torch.stack([image] * 2) if self.tasks[name].kind == CLASSIFICATION else [image] * 2
            try:
                found[name] = trace(model, images, _Labels(model, wildcard))
            except Exception as error:  # a user's model may raise anything
                log.warning("%s: shares no normalisation: its layers cannot be followed: %s", name, error)
        return found

    @cached_property
    def _image(self) -> Image.Image:
        """An image of the first task, which all transforms are tried on."""
        dataset: Any = self.evaluator.data[next(iter(self.tasks))].val.dataset
        return load_image(dataset.samples[0][0])

    def _candidates(self, tasks: Sequence[str]) -> list[tuple[Occurrence, ...]]:
        """The normalisation layers of the longest prefix that the tasks have in common, from the first one on."""
        traces = self._traces(tasks, wildcard=True)
        if len(traces) < len(tasks):
            return []
        first, others = traces[tasks[0]], [traces[task] for task in tasks[1:]]
        common = [p for p in first.points if all(any(p is q for q in common_points(first, o)) for o in others)]
        if not common:
            return []
        found, inside = [], tuple(f"{name}." for name in common[-1].skipped)
        for number, names in first.outputs.items():
            layer = next((n for n in names if f"{n}.".startswith(inside) and self._can_share(tasks[0], n)), None)
            if layer is None:
                continue
            alike = [next((n for n in o.outputs.get(number, ()) if self._can_share(t, n)), None)
                     for t, o in zip(tasks[1:], others, strict=True)]  # fmt: skip
            occurrences = [Occurrence(task, n) for task, n in zip(tasks, [layer, *alike], strict=True) if n is not None]
            signatures = {layer_signature(self.state.models[o.task], o.layer) for o in occurrences}
            if len(occurrences) < len(tasks) or len(signatures) > 1:
                break
            found.append(tuple(occurrences))
        return found

    def _can_share(self, task: str, layer: str) -> bool:
        return can_share(self.state.models[task].get_submodule(layer))

    # ---- sharing it --------------------------------------------------------------------------------------------

    def _share(self, tasks: Sequence[str]) -> list[dict[str, Member]]:
        """Shares as deep as these tasks stay at their targets; then without the one that fares worst.

        Returns the groups that then run layers once. If there is none, nothing is shared.
        """
        affected = _sharing_with(tasks, self.state.kept)
        snapshot, shared = take_snapshot(self._container(affected)), dict(self.shared)
        accuracies = {name: replace(self.evaluator.accuracy[name]) for name in affected}
        teachers = {name: deep_copy(self.state.models[name]) for name in tasks}
        left = list(tasks)
        while len(left) > 1 and (worst := self._share_deepest(left, teachers)) is not None:
            left.remove(worst)
        groups = members_of(self._traces(tasks, wildcard=False), tasks)
        if not groups:
            restore_snapshot(snapshot)
            self.shared = shared
            self.evaluator.accuracy |= accuracies
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
        snapshot = take_snapshot(self._container(_sharing_with(teachers, self.state.kept)))
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
                measured = self._trained(measured, [o for layer in layers for o in layer.occurrences])
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

    def _trained(self, fitted: Mapping[str, float], norms: Sequence[Occurrence]) -> dict[str, float]:
        """Trains these tasks, and all that share weights with them, as in any trial; what all of them then reach.

        norms: shared ones, whose statistics stay as they are: each batch is of one task.
        """
        names = _sharing_with(fitted, self.state.kept)
        known = {**{name: self.evaluator.accuracy[name].merged for name in names}, **fitted}
        tasks = {name: self.tasks[name] for name in names}
        options = replace(self.options.training, freeze_prefix=False)
        teachers = teachers_of(self.state, tasks, self.state.kept, options)
        context = RoundContext(
            device=self.state.device,
            seed=self.options.seed,
            purpose=("shared normalisation", self.trials),
            clock=self.clock,
            fitted={name: Standing(known[name] / task.target_acc, known[name]) for name, task in tasks.items()},
            screen_targets=self.evaluator.screen_targets(names),
        )
        try:
            with _in_eval_mode(self.state.models[o.task].get_submodule(o.layer) for o in norms):
                outcome = self.recover(self.state.models, tasks, self.evaluator.data, options, context, teachers)
        finally:
            for teacher in teachers.values():
                teacher.close()
        if outcome.reason == TIME_OVER:
            raise TimeOver
        self.steps += outcome.steps
        with self.clock.interruptible():
            return self.evaluator.measure_all({name: self.state.models[name] for name in names})

    def _is_shared(self, occurrences: Sequence[Occurrence]) -> bool:
        return all(o in self.shared for o in occurrences)

    def _images(self, teachers: Mapping[str, nn.Module]) -> dict[str, list]:
        return self.images.of_tasks(teachers, THRESHOLDS.sensitivity.pixels, "shared normalisation")

    def _container(self, names: Iterable[str]) -> nn.ModuleDict:
        return nn.ModuleDict({name: self.state.models[name] for name in names})

    def _groups(self) -> Configuration:
        distinct = {id(occurrences): occurrences for occurrences in self.shared.values()}
        return tuple(group_of(self.state.models, occurrences) for occurrences in distinct.values())


def _sharing_with(tasks: Iterable[str], kept: Configuration) -> list[str]:
    """The tasks, and those that share weights with any of them, directly or through others."""
    found, grown = set(tasks), True
    while grown:
        reached = {task for group in kept if found & set(group.tasks) for task in group.tasks}
        grown = not reached <= found
        found |= reached
    return sorted(found)


@contextlib.contextmanager
def _in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, these modules stay in eval mode, also where their models are put into train mode."""
    held = list(modules)
    for module in held:
        module.eval()
        vars(module)["train"] = _stay  # models call it for each of their modules
    try:
        yield
    finally:
        for module in held:
            del vars(module)["train"]


def _stay(mode: bool = True) -> None:
    """In the place of a module's `train`."""


class _Labels:
    """What stands for the tensors of a model: their content; of normalisation that could be shared, the shape."""

    def __init__(self, model: nn.Module, wildcard: bool):
        self.model, self.wildcard = model, wildcard

    def __call__(self, name: str, tensor: Tensor) -> object:
        module, _, key = name.rpartition(".")
        if self.wildcard and can_share(self.model.get_submodule(module)):
            return key, tensor.dtype, tuple(tensor.shape)
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return tensor.dtype, tuple(tensor.shape), sha256(values.numpy().tobytes()).hexdigest()


def _input(task: Task, image: Image.Image) -> Tensor:
    """What the task's val transform makes of an image."""
    if task.kind == CLASSIFICATION:
        return task.val_transform(image)
    size = (image.height, image.width)
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)  # type: ignore[call-overload]
    return task.val_transform(image, {"boxes": boxes, "labels": torch.zeros(0, dtype=torch.int64), "image_id": 0})[0]
