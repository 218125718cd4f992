"""Least squares for tied layers, each on the inputs it has behind all layers before it, in one pass over the images.

The forward passes of all tasks advance together (coroutines.py). At every tied layer they wait for each other until its
weights are fitted, and continue with these, so no layer is fitted on inputs that a later fit changes. What waits is in
memory, so near the input, where an image takes most, only some of the images wait (teacher_samples.py): the others
start when those layers are fitted, and run through them one batch after another.
"""

import contextlib
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gemel.environment import ranks
from gemel.environment.failures import is_out_of_memory
from gemel.fitting.batch_norm import (
    ChannelMoments,
    averaged_statistics,
    channel_moments,
    pooled_moments,
    set_statistics,
)
from gemel.fitting.coroutines import current, most_complete, run_coroutines, wait
from gemel.fitting.least_squares import RIDGE, Fit, fit_group, sums_of, why_unfit
from gemel.fitting.moments import Moments
from gemel.fitting.rows import Rows, input_rows, linear_map_at, row_itemsize, sample_inputs, shape_of
from gemel.fitting.teacher_samples import LayerSamples, TeacherSamples
from gemel.forward.batches import Batch, to_device
from gemel.forward.hooks import hooked
from gemel.forward.modes import Models, device_of
from gemel.sharing.adapters import LinearMap
from gemel.sharing.groups import Configuration, Group

MAX_LATE_BYTES = 128 << 20  # of inputs in the unmerged model that a pass gives before they are used

PassId = tuple[str, int]  # one forward pass: task, number of its batch


class Norm(NamedTuple):
    """Batch normalisation at which the forward passes of its task wait for each other."""

    task: str
    name: str


@torch.no_grad()
def fit_sequentially(
    models: Models,
    teachers: Models,
    groups: Configuration,
    images: Mapping[str, Sequence[Batch]],
    *,
    teacher_samples: TeacherSamples,
    task_weights: Mapping[str, float] | None = None,
    ridge: float = RIDGE,
    reports_errors: bool = False,
) -> dict[Group, Fit]:
    """As `fit_least_squares` with a stage for every layer, but in one forward pass of each model and batch.

    teacher_samples: what `sample_teachers` returned for these groups and images; it says how many batches wait at a
    layer. At batch normalisation they wait as well, until its statistics are set from the inputs of all that wait there
    (batch_norm.set_statistics); where it is called several times in a pass, they are averaged over the batches instead.
    reports_errors: whether the fits have errors before and after.

    With several ranks each runs the forward passes of its own tasks, for which alone it has images; the sums over the
    rows of a group's tasks go to all ranks, and those that have a task of the group solve the same system. The models
    of other ranks' tasks are out of date afterwards (gemel.sharing.holders.synchronise).

    Memory is that of the activations (without gradients) of all batches that wait at one layer, the rows of one task,
    and the sums over the rows of one group. A layer that is called several times in a pass (heads over pyramid levels)
    is fitted at its first call, on the inputs of that call and on those that the later calls have in the teacher. A
    layer on regions is fitted on its inputs in the teacher; so are the rows of a task that comes to a layer later than
    the tasks that wait for it there (models may have tied layers in different orders).
    Source: Nguyen et al., "RegMean++", 2025 (inputs of the merged model, layer by layer); targets as in PLeaS.
    """
    return _SequentialFit(models, teachers, groups, images, teacher_samples, task_weights, ridge, reports_errors).run()


