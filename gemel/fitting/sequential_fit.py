"""Least squares for tied layers, each on the inputs it has behind all layers before it, in one pass over the images.

The forward passes of all tasks advance together (sharing/lockstep.py). They wait for each other at every tied layer
until its weights are found, and go on with these, so no layer is fitted on inputs that a later fit changes.
"""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from gemel.fitting.batch_norm import averaged_statistics
from gemel.fitting.coroutines import run_coroutines
from gemel.fitting.least_squares import RIDGE, Fit, fit_group, quotas, why_unfit
from gemel.fitting.rows import (
    Rows,
    Samples,
    input_rows,
    is_linear_map,
    of_regions,
    sample_inputs,
    sample_outputs,
    shape_of,
)
from gemel.forward.batches import Batch
from gemel.sharing.groups import Configuration, Group

Party = tuple[str, int]  # task, number of the batch


class TeacherSamples(NamedTuple):
    """What the teachers put out on some images; the same for every fit of the same groups on them."""

    samples: dict[Party, Samples]
    x: dict[tuple[Party, str], torch.Tensor]  # inputs of layers for which those of the tied model will not do
    further: dict[tuple[Party, str], torch.Tensor]  # inputs of all calls but the first


@torch.no_grad()
def fit_sequentially(
    models: nn.ModuleDict,
    teachers: Mapping[str, nn.Module],
    groups: Configuration,
    images: Mapping[str, Sequence[Batch]],
    *,
    asked: TeacherSamples,
    task_weights: Mapping[str, float] | None = None,
    ridge: float = RIDGE,
) -> dict[Group, Fit]:
    """As `fit_least_squares`, with as many stages as there are layers, in one forward pass of each
    model. asked: of `sample_teachers`, for these groups and images. Batch normalisation statistics are re-estimated on the
    way: each layer's behind the fits before it.

    All batches of all tasks are in flight at once: memory is that of the activations at one layer (without gradients)
    for all images. A layer that is called several times in a pass (heads over pyramid levels) is fitted at its first
    call, on the inputs of that call and on those that the further calls have in the teacher. A layer on regions is
    fitted on its inputs in the teacher; so is the part of a task that comes to a layer later than the tasks that wait
    for it there (models may have tied layers in different orders).
    Source: Nguyen et al., "RegMean++", 2025 (inputs of the merged model, layer by layer); targets as in PLeaS.
    """
    return _Pass(models, teachers, groups, images, asked, task_weights, ridge).run()


