"""Least squares for tied layers, each on the inputs it has behind all layers before it, in one pass over the images.

The forward passes of all tasks advance together (coroutines.py). At every tied layer they wait for each other until its
weights are fitted, and continue with these, so no layer is fitted on inputs that a later fit changes.
"""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemel.fitting.batch_norm import averaged_statistics
from gemel.fitting.coroutines import current, run_coroutines, wait
from gemel.fitting.least_squares import RIDGE, Fit, fit_group, quotas, why_unfit
from gemel.fitting.rows import (
    Rows,
    Samples,
    input_rows,
    is_linear_map,
    linear_map_at,
    of_regions,
    sample_inputs,
    sample_outputs,
    shape_of,
)
from gemel.forward.batches import Batch, to_device
from gemel.forward.hooks import hooked
from gemel.forward.modes import Models, device_of
from gemel.sharing.adapters import LinearMap
from gemel.sharing.groups import Configuration, Group

PassId = tuple[str, int]  # one forward pass: task, number of its batch


class TeacherSamples(NamedTuple):
    """Sampled outputs of the teachers on some images; the same for every fit of the same groups on these images."""

    samples: dict[PassId, Samples]
    inputs: dict[tuple[PassId, str], Tensor]  # rows of layers on regions, which are fitted on the teacher's inputs
    later_inputs: dict[tuple[PassId, str], Tensor]  # rows of all calls of a layer but the first


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
) -> dict[Group, Fit]:
    """As `fit_least_squares` with a stage for every layer, but in one forward pass of each model and batch.

    teacher_samples: what `sample_teachers` returned for these groups and images. Statistics of batch normalisation are
    re-estimated in the same pass, those of each layer behind the fits before it.

    All batches of all tasks are in flight at once: memory is that of the activations at one layer (without gradients)
    for all images. A layer that is called several times in a pass (heads over pyramid levels) is fitted at its first
    call, on the inputs of that call and on those that the later calls have in the teacher. A layer on regions is
    fitted on its inputs in the teacher; so are the rows of a task that comes to a layer later than the tasks that wait
    for it there (models may have tied layers in different orders).
    Source: Nguyen et al., "RegMean++", 2025 (inputs of the merged model, layer by layer); targets as in PLeaS.
    """
    return _SequentialFit(models, teachers, groups, images, teacher_samples, task_weights, ridge).run()