class _SequentialFit:
    """One fit: the rows that are not used yet, and the groups that are fitted."""

    def __init__(
        self,
        models: Models,
        teachers: Models,
        groups: Configuration,
        images: Mapping[str, Sequence[Batch]],
        teacher_samples: TeacherSamples,
        task_weights: Mapping[str, float] | None,
        ridge: float,
        reports_errors: bool,
    ):
        self.models, self.teachers, self.images = models, teachers, images
        self.task_weights, self.ridge, self.reports_errors = task_weights, ridge, reports_errors
        self.samples = teacher_samples
        reasons = {group: why_unfit(models, group) or self.why_without_rows(group) for group in groups}
        self.fits = {group: Fit(reason) for group, reason in reasons.items() if reason}
        self.to_fit = [group for group in groups if group not in self.fits]
        self.group_of = {(o.task, o.layer): group for group in self.to_fit for o in group.occurrences}
        self.tasks = list(dict.fromkeys(task for group in groups for task in group.tasks))
        self.norms = [Norm(*key) for key in self.samples.norms if key[0] in self.tasks]
        self.failed: Exception | None = None  # memory that ran out in a forward pass, while other ranks wait
        self.moments: dict[Norm, dict[int, ChannelMoments]] = {norm: {} for norm in self.norms}
        self.settled: set[Norm] = set()
        self.rows: dict[tuple[str, str], _RowsOfLayer] = {}
        self.sums: dict[tuple[str, str], Moments] = {}
        self.of_teachers: dict[tuple[str, str, int], Tensor] = {}  # inputs of a batch that are yet to be used

    def why_without_rows(self, group: Group) -> str:
        """Why there are no rows of the group in some forward pass; empty if there are."""
        for o in group.occurrences:
            if not self.samples.summary(o).is_always_called:
                return f"{o.task}: {o.layer} is never called as a module"
        return ""

    def run(self) -> dict[Group, Fit]:
        with contextlib.ExitStack() as stack:
            for task in ranks.mine(self.tasks):
                model = self.models[task]
                layers = [layer for name, layer in self.group_of if name == task]
                norms = [norm.name for norm in self.norms if norm.task == task]
                stack.enter_context(averaged_statistics(model, keep=[model.get_submodule(name) for name in norms]))
                stack.enter_context(hooked(model, layers, self.wait_for_fit, before=True))
                stack.enter_context(hooked(model, norms, self.wait_for_statistics, before=True))
            self.passes = [(task, i) for task in self.tasks for i in range(self.samples.num_batches[task])]
            own = [pass_id for pass_id in self.passes if ranks.is_mine(pass_id[0])]
            programs = {pass_id: functools.partial(self.forward, pass_id) for pass_id in own}
            everywhere = self.everywhere if ranks.size() > 1 else None
            self.late = {} if everywhere else self.foreseen_late()
            run_coroutines(programs, self.members(), self.meet, self.starts(own), everywhere)
        missed = {group: Fit("no forward pass of the tied models came to it") for group in self.to_fit}
        return {**missed, **self.fits}

    def foreseen_late(self) -> dict[str, list[str]]:
        """Task -> its layers whose groups will be fitted before it comes to them, in the order of these fits.

        As if all batches of a task were one that waits for its groups in the order of its layers; where that is not
        so, the teacher only runs more often.
        """
        waiting = self.samples.waiting
        left = {task: [name for name in waiting[task] if (task, name) in self.group_of] for task in self.tasks}
        found: dict[str, list[str]] = {task: [] for task in self.tasks}
        while keys := {task: self.group_of[task, names[0]] for task, names in left.items() if names}:
            present: dict[Group, list[str]] = {}
            for task, group in keys.items():
                present.setdefault(group, []).extend([task] * self.samples.num_batches[task])
            members = {group: [t for t in group.tasks for _ in range(self.samples.num_batches[t])] for group in present}
            group = next(iter(most_complete(present, members)))
            for task, name in group.occurrences:
                if task not in present[group]:
                    found[task].append(name)
                left[task].remove(name)
        return found

    def members(self) -> dict[Group | Norm, list[PassId]]:
        """The forward passes that wait for each group, and for the statistics of each normalisation."""
        waiting = self.samples.waiting
        members: dict[Group | Norm, list[PassId]] = {
            norm: [(norm.task, i) for i in range(waiting[norm.task][norm.name])] for norm in self.norms
        }
        for group in self.to_fit:
            counts = {o.task: self.samples.summary(o).num_batches for o in group.occurrences}
            members[group] = [(task, i) for task, count in counts.items() for i in range(count)]
        return members

    def everywhere(
        self, waiting: dict[Group | Norm, list[PassId]], num_late: int
    ) -> tuple[dict[Group | Norm, list[PassId]], int]:
        """Who waits for what on all ranks, in the order of the passes, and how many are yet to begin."""
        keys: list[Group | Norm] = [*self.norms, *self.to_fit]
        index = {key: i for i, key in enumerate(keys)}
        own = [[*pass_id, index[key]] for key, names in waiting.items() for pass_id in names]
        parts = ranks.gathered([own, num_late, self.failed is not None])
        if any(has_failed for _, _, has_failed in parts):
            raise torch.OutOfMemoryError("a rank is out of memory") from self.failed
        waits_for = {(task, number): keys[i] for own, _, _ in parts for task, number, i in own}
        found: dict[Group | Norm, list[PassId]] = {}
        for pass_id in self.passes:
            if pass_id in waits_for:
                found.setdefault(waits_for[pass_id], []).append(pass_id)
        return found, sum(late for _, late, _ in parts)

    def starts(self, passes: Sequence[PassId]) -> dict[PassId, Group | Norm]:
        """The forward passes that do not start at once -> the last place in whose layers they do not wait."""
        found: dict[PassId, Group | Norm] = {}
        for task, number in passes:
            for name, count in self.samples.waiting[task].items():  # from the input on; the last one stays
                if count <= number and (task, name) in self.group_of:
                    found[task, number] = self.group_of[task, name]
                elif count <= number and Norm(task, name) in self.moments:
                    found[task, number] = Norm(task, name)
        return found

    def meet(self, key: Group | Norm, present: list[PassId]) -> None:
        """Fits a group, or sets the statistics of a normalisation, for which these passes wait."""
        if isinstance(key, Norm):
            if ranks.is_mine(key.task):
                self.settle(key)
        else:
            self.fit(key)

    def forward(self, pass_id: PassId) -> None:
        task, number = pass_id
        model = self.models[task]
        try:
            model(to_device(self.images[task][number], device_of(model)))
        except (RuntimeError, MemoryError) as error:
            if ranks.size() == 1 or not is_out_of_memory(error):
                raise
            self.failed = error

    def wait_for_fit(self, name: str, layer: LinearMap, inputs: tuple) -> None:
        """Hook before a layer: keeps the rows of its inputs, and waits until the layer's group is fitted."""
        task, number = current()
        group = self.group_of[task, name]
        if group in self.fits:
            return
        samples = self.samples[task, name]
        if number < samples.num_batches and number not in samples.inputs and (task, name) not in self.sums:
            sample, later = samples.calls[number][0], samples.later_inputs.get(number)
            if sample.input_shape == inputs[0].shape:
                rows = [input_rows(layer, inputs[0], sample.output_shape, sample.picked)]
                self.keep(group, task, name, number, rows if later is None else [*rows, later.load()])
        wait(group)

    def wait_for_statistics(self, name: str, layer: nn.Module, inputs: tuple) -> None:
        """Hook before batch normalisation: notes the moments of its inputs, and waits until its statistics are set."""
        task, number = current()
        norm = Norm(task, name)
        if norm not in self.settled:
            self.moments[norm][number] = channel_moments(inputs[0])
            wait(norm)

    def settle(self, norm: Norm) -> None:
        """Sets the statistics by the moments of its inputs here and in the unmerged model."""
        of_teacher, of_model = self.samples.norms[norm], self.moments.pop(norm)
        numbers = [number for number in of_model if number in of_teacher]
        if numbers:
            model, teacher = (
                cast(_BatchNorm, models[norm.task].get_submodule(norm.name)) for models in (self.models, self.teachers)
            )
            own = pooled_moments([of_model[number] for number in numbers])
            set_statistics(model, own, teacher, pooled_moments([of_teacher[number].load() for number in numbers]))
        self.settled.add(norm)

    def keep(self, group: Group, task: str, name: str, number: int, rows: Sequence[Tensor]) -> None:
        """Keeps the rows of one batch; the last ones of a layer are replaced by the sums that a fit needs."""
        samples = self.samples[task, name]
        kept = self.rows.setdefault((task, name), _RowsOfLayer(samples))
        kept.put(number, rows)
        if len(kept.seen) == samples.num_batches - len(samples.inputs):
            self.sum_up(group, task, name)

    def sum_up(self, group: Group, task: str, name: str) -> None:
        samples = self.samples[task, name]
        kept = self.rows.pop((task, name), None) or _RowsOfLayer(samples)
        for number in range(samples.num_batches):
            if number not in kept.seen:
                kept.put(number, [self.inputs_of_teacher(task, name, number)])
        assert kept.x is not None
        metric = None if samples.metric is None else samples.metric.load()
        self.sums[task, name] = sums_of(self.models, group, Rows(kept.x, samples.outputs()), metric)

    def fit(self, group: Group) -> None:
        """Fits a group; rows of passes that have not come to it are those of their teachers' inputs.

        A group whose tasks all belong to one rank is fitted there alone.
        """
        own = [o for o in group.occurrences if ranks.is_mine(o.task)]
        with ranks.sharing_memory_errors() if self.is_of_several_ranks(group) else contextlib.nullcontext():
            for o in own:
                if o not in self.sums:
                    self.sum_up(group, o.task, o.layer)
        num_images = sum(self.samples.summary(o).num_images for o in group.occurrences)
        sums = {(o.task, o.layer): self.sums.pop(o) for o in own}
        if self.is_of_several_ranks(group):
            sums = self.of_all_ranks(group, sums)
        if not own:
            self.fits[group] = Fit("its tasks belong to other ranks")
            return
        how = (self.task_weights, self.ridge, num_images, self.reports_errors)
        self.fits[group] = fit_group(self.models, group, sums, *how)

    def is_of_several_ranks(self, group: Group) -> bool:
        return len({ranks.owner_of(task) for task in group.tasks}) > 1

    def of_all_ranks(self, group: Group, own: Mapping[tuple[str, str], Moments]) -> dict[tuple[str, str], Moments]:
        """The sums over the rows of every occurrence of the group."""
        tensors = {f"{o[0]}/{key}": tensor for o, sums in own.items() for key, tensor in sums.tensors().items()}
        found: dict[str, dict[str, Tensor]] = {}
        device = device_of(self.models[group.occurrences[0].task])
        for name, tensor in ranks.united_tensors(tensors, device).items():
            task, _, key = name.partition("/")
            found.setdefault(task, {})[key] = tensor
        return {(o.task, o.layer): Moments.of_tensors(found[o.task]) for o in group.occurrences}

    def inputs_of_teacher(self, task: str, name: str, number: int) -> Tensor:
        samples = self.samples[task, name]
        if number in samples.inputs:
            return samples.inputs[number].load()
        if (task, name, number) not in self.of_teachers:
            calls = {other: self.samples[task, other].calls[number] for other in self.also_late(task, name, number)}
            found = sample_inputs(self.teachers[task], calls, self.images[task][number], ends_early=True)
            self.of_teachers |= {(task, other, number): rows for other, rows in found.items()}
        return self.of_teachers.pop((task, name, number))

    def also_late(self, task: str, name: str, number: int) -> list[str]:
        """The layer, and those of the task that will be fitted on its teacher's inputs as well: one pass gives the
        inputs of all, those of later fits as long as they take at most MAX_LATE_BYTES."""
        names, taken = [name], 0
        late = self.late.get(task, [])
        for other in late[late.index(name) + 1 :] if name in late else ():
            samples, layer = self.samples[task, other], linear_map_at(self.models[task], other)
            groups, inputs, _ = shape_of(layer)
            rows = sum(len(call.positions) for calls in samples.calls for call in calls)
            taken += groups * rows * inputs * row_itemsize(layer)
            if taken > MAX_LATE_BYTES:
                break
            if number < samples.num_batches and number not in samples.inputs:
                names.append(other)
        return names


class _RowsOfLayer:
    """The inputs x [groups, n, d] of one layer of one task, in one tensor that its batches fill."""

    def __init__(self, samples: LayerSamples):
        counts = [sum(len(call.positions) for call in calls) for calls in samples.calls]
        self.ends = list(itertools.accumulate(counts))
        self.seen: set[int] = set()
        self.x: Tensor | None = None

    def put(self, number: int, parts: Sequence[Tensor]) -> None:
        end = self.ends[number]
        begin = end - sum(part.shape[1] for part in parts)
        assert begin == (self.ends[number - 1] if number else 0), "as many rows as positions were sampled"
        if self.x is None:
            groups, _, inputs = parts[0].shape
            self.x = parts[0].new_empty(groups, self.ends[-1], inputs)
        torch.cat(list(parts), 1, out=self.x[:, begin:end])
        self.seen.add(number)