@torch.no_grad()
def sample_teachers(
    teachers: Mapping[str, nn.Module],
    groups: Configuration,
    images: Mapping[str, Sequence[Batch]],
    *,
    generator: torch.Generator,
    positions: int = 2048,
) -> TeacherSamples:
    """Draws rows of the groups' layers and records what the teachers put out there, in one forward pass of each.

    positions: rows per layer and task.
    """
    asked = TeacherSamples({}, {}, {})
    able = [group for group in groups if _is_able(teachers, group)]
    for task in dict.fromkeys(task for group in groups for task in group.tasks):
        layers, total = quotas(teachers, able, task, positions), sum(map(len, images[task]))
        for i, batch in enumerate(images[task]):
            shares = {name: -(-quota * len(batch) // total) for name, quota in layers.items()}
            samples = asked.samples[task, i] = sample_outputs(teachers[task], shares, batch, generator)
            regions = {name: calls for name, calls in samples.items() if of_regions(calls, batch)}
            further = {name: calls for name, calls in samples.items() if len(calls) > 1 and name not in regions}
            inputs = sample_inputs(teachers[task], regions | further, batch) if regions or further else {}
            for name, rows in inputs.items():
                if name in regions:
                    asked.x[(task, i), name] = rows
                else:
                    asked.further[(task, i), name] = rows[:, len(further[name][0].picked) :]
    return asked


def is_short_of_rows(
    teachers: Mapping[str, nn.Module], groups: Configuration, asked: TeacherSamples, positions: int = 2048
) -> bool:
    """Whether some layer has fewer rows than half its inputs, and more images would give it more."""
    for task in dict.fromkeys(task for task, _ in asked.samples):
        of_task = [samples for (name, _), samples in asked.samples.items() if name == task]
        for layer, quota in quotas(teachers, [g for g in groups if _is_able(teachers, g)], task, positions).items():
            rows = sum(len(sample.picked) for samples in of_task for sample in samples.get(layer, ()))
            if 0 < rows < min(quota, shape_of(teachers[task].get_submodule(layer))[1] / 2):
                return True
    return False


def _is_able(teachers: Mapping[str, nn.Module], group: Group) -> bool:
    return is_linear_map(teachers[group.occurrences[0].task].get_submodule(group.occurrences[0].layer))


class _Pass:
    """One pass: what the teachers put out, the rows that wait to be fitted, and the fits so far."""

    def __init__(self, models, teachers, groups, images, asked, task_weights, ridge):
        self.models, self.teachers, self.task_weights, self.ridge = models, teachers, task_weights, ridge
        self.fits: dict[Group, Fit] = {group: Fit(reason) for group in groups if (reason := why_unfit(models, group))}
        self.open = [group for group in groups if group not in self.fits]
        tasks = list(dict.fromkeys(task for group in groups for task in group.tasks))
        self.batches: dict[Party, Batch] = {(t, i): batch for t in tasks for i, batch in enumerate(images[t])}
        self.samples = {party: dict(samples) for party, samples in asked.samples.items()}
        self.x = dict(asked.x)  # (party, layer) -> rows that wait to be fitted
        self.further = dict(asked.further)
        self.here = threading.local()  # the party whose forward pass this thread runs
        self.leave_out_unseen()

    def keep_teachers_inputs(self, party: Party, samples: Samples) -> None:
        if samples:
            x = sample_inputs(self.teachers[party[0]], samples, self.batches[party])
            self.x |= {(party, name): rows for name, rows in x.items()}

    def leave_out_unseen(self) -> None:
        for group in self.open:
            for o in group.occurrences:
                if any(task == o.task and o.layer not in s for (task, _), s in self.samples.items()):
                    self.fits[group] = Fit(f"{o.task}: {o.layer} is never called as a module")

    def parties(self, group: Group) -> list[Party]:
        return [party for party in self.batches if party[0] in group.tasks]

    def run(self) -> dict[Group, Fit]:
        left = [group for group in self.open if group not in self.fits]
        with contextlib.ExitStack() as stack:
            for task in {task: None for task, _ in self.batches}:
                stack.enter_context(averaged_statistics(self.models[task]))
            for group in left:
                for o in group.occurrences:
                    layer = self.models[o.task].get_submodule(o.layer)
                    stack.callback(layer.register_forward_pre_hook(self.hook(group, o.layer)).remove)
            programs = {party: self.program(party) for party in self.batches}
            run_coroutines(programs, {group: self.parties(group) for group in left}, self.fit)
        missed = {group: Fit("no forward pass of the tied models came to it") for group in left}
        return {**missed, **self.fits}

    def program(self, party: Party):
        def forward(wait) -> None:
            self.here.party, self.here.wait = party, wait
            batch, device = self.batches[party], next(self.models[party[0]].parameters()).device
            self.models[party[0]](batch.to(device) if torch.is_tensor(batch) else [image.to(device) for image in batch])

        return forward

    def hook(self, group: Group, name: str):
        def arrive(layer: nn.Module, inputs: tuple) -> None:
            if group in self.fits:
                return
            party = self.here.party
            sample = self.samples[party][name][0]
            if (party, name) not in self.x and sample.input_shape == inputs[0].shape:
                rows = [input_rows(layer, inputs[0], sample.output_shape, sample.picked)]
                rows += [self.further.pop((party, name))] if (party, name) in self.further else []
                self.x[party, name] = torch.cat(rows, 1)
            self.here.wait(group)

        return arrive

    def fit(self, group: Group, present: list[Party]) -> None:
        """Solves for a group at which these parties wait; the rows of others come from their teachers."""
        rows = {}
        for o in group.occurrences:
            parties = [party for party in self.batches if party[0] == o.task]
            for party in parties:
                if (party, o.layer) not in self.x:
                    self.keep_teachers_inputs(party, {o.layer: self.samples[party][o.layer]})
            x = torch.cat([self.x.pop((party, o.layer)) for party in parties], 1)
            y = torch.cat([s.y for party in parties for s in self.samples[party].pop(o.layer)], 1)
            rows[o.task, o.layer] = Rows(x, y)
        num_images = sum(len(self.batches[party]) for party in self.parties(group))
        self.fits[group] = fit_group(self.models, group, rows, self.task_weights, self.ridge, num_images)