@torch.no_grad()
def sample_teachers(
    teachers: Models,
    groups: Configuration,
    images: Mapping[str, Sequence[Batch]],
    *,
    generator: torch.Generator,
    positions: int = 2048,
) -> TeacherSamples:
    """Draws rows of the groups' layers and records the teachers' outputs there, in one forward pass of each.

    positions: rows per layer and task.
    """
    found = TeacherSamples({}, {}, {})
    linear = [group for group in groups if _is_linear(teachers, group)]
    for task in dict.fromkeys(task for group in groups for task in group.tasks):
        layers, total = quotas(teachers, linear, task, positions), sum(map(len, images[task]))
        for i, batch in enumerate(images[task]):
            shares = {name: -(-quota * len(batch) // total) for name, quota in layers.items()}
            samples = found.samples[task, i] = sample_outputs(teachers[task], shares, batch, generator)
            regions = {name: calls for name, calls in samples.items() if of_regions(calls, batch)}
            repeated = {name: calls for name, calls in samples.items() if len(calls) > 1 and name not in regions}
            inputs = sample_inputs(teachers[task], regions | repeated, batch) if regions or repeated else {}
            for name, rows in inputs.items():
                if name in regions:
                    found.inputs[(task, i), name] = rows
                else:
                    found.later_inputs[(task, i), name] = rows[:, len(repeated[name][0].picked) :]
    return found


def is_short_of_rows(
    teachers: Models, groups: Configuration, teacher_samples: TeacherSamples, positions: int = 2048
) -> bool:
    """Whether some layer has fewer rows than half its inputs, and more images would give it more."""
    linear = [group for group in groups if _is_linear(teachers, group)]
    for task in dict.fromkeys(task for task, _ in teacher_samples.samples):
        of_task = [samples for (name, _), samples in teacher_samples.samples.items() if name == task]
        for layer, quota in quotas(teachers, linear, task, positions).items():
            rows = sum(len(sample.picked) for samples in of_task for sample in samples.get(layer, ()))
            if 0 < rows < min(quota, shape_of(linear_map_at(teachers[task], layer))[1] / 2):
                return True
    return False


def _is_linear(teachers: Models, group: Group) -> bool:
    return is_linear_map(teachers[group.occurrences[0].task].get_submodule(group.occurrences[0].layer))


class _SequentialFit:
    """One fit: the teachers' samples, the rows that are not used yet, and the groups that are fitted."""

    def __init__(
        self,
        models: Models,
        teachers: Models,
        groups: Configuration,
        images: Mapping[str, Sequence[Batch]],
        teacher_samples: TeacherSamples,
        task_weights: Mapping[str, float] | None,
        ridge: float,
    ):
        self.models, self.teachers, self.task_weights, self.ridge = models, teachers, task_weights, ridge
        tasks = dict.fromkeys(task for group in groups for task in group.tasks)
        self.batches: dict[PassId, Batch] = {(t, i): batch for t in tasks for i, batch in enumerate(images[t])}
        self.samples = {pass_id: dict(samples) for pass_id, samples in teacher_samples.samples.items()}
        self.inputs = dict(teacher_samples.inputs)
        self.later_inputs = dict(teacher_samples.later_inputs)
        reasons = {group: why_unfit(models, group) or self.why_without_rows(group) for group in groups}
        self.fits = {group: Fit(reason) for group, reason in reasons.items() if reason}
        self.to_fit = [group for group in groups if group not in self.fits]
        self.group_of = {(o.task, o.layer): group for group in self.to_fit for o in group.occurrences}

    def why_without_rows(self, group: Group) -> str:
        """Why there are no rows of the group in some forward pass; empty if there are."""
        for o in group.occurrences:
            if any(task == o.task and o.layer not in samples for (task, _), samples in self.samples.items()):
                return f"{o.task}: {o.layer} is never called as a module"
        return ""

    def run(self) -> dict[Group, Fit]:
        with contextlib.ExitStack() as stack:
            for task in dict.fromkeys(task for task, _ in self.batches):
                layers = [layer for name, layer in self.group_of if name == task]
                stack.enter_context(averaged_statistics(self.models[task]))
                stack.enter_context(hooked(self.models[task], layers, self.wait_for_fit, before=True))
            programs = {pass_id: functools.partial(self.forward, pass_id) for pass_id in self.batches}
            run_coroutines(programs, {group: self.passes_of(group.tasks) for group in self.to_fit}, self.fit)
        missed = {group: Fit("no forward pass of the tied models came to it") for group in self.to_fit}
        return {**missed, **self.fits}

    def passes_of(self, tasks: Sequence[str]) -> list[PassId]:
        return [pass_id for pass_id in self.batches if pass_id[0] in tasks]

    def forward(self, pass_id: PassId) -> None:
        model = self.models[pass_id[0]]
        model(to_device(self.batches[pass_id], device_of(model)))

    def wait_for_fit(self, name: str, layer: LinearMap, inputs: tuple) -> None:
        """Hook before a layer: keeps the rows of its inputs, and waits until the layer's group is fitted."""
        pass_id: PassId = current()
        group = self.group_of[pass_id[0], name]
        if group in self.fits:
            return
        sample = self.samples[pass_id][name][0]
        if (pass_id, name) not in self.inputs and sample.input_shape == inputs[0].shape:
            rows = [input_rows(layer, inputs[0], sample.output_shape, sample.picked)]
            rows += [self.later_inputs.pop((pass_id, name))] if (pass_id, name) in self.later_inputs else []
            self.inputs[pass_id, name] = torch.cat(rows, 1)
        wait(group)

    def fit(self, group: Group, present: list[PassId]) -> None:
        """Fits a group for which these passes wait; rows of the other passes are those of their teachers' inputs."""
        rows = {}
        for o in group.occurrences:
            passes = self.passes_of([o.task])
            for pass_id in passes:
                if (pass_id, o.layer) not in self.inputs:
                    samples = {o.layer: self.samples[pass_id][o.layer]}
                    found = sample_inputs(self.teachers[o.task], samples, self.batches[pass_id])
                    self.inputs[pass_id, o.layer] = found[o.layer]
            x = torch.cat([self.inputs.pop((pass_id, o.layer)) for pass_id in passes], 1)
            y = torch.cat([sample.y for pass_id in passes for sample in self.samples[pass_id].pop(o.layer)], 1)
            rows[o.task, o.layer] = Rows(x, y)
        num_images = sum(len(self.batches[pass_id]) for pass_id in self.passes_of(group.tasks))
        self.fits[group] = fit_group(self.models, group, rows, self.task_weights, self.ridge, num_images)
